"""What a vLLM engine is told: by its configuration, and by each request. Needs no vLLM."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from steered_moe import RouterSteering, SteeredMoEForCausalLM, combining
from steered_moe.errors import FormatError, SteeredMoEError
from steered_moe.storage import SteeringRepo, read_repo
from steered_moe.vllm_plugin import register
from steered_moe.vllm_points import missing
from steered_moe.vllm_settings import KEY, EngineSettings, engine_settings

LAYERS, EXPERTS = [2], 16


def steering(name: str, expert: int, force: int) -> RouterSteering:
    weights, table = torch.zeros(1, EXPERTS), torch.zeros(1, EXPERTS)
    weights[0, expert], table[0, expert] = 1.0, force
    return RouterSteering(name, LAYERS, weights, table if force else None)


@pytest.fixture(scope="module")
def repo(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "soft", and "up" and "down", which contradict each other; "down" is off."""
    folder = tmp_path_factory.mktemp("settings")
    made = [steering("soft", 0, 0), steering("up", 3, 1), steering("down", 3, -1)]
    model = SteeredMoEForCausalLM.from_base(tiny / "base", made[:2], strength=0.5)
    model.save_pretrained(folder)
    replace(read_repo(folder), steerings=made, strengths=[0.5, 0.5, 0.0]).write(folder)
    return folder


@pytest.fixture
def settings(repo: Path) -> EngineSettings:
    found = engine_settings({KEY: {"repo_id": str(repo)}})
    assert found is not None
    return found


def test_the_configuration_names_a_repo(repo: Path) -> None:
    assert engine_settings({}) is None
    assert engine_settings({"other": 1}) is None
    short = engine_settings({KEY: str(repo)})
    assert short == engine_settings({KEY: {"repo_id": str(repo)}})
    assert short.strengths == {"soft": 0.5, "up": 0.5, "down": 0.0}
    assert short.layers == {2}
    one = engine_settings({KEY: {"repo_id": str(repo), "steering": "soft", "strength": 2.0}})
    assert one.strengths == {"soft": 2.0}
    assert one.fingerprint != short.fingerprint


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"repo": "x"}, "no field 'repo'; it has repo_id"),
        ({"strength": 1.0}, "names no repo_id"),
        (3, "give a repo_id"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused(given: Any, told: str) -> None:
    with pytest.raises(SteeredMoEError, match=told):
        engine_settings({KEY: given})


def test_a_repo_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        engine_settings({KEY: str(tmp_path)})


@pytest.mark.parametrize(
    ("asked", "strengths"),
    [
        (0.0, {}),
        ({"name": "up"}, {"up": 0.5}),
        ({"name": "down", "strength": 2}, {"down": 2.0}),
        ({"name": "down", "strength": 0}, {}),
        ('{"name": "soft", "strength": -1}', {"soft": -1.0}),
        ({"strength": {"soft": 3.0}}, {"soft": 3.0}),
        ({"strength": {"soft": 3.0, "up": 1}}, {"soft": 3.0, "up": 1.0}),
        ("0.25", None),
        (1.0, None),
    ],
)
def test_a_request_asks_for_strengths(
    settings: EngineSettings, asked: Any, strengths: dict[str, float] | None
) -> None:
    if strengths is None:  # all at once contradict each other
        with pytest.raises(SteeredMoEError, match="is forced by one steering and banned"):
            settings.of_request(asked)
        return
    assert settings.of_request(asked) == strengths


def test_a_request_adds_up_what_it_names_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a thousand steerings is as quick as one of two: the others are not looked at."""
    names = [f"s{i}" for i in range(1000)]
    many = tuple(RouterSteering(name, [1, 2], torch.ones(2, 4), scale="abs") for name in names)
    repo = SteeringRepo({"num_experts_per_tok": 2}, many, (0.0,) * len(many))
    seen = []
    original = combining._add
    monkeypatch.setattr(combining, "_add", lambda *given: (seen.append(given[1]), original(*given)))
    settings = EngineSettings(repo)
    asked = settings.of_request({"name": "s7", "strength": 3})
    assert settings.combined(asked)[1]["abs"].tolist() == [[3.0] * 4]
    assert {one.name for one in seen} == {"s7"}
    settings.of_request({"strength": {"s7": 1, "s9": 1}})
    assert {one.name for one in seen} == {"s7", "s9"}  # the twin


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_plugin_does_nothing_and_says_what_is_missing() -> None:
    register()
    assert "MoERunner._apply_quant_method" in missing()
