"""Attach steerings to a model, change their strength, take them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from steered_moe.combining import combine
from steered_moe.errors import SteeringError
from steered_moe.fit import ModelShape, check_fit, check_force
from steered_moe.guard import Guard
from steered_moe.probe import is_meta, prove
from steered_moe.routers import decoder, find_routers
from steered_moe.steered_router import SteeredRouter, check_free
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
    intervention = attach_all(model, [steering], [strength])
    return SteeringHandle(intervention, steering.name)


def attach_all(
    model: nn.Module, steerings: Sequence[RouterSteering], strengths: Sequence[Strength]
) -> Intervention:
    """Attach several steerings at once, all or none; see `attach`."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    intervention = attached(model) or Intervention(model)
    intervention.add(steerings, strengths)
    return intervention


def attached(model: nn.Module) -> Intervention | None:
    """Everything that `attach` put on ``model``, or None."""
    return getattr(getattr(model, "_orig_mod", model), _ATTRIBUTE, None)


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
        return as_given(self._intervention.strength(self.name))

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
    """

    def __init__(self, model: nn.Module) -> None:
        routers = find_routers(model)
        self.model = model
        self.shape = ModelShape.of(routers, model)
        self.steerings: dict[str, RouterSteering] = {}
        self.strengths: dict[str, Tensor] = {}
        self.routers: dict[int, SteeredRouter] = {}
        self._guard = Guard(decoder(model, routers), self.routers, self._rewrite)

    def add(self, steerings: Sequence[RouterSteering], strengths: Sequence[Strength]) -> None:
        """See `attach`; steerings that are refused leave the model as it was."""
        all_steerings, all_strengths = dict(self.steerings), dict(self.strengths)
        for steering, strength in zip(steerings, strengths, strict=True):
            if not isinstance(steering, RouterSteering):
                raise SteeringError(f"{steering!r} is no RouterSteering; load one with its .load")
            if steering.name in all_steerings:
                raise SteeringError(
                    f"a steering named {steering.name!r} is attached already; remove it, or "
                    "rename one with dataclasses.replace(steering, name=...)"
                )
            check_fit(steering, self.shape, self.model)
            all_steerings[steering.name] = steering
            all_strengths[steering.name] = as_rows(strength)
        self._change(all_steerings, all_strengths)

    def remove(self, name: str) -> None:
        """Take a steering off."""
        self.strength(name)
        keep = [other for other in self.steerings if other != name]
        self._apply(
            {other: self.steerings[other] for other in keep},
            {other: self.strengths[other] for other in keep},
        )

    def strength(self, name: str) -> Tensor:
        """Strength of a steering, float32 ``(rows,)``.

        Raises:
            SteeringError: No such steering is attached.
        """
        if name not in self.strengths:
            names = ", ".join(self.steerings) or "none"
            raise SteeringError(f"no steering named {name!r} is attached; there is {names}")
        return self.strengths[name]

    def set_strengths(self, strengths: Mapping[str, Strength]) -> None:
        """Set the strength of the named steerings, in place; all or none."""
        for name in strengths:
            self.strength(name)
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

    def _change(
        self, steerings: Mapping[str, RouterSteering], strengths: Mapping[str, Tensor]
    ) -> None:
        """Apply and prove, or go back. Without weights only the fit is known."""
        before = (self.steerings, self.strengths)
        self._apply(steerings, strengths)
        self._guard.meta = is_meta(self.model)
        proved = self._guard.meta
        try:
            if not proved:
                prove(self.model, self.routers, self._guard.rows)
            proved = True
        finally:
            if not proved:
                self._apply(*before)
        self._guard.expect()

    def _rewrite(self) -> None:
        self._apply(self.steerings, self.strengths)

    def _apply(
        self, steerings: Mapping[str, RouterSteering], strengths: Mapping[str, Tensor]
    ) -> None:
        """Work all numbers out first, so that what is refused changes nothing; then write them."""
        tables = combine(steerings, strengths)
        tables = {k: parts for k, parts in tables.items() if k not in self.shape.elsewhere}
        for layer, parts in tables.items():
            check_force(parts.get("force"), layer, self.shape.top_k[layer])
            if layer not in self.routers:
                check_free(self.shape.routers[layer])
        self.steerings, self.strengths = dict(steerings), dict(strengths)
        for layer in [layer for layer in self.routers if layer not in tables]:
            self.routers.pop(layer).unwrap()
        for layer, parts in tables.items():
            if layer not in self.routers:
                self.routers[layer] = SteeredRouter(self.shape.routers[layer])
            self.routers[layer].write(parts)
        self._register(max((len(rows) for rows in strengths.values()), default=1))

    def _register(self, rows: int) -> None:
        self._guard.rows = rows
        if self.steerings:
            setattr(self.model, _ATTRIBUTE, self)
            self._guard.stand()
        elif attached(self.model) is self:
            self._guard.leave()
            delattr(self.model, _ATTRIBUTE)
