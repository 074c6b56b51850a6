"""Task, multilingual and random experts against plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import real_data

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.collection import stack
from steered_moe.errors import FormatError, SteeringError
from steered_moe.selection import (
    METHODS,
    PRESETS,
    exclusive_experts,
    method,
    multilingual_experts,
    preferred,
    preset,
    random_experts,
    risk_difference,
    shared_experts,
    task_experts,
)


def profile(frequency: dict[str, list[list[float]]], texts: int = 10) -> RoutingProfile:
    """A profile whose mean frequencies over texts are ``frequency`` (layers x experts), while its
    frequencies over tokens say the opposite."""
    rows = torch.tensor(list(frequency.values()), dtype=torch.float64)
    languages, layers, _ = rows.shape
    return RoutingProfile(
        tuple(frequency),
        tuple(range(layers)),
        counts=(1 - rows) * 100,
        weight_sums=rows,
        tokens=torch.full((languages, layers), 100.0),
        sequences=torch.full((languages,), float(texts)),
        frequency_sums=rows * texts,
    )


TASK = profile({"en": [[0.9, 0.5, 0.4, 0.2], [0.6, 0.8, 0.5, 0.1], [0.2, 0.2, 0.8, 0.8]]})
GENERAL = profile(
    {
        "en": [[0.5, 0.5, 0.5, 0.5], [0.5, 0.4, 0.4, 0.7], [0.5, 0.5, 0.5, 0.5]],
        "de": [[0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.4, 0.8], [0.9, 0.5, 0.5, 0.1]],
        "bn": [[0.1, 0.5, 0.5, 0.9], [0.1, 0.4, 0.4, 1.0], [0.5, 0.5, 0.5, 0.5]],
    }
)


def test_task_experts_are_those_above_the_threshold():
    steering = task_experts(TASK, GENERAL, threshold=0.25, layers=[0, 1, 2])
    assert steering.layers.tolist() == [0, 1, 2]
    assert steering.weights.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert steering.scale == "std"
    assert steering.force is None
    lower = task_experts(TASK, GENERAL, threshold=0.05, layers=[1])
    assert lower.weights.tolist() == [[1, 1, 1, 0]]  # the same layer at a lower threshold


def test_layers_without_a_task_expert_are_left_out():
    assert task_experts(TASK, GENERAL, threshold=0.35, layers=[0, 1, 2]).layers.tolist() == [0, 1]


def test_hard_mode_forces_and_adds_nothing():
    steering = task_experts(TASK, GENERAL, threshold=0.25, layers=[2], mode="hard")
    assert steering.force.tolist() == [[0, 0, 1, 1]]
    assert not steering.weights.any()


def test_multilingual_experts_count_for_any_other_language():
    steering = multilingual_experts(GENERAL, threshold=0.25, layers=[0, 1, 2])
    assert steering.weights.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]]
    only_german = multilingual_experts(GENERAL.of(["en", "de"]), threshold=0.25, layers=[0, 1, 2])
    assert only_german.layers.tolist() == [2]


def test_random_experts_match_layer_by_layer():
    force = torch.zeros(3, 16)
    force[2, 4] = 1
    weights = torch.zeros(3, 16)
    weights[0, :3] = torch.tensor([0.5, 1.0, 1.5])
    weights[1, 7] = 1.0
    like = RouterSteering("like", [3, 4, 6], weights, force=force)
    control = random_experts(like, seed=1)
    assert control.layers.tolist() == [3, 4, 6]
    assert torch.equal(control.weights.sort(dim=1).values, like.weights.sort(dim=1).values)
    assert control.force.sum(dim=1).tolist() == [0, 0, 1]
    assert control.fingerprint != like.fingerprint
    assert control.fingerprint == random_experts(like, seed=1).fingerprint
    assert control.fingerprint != random_experts(like, seed=2).fingerprint


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(SteeringError, match=r"largest difference there is 0\.400"):
        task_experts(TASK, GENERAL, threshold=0.5, layers=[0, 1, 2])
    with pytest.raises(SteeringError, match=r"threshold is 1\.5"):
        task_experts(TASK, GENERAL, threshold=1.5, layers=[0])
    with pytest.raises(SteeringError, match="mode is 'firm'"):
        task_experts(TASK, GENERAL, threshold=0.2, layers=[0], mode="firm")
    with pytest.raises(FormatError, match="sw not in the profile"):
        task_experts(TASK, GENERAL, threshold=0.2, layers=[0], language="sw")
    with pytest.raises(SteeringError, match="no language but en"):
        multilingual_experts(GENERAL.of(["en"]), threshold=0.2, layers=[0])
    fewer = profile({"en": [[0.5, 0.5]]})
    with pytest.raises(SteeringError, match="not of one model"):
        task_experts(TASK, fewer, threshold=0.2, layers=[0])
    bare = RoutingProfile(("en",), (0,), torch.ones(1, 1, 4), torch.ones(1, 1))
    with pytest.raises(FormatError, match="sums over tokens only"):
        task_experts(bare, bare, threshold=0.2, layers=[0])


def counted(frequency: list[list[float]], language: str = "en") -> RoutingProfile:
    """A profile of one language from frequencies over tokens."""
    rows = torch.tensor([frequency], dtype=torch.float64)
    return RoutingProfile(
        (language,), tuple(range(rows.shape[1])), rows * 100, torch.full((1, 3), 100.0)
    )


FIRST = counted([[0.9, 0.6, 0.3, 0.2], [0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.9, 0.1]])
SECOND = counted([[0.4, 0.2, 0.75, 0.6], [0.5, 0.4, 0.6, 0.5], [0.6, 0.4, 0.1, 0.9]])


def ranked_by_hand(activate: int, deactivate: int, top_k: int = 2) -> dict[tuple[int, int], int]:
    """SteerMoE's walk through the ranking, one expert at a time."""
    difference = FIRST.frequency[0] - SECOND.frequency[0]
    order = sorted(
        ((layer, expert) for layer in range(3) for expert in range(4)),
        key=lambda place: -abs(float(difference[place])),
    )
    force: dict[tuple[int, int], int] = {}
    for place in order:
        ups = [p for p, sign in force.items() if sign > 0]
        full = sum(layer == place[0] for layer, _ in ups) >= top_k
        if difference[place] > 0 and len(ups) < activate and not full:
            force[place] = 1
        elif difference[place] < 0 and len(force) - len(ups) < deactivate:
            force[place] = -1
    return force


