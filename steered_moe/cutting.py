"""Answers of the transformers server end before a stop text, as those of OpenAI do.

That server ends generation with the stop text in its answer, or, in continuous batching, not at
all. Here answers are cut on their way out, in one piece or streamed.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

_EVENT = "data: "
_END = "\n\n"


class Cut:
    """A text that arrives in pieces, up to the first stop text.

    Args:
        stops: Texts that end it.

    Attributes:
        ended: A stop text was seen.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.ended = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """What is sure to stand before any stop text; the rest is held until more is known."""
        if self.ended:
            return ""
        text = self._held + piece
        places = [place for place in map(text.find, self.stops) if place >= 0]
        if places:
            self.ended, self._held = True, ""
            return text[: min(places)]
        sure = len(text) - max((_begun(text, stop) for stop in self.stops), default=0)
        self._held = text[sure:]
        return text[:sure]

    def rest(self) -> str:
        """What was held when the text ended."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` a stop text may begin with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def answered(original: Callable[..., Any]) -> Callable[..., Any]:
    """``handle_request`` of a handler whose answers end before the stop texts of the request."""

    async def handle(self: Any, body: Mapping[str, Any], request_id: str) -> Any:
        response = await original(self, body, request_id)
        asked = body.get("stop") or []
        stops = [asked] if isinstance(asked, str) else list(asked)
        return response if not any(stops) else _cut_response(response, stops)

    return handle


def _cut_response(response: Any, stops: Sequence[str]) -> Any:
    if hasattr(response, "body_iterator"):
        response.body_iterator = cut_events(response.body_iterator, stops)
        return response
    answer = json.loads(response.body)
    for choice in answer.get("choices", ()):
        cut = Cut(stops)
        holder, name = _text(choice)
        if isinstance(holder.get(name), str):
            holder[name] = cut.feed(holder[name]) + cut.rest()
        if cut.ended:
            choice["finish_reason"] = "stop"
    return type(response)(answer, response.status_code)


async def cut_events(events: Any, stops: Sequence[str]) -> AsyncIterator[str]:
    """Server-sent events of one answer, up to a stop text; what is behind is not generated.

    Args:
        events: Strings of one or more whole events; closed at a stop text.
        stops: Texts that end the answer.
    """
    cut = Cut(stops)
    async with aclosing(events):
        async for part in events:
            for event in filter(None, part.split(_END)):
                for made in _cut_event(event, cut):
                    yield made
                if cut.ended:
                    return


def _cut_event(event: str, cut: Cut) -> Iterator[str]:
    """One event as it is, with less text, or two: what was held, and the end of the answer."""
    data = json.loads(event.removeprefix(_EVENT)) if event.startswith(_EVENT + "{") else {}
    if not data.get("choices"):
        yield event + _END
        return
    choice = data["choices"][0]
    holder, name = _text(choice)
    if choice.get("finish_reason") is not None:
        held = cut.rest()
        if held:
            yield _written(data, held, None)
        yield event + _END
        return
    if not isinstance(holder.get(name), str):
        yield event + _END
        return
    text = cut.feed(holder[name])
    if text or cut.ended:
        yield _written(data, text, None)
    if cut.ended:
        yield _written(data, "", "stop")


def _written(like: Mapping[str, Any], text: str, reason: str | None) -> str:
    """An event with another text and end."""
    data = json.loads(json.dumps({key: value for key, value in like.items() if key != "usage"}))
    choice = data["choices"][0]
    holder, name = _text(choice)
    holder[name], choice["finish_reason"] = text, reason
    return f"{_EVENT}{json.dumps(data)}{_END}"


def _text(choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Where the text of a choice is: in a message, in a part of one, or in the choice itself."""
    for name in ("message", "delta"):
        if name in choice:
            return choice[name], "content"
    return choice, "text"
