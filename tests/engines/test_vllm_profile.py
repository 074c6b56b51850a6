"""Routing counted inside real vLLM engines: the numbers of `profile_texts`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make engines runs these")

import torch
from checkpoints import FAMILIES, write_base, write_repo
from starting import engine
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe import SteeredMoEForCausalLM
from steered_moe.collection import profile_texts
from steered_moe.embedded import embedded_model
from steered_moe.errors import InterventionError
from steered_moe.profile import RoutingProfile
from steered_moe.vllm_profile import profile_with_vllm

EMBEDDED = Path(embedded_model()).parent / "base"
TEXTS = {
    "en": ["Tom has 2 apples.", "Sara buys 5 stamps and finds 17 more on the way home."],
    "sw": ["Tom ana tufaha 2."],
    "bn": ["টমের কাছে 42টি ডাকটিকিট আছে।", "টমের কাছে 42টি ডাকটিকিট আছে।"],
}


class Bytes:
    """A tokenizer of bytes for the random checkpoints."""

    chat_template = None
    padding_side = "left"
    pad_token_id = 0
    eos_token_id = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        ids = [[3 + byte % 250 for byte in text.encode()] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def check_equal(found: RoutingProfile, expected: RoutingProfile) -> None:
    """Counts are equal; and another language's are not."""
    assert found.languages == expected.languages
    assert found.layers == expected.layers
    assert found.counts.equal(expected.counts)
    assert found.tokens.equal(expected.tokens)
    assert not found.of(["en"]).counts.equal(expected.of(["sw"]).counts)  # the twin


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    base = write_base(family, tmp_path / "base")
    repo = write_repo(base, tmp_path / "repo", force=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = profile_texts(model, Bytes(), TEXTS)
    with engine(base, None, additional_config={"steered_moe": {"profile": True}}) as llm:
        check_equal(profile_with_vllm(llm, TEXTS, tokenizer=Bytes()), plain)
        check_equal(profile_with_vllm(llm, TEXTS, tokenizer=Bytes()), plain)  # again, from 0
    model = SteeredMoEForCausalLM.from_pretrained(repo, dtype=torch.float32)
    steered = profile_texts(model, Bytes(), TEXTS)
    assert not steered.counts.equal(plain.counts)
    config = {"steered_moe": {"profile": True, "repo_id": str(repo)}}
    with engine(base, None, additional_config=config) as llm:
        check_equal(profile_with_vllm(llm, TEXTS, tokenizer=Bytes()), steered)


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": False}, {"tensor_parallel_size": 2}, {"max_num_batched_tokens": 32}],
    ids=["compiled", "two processes", "prefill in chunks"],
)
def test_other_ways_to_run_count_the_same(options: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    given = {"additional_config": {"steered_moe": {"profile": True}}, **options}
    with engine(EMBEDDED, None, skip_tokenizer_init=False, **given) as llm:
        check_equal(profile_with_vllm(llm, TEXTS), profile_texts(model, tokenizer, TEXTS))
        chats = profile_with_vllm(llm, TEXTS, chat=True)
        check_equal(chats, profile_texts(model, tokenizer, TEXTS, chat=True))
        assert chats.about["chat"]


def test_an_engine_that_was_not_asked_to_counts_nothing() -> None:
    with engine(EMBEDDED, None) as llm:
        with pytest.raises(InterventionError, match="the engine counts no routing"):
            profile_with_vllm(llm, TEXTS)
        with pytest.raises(Exception, match="this engine counts no routing"):
            llm.collective_rpc("steered_moe_profile")
