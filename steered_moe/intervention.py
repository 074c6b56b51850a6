"""Attach steerings to a model, change their strength, take them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.combining import combine
from steered_moe.errors import InterventionError, SteeringError
from steered_moe.fit import ModelShape, check_fit, check_force
from steered_moe.probe import is_meta, prove
from steered_moe.routers import find_routers
from steered_moe.steered_router import SteeredRouter
from steered_moe.steering import RouterSteering
from steered_moe.strength import Strength, as_given, as_rows

_ATTRIBUTE = "_steered_moe"


def attach(model: nn.Module, steering: RouterSteering, strength: Strength = 1.0) -> SteeringHandle:
    """Steer ``model`` in place. Several steerings can be attached under different names.

    A forward pass over two tokens proves that the edit reaches the selection of experts in every
    steered layer. On a model on the meta device only the fit is checked.

    Args:
        model: Any MoE causal LM of transformers, loaded and dispatched.
        steering: What to do in which layers. Rows that are all zero cost nothing.
        strength: Number, or one per row of the batch. 0 is off (output bit-identical to the base
            model); a negative number negates the soft part.

    Returns:
        A handle with ``strength``, ``steered``, ``unsteered`` and ``remove``.

    Raises:
        RouterError: The model has no router that can be steered.
        BaseModelError: The steering does not fit the model's layers, experts or top-k.
        SteeringError: A bad strength, a name in use, steerings that contradict each other.
        InterventionError: The edit would have no effect on this model.
    """
    intervention = attached(model) or Intervention(model)
    intervention.add(steering, strength)
    return SteeringHandle(intervention, steering.name)


def attached(model: nn.Module) -> Intervention | None:
    """Everything that `attach` put on ``model``, or None."""
    return getattr(model, _ATTRIBUTE, None)


class SteeringHandle:
    """One attached steering, as `attach` returns it.

    Args:
        intervention: Everything that is attached to the model.
        name: Which of it.
    """

    def __init__(self, intervention: Intervention, name: str) -> None:
        self._intervention = intervention
        self.name = name

    @property
    def strength(self) -> float | Tensor:
        """Strength now. Set a number, or one per row of the batch."""
        return as_given(self._intervention.strengths[self.name])

    @strength.setter
    def strength(self, value: Strength) -> None:
        self._intervention.set_strengths({self.name: value})

    @contextmanager
    def steered(self, strength: Strength = 1.0) -> Iterator[None]:
        """Steer at ``strength`` inside the block, then as before."""
        with self._intervention.at({self.name: strength}):
            yield

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """Without this steering inside the block, then as before."""
        with self.steered(0.0):
            yield

    def remove(self) -> None:
        """Take this steering off; with the last one the model is as it was before."""
        self._intervention.remove(self.name)


class Intervention:
    """Everything that is attached to one model.

    Args:
        model: The model; it is changed only when a steering is added.

    Attributes:
        steerings: Name -> steering.
        strengths: Name -> float32 ``(rows,)``; rows is 1, or one per row of the batch.
        routers: Layer -> steered router, for the layers that some steering edits.
        rows: 1, or the number of batch rows that have a strength of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shape = ModelShape.of(find_routers(model), model)
        self.steerings: dict[str, RouterSteering] = {}
        self.strengths: dict[str, Tensor] = {}
        self.routers: dict[int, SteeredRouter] = {}
        self.rows = 1
        self._hooks: list[Any] = []
        self._fired = False
        self._meta = False

    def add(self, steering: RouterSteering, strength: Strength) -> None:
        """See `attach`; a steering that is refused leaves the model as it was."""
        if steering.name in self.steerings:
            raise SteeringError(
                f"a steering named {steering.name!r} is attached already; remove it, or rename "
                "one with dataclasses.replace(steering, name=...)"
            )
        check_fit(steering, self.shape, self.model)
        steerings = {**self.steerings, steering.name: steering}
        strengths = {**self.strengths, steering.name: as_rows(strength)}
        self._apply(steerings, strengths)
        self._prove(steering.name)

    def remove(self, name: str) -> None:
        """Take a steering off."""
        self._known(name)
        keep = [other for other in self.steerings if other != name]
        self._apply(
            {other: self.steerings[other] for other in keep},
            {other: self.strengths[other] for other in keep},
        )

    def set_strengths(self, strengths: Mapping[str, Strength]) -> None:
        """Set the strength of the named steerings, in place; all or none."""
        for name in strengths:
            self._known(name)
        rows = {name: as_rows(strength) for name, strength in strengths.items()}
        self._apply(self.steerings, {**self.strengths, **rows})

    @contextmanager
    def at(self, strengths: Mapping[str, Strength]) -> Iterator[None]:
        """Other strengths inside the block, then as before."""
        before = dict(self.strengths)
        self.set_strengths(strengths)
        try:
            yield
        finally:
            self.set_strengths({n: before[n] for n in strengths if n in self.strengths})

    @property
    def buffer_bytes(self) -> int:
        """Memory that steering takes: the bytes of its buffers."""
        edits = (steered.edit for steered in self.routers.values())
        tensors = (part for edit in edits for part in edit if isinstance(part, Tensor))
        return sum(tensor.nbytes for tensor in tensors)

    def _prove(self, name: str) -> None:
        """Prove the edit, or take it off again. Without weights only the fit is known."""
        self._meta = is_meta(self.model)
        proved = self._meta
        try:
            if not proved:
                prove(self.model, self.routers)
            proved = True
        finally:
            if not proved:
                self.remove(name)
        for steered in self.routers.values():
            steered.fired = False
        self._fired = False

    def _known(self, name: str) -> None:
        if name not in self.steerings:
            raise SteeringError(
                f"no steering named {name!r} is attached; there is {', '.join(self.steerings)}"
            )

    def _apply(
        self, steerings: Mapping[str, RouterSteering], strengths: Mapping[str, Tensor]
    ) -> None:
        """Work all numbers out first, so that what is refused changes nothing; then write them."""
        tables = combine(steerings, strengths)
        for layer, parts in tables.items():
            check_force(parts.get("force"), layer, self.shape.top_k[layer])
        self.steerings, self.strengths = dict(steerings), dict(strengths)
        self.rows = max([len(rows) for rows in strengths.values()], default=1)
        for layer in [layer for layer in self.routers if layer not in tables]:
            self.routers.pop(layer).unwrap()
        for layer, parts in tables.items():
            if layer not in self.routers:
                self.routers[layer] = SteeredRouter(self.shape.routers[layer])
            self.routers[layer].write(parts)
        self._hook() if tables else self._unhook()

    def _hook(self) -> None:
        if not self._hooks:
            setattr(self.model, _ATTRIBUTE, self)
            before = self.model.register_forward_pre_hook(self._check_before, with_kwargs=True)
            self._hooks = [before, self.model.register_forward_hook(self._check_fired)]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.model.__dict__.pop(_ATTRIBUTE, None)

    def _check_before(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Rows of a batch are repeated evenly, as generate repeats prompts for beams."""
        if self._meta:
            raise InterventionError(
                "steering was attached while the model was on the meta device, so its numbers "
                "went with the weights; remove it, and attach it after loading"
            )
        if self.rows == 1:
            return
        values = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batches = [value.shape[0] for value in values if isinstance(value, Tensor)]
        batch = batches[0] if batches else self.rows
        if batch % self.rows:
            raise SteeringError(
                f"strength has {self.rows} rows but the batch has {batch}; give one per row of the "
                "batch, or a single number"
            )

    def _check_fired(self, model: nn.Module, args: Any, output: Any) -> None:
        """After the first eager forward every steered router must have run the edit."""
        if torch.compiler.is_compiling() or self._fired:
            return
        silent = [s.router.path for s in self.routers.values() if not s.fired]
        if silent:
            raise InterventionError(
                f"{len(silent)} steered routers were bypassed, the first is {silent[0]!r}: "
                "something computes routing without them (use_kernels=True, native MXFP4). "
                "Load without kernels, or with Mxfp4Config(dequantize=True)"
            )
        self._fired = True