@pytest.mark.parametrize(("activate", "deactivate"), [(1, 0), (3, 2), (4, 4), (0, 3)])
def test_risk_difference_equals_a_walk_through_the_ranking(activate: int, deactivate: int):
    steering = risk_difference(FIRST, SECOND, activate=activate, deactivate=deactivate)
    found = {
        (layer, expert): int(steering.force[row, expert])
        for row, layer in enumerate(steering.layers.tolist())
        for expert in range(4)
        if steering.force[row, expert]
    }
    assert found == ranked_by_hand(activate, deactivate)
    assert found != ranked_by_hand(activate + 1, deactivate)


def test_no_layer_gets_more_than_top_k():
    first = counted([[0.9, 0.7, 0.4, 0.0], [0.6, 0.5, 0.5, 0.4], [0.5, 0.5, 0.5, 0.5]])
    second = counted([[0.4, 0.3, 0.2, 1.0], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    steering = risk_difference(first, second, activate=3, deactivate=0)
    # expert 2 of layer 0 differs more than expert 0 of layer 1, but two of its layer are forced
    assert steering.layers.tolist() == [0, 1]
    assert steering.force.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    with pytest.raises(SteeringError, match="4 experts cannot be activated: 3 differ"):
        risk_difference(first, second, activate=4, deactivate=0)


def test_risk_difference_says_what_cannot_be_met():
    with pytest.raises(SteeringError, match="9 experts cannot be activated: 5 differ"):
        risk_difference(FIRST, SECOND, activate=9, deactivate=0)
    with pytest.raises(SteeringError, match="both 0"):
        risk_difference(FIRST, SECOND, activate=0, deactivate=0)
    with pytest.raises(SteeringError, match="cannot be deactivated"):
        risk_difference(FIRST, SECOND, activate=1, deactivate=-1)
    only = risk_difference(FIRST, SECOND, activate=1, deactivate=1, layers=[0])
    assert only.layers.tolist() == [0]


def test_preferred_moves_the_target_towards_the_pivot():
    both = stack([FIRST, counted(SECOND.frequency[0].tolist(), "bn")])
    steering = preferred(both, "bn", layers=[0, 1, 2], threshold=0.3)
    assert steering.layers.tolist() == [0, 2]
    assert torch.allclose(
        steering.weights, torch.tensor([[0.5, 0.4, 0.0, 0.0], [0.0, 0.5, 0.8, 0.0]])
    )
    other_way = preferred(both, "en", pivot="bn", layers=[0, 1, 2], threshold=0.3)
    assert not (other_way.weights.bool() & steering.weights.bool()).any()
    with pytest.raises(SteeringError, match="both 'en'"):
        preferred(both, "en", layers=[0])


def test_exclusive_experts_are_masked():
    frequency = {
        "en": [[0.9, 0.8, 0.2, 0.1]],
        "zh": [[0.9, 0.1, 0.7, 0.3]],
        "bn": [[0.2, 0.1, 0.8, 0.9]],
    }
    parts = []
    for language, rows in frequency.items():
        table = torch.tensor([rows], dtype=torch.float64)
        parts.append(RoutingProfile((language,), (0,), table * 10, torch.full((1, 1), 10.0)))
    profiles = stack(parts)
    # of the two most frequent: en has 0 and 1, zh has 0 and 2, bn has 2 and 3
    steering = exclusive_experts(profiles, "bn", top=2, threshold=0.5, layers=[0])
    assert steering.force.tolist() == [[0, 0, -1, -1]]  # 2: 0.8 of 1.5
    steering = exclusive_experts(profiles, "bn", top=2, threshold=0.55, layers=[0])
    assert steering.force.tolist() == [[0, 0, 0, -1]]
    together = exclusive_experts(profiles, ["zh", "bn"], top=2, threshold=0.55, layers=[0])
    assert together.force.tolist() == [[0, 0, -1, -1]]
    with pytest.raises(SteeringError, match="lower the threshold"):
        exclusive_experts(profiles, "zh", top=2, threshold=0.9, layers=[0])


def test_methods_and_presets_by_name():
    assert method("task_experts") is task_experts
    with pytest.raises(SteeringError, match="there is no method 'magic'; there are task_experts"):
        method("magic")
    with pytest.raises(SteeringError, match="there is no preset"):
        preset("magic")
    mgsm = preset("qwen3-30b-a3b-mgsm")
    assert (mgsm.layers[0], mgsm.layers[-1]) == (7, 34)  # 8 to 35, counted from 1
    assert (mgsm.parameters["threshold"], mgsm.strength) == (0.4, 0.5)
    shared = preset("qwen3-30b-a3b-english")
    assert (shared.layers[0], shared.layers[-1], shared.strength) == (10, 39, 0.022)
    assert {p.method for p in PRESETS.values()} <= set(METHODS)


def test_the_preset_gives_the_released_steering():
    profiles = RoutingProfile.from_recorder(real_data("real_routing/qwen3_30b_a3b_mgsm"))
    settings = preset("qwen3-30b-a3b-english")
    steering = method(settings.method)(profiles, layers=settings.layers, **settings.parameters)
    assert steering.num_steered_experts == 420


def test_profiles_and_corpora_are_recorded():
    task = replace(TASK, about={"model": "m", "corpus": "problems"})
    general = replace(GENERAL, about={"model": "m", "corpus": "text"})
    found = task_experts(task, general, threshold=0.25, layers=[0]).provenance
    assert found["corpora"] == ["problems", "text"]
    assert found["profile_sha256"] == [task.fingerprint, general.fingerprint]
    alone = task_experts(TASK, GENERAL, threshold=0.25, layers=[0]).provenance
    assert "corpora" not in alone


def test_profiles_of_two_models_are_refused_by_name():
    task, general = (replace(p, about={"model": "m", "revision": "1"}) for p in (TASK, GENERAL))
    task_experts(task, general, threshold=0.25, layers=[0])
    for other in ({"model": "n"}, {"model": "m", "revision": "2"}):
        with pytest.raises(SteeringError, match=r"m at 1 and of [mn] at .*; profile one model"):
            task_experts(task, replace(general, about=other), threshold=0.25, layers=[0])


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("chat", {"chat": True}, {}),
        ("template_tokens", {}, {"template_tokens": False}),
        ("dtype", {"dtype": "float32"}, {"dtype": "bfloat16"}),
        ("model_sha256", {"model_sha256": "a"}, {"model_sha256": "b"}),
        ("tokenizer_sha256", {"tokenizer_sha256": "a"}, {"tokenizer_sha256": "b"}),
    ],
)
def test_profiles_measured_in_two_ways_are_refused(name: str, one: Any, other: Any):
    task, general = replace(TASK, about={"model": "m"} | one), replace(GENERAL, about=other)
    with pytest.raises(SteeringError, match=f"{name} is .* profile both in the same way"):
        task_experts(task, general, threshold=0.25, layers=[0])
    task_experts(task, replace(GENERAL, about=one), threshold=0.25, layers=[0])


