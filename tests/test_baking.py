"""A constant steering in the biases of a plain checkpoint: the same logits without this library."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from architectures import EXPERTS, build, moe_model_types
from conftest import HUB
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from steered_moe import RouterSteering, SteeredMoEForCausalLM, find_routers
from steered_moe.baking import bake, bias_of
from steered_moe.cli import app
from steered_moe.errors import BaseModelError, FormatError, RouterError, SteeringError

IDS = torch.tensor([[5, 9, 31, 77, 120, 8]])


def constant(name: str = "constant", scale: str = "none", size: float = 1.0) -> RouterSteering:
    weights = size * torch.randn(2, EXPERTS, generator=torch.Generator().manual_seed(3))
    return RouterSteering(name, [1, 2], weights, scale=scale)


def repo_of(folder: Path, family: str, *steerings: RouterSteering, **changes) -> Path:
    """A base of several shards and a steering repo for it."""
    build(family, **changes).save_pretrained(folder / "base", max_shard_size="20KB")
    model = SteeredMoEForCausalLM.from_base(folder / "base", list(steerings) or constant())
    model.save_pretrained(folder / "repo")
    return folder / "repo"


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_plain_checkpoint_answers_as_the_steered_model(tmp_path: Path):
    repo = repo_of(tmp_path, "gpt_oss")
    errors = bake(str(repo), tmp_path / "baked", strength=1.5)
    model = SteeredMoEForCausalLM.from_pretrained(repo, strength=1.5, dtype=torch.float32)
    with torch.no_grad():
        steered = model(IDS).logits
    found = logits(tmp_path / "baked")
    torch.testing.assert_close(found, steered, atol=1e-5, rtol=0)
    assert not torch.allclose(found, logits(tmp_path / "base"), atol=1e-2)  # the twin
    assert len(list((tmp_path / "baked").glob("*.safetensors"))) > 2
    base, baked = weights_in(tmp_path / "base"), weights_in(tmp_path / "baked")
    changed = {name for name in base if not torch.equal(base[name], baked[name])}
    assert changed == {f"model.layers.{layer}.mlp.router.bias" for layer in (1, 2)} == set(errors)
    assert base.keys() == baked.keys()
    for file in (tmp_path / "baked").glob("*.safetensors"):  # loaders look for {"format": "pt"}
        with safe_open(file, "pt") as mine, safe_open(tmp_path / "base" / file.name, "pt") as old:
            assert mine.metadata() == old.metadata()
    kept = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert kept == json.loads((tmp_path / "base" / "config.json").read_text())
    assert constant().fingerprint in (tmp_path / "baked" / "README.md").read_text()


def test_only_routers_whose_bias_is_added_to_logits_can_be_baked(caplog: pytest.LogCaptureFixture):
    """Of all families; a bias of the selection alone and a scale per expert do not pass."""
    caplog.set_level(logging.ERROR)
    names = [name for name in moe_model_types() if name != "doge"]
    assert {n for n in names if bias_of(find_routers(build(n))[0]) is not None} == {"gpt_oss"}


def test_several_that_are_constant_add_up_and_each_can_be_chosen(tmp_path: Path):
    repo = repo_of(tmp_path, "gpt_oss", constant("a"), constant("b", size=0.5))
    bake(str(repo), tmp_path / "both")
    bake(str(repo), tmp_path / "b", steering="b")
    name = "model.layers.1.mlp.router.bias"
    base, both, b = (weights_in(tmp_path / x)[name] for x in ("base", "both", "b"))
    delta = constant("b", size=0.5).weights[0]
    torch.testing.assert_close(b - base, delta, atol=1e-6, rtol=0)
    torch.testing.assert_close(both - base, 3 * delta, atol=1e-6, rtol=0)


def test_rounding_is_told_and_a_change_that_is_lost_is_refused(tmp_path: Path):
    repo = repo_of(tmp_path, "gpt_oss", dtype=torch.bfloat16)
    errors = bake(str(repo), tmp_path / "baked")
    baked, base = weights_in(tmp_path / "baked"), weights_in(tmp_path / "base")
    for row, (name, error) in enumerate(sorted(errors.items())):
        exact = base[name].double() + constant().weights[row].double()
        assert error == float((baked[name].double() - exact).abs().max())
        assert 0 < error < 0.02
    with pytest.raises(SteeringError, match="changes nothing in bfloat16; use a larger strength"):
        bake(str(repo), tmp_path / "lost", strength=1e-5)
    repo = repo_of(tmp_path / "half", "gpt_oss", dtype=torch.float16)
    with pytest.raises(SteeringError, match=r"would not be finite in torch\.float16"):
        bake(str(repo), tmp_path / "lost", strength=1e6)
    assert not (tmp_path / "lost").exists()  # nothing is left behind


@pytest.mark.parametrize("scale", ["std", "abs"])
def test_an_edit_that_depends_on_the_token_is_refused(tmp_path: Path, scale: str):
    repo = repo_of(tmp_path, "gpt_oss", constant(scale=scale))
    with pytest.raises(SteeringError, match=f"layer 1 has an edit of the kind '{scale}'"):
        bake(str(repo), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_what_cannot_be_baked_is_refused(tmp_path: Path):
    repo = repo_of(tmp_path / "a", "gpt_oss")
    with pytest.raises(SteeringError, match="at this strength nothing is steered"):
        bake(str(repo), tmp_path / "baked", strength=0.0)
    force = torch.zeros(2, EXPERTS)
    force[0, 3] = 1
    forced = RouterSteering("force", [1, 2], torch.zeros(2, EXPERTS), force)
    with pytest.raises(SteeringError, match="kind 'force'"):
        bake(str(repo_of(tmp_path / "b", "gpt_oss", forced)), tmp_path / "baked")
    with pytest.raises(RouterError, match=r"Qwen3MoeTopKRouter in layer 1 has no bias"):
        bake(str(repo_of(tmp_path / "c", "qwen3_moe")), tmp_path / "baked")
    with pytest.raises(BaseModelError, match="made for a 'gpt_oss' model"):
        bake(str(repo), tmp_path / "baked", base_model=str(tmp_path / "c" / "base"))
    for used in (tmp_path / "a", repo / "config.json"):
        with pytest.raises(FormatError, match="is not empty"):
            bake(str(repo), used)
    for file in (tmp_path / "a" / "base").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FormatError, match="holds no safetensors"):
        bake(str(repo), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_the_command_takes_both_repos_from_the_hub(tmp_path: Path):
    repo = repo_of(tmp_path, "gpt_oss")
    base = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    HUB.commit("user/tiny-oss", base | {"pytorch_model.bin": b"a pickle"})
    HUB.commit("user/oss-steered", {path.name: path.read_bytes() for path in repo.iterdir()})
    given = ["bake", "user/oss-steered", "--base-model", "user/tiny-oss"]
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "baked")])
    assert done.exit_code == 0, done.output
    assert "2 router biases changed, rounded by at most" in done.output
    assert not (tmp_path / "baked" / "pytorch_model.bin").exists()
    bake(str(repo), tmp_path / "again")
    again, baked = weights_in(tmp_path / "again"), weights_in(tmp_path / "baked")
    assert all(torch.equal(again[name], baked[name]) for name in again)
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "baked")])
    assert done.exit_code == 1
    assert "is not empty" in done.output
    HUB.repos.pop("user/oss-steered")
    HUB.repos.pop("user/tiny-oss")
