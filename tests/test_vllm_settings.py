"""What a vLLM engine is told: by its configuration, and by each request. Needs no vLLM."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steered_moe import RouterSteering, SteeredMoEForCausalLM, combining
from steered_moe.edit import Edit
from steered_moe.errors import FormatError, SteeredMoEError
from steered_moe.storage import SteeringRepo, read_repo
from steered_moe.vllm_layers import SteeredLayers, _lowered
from steered_moe.vllm_plugin import _check_profiling, _of_request, register
from steered_moe.vllm_points import missing
from steered_moe.vllm_settings import (
    KEY,
    EngineSettings,
    engine_settings,
    is_profiling,
    settings_of,
)

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
        ({"repo_id": 3}, "repo_id of steered_moe is 3; give a string"),
        ({"repo_id": "R", "steering": ["soft"]}, "steering of steered_moe is"),
        ({"repo_id": "R", "strength": [1.0, 2.0]}, "give one number"),
        ({"repo_id": "R", "strength": {"soft": 1e39}}, "must be finite"),
        ({"repo_id": "R", "strength": 1.0}, "is forced by one steering and banned"),
        ({"repo_id": "R", "fingerprint": "x"}, "has changed since another process"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused(repo: Path, given: Any, told: str) -> None:
    if isinstance(given, dict) and given.get("repo_id") == "R":
        given = given | {"repo_id": str(repo)}
    with pytest.raises(SteeredMoEError, match=told):
        engine_settings({KEY: given})


def test_profiling_is_on_or_off() -> None:
    assert is_profiling({KEY: {"profile": True}})
    assert not is_profiling({KEY: "user/x"})
    with pytest.raises(SteeredMoEError, match="give true or false"):
        is_profiling({KEY: {"profile": 1}})


def test_an_engine_reads_its_repo_once_and_the_next_engine_anew(repo: Path, tmp_path: Path) -> None:
    """The caller's mapping stays as it is, so that it serves for the next engine."""
    folder = tmp_path / "repo"
    shutil.copytree(repo, folder)
    config = {KEY: {"repo_id": str(folder)}, "other": 1}
    first, second = (SimpleNamespace(additional_config=config) for _ in range(2))
    found = settings_of(first)
    replace(read_repo(folder), steerings=[steering("new", 1, 0)], strengths=[1.0]).write(folder)
    assert settings_of(first) is found
    handed = pickle.loads(pickle.dumps(first))
    assert settings_of(handed).strengths == found.strengths
    assert settings_of(second).strengths == {"new": 1.0}
    assert config == {KEY: {"repo_id": str(folder)}, "other": 1}
    assert first.additional_config[KEY]["fingerprint"] == found.fingerprint
    assert second.additional_config[KEY]["fingerprint"] != found.fingerprint
    with pytest.raises(SteeredMoEError, match="start it again"):
        engine_settings(first.additional_config)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"name": ["soft", "up"]}, "give one name, or a strength for each of several"),
        ({"name": None}, "name of steered_moe is null"),
        ({"strength": None}, "strength of steered_moe is null"),
        ("null", "strength of steered_moe is null"),
        ({"strength": {}}, "strength is empty"),
        (True, "strength is True"),
        ("[" * 100_000, "is no JSON"),
        (1e39, "must be finite"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    settings: EngineSettings, asked: Any, told: str
) -> None:
    with pytest.raises(SteeredMoEError, match=told):
        settings.of_request(asked)


def test_a_request_that_forces_more_than_a_token_gets_is_refused() -> None:
    made = tuple(steering(f"s{i}", i, 1) for i in range(3))
    settings = EngineSettings(SteeringRepo({"num_experts_per_tok": 2}, made, (0.0,) * 3))
    assert settings.of_request({"strength": {"s0": 1, "s2": 1}}) == {"s0": 1, "s2": 1}
    with pytest.raises(SteeredMoEError, match="3"):
        settings.of_request(1.0)


def test_under_data_parallelism_all_tokens_have_the_engines_strength(
    settings: EngineSettings,
) -> None:
    """Nor may a request ask for another one."""
    for size, uniform in ((1, False), (2, True)):
        config = SimpleNamespace(
            additional_config={}, parallel_config=SimpleNamespace(data_parallel_size=size)
        )
        layers = SteeredLayers(settings, 4, 8, uniform)
        layers.assign([None, {"soft": 2.0}], [1, 2])
        assert layers._tokens.tolist() == ([0] if uniform else [0, 1, 1, 0, 0, 0, 0, 0])
        if uniform:
            with pytest.raises(SteeredMoEError, match="start one server for each strength"):
                _of_request(settings, 0.0, config)
        else:
            assert _of_request(settings, 0.0, config) == {}


def test_routing_is_not_counted_where_tokens_are_not_those_of_the_texts() -> None:
    def config(captured: bool, size: int, speculative: Any) -> Any:
        return SimpleNamespace(
            model_config=SimpleNamespace(enable_return_routed_experts=captured),
            parallel_config=SimpleNamespace(data_parallel_size=size),
            speculative_config=speculative,
        )

    _check_profiling(config(False, 1, None))
    for wrong in ((True, 1, None), (False, 2, None), (False, 1, "ngram")):
        with pytest.raises(SteeredMoEError, match="profile: "):
            _check_profiling(config(*wrong))


def test_forced_experts_are_first_after_a_softmax_too() -> None:
    """Some kernels rank after it, and of equals take the first; a step must survive it."""
    force = torch.zeros(1, EXPERTS, dtype=torch.int8)
    force[0, 5], force[0, 9] = 1, 1
    for size in (30.0, 1.0, 0.03):
        z = size * torch.randn(500, EXPERTS, generator=torch.Generator().manual_seed(0))
        forced = Edit(EXPERTS, force=force.expand(500, -1)).logits(z)
        for logits, right in ((_lowered(forced, force, 2), True), (forced, False)):
            order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True).indices[:, :2]
            assert bool(torch.isin(order, torch.tensor([5, 9])).all()) == right


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