def test_what_is_the_default_or_not_known_is_no_difference():
    task = replace(TASK, about={"chat": False, "template_tokens": True, "dtype": "float32"})
    task_experts(task, GENERAL, threshold=0.25, layers=[0])


def counts_of_three() -> RoutingProfile:
    """en, zh and bn in three layers: of the two most frequent experts, en shares 1 with zh."""
    rows = {"en": [9, 8, 1, 0], "zh": [1, 6, 8, 0], "bn": [0, 1, 7, 9]}
    counts = torch.tensor(list(rows.values())).unsqueeze(1).expand(3, 3, 4).double()
    return RoutingProfile(tuple(rows), (0, 1, 2), counts, torch.full((3, 3), 10.0))


THREE = counts_of_three()
ASK: dict[str, Any] = {
    "shared_experts": lambda **more: shared_experts(THREE, **{"top": 2} | more),
    "exclusive_experts": lambda **more: exclusive_experts(
        THREE, **{"language": "bn", "top": 2} | more
    ),
    "preferred": lambda **more: preferred(THREE, **{"target": "zh"} | more),
    "task_experts": lambda **more: task_experts(TASK, GENERAL, **{"threshold": 0.25} | more),
    "multilingual_experts": lambda **more: multilingual_experts(
        GENERAL, **{"threshold": 0.25} | more
    ),
    "risk_difference": lambda **more: risk_difference(
        FIRST, SECOND, **{"activate": 3, "deactivate": 2} | more
    ),
}


