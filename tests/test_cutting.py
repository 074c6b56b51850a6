"""Texts end before a stop text, in whatever pieces they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from steered_moe.cutting import Cut, cut_events

TEXTS = st.text("ab=", max_size=30)
STOPS = st.lists(st.text("ab=", min_size=1, max_size=4), min_size=1, max_size=3)


def expected(text: str, stops: list[str]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


@given(TEXTS, STOPS, st.lists(st.integers(0, 30), max_size=6))
def test_pieces_are_cut_as_the_whole_text_is(text: str, stops: list[str], cuts: list[int]) -> None:
    """Where one stop text begins inside another, the one that is whole first ends the text."""
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    cut = Cut(stops)
    said = "".join(cut.feed(text[i:j]) for i, j in pairwise(edges)) + cut.rest()
    whole = expected(text, stops)
    assert cut.ended == (whole != text or any(stop in text for stop in stops))
    assert said == whole or (
        said.startswith(whole) and any(len(a) != len(b) for a in stops for b in stops)
    )


def test_what_may_begin_a_stop_text_is_held() -> None:
    cut = Cut(["<end>"])
    assert [cut.feed(piece) for piece in ("a<", "en", "x<e")] == ["a", "", "<enx"]
    assert cut.rest() == "<e"
    assert not cut.ended
    assert Cut(["", "b"]).feed("ab") == "a"  # an empty text ends nothing


def event(text: str, reason: str | None = None) -> str:
    choice = {"delta": {"content": text}, "finish_reason": reason}
    return f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n"


def run(events: list[str], stops: list[str]) -> tuple[list[tuple[str, str | None]], bool]:
    """What is left of the events, and whether their source was closed before its end."""
    closed = []

    async def source() -> AsyncIterator[str]:
        try:
            for one in events:
                yield one
        except GeneratorExit:
            closed.append(True)
            raise

    async def collect() -> list[str]:
        return [one async for one in cut_events(source(), stops)]

    found = [json.loads(one.removeprefix("data: ")) for one in asyncio.run(collect())]
    told = [(one["choices"][0]["delta"].get("content"), one["choices"][0]["finish_reason"])
            for one in found]  # fmt: skip
    return told, bool(closed)


def test_a_stream_ends_at_a_stop_text_and_its_source_is_closed() -> None:
    events = [event("1") + event("2+"), event("3=5"), event("6"), event("", "length")]
    assert run(events, ["=5"]) == ([("1", None), ("2+", None), ("3", None), ("", "stop")], True)
    told, closed = run(events, ["=7"])
    assert ("".join(text for text, _ in told), told[-1][1], closed) == ("12+3=56", "length", False)
    held = [event("3="), event("", "length")]
    assert run(held, ["=5"]) == ([("3", None), ("=", None), ("", "length")], False)
