"""The embedded model as it is committed: it loads offline and does what its card says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from corpus import problems, sentences
from grammar import Language, codes
from hub_server import HubServer
from report import card
from safetensors.torch import load_file
from scoring import number_in, right, solved
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from steered_moe import SteeredMoEForCausalLM, embedded
from steered_moe.cli import app
from steered_moe.collection import profile_texts
from steered_moe.divergence import divergence

FOLDER = ROOT / "examples" / "tiny_multilingual_moe"
CHECKED = ("en", "es", "ru", "bn")
PROBLEMS = 250


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "base")


def table(part: str) -> dict:
    return json.loads((FOLDER / f"{part}.json").read_text(encoding="utf-8"))


def test_it_is_an_ordinary_small_checkpoint(model):
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    file = FOLDER / "base" / "model.safetensors"
    assert file.stat().st_size <= 15_000_000
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_the_steered_model_loads_offline(hub: HubServer, model, tokenizer):
    steered = SteeredMoEForCausalLM.from_pretrained(FOLDER / "steered", dtype=torch.float32)
    assert not hub.requests
    inputs = tokenizer("Tom has 12 apples.", return_tensors="pt")
    with torch.no_grad():
        base, changed = model(**inputs).logits, steered(**inputs).logits
        assert not torch.equal(base, changed)
        with steered.unsteered():
            assert torch.equal(base, steered(**inputs).logits)


@pytest.mark.parametrize("code", CHECKED)
def test_accuracy_is_that_of_the_card(model, tokenizer, code: str):
    rows = list(problems("test", PROBLEMS, 2))
    accuracy = right(model, tokenizer, rows, Language(code)).double().mean().item()
    expected = table("quality")["accuracy"][code]
    error = math.sqrt(expected * (1 - expected) / PROBLEMS)
    assert abs(accuracy - expected) < 4 * error + 0.01


def test_the_card_tells_languages_apart():
    """Twin of the test above: another language's number would not pass for most pairs."""
    accuracy = table("quality")["accuracy"]
    assert set(accuracy) == set(codes())
    assert accuracy["en"] >= 0.90
    assert sum(0.4 <= value <= 0.85 for value in accuracy.values()) >= 3
    error = math.sqrt(0.25 / PROBLEMS)
    assert accuracy["en"] - accuracy["bn"] > 4 * error + 0.01


def test_one_pass_and_greedy_decoding_agree(model, tokenizer):
    rows = list(problems("dev", 120, 11))
    once = solved(model, tokenizer, rows, Language("de"))
    greedy = right(model, tokenizer, rows, Language("de"))
    assert (greedy | ~once).all()  # what one pass calls solved is answered right
    assert (once == greedy).double().mean() > 0.9
    assert 0 < once.sum() < len(once)


def test_the_last_number_counts():
    assert number_in("12+5=17, 17*2=34") == 34
    assert number_in("34.") == 34
    assert number_in("none") is None


def test_divergence_is_u_shaped_as_the_card_says(model, tokenizer):
    rows = list(sentences("dev", 40, seed=4))
    texts = {c: [row.text(Language(c)) for row in rows] for c in codes()}
    profile = profile_texts(model, tokenizer, texts, batch_size=40, keep_sequences=True)
    written = table("routing")["divergence"]
    for code, curve in divergence(profile).items():
        assert torch.allclose(curve, torch.tensor(written[code]).double(), atol=0.08)
    assert len(table("routing")["u_shaped"]) >= len(written) / 2


def test_card_and_numbers_agree():
    seeds = sorted(path for path in FOLDER.glob("seeds/*") if path.is_dir())
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == card(FOLDER, seeds)


def test_the_command_line_finds_it():
    question = "Tom has 12 apples. Tom buys 5 more. How many apples does Tom have now?"
    arguments = ["compare", "embedded", question, question, "--max-new-tokens", "8"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert result.output.count("12+5=17") == 4


def test_a_wheel_without_it_says_how_to_get_a_model(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    result = CliRunner().invoke(app, ["inspect", "embedded"], env={"COLUMNS": "100"})
    assert result.exit_code == 1
    assert "name a steering repo" in result.output
