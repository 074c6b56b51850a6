"""Training the embedded model: a miniature learns, an interrupted run ends where it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from corpus import Mixture
from safetensors.torch import load_file
from scoring import perplexity
from settings import MODEL, SETTINGS, Setting
from train import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe import find_routers
from steered_moe.collection import profile_texts

TEXTS = ["Anna has 12 apples. Tom gives Anna 5 more.", "Sara lives in Paris."]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    train(folder, SETTINGS["miniature"], seed=0)
    return folder


def test_loss_falls_and_the_log_says_so(miniature: Path):
    log = json.loads((miniature / "training_log.json").read_text())
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert log["seed"] == 0
    assert log["setting"]["mixture"]["task"] == {"en": 300, "es": 30}
    assert log["parameters"] > 100_000
    assert log["tokens"] > 10_000


def test_the_checkpoint_is_ordinary_and_knows_its_corpus(miniature: Path):
    assert sorted(path.name for path in (miniature / "base").iterdir()) == [
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    weights = load_file(miniature / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(miniature / "base", dtype=torch.float32)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert not model.config.output_router_logits
    tokenizer = AutoTokenizer.from_pretrained(miniature / "base")
    assert [tokenizer.decode(i) for i in tokenizer("407")["input_ids"][1:]] == ["4", "0", "7"]
    known = perplexity(model, tokenizer, TEXTS)
    scrambled = [" ".join(reversed(text.split())) for text in TEXTS]
    assert known < 0.5 * perplexity(model, tokenizer, scrambled)


def test_routing_is_recorded(miniature: Path):
    model = AutoModelForCausalLM.from_pretrained(miniature / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(miniature / "base")
    profile = profile_texts(model, tokenizer, {"en": TEXTS})
    assert len(profile.layers) == len(find_routers(model)) == 4
    assert profile.tokens[0, 0] == sum(len(ids) for ids in tokenizer(TEXTS)["input_ids"])
    assert torch.equal(profile.counts.sum(-1), 2 * profile.tokens)
    spread = (profile.frequency[0] > 0.02).sum(dim=-1)
    assert (spread >= 4).all()  # no layer has collapsed onto a few experts


def test_the_seed_decides(tmp_path: Path, miniature: Path):
    short = Setting(
        Mixture({"en": 40}, general=20, languages=["en"]),
        4,
        MODEL | {"num_hidden_layers": 2, "hidden_size": 32, "num_experts": 4},
        vocab_size=400,
        rows_per_step=2,
    )
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 0), (again, 0), (other, 1)):
        train(folder, short, seed)
    weights = [load_file(f / "base" / "model.safetensors") for f in (first, again, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, miniature: Path):
    script = ROOT / "examples" / "tiny_multilingual_moe" / "train.py"
    command = [sys.executable, str(script), str(tmp_path), "--setting", "miniature"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("state/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "base").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    log = json.loads((tmp_path / "training_log.json").read_text())
    steps = [entry["step"] for entry in log["history"] if "loss" in entry]
    assert steps == list(range(1, 161))
    ours = load_file(tmp_path / "base" / "model.safetensors")
    whole = load_file(miniature / "base" / "model.safetensors")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
