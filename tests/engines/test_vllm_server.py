"""``steered-moe serve --engine vllm``: requests over HTTP, each with a strength of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make engines runs these")

import openai
import torch
from transformers import AutoTokenizer

from steered_moe import SteeredMoEForCausalLM
from steered_moe.embedded import embedded_model
from steered_moe.encoding import encode

REPO = Path(embedded_model()).parent / "methods"
QUESTION = "Tom tiene 42 sellos. Tom encuentra 6 sellos más. ¿Cuántos sellos tiene Tom ahora?"


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    given = ["--port", str(port), "--dtype", "float32", "--max-model-len", "256",
             "--max-num-seqs", "8", "--enforce-eager"]  # fmt: skip
    script = "from steered_moe.cli import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "serve", str(REPO), "--engine", "vllm", *given],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    made = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
    try:
        for _ in range(240):
            assert process.poll() is None, "the server has ended"
            try:
                made.models.list()
            except openai.APIConnectionError:
                time.sleep(0.5)
            else:
                break
        yield made
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)
    finally:
        process.kill()


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
        assert mine == pytest.approx(expected(strengths), abs=1e-3)
    assert len({tuple(one) for one in found}) == 4


def test_a_request_for_something_unknown_is_a_bad_one(client: openai.OpenAI) -> None:
    for asked, told in (
        ("{}", "is empty"),
        ('{"name": "x"}', "there is task-soft, shared, task-hard"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            ask(client, asked)
    assert ask(client, 0.0)
