"""The systems of an evaluation: base, steerings, and their controls, which should not help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from steered_moe.errors import SteeredMoEError, SteeringError
from steered_moe.intervention import attach
from steered_moe.selection import random_experts
from steered_moe.steering import RouterSteering

BASE = "base"
_TRIES = 50
OF = "/"  # a control is named STEERING/CONTROL


def outside_layers(
    like: RouterSteering, num_layers: int, name: str = "outside-middle"
) -> RouterSteering:
    """The same edit in layers that the steering leaves alone, those at both ends first.

    2510.04694 reports that steering outside the middle layers does harm. Row i of the steering
    goes to the i-th of the first, last, second, last but one ... layer outside its range; where
    there are too few, the rest is left out.

    Args:
        like: The steering to move.
        num_layers: Decoder layers of the model.
        name: Name of the control.

    Raises:
        SteeringError: The steering covers all layers from its first to its last one.
    """
    first, last = int(like.layers[0]), int(like.layers[-1])
    front, back = list(range(first)), list(range(num_layers - 1, last, -1))
    ends = [x for pair in zip(front, back, strict=False) for x in pair]
    shorter = min(len(front), len(back))
    outside = (ends + front[shorter:] + back[shorter:])[: len(like.layers)]
    if not outside:
        raise SteeringError(
            f"{like.name!r} steers layers {first} to {last} of {num_layers}; there is none outside"
        )
    rows = slice(0, len(outside))
    return replace(
        like,
        name=name,
        layers=torch.tensor(outside),
        weights=like.weights[rows],
        force=None if like.force is None else like.force[rows],
        provenance={
            "method": "outside_layers",
            "like": {"name": like.name, **dict(like.provenance)},
        },
    )


def random_draws(like: RouterSteering, draws: int) -> list[RouterSteering]:
    """Random controls, "random-SEED", of the first seeds whose draws differ from one another and
    from the steering itself.

    Raises:
        SteeringError: There are fewer than ``draws``.
    """
    made: dict[str, RouterSteering] = {}
    for seed in range(_TRIES * draws):
        if len(made) == draws:
            break
        drawn = random_experts(like, seed=seed, name=f"random-{seed}")
        if drawn.fingerprint != like.fingerprint:
            made.setdefault(drawn.fingerprint, drawn)
    if len(made) < draws:
        raise SteeringError(
            f"{like.name!r} has {len(made)} different random controls; give --controls {len(made)}"
        )
    return list(made.values())


def controls(like: RouterSteering, num_layers: int, draws: int = 1) -> list[RouterSteering]:
    """Random experts of equal number and strength, ``draws`` times, and the layers outside.

    Args:
        like: The steering to control for.
        num_layers: Decoder layers of the model.
        draws: How many random ones.

    Raises:
        SteeringError: There are fewer different random ones.
    """
    made = random_draws(like, draws)
    covers_all = int(like.layers[0]) == 0 and int(like.layers[-1]) == num_layers - 1
    return made if covers_all else [*made, outside_layers(like, num_layers)]


@dataclass(frozen=True)
class System:
    """What answers: the base model, or steered.

    Args:
        name: "base", that of a steering, or "steering/control".
        steering: None for the base model.
        strength: Of the steering.
    """

    name: str
    steering: RouterSteering | None = None
    strength: float = 1.0

    def on(self, model: PreTrainedModel) -> Any:
        """Steer ``model`` inside the block."""
        return nullcontext() if self.steering is None else _steered(model, self)

    @property
    def about(self) -> dict[str, Any]:
        """What a run records of it."""
        if self.steering is None:
            return {"name": self.name}
        fingerprint = self.steering.fingerprint
        return {"name": self.name, "fingerprint": fingerprint, "strength": self.strength}


@contextmanager
def _steered(model: PreTrainedModel, system: System) -> Iterator[None]:
    if system.steering is None:
        raise SteeredMoEError(f"{system.name} has no steering")
    handle = attach(model, system.steering, system.strength)
    try:
        yield
    finally:
        handle.remove()


def systems(
    steerings: Sequence[tuple[RouterSteering, float]], num_layers: int, draws: int = 1
) -> list[System]:
    """Base, each steering, and the controls of each.

    Args:
        steerings: Each with its strength; their names are those of the systems.
        num_layers: Decoder layers of the model.
        draws: Random controls of each steering; 0 leaves all controls out.

    Raises:
        SteeringError: A steering has the name of the base model, or of a control.
    """
    made = [System(BASE)]
    for steering, strength in steerings:
        if steering.name == BASE or OF in steering.name:
            raise SteeringError(f"a steering named {steering.name!r} would be mistaken; rename it")
        made.append(System(steering.name, steering, strength))
        others = controls(steering, num_layers, draws) if draws else []
        made += [System(f"{steering.name}{OF}{one.name}", one, strength) for one in others]
    return made
