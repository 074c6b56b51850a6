"""``steered-moe serve --engine vllm``: requests over HTTP, each with a strength of its own."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make engines runs these")

import httpx
import openai
import torch
from servers import serving
from transformers import AutoTokenizer

from steered_moe import SteeredMoEForCausalLM
from steered_moe.embedded import embedded_model
from steered_moe.encoding import encode

REPO = Path(embedded_model()).parent / "methods"
QUESTION = "Tom tiene 42 sellos. Tom encuentra 6 sellos más. ¿Cuántos sellos tiene Tom ahora?"


KEY = "secret"
CLOSE = 2e-5
"""Of log-probabilities; the model is sure of its answers, so that strengths change little more."""

PATH = "/steered_moe"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[openai.OpenAI, httpx.Client]]:
    """A client of each kind; the server has the route for changes, and a key."""
    with serving(REPO, VLLM_PLUGINS="steered_moe", VLLM_API_KEY=KEY) as (process, address):
        head = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=address, headers=head, timeout=60) as http:
            yield openai.OpenAI(base_url=address, api_key=KEY, max_retries=0), http
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)


@pytest.fixture
def client(server: tuple[openai.OpenAI, httpx.Client]) -> openai.OpenAI:
    return server[0]


def ask(client: openai.OpenAI, asked: Any) -> list[float]:
    """Log-probabilities of an answer's tokens."""
    [model] = client.models.list().data
    done = client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": QUESTION}], max_tokens=6,
        temperature=0, logprobs=True,
        extra_body={} if asked is None else {"vllm_xargs": {"steered_moe": asked}},
    )  # fmt: skip
    return [token.logprob for token in done.choices[0].logprobs.content]


@torch.no_grad()
def expected(strengths: Any) -> list[float]:
    """The same by the transformers wrapper."""
    model = SteeredMoEForCausalLM.from_pretrained(REPO, strength=strengths, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REPO.parent / "base")
    ids = encode(tokenizer, [QUESTION], True)["input_ids"]
    found = []
    for _ in range(6):
        scores = model(ids).logits[0, -1].log_softmax(-1)
        found.append(float(scores.max()))
        ids = torch.cat([ids, scores.argmax().reshape(1, 1)], dim=1)
    return found


def test_each_request_has_its_own_strength(client: openai.OpenAI) -> None:
    hard = {"task-soft": 0.0, "shared": 0.0, "task-hard": 1.0}
    cases = [(None, None), (0.0, 0.0), (4.0, 4.0), (json.dumps({"name": "task-hard"}), hard)]
    found = [ask(client, asked) for asked, _ in cases]
    for mine, (_, strengths) in zip(found, cases, strict=True):
        assert mine == pytest.approx(expected(strengths), abs=CLOSE)
    for i, mine in enumerate(found):  # the twin
        assert all(mine != pytest.approx(other, abs=CLOSE) for other in found[:i])


def test_a_request_for_something_unknown_is_a_bad_one(client: openai.OpenAI) -> None:
    for asked, told in (
        ("{}", "is empty"),
        ('{"name": "x"}', "there is task-soft, shared, task-hard"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            ask(client, asked)
    assert ask(client, 0.0)


def test_beams_are_refused_a_strength_that_they_would_not_have(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    given = {"model": model.id, "prompt": "Tom", "max_tokens": 3, "n": 2}
    more = {"use_beam_search": True, "vllm_xargs": {"steered_moe": 0.5}}
    with pytest.raises(openai.BadRequestError, match="leave steered_moe out"):
        client.completions.create(**given, extra_body=more)
    assert client.completions.create(**given, extra_body={"use_beam_search": True}).choices


def test_the_default_is_changed_over_http(server: tuple[openai.OpenAI, httpx.Client]) -> None:
    client, http = server
    before = ask(client, None)
    [worker] = http.get(PATH).json()["workers"]
    assert worker["strengths"] == pytest.approx({"task-soft": 1, "shared": 0.1, "task-hard": 1})
    one = {"task-soft": 4.0, "shared": 0.0, "task-hard": 0.0}
    for strength, as_asked in ((0.0, 0.0), ({"task-soft": 4.0}, one)):
        done = http.post(PATH, json={"strength": strength})
        assert done.status_code == 200, done.text
        assert ask(client, None) == pytest.approx(expected(as_asked), abs=CLOSE)
        assert http.get(PATH).json()["workers"][0]["strengths"] == done.json()["strengths"]
    assert ask(client, None) != pytest.approx(before, abs=CLOSE)  # the twin
    http.post(PATH, json={"strength": worker["strengths"]}).raise_for_status()
    assert ask(client, None) == pytest.approx(before, abs=CLOSE)


def test_changes_that_make_no_sense_or_have_no_key_are_refused(
    server: tuple[openai.OpenAI, httpx.Client],
) -> None:
    client, http = server
    before = ask(client, None)
    for body, status, told in (
        ({"strength": {"x": 1.0}}, 400, "there is task-soft, shared, task-hard"),
        ({"strength": {}}, 400, "strength is empty"),
        ({"strength": True}, 400, "strength"),
        ({"strength": "much"}, 400, "strength"),
        ({"strenght": 1.0}, 400, "strenght"),
    ):
        done = http.post(PATH, json=body)
        assert (done.status_code, told in done.text) == (status, True), done.text
    bare = httpx.post(f"{http.base_url}{PATH[1:]}", json={"strength": 0.0}, timeout=60)
    assert bare.status_code == 401
    assert ask(client, None) == pytest.approx(before, abs=CLOSE)
