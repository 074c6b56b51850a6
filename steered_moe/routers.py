"""Find the routers of any Mixture-of-Experts model in transformers.

transformers itself says which module class of a model yields router logits, and at which place of
its output (the ``router_logits`` entry of ``_can_record_outputs``). Before transformers 5.19 some
models lack the entry; there the router is the module that stands beside the experts. What neither
says is held as data below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from steered_moe.errors import RouterError

UNSTEERABLE: Mapping[str, str] = MappingProxyType(
    {
        "DogeCDMoE": "doge looks experts up by product keys, so there is no logit per expert",
        "DeepseekV4HashRouter": "its experts are looked up by token id, logits only weigh them",
    }
)
"""Router classes that no edit of logits can steer, with the reason."""

SHARED_COLUMNS: Mapping[str, str] = MappingProxyType({"InklingTopkRouter": "n_shared_experts"})
"""Routers that also score shared experts: attribute that counts these last columns."""

SELECTING_METHOD = "route_tokens_to_experts"
"""Where a router returns logits only (dbrx), the method of its parent that picks the experts; the
logits are its last argument."""

BESIDE_EXPERTS = ("router", "gate")
"""Names of a router that stands beside a module called ``experts``."""

TOP_K = ("top_k", "top_k_experts", "num_experts_per_tok", "moe_topk")
"""Names under which a router, its parent or their config say how many experts a token gets."""

ELSEWHERE = "PipelineIdentityLayer"
"""Class that transformers puts in the place of a layer of another stage of a pipeline."""

ATTENTION = ("self_attn", "self_attention", "attention")
"""Routers below these modules pick attention experts (jetmoe); feed-forward ones are steered."""


@dataclass(frozen=True)
class Router:
    """One router of a model.

    Args:
        layer: 0-based decoder layer.
        path: Name of the module in the model.
        module: The module.
        parent: The module that calls it.
        num_experts: Number of columns that can be selected. Identity ("zero") experts of
            longcat_flash and the skip expert of zaya count, shared experts do not.
        top_k: How many of them each token gets.
        weight_shape: ``(columns, features)`` of the weight whose product makes the logits.
        logits_index: Where the logits stand in the module's output; None where nothing says so.
    """

    layer: int
    path: str
    module: nn.Module = field(repr=False)
    parent: nn.Module = field(repr=False)
    num_experts: int
    top_k: int
    weight_shape: tuple[int, int]
    logits_index: int | None

    @property
    def entries(self) -> list[tuple[nn.Module, str]]:
        """Methods in which logits are made or experts picked: module and name, forward first."""
        forward = (self.module, "forward")
        selects = hasattr(self.parent, SELECTING_METHOD)
        return [forward, (self.parent, SELECTING_METHOD)] if selects else [forward]


def find_routers(model: nn.Module) -> list[Router]:
    """The steerable routers of ``model``, one per decoder layer that has one, in layer order.

    Args:
        model: Any MoE that ``AutoModelForCausalLM`` can build; weights may be on any device.

    Raises:
        RouterError: The model has no router, or none that can be steered; says why.
    """
    if not isinstance(model, nn.Module):
        raise RouterError(f"{model!r} is no model; load one with AutoModelForCausalLM first")
    places = [*_recorded(model)] or [*_beside_experts(model)]
    found = [_describe(model, path, index) for path, index in places]
    if not found:
        reasons = [f"{path}: {reason}" for path, reason in unsteerable(model).items()]
        name = type(model).__name__
        raise RouterError(
            f"{name} cannot be steered; {reasons[0]}"
            if reasons
            else f"{name} has no router: it is a dense model. Load a Mixture-of-Experts model, "
            "one whose class records `router_logits` in transformers"
        )
    return sorted(found, key=lambda router: router.layer)


def unsteerable(model: nn.Module) -> dict[str, str]:
    """Module path -> reason, for the routers of ``model`` that no edit of logits can steer."""
    return {
        path: UNSTEERABLE[type(module).__name__]
        for path, module in model.named_modules()
        if type(module).__name__ in UNSTEERABLE
    }


def layer_of(path: str) -> int:
    """Decoder layer in a module path: the first number in it."""
    number = re.search(r"\.(\d+)\.", f".{path}.")
    if number is None:
        raise RouterError(f"router {path!r} is not inside a list of decoder layers")
    return int(number.group(1))


def num_layers(model: nn.Module, routers: Sequence[Router]) -> int:
    """Number of decoder layers: the length of the list of modules that holds the routers."""
    return len(model.get_submodule(_layer_list(routers)))  # type: ignore[arg-type]


def other_stages(model: nn.Module, routers: Sequence[Router]) -> frozenset[int]:
    """Decoder layers that other processes of a pipeline hold; here an identity stands for them."""
    layers: Any = model.get_submodule(_layer_list(routers))
    return frozenset(i for i, layer in enumerate(layers) if type(layer).__name__ == ELSEWHERE)


def decoder(model: nn.Module, routers: Sequence[Router]) -> nn.Module:
    """The module that holds the list of decoder layers, ``model`` itself or a part of it."""
    return model.get_submodule(_layer_list(routers).rpartition(".")[0])


def _layer_list(routers: Sequence[Router]) -> str:
    path = routers[0].path
    return path[: path.index(f".{routers[0].layer}.")]


def _recorded(model: nn.Module) -> Iterator[tuple[str, int | None]]:
    """Paths of the modules that transformers records router logits from, innermost only."""
    specs = [spec for sub in model.modules() for spec in _recorders(sub)]
    matches = {
        path: spec.index
        for path, module in model.named_modules()
        for spec in specs
        if isinstance(module, spec.target_class)
    }
    for path, index in matches.items():
        inner = any(other.startswith(f"{path}.") for other in matches)
        in_attention = any(part in ATTENTION for part in path.split("."))
        steerable = type(model.get_submodule(path)).__name__ not in UNSTEERABLE
        if steerable and not inner and not in_attention:
            yield path, index


def _recorders(module: nn.Module) -> list[Any]:
    """The `OutputRecorder`s of ``router_logits`` that a model class declares."""
    if not isinstance(module, PreTrainedModel):
        return []
    specs = (module._can_record_outputs or {}).get("router_logits", [])
    specs = specs if isinstance(specs, list) else [specs]
    targets = [(spec, getattr(spec, "target_class", None)) for spec in specs]
    return [spec for spec, target in targets if target not in (None, nn.Linear)]


def _beside_experts(model: nn.Module) -> Iterator[tuple[str, int | None]]:
    """Paths of the modules that stand beside experts under a router's name."""
    for path, module in model.named_modules():
        if hasattr(module, "experts") and type(module).__name__ not in UNSTEERABLE:
            for name in BESIDE_EXPERTS:
                if isinstance(getattr(module, name, None), nn.Module):
                    yield f"{path}.{name}", None


