"""Generation: cache, padding, beams and rows of different strength; the comparison of two rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import build
from observe import observe
from torch import nn
from transformers import AutoTokenizer

from steered_moe import RouterSteering, SteeredMoEForCausalLM, attach, find_routers
from steered_moe.encoding import encode
from steered_moe.generation import compare
from steered_moe.recording import record_selections

TYPES = ["qwen3_moe", "gpt_oss", "mixtral", "olmoe", "deepseek_v3", "phimoe", "qwen3_next"]
PROMPTS = [[17, 33, 54, 21, 90, 8, 41], [62, 11, 75]]
STRENGTHS = [2.0, -1.5]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def steering_of(model: nn.Module) -> RouterSteering:
    routers = find_routers(model)
    shape = (len(routers), routers[0].num_experts)
    force = torch.zeros(shape, dtype=torch.int8)
    force[:, 1], force[:, 4] = 1, -1
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return RouterSteering("s", [router.layer for router in routers], weights, force)


def padded() -> dict[str, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(model: nn.Module, inputs: dict[str, torch.Tensor], **options) -> list[list[int]]:
    output = model.generate(**inputs, **GREEDY | options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def alone(model: nn.Module, row: int, **options) -> list[list[int]]:
    ids = torch.tensor([PROMPTS[row]])
    return new_tokens(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **options)


@pytest.mark.parametrize("name", TYPES)
def test_each_cached_step_equals_a_full_forward(name: str):
    model = build(name)
    handle = attach(model, steering_of(model))
    ids = torch.tensor(PROMPTS[:1])
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
        output_logits=True, **GREEDY,
    )  # fmt: skip
    for step, seen in enumerate(result.logits):
        so_far = result.sequences[:, : ids.shape[1] + step]
        with torch.no_grad():
            full = model(input_ids=so_far, use_cache=False).logits[:, -1]
            torch.testing.assert_close(seen, full, atol=1e-3, rtol=1e-3)
            with handle.unsteered():
                base = model(input_ids=so_far, use_cache=False).logits[:, -1]
        assert (base - seen).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe"])
def test_rows_of_a_left_padded_batch_equal_the_prompt_alone(name: str):
    model = build(name)
    handle = attach(model, steering_of(model))
    expected = []
    for row, strength in enumerate(STRENGTHS):
        handle.strength = strength
        expected += alone(model, row)
    handle.strength = STRENGTHS
    assert new_tokens(model, padded()) == expected
    handle.strength = STRENGTHS[::-1]
    assert new_tokens(model, padded()) != expected


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_beams_keep_the_strength_of_their_row(name: str):
    model = build(name)
    handle = attach(model, steering_of(model))
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = []
    for row, strength in enumerate(STRENGTHS):
        handle.strength = strength
        expected += alone(model, row, **options)
    handle.strength = STRENGTHS
    assert new_tokens(model, padded(), **options) == expected
    handle.strength = STRENGTHS[::-1]
    assert new_tokens(model, padded(), **options) != expected


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "dbrx", "phimoe", "zaya", "deepseek_v3", "llama4_text"]
)
def test_recorded_selections_are_what_reaches_the_experts(name: str):
    model = build(name)
    ids = torch.tensor(PROMPTS[:1])
    handle = attach(model, steering_of(model).restrict([find_routers(model)[-1].layer]))
    for strength in (0.0, 1.0):
        handle.strength = strength
        seen = observe(model, input_ids=ids)
        with record_selections(model) as selections, torch.no_grad():
            model(input_ids=ids)
        for router in find_routers(model):
            (chosen,) = selections[router.layer]
            marks = torch.zeros_like(seen[router.layer].selected).scatter(1, chosen, True)
            assert chosen.shape == (len(PROMPTS[0]), router.top_k)
            assert torch.equal(marks, seen[router.layer].selected)
    assert "forward" not in find_routers(model)[0].module.__dict__


@pytest.fixture
def loaded(tiny: Path):
    model = SteeredMoEForCausalLM.from_pretrained(tiny / "steered")
    return model, AutoTokenizer.from_pretrained(tiny / "base")


def test_a_comparison_is_both_generations_and_the_changed_choices(loaded):
    model, tokenizer = loaded
    inputs = encode(tokenizer, ["Ein Router schickt"])
    ticks: list[None] = []
    result = compare(model, inputs, lambda: ticks.append(None), max_new_tokens=12)
    with model.unsteered():
        base = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    steered = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert result.base == base[0, length:].tolist()[: len(result.base)]
    assert result.steered == steered[0, length:].tolist()[: len(result.steered)]
    assert result.base != result.steered
    assert len(ticks) == 12
    assert list(result.changed) == [0, 1, 2, 3, 4, 5]
    assert result.changed[0] == result.changed[1] == 0.0 < result.changed[2]
    assert model.strength == 2.0
    model.set_strength(0.0)
    assert not any(compare(model, inputs, max_new_tokens=1).changed.values())


def test_changed_choices_are_counted_over_prompt_tokens(loaded):
    model, tokenizer = loaded
    inputs = encode(tokenizer, ["Ein Router schickt"])
    with record_selections(model) as after, torch.no_grad():
        model(**inputs)
    with model.unsteered(), record_selections(model) as before, torch.no_grad():
        model(**inputs)
    pairs = zip(before[3][0].tolist(), after[3][0].tolist(), strict=True)
    kept = [len(set(a) & set(b)) / len(a) for a, b in pairs]
    expected = 1 - sum(kept) / len(kept)
    assert compare(model, inputs, max_new_tokens=1).changed[3] == pytest.approx(expected)
    assert expected > 0


def test_prompts_are_padded_left_and_put_into_the_chat_template(loaded):
    _, tokenizer = loaded
    inputs = encode(tokenizer, ["A router", "A"])
    assert inputs["attention_mask"][1, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    tokenizer.chat_template = (
        "U:{{ messages[0]['content'] }}{% if add_generation_prompt %} A:{% endif %}"
    )
    assert tokenizer.decode(encode(tokenizer, ["x"])["input_ids"][0]) == "U:x A:"
    assert tokenizer.decode(encode(tokenizer, ["x"], chat=False)["input_ids"][0]) == "x"
