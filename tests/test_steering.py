"""The value: validation, algebra, fingerprint, save and load."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from steered_moe import RouterSteering
from steered_moe.errors import FormatError, SteeringError

WEIGHTS = torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.5, 0.0]])
FORCE = torch.tensor([[0, 1, 0], [-1, 0, 0]], dtype=torch.int8)


def steering(**changes) -> RouterSteering:
    fields = {"name": "a", "layers": [3, 5], "weights": WEIGHTS, "force": FORCE} | changes
    return RouterSteering(**fields)


def test_a_value_is_normalised_and_frozen():
    value = steering(layers=[5, 3])
    assert value.layers.tolist() == [3, 5]
    assert value.weights.tolist() == WEIGHTS.flip(0).tolist()
    assert value.force.tolist() == FORCE.flip(0).tolist()
    assert (value.layers.dtype, value.weights.dtype) == (torch.int64, torch.float32)
    with pytest.raises(FrozenInstanceError):
        value.name = "b"


def test_it_keeps_its_own_copy_of_the_tensors():
    weights = WEIGHTS.clone()
    value = steering(weights=weights)
    weights[0, 0] = 99.0
    assert value.weights[0, 0] == 1.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "a.b"}, "'a.b'"),
        ({"name": ""}, "''"),
        ({"layers": [3, 3]}, "layer 3 appears twice"),
        ({"layers": [-1, 3]}, "layer -1 is negative"),
        ({"layers": [3]}, "2 rows but there are 1 layers"),
        ({"layers": [3.0, 5.0]}, "whole number"),
        ({"layers": []}, "at least one"),
        ({"weights": torch.zeros(2)}, "shape (2,)"),
        ({"weights": torch.full((2, 3), float("nan"))}, "weights[0, 0] is nan"),
        ({"weights": torch.tensor([[0, 0, 0], [0, float("inf"), 0]])}, "weights[1, 1] is inf"),
        ({"weights": "many"}, "not a tensor"),
        ({"force": torch.full((2, 3), 2)}, "force holds 2"),
        ({"force": torch.full((2, 3), 0.5)}, "force holds 0.5"),
        ({"force": torch.zeros(2, 4)}, "shape (2, 4)"),
        ({"scale": "variance"}, "'variance'"),
        ({"provenance": {"when": object()}}, "not JSON"),
        ({"provenance": {"strength": 5.0}}, "provenance holds 'strength'"),
        ({"provenance": {"languages": "en"}}, "languages is 'en'; it must be a list"),
        ({"layers": [True, False]}, "whole number"),
        ({"weights": torch.zeros(2, 3, dtype=torch.complex64)}, "expected real numbers"),
    ],
)
def test_what_cannot_be_right_is_refused_by_value(changes, says):
    with pytest.raises(SteeringError) as error:
        steering(**changes)
    assert says in str(error.value)


def test_multiplying_scales_the_soft_part_and_zero_drops_the_force():
    assert torch.equal((2 * steering()).weights, 2 * WEIGHTS)
    assert torch.equal((steering() * -0.5).weights, -0.5 * WEIGHTS)
    assert torch.equal((-steering()).force, FORCE)
    assert (0 * steering()).force is None
    with pytest.raises(SteeringError, match="inf"):
        steering() * float("inf")


def test_adding_takes_the_union_of_layers():
    other = RouterSteering("b", [5, 9], torch.ones(2, 3))
    total = steering() + other
    assert total.layers.tolist() == [3, 5, 9]
    expected = [[1.0, 0.0, -2.0], [1.0, 1.5, 1.0], [1.0, 1.0, 1.0]]
    assert total.weights.tolist() == expected
    assert total.force.tolist() == [[0, 1, 0], [-1, 0, 0], [0, 0, 0]]
    assert total == RouterSteering(
        "a+b", [3, 5, 9], expected, total.force, provenance=total.provenance
    )


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (RouterSteering("b", [3], torch.ones(1, 3), scale="abs"), "scale 'std' and scale 'abs'"),
        (RouterSteering("b", [3], torch.ones(1, 4)), "3 experts and 4 experts"),
        (
            RouterSteering("b", [3], torch.ones(1, 3), force=[[0, -1, 0]]),
            "layer 3, expert 1 is forced by one steering and banned",
        ),
    ],
)
def test_sums_that_make_no_sense_are_refused(other, says):
    with pytest.raises(SteeringError, match=says.replace("(", r"\(")):
        steering() + other


def test_restricting_keeps_rows_of_the_layers():
    kept = steering().restrict(range(4, 9))
    assert kept.layers.tolist() == [5]
    assert torch.equal(kept.weights, WEIGHTS[1:])
    assert torch.equal(kept.force, FORCE[1:])
    with pytest.raises(SteeringError, match="has 3, 5"):
        steering().restrict([4])


def test_the_fingerprint_follows_what_a_steering_does():
    value = steering()
    assert value.fingerprint == replace(value, name="other", provenance={"x": 1}).fingerprint
    assert value.fingerprint == (0.5 * (2 * value)).fingerprint
    different = [
        2 * value,
        replace(value, scale="abs"),
        replace(value, force=None),
        replace(value, layers=torch.tensor([3, 6])),
    ]
    assert value.fingerprint not in {other.fingerprint for other in different}
    assert value == steering()
    assert value != steering(name="b")


def test_the_repr_can_be_read():
    text = repr(steering(layers=[3, 4]))
    assert "layers=3-4, experts=3, weighted=3, forced=1, banned=1" in text


def test_save_and_load_are_exact(tmp_path):
    value = steering(provenance={"method": "x", "languages": ["en", "zh"]})
    value.save(tmp_path)
    loaded = RouterSteering.load(tmp_path)
    assert loaded == value
    assert torch.equal(loaded.weights, value.weights)
    assert loaded != 2 * value
    with pytest.raises(FormatError, match="no steering named 'b'; choose one of: a"):
        RouterSteering.load(tmp_path, name="b")