def _describe(model: nn.Module, path: str, index: int | None) -> Router:
    module = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    columns, features = _weight_shape(module, path)
    shared = getattr(module, SHARED_COLUMNS.get(type(module).__name__, ""), 0)
    return Router(
        layer=layer_of(path),
        path=path,
        module=module,
        parent=parent,
        num_experts=columns - shared,
        top_k=_top_k(module, parent, path),
        weight_shape=(columns, features),
        logits_index=index,
    )


def _weight_shape(module: nn.Module, path: str) -> tuple[int, int]:
    """Shape of the weight that makes the logits: the last matrix that the router registers.

    A matrix of one row is no weight (ernie4_5_moe keeps its correction bias in that shape).
    """
    matrices = [p for p in module.parameters() if p.dim() == 2 and p.shape[0] > 1]
    if not matrices:
        raise RouterError(f"router {path!r} ({type(module).__name__}) has no weight matrix")
    weight = matrices[-1]
    if not weight.is_floating_point():
        raise RouterError(
            f"router {path!r} is quantized ({weight.dtype}), which hides its logits; keep routers "
            f"in 16 bit, e.g. llm_int8_skip_modules=[{path.rpartition('.')[2]!r}, 'lm_head']"
        )
    return int(weight.shape[0]), int(weight.shape[1])


def _top_k(module: nn.Module, parent: nn.Module, path: str) -> int:
    configs = [getattr(holder, "config", None) for holder in (module, parent)]
    for holder in (module, parent, *configs):
        for name in TOP_K:
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    raise RouterError(f"router {path!r} ({type(module).__name__}) does not say how many it selects")
