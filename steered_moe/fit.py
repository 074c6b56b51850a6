"""Whether a steering fits a model: layers, experts, top-k. Needs shapes only, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from steered_moe.errors import BaseModelError
from steered_moe.routers import Router, layer_of, num_layers, other_stages, unsteerable
from steered_moe.steering import RouterSteering


@dataclass(frozen=True)
class ModelShape:
    """What steering needs to know of a model.

    Args:
        num_layers: Number of decoder layers, with a router or without.
        routers: Layer -> router.
        refused: Layer -> why its router cannot be steered.
        elsewhere: Layers that other processes of a pipeline hold, and steer.
    """

    num_layers: int
    routers: Mapping[int, Router]
    refused: Mapping[int, str]
    elsewhere: frozenset[int] = frozenset()

    @classmethod
    def of(cls, routers: Sequence[Router], model: nn.Module) -> ModelShape:
        """The shape of ``model``, which may be on the meta device."""
        refused = {layer_of(path): f"{path}: {why}" for path, why in unsteerable(model).items()}
        by_layer = {router.layer: router for router in routers}
        elsewhere = other_stages(model, routers)
        return cls(num_layers(model, routers), by_layer, refused, elsewhere)

    @property
    def fields(self) -> dict[str, int]:
        """The sizes that a steering repo records (the largest one, should layers differ)."""
        return {
            "num_hidden_layers": self.num_layers,
            "num_experts": max(router.num_experts for router in self.routers.values()),
            "num_experts_per_tok": max(router.top_k for router in self.routers.values()),
        }

    @property
    def top_k(self) -> Mapping[int, int]:
        """Layer -> experts per token."""
        return {layer: router.top_k for layer, router in self.routers.items()}


def check_fit(steering: RouterSteering, shape: ModelShape, model: nn.Module) -> None:
    """Refuse a steering that does not fit.

    Raises:
        BaseModelError: A layer that does not exist or has no router, a wrong number of experts,
            more forced experts than top-k or too few left after bans; names layer and fix.
    """
    name = type(model).__name__
    for row, layer in enumerate(steering.layers.tolist()):
        if layer >= shape.num_layers:
            raise BaseModelError(
                f"{steering.name!r} steers layer {layer} but {name} has {shape.num_layers} layers "
                f"(0 to {shape.num_layers - 1}); it was made for another model"
            )
        if layer in shape.elsewhere:
            continue
        if layer not in shape.routers:
            reason = shape.refused.get(layer, "it is a dense layer without a router")
            raise BaseModelError(
                f"{steering.name!r} steers layer {layer} of {name}, which cannot be: {reason}; "
                "leave it out with steering.restrict(...)"
            )
        if steering.num_experts != shape.routers[layer].num_experts:
            raise BaseModelError(
                f"{steering.name!r} has {steering.num_experts} experts but layer {layer} of "
                f"{name} has {shape.routers[layer].num_experts}; it was made for another model"
            )
        force = None if steering.force is None else steering.force[row : row + 1]
        check_force(force, layer, shape.routers[layer].top_k)


def check_force(force: Tensor | None, layer: int, top_k: int) -> None:
    """Refuse force, int8 ``(rows, experts)``, that leaves no valid selection of ``top_k`` experts.

    Raises:
        BaseModelError: Names the layer.
    """
    if force is None:
        return
    forced = int((force > 0).sum(dim=1).max())
    left = force.shape[1] - int((force < 0).sum(dim=1).max())
    if forced > top_k:
        raise BaseModelError(
            f"layer {layer}: {forced} experts are forced but each token gets {top_k}; "
            f"force at most {top_k}"
        )
    if left < top_k:
        raise BaseModelError(
            f"layer {layer}: bans leave {left} experts but each token gets {top_k}; "
            f"ban at most {force.shape[1] - top_k}"
        )
