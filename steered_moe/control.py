"""Turn the steering of a loaded model up, down, off, on; add and remove steerings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steered_moe.errors import SteeringError
from steered_moe.intervention import Intervention, attach, attached
from steered_moe.steering import RouterSteering
from steered_moe.strength import Strength, as_given, as_rows, by_name


class SteeringControl(PreTrainedModel):
    """The methods that a steered model has on top of its base model's."""

    @property
    def steerings(self) -> dict[str, RouterSteering]:
        """The attached steerings by name."""
        intervention = attached(self)
        return {} if intervention is None else dict(intervention.steerings)

    @property
    def steering(self) -> RouterSteering:
        """The attached steering.

        Raises:
            SteeringError: None or several are attached; use ``steerings``.
        """
        if len(self.steerings) != 1:
            raise SteeringError(
                f"{len(self.steerings)} steerings are attached; use model.steerings[name]"
            )
        return next(iter(self.steerings.values()))

    @property
    def strengths(self) -> dict[str, float | Tensor]:
        """Strength of each steering now, by name."""
        intervention = attached(self)
        values = {} if intervention is None else intervention.strengths
        return {name: as_given(value) for name, value in values.items()}

    @property
    def strength(self) -> float | Tensor | dict[str, float | Tensor]:
        """Strength now: one value when all steerings agree, else a dict by name. Settable."""
        values = self.strengths
        rows = [as_rows(value) for value in values.values()]
        if rows and all(torch.equal(rows[0], other) for other in rows):
            return as_given(rows[0])
        return values

    @strength.setter
    def strength(self, value: Strength | Mapping[str, Strength]) -> None:
        self.set_strength(value)

    def set_strength(self, strength: Strength | Mapping[str, Strength]) -> None:
        """Set the strength of all steerings, or of those named in a mapping; in place.

        Args:
            strength: A number, or one number per row of the batch (0 = base model).
        """
        self._intervention().set_strengths(by_name(strength, self.steerings))

    @contextmanager
    def steered(self, strength: Strength | Mapping[str, Strength] = 1.0) -> Iterator[None]:
        """Steer at ``strength`` inside the block, then as before."""
        with self._intervention().at(by_name(strength, self.steerings)):
            yield

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """The base model inside the block, then as before."""
        with self.steered(0.0):
            yield

    def add_steering(self, steering: RouterSteering, strength: Strength = 1.0) -> None:
        """Attach one more steering, under its own name."""
        attach(self, steering, strength)

    def remove_steering(self, name: str) -> None:
        """Take a steering off."""
        self._intervention().remove(name)

    def _intervention(self) -> Intervention:
        intervention = attached(self)
        if intervention is None:
            raise SteeringError("no steering is attached; use model.add_steering(steering)")
        return intervention
