"""Steerings for other projects, against their arithmetic written down once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EXPERTS, TOP_K, build
from torch import Tensor, nn
from typer.testing import CliRunner

from steered_moe import RouterSteering, SteeredMoEForCausalLM, find_routers
from steered_moe.cli import app
from steered_moe.errors import FormatError, SteeringError
from steered_moe.exporting import export
from steered_moe.recording import watch_routing

IDS = torch.tensor([[5, 9, 31, 77, 120, 8, 3, 44, 61, 90]])
NORMAL = {"norm_topk_prob": True}


def soft(scale: str = "std", *values: float) -> RouterSteering:
    weights = torch.zeros(2, EXPERTS)
    weights[0, 1], weights[0, 5], weights[1, 2] = values or (0.8, 0.8, -0.5)
    return RouterSteering("soft", [1, 2], weights, scale=scale)


def hard(forced: list[int], banned: list[int]) -> RouterSteering:
    force = torch.zeros(2, EXPERTS)
    force[:, forced], force[:, banned] = 1, -1
    return RouterSteering("hard", [1, 2], torch.zeros(2, EXPERTS), force)


def repo_of(folder: Path, steering: RouterSteering, family: str = "qwen3_moe", **changes) -> Path:
    build(family, **changes).save_pretrained(folder / "base")
    SteeredMoEForCausalLM.from_base(folder / "base", steering).save_pretrained(folder / "repo")
    return folder / "repo"


def dense(selected: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(len(selected), EXPERTS).scatter_add(1, selected, weights.float())


@torch.no_grad()
def ours(repo: Path, strength: float) -> dict[int, tuple[nn.Module, Tensor, Tensor]]:
    """Layer -> router, the states it gets in the steered model, and its routing weights."""
    model = SteeredMoEForCausalLM.from_pretrained(repo, strength=strength, dtype=torch.float32)
    routing: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    routers = {router.layer: router for router in find_routers(model)}
    for layer, router in routers.items():
        router.module.register_forward_pre_hook(
            lambda module, args, layer=layer: states.update({layer: args[0].reshape(-1, 32)})
        )
    with watch_routing(
        model, lambda r, found: routing.update({r.layer: dense(found.selected, found.weights)})
    ):
        model(IDS)
    return {k: (routers[k].module, states[k], routing[k]) for k in routers}


def theirs(module: nn.Module, hidden: Tensor, entry: dict[str, Any]) -> Tensor:
    """EasySteer's moe_router before a router that takes the softmax and normalises its top-k."""
    z = hidden @ module.weight.detach().T
    if entry["mode"] == "soft":
        spread = ((z - z.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / (z.shape[1] - 1)
        for expert in entry["expert_ids"]:
            z[:, expert] = z[:, expert] + entry["lambda"] * spread.sqrt()[:, 0]
    else:
        z = z - z.logsumexp(1, keepdim=True)
        top, low = z.max(1).values, z.min(1).values
        mode, ids = entry["mode"], entry.get("expert_ids", [])
        up = entry.get("activate_ids", []) + (ids if mode == "activate" else [])
        down = entry.get("deactivate_ids", []) + (ids if mode == "deactivate" else [])
        for expert in up:
            z[:, expert] = top + entry.get("epsilon", 0.01)
        for expert in down:
            z[:, expert] = low - entry.get("epsilon", 0.01)
    chances, chosen = z.softmax(1).topk(TOP_K)
    return dense(chosen, chances / chances.sum(1, keepdim=True))


CASES: dict[str, tuple[RouterSteering, dict[str, Any]]] = {
    "soft": (soft(), {"lambda": 0.8}),  # twin: lambda of the population's deviation
    "bans": (hard([], [0, 3, 6]), {"expert_ids": [0, 3]}),
    "all places": (hard([2, 7], []), {"activate_ids": [2]}),
    "one place": (hard([4], []), {"epsilon": 0.01}),
    "both": (hard([4], [1, 2]), {"epsilon": 0.01}),
}


@pytest.mark.parametrize("name", CASES)
def test_easysteer_gives_the_same_experts_and_weights(name: str, tmp_path: Path):
    steering, twin = CASES[name]
    repo = repo_of(tmp_path, steering, **NORMAL)
    written = export(str(repo), "easysteer", tmp_path / "out.json", strength=1.5)
    assert json.loads((tmp_path / "out.json").read_text()) == written
    assert set(written["layer_configs"]) == {"1", "2"}
    found = ours(repo, 1.5)
    entries = {int(layer): entry for layer, entry in written["layer_configs"].items()}
    for layer, entry in entries.items():
        module, hidden, weights = found[layer]
        torch.testing.assert_close(theirs(module, hidden, entry), weights, atol=1e-5, rtol=0)
    module, hidden, weights = found[1]
    twin = twin | ({"lambda": 1.5 * 0.8} if "lambda" in twin else {})
    assert (theirs(module, hidden, entries[1] | twin) - weights).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["bans", "all places"])
def test_steermoe_lists_layers_and_experts(name: str, tmp_path: Path):
    repo = repo_of(tmp_path, CASES[name][0], **NORMAL)
    written = export(str(repo), "steermoe", tmp_path / "out.json")
    expected = {"bans": ([], [0, 3, 6]), "all places": ([2, 7], [])}[name]
    for kind, experts in zip(("activated", "deactivated"), expected, strict=True):
        assert written[kind] == [[layer, expert] for layer in (1, 2) for expert in experts]


REFUSED = {
    "other coefficients": (soft("std", 0.8, 0.4, -0.5), "easysteer", {}, "2 different coeff"),
    "abs": (soft("abs"), "easysteer", {}, "kind 'abs'; easysteer has std and force only"),
    "none": (soft("none"), "easysteer", {}, "kind 'none'"),
    "soft lists": (soft(), "steermoe", {}, "kind 'std'; steermoe only forces and bans"),
    "one forced": (hard([4], []), "steermoe", {}, "forces fewer experts than a token gets"),
    "not normalised": (hard([2, 7], []), "easysteer", {"norm_topk_prob": False}, "layer 1: there"),
    "its margin": (hard([], [0]), "steermoe", {"norm_topk_prob": False}, "layer 1: there"),
    "sigmoid": (hard([], [0]), "easysteer", {"family": "glm4_moe"}, "other routing weights"),
    "no format": (soft(), "vllm", {}, "no format 'vllm'; there are easysteer, steermoe"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_express_is_refused(name: str, tmp_path: Path):
    steering, kind, changes, told = REFUSED[name]
    repo = repo_of(tmp_path, steering, **({} if "family" in changes else NORMAL) | changes)
    with pytest.raises((SteeringError, FormatError), match=told):
        export(str(repo), kind, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_soft_edits_of_raw_logits_hold_for_sigmoid_routers_too(tmp_path: Path):
    repo = repo_of(tmp_path, soft(), "glm4_moe")
    entry = export(str(repo), "easysteer", tmp_path / "out.json")["layer_configs"]["2"]
    assert entry["expert_ids"] == [2]
    assert entry["lambda"] == pytest.approx(-0.5 * ((EXPERTS - 1) / EXPERTS) ** 0.5)


def test_the_command_and_what_it_refuses(tmp_path: Path):
    repo = repo_of(tmp_path, soft(), **NORMAL)
    given = ["export", str(repo), "--format", "easysteer", "--out", str(tmp_path / "out.json")]
    assert CliRunner().invoke(app, [*given, "--strength", "0"]).exit_code == 1
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(app, given)
    assert "exists; export into a new file" in again.output
    nowhere = CliRunner().invoke(app, [*given[:-1], str(tmp_path / "none" / "out.json")])
    assert "in no folder that exists" in " ".join(nowhere.output.split())
