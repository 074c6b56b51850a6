"""Task, multilingual and random experts against plain Python."""

from __future__ import annotations

import pytest
import torch

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.errors import FormatError, SteeringError
from steered_moe.selection import multilingual_experts, random_experts, task_experts


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
    bare = RoutingProfile(("en",), (0,), *(torch.ones(1, 1, 4) for _ in "ab"), torch.ones(1, 1))
    with pytest.raises(FormatError, match="sums over tokens only"):
        task_experts(bare, bare, threshold=0.2, layers=[0])