@pytest.mark.parametrize("method", ASK)
def test_layers_may_come_from_an_iterator_and_are_recorded(method: str):
    def once() -> Iterator[int]:
        yield from (2, 0, 1, 1)

    steering = ASK[method](layers=once())
    assert steering == ASK[method](layers=range(3))
    assert len(steering.layers) > 1
    assert steering.provenance["parameters"]["layers"] == "0-2"
    assert ASK[method](layers=[0, 2]).provenance["parameters"]["layers"] == "0, 2"


def test_all_layers_are_recorded_where_none_are_asked_for():
    found = risk_difference(FIRST, SECOND, activate=1, deactivate=1)
    assert found.provenance["parameters"]["layers"] == "0-2"


def test_exclusive_experts_record_what_the_language_competed_with():
    parameters = ASK["exclusive_experts"](layers=[1]).provenance["parameters"]
    assert parameters["against"] == ["en", "zh"]
    alone = exclusive_experts(THREE.of(["en", "bn"]), "bn", top=2, layers=[1])
    assert alone.provenance["parameters"]["against"] == ["en"]


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("exclusive_experts", {"language": ["bn", "bn"]}, "name each language once"),
        ("exclusive_experts", {"language": []}, r"language is \[\]; name at least one"),
        ("exclusive_experts", {"language": 5}, "language is 5"),
        ("exclusive_experts", {"threshold": 1.0}, r"threshold is 1\.0; it must lie in \(0, 1\)"),
        ("exclusive_experts", {"threshold": "a"}, "threshold is 'a'; it must be a finite number"),
        ("exclusive_experts", {"top": 2.5}, r"top is 2\.5; it must be a whole number"),
        ("shared_experts", {"languages": []}, r"languages is \[\]; name at least one"),
        ("shared_experts", {"languages": "en"}, "at least two different ones"),
        ("shared_experts", {"languages": ["en", 5]}, r"languages is \['en', 5\]"),
        ("shared_experts", {"languages": ["en", ""]}, r"languages is \['en', ''\]"),
        ("shared_experts", {"threshold": 1.0}, r"threshold is 1\.0; it must lie in \(0, 1\)"),
        ("shared_experts", {"threshold": 1}, r"threshold is 1\.0; it must lie in \(0, 1\)"),
        ("shared_experts", {"threshold": True}, "threshold is True; it must be a finite number"),
        ("shared_experts", {"top": "2"}, "top is '2'; it must be a whole number"),
        ("shared_experts", {"source": 5}, "source is 5; it must be one of en, zh"),
        ("preferred", {"threshold": float("nan")}, "threshold is nan"),
        ("preferred", {"threshold": 10**400}, "must be a finite number"),
        ("preferred", {"target": 5}, "pivot and target is"),
        ("preferred", {"layers": [7, 9]}, "none of the layers 7, 9 was profiled; there are 0-2"),
        ("task_experts", {"threshold": "0.3"}, r"threshold is '0\.3'; it must be a finite number"),
        ("task_experts", {"language": 5}, r"language is \[5\]; name at least one"),
        ("multilingual_experts", {"threshold": None}, "threshold is None"),
        ("risk_difference", {"activate": 1.5}, r"activate is 1\.5; it must be a whole number"),
        ("risk_difference", {"deactivate": True}, "deactivate is True"),
        ("risk_difference", {"language": 5}, r"language is \[5\]"),
        ("risk_difference", {"layers": []}, r"layers are \[\]; give at least one"),
        ("preferred", {"layers": 5}, "layers are 5; give whole numbers"),
        ("preferred", {"layers": "0-2"}, "layers are '0-2'; give whole numbers"),
        ("task_experts", {"layers": [0.5]}, r"layers are \[0\.5\]; give whole numbers"),
        ("task_experts", {"layers": [-1, 0]}, r"layers are \[-1, 0\]; give at least one"),
    ],
)
def test_settings_of_another_type_are_refused(method: str, settings: Any, says: str):
    with pytest.raises(SteeringError, match=says):
        ASK[method](**{"layers": range(3)} | settings)


@pytest.mark.parametrize("seed", ["abc", 1.5, None, 2**64, -(2**63) - 1])
def test_seeds_that_are_no_whole_numbers_are_refused(seed: Any):
    with pytest.raises(SteeringError, match="seed is"):
        random_experts(ASK["task_experts"](layers=[0]), seed=seed)
