"""What routing really did in a model, read at the experts' door and not from any library.

Layers are named by the index of their decoder layer. `columns` is the number of choices a router
has: its experts, and the slots without weights that some models add (longcat_flash, zaya).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROUTER_NAMES = ("router", "gate")

# A block of experts without a child called "experts".
BLOCKS = {"JetMoeMoE"}

# Where a router keeps its number of columns; the first attribute that exists is the one.
# longcat_flash and zaya count their extra slots in the first two.
COLUMNS = (
    "num_router_classes",
    "n_routed_experts",
    "num_experts",
    "out_features",
    "layer.out_features",
    "proj.out_features",
)


@dataclass(frozen=True)
class Observation:
    """The routing of one layer: which column is used for which token, and with what weight.

    selected: bool [tokens, columns]
    weights: float [tokens, columns], zero where nothing is selected
    """

    selected: Tensor
    weights: Tensor


@torch.no_grad()
def observe(model: nn.Module, **inputs: Any) -> dict[int, Observation]:
    """Run the model once and report, layer by layer, the routing that its experts were given."""
    seen: dict[int, Observation] = {}
    with ExitStack() as spies:
        for layer, block in _blocks(model).items():
            spies.enter_context(_spy(block)(block, partial(seen.__setitem__, layer)))
        model(**inputs)
    return seen


@torch.no_grad()
def raw_logits(model: nn.Module, **inputs: Any) -> dict[int, Tensor]:
    """Run a model that is not steered once and return its router logits [tokens, columns].

    They are float, before any soft-cap, softmax or sigmoid. Layers whose router does not choose
    by logits (the hash layers of deepseek_v4) are left out. The shared experts of inkling_text
    have logits too; these are the columns after the last one that can be selected.
    """
    seen: dict[int, Tensor] = {}
    with ExitStack() as spies:
        for layer, block in _blocks(model).items():
            if not hasattr(_router(block), "tid2eid"):
                report = partial(seen.__setitem__, layer)
                spies.enter_context(_spy_on_logits(_router(block), report))
        model(**inputs)
    return seen


def _blocks(model: nn.Module) -> dict[int, nn.Module]:
    """Find the blocks that hold a router and its experts, by decoder layer."""
    named = {name: module for name, module in model.named_modules() if _is_block(module)}
    if not named:
        raise ValueError(f"no router was found in {type(model).__name__}")
    return {_decoder_layer(name): block for name, block in named.items()}


def _decoder_layer(name: str) -> int:
    """Return the first number in the dotted name of a module."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _is_block(module: nn.Module) -> bool:
    """Tell whether a module holds a router next to its experts."""
    children = dict(module.named_children())
    has_experts = "experts" in children or type(module).__name__ in BLOCKS
    return has_experts and any(name in children for name in ROUTER_NAMES)


def _router(block: nn.Module) -> nn.Module:
    """Return the router of a block."""
    children = dict(block.named_children())
    return next(children[name] for name in ROUTER_NAMES if name in children)


def _columns(router: nn.Module) -> int:
    """Return the number of columns among which a router selects."""
    for name in COLUMNS:
        try:
            return int(attrgetter(name)(router))
        except AttributeError:
            continue
    raise ValueError(f"the number of columns of {type(router).__name__} is not known")


# Observing: a spy is active within a `with` block and hands each Observation to `report`.
Report = Callable[[Observation], None]
Spy = AbstractContextManager[Any]


def _spy_on_experts(block: nn.Module, report: Report) -> Spy:
    """Read the indices and weights [tokens, k] that a block passes to its experts."""
    columns = _columns(_router(block))

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, index, weights = (*args, *kwargs.values())
        report(_dense(index, weights, columns))

    return block.get_submodule("experts").register_forward_pre_hook(hook, with_kwargs=True)


def _spy_on_zaya(block: nn.Module, report: Report) -> Spy:
    """Read what reaches the experts, and put masked slots back in the column of the skip expert.

    The router turns a skipped token into expert 0 with weight zero. That is no choice of expert 0:
    its weight would be the softmax of the logits, which is zero only in underflow.
    """

    def restore(observed: Observation) -> None:
        skipped = observed.weights.sum(-1) == 0
        selected = observed.selected.clone()
        selected[:, 0] &= ~skipped
        selected[:, -1] |= skipped
        report(Observation(selected, observed.weights))

    return _spy_on_experts(block, restore)


def _spy_on_dense_scores(block: nn.Module, report: Report) -> Spy:
    """Read the scores [tokens, columns] of llama4, zero for the experts that are not selected.

    They multiply what goes into the experts, not what comes out.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        report(Observation(output[0] > 0, output[0]))

    return _router(block).register_forward_hook(hook)


def _spy_on_sorted_tokens(block: nn.Module, report: Report) -> Spy:
    """Read the assignments of jetmoe: tokens and gates sorted by expert, tokens per expert."""

    def hook(_: nn.Module, args: tuple[Tensor], output: tuple[Any, ...]) -> None:
        _, tokens, gates, sizes, _ = output
        counts = torch.tensor(sizes, device=tokens.device)
        experts = torch.arange(len(sizes), device=tokens.device).repeat_interleave(counts)
        weights = gates.new_zeros(len(args[0]), len(sizes))
        weights[tokens, experts] = gates
        report(Observation(_marked(weights, (tokens, experts)), weights))

    return _router(block).register_forward_hook(hook)


@contextmanager
def _spy_on_inner_choice(block: nn.Module, report: Report) -> Iterator[None]:
    """Read the choice that the experts of aria_text make themselves before transformers 5.19."""
    experts: Any = block.get_submodule("experts")
    columns = _columns(_router(block))
    choose = experts.route_tokens_to_experts

    def spy(logits: Tensor) -> tuple[Tensor, Tensor]:
        index, weights = choose(logits)
        report(_dense(index, weights, columns))
        return index, weights

    experts.route_tokens_to_experts = spy
    try:
        yield
    finally:
        del experts.route_tokens_to_experts


_SPIES: dict[str, Callable[[nn.Module, Report], Spy]] = {
    "ZayaSparseMoeBlock": _spy_on_zaya,
    "Llama4TextMoe": _spy_on_dense_scores,
    "JetMoeMoE": _spy_on_sorted_tokens,
}


def _spy(block: nn.Module) -> Callable[[nn.Module, Report], Spy]:
    """Return the spy that understands how the experts of a block are called."""
    if hasattr(getattr(block, "experts", None), "route_tokens_to_experts"):
        return _spy_on_inner_choice
    return _SPIES.get(type(block).__name__, _spy_on_experts)


def _dense(index: Tensor, weights: Tensor, columns: int) -> Observation:
    """Spread indices and weights [tokens, k] over all columns."""
    spread = weights.new_zeros(len(index), columns).scatter_add(1, index, weights)
    chosen = torch.zeros_like(spread, dtype=torch.bool).scatter(1, index, True)
    return Observation(chosen, spread)


def _marked(like: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
    """Return a bool tensor in the shape of another one, true at some places."""
    marked = torch.zeros_like(like, dtype=torch.bool)
    marked[where] = True
    return marked


# Raw logits: read from the router's output, or computed from its input where the output has none.
def _spy_on_logits(router: nn.Module, report: Callable[[Tensor], None]) -> Spy:
    """Report the raw logits of a router as long as the returned context is active."""
    read = _READERS.get(type(router).__name__, _recorded)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        report(read(router, args[0].flatten(0, -2), output).float())

    return router.register_forward_hook(hook)


def _recorded(router: Any, hidden: Tensor, output: Any) -> Tensor:
    """Take the logits from a router's output: the last tensor [tokens, columns] in it."""
    items = (output,) if isinstance(output, Tensor) else output
    shape = (len(hidden), _columns(router))
    return [item for item in items if isinstance(item, Tensor) and item.shape == shape][-1]


def _projected(router: Any, hidden: Tensor, output: Any) -> Tensor:
    """Compute the logits in the dtype of the model."""
    return functional.linear(hidden, router.weight)


def _projected_in_float32(router: Any, hidden: Tensor, output: Any) -> Tensor:
    """Compute the logits in float32, with those of shared experts."""
    weight = getattr(router, "classifier", router).weight
    return functional.linear(hidden.float(), weight.float())


def _projected_after_norm(router: Any, hidden: Tensor, output: Any) -> Tensor:
    """Compute the logits of gemma4, whose router records probabilities."""
    scaled = router.norm(hidden) * router.scale * router.scalar_root_size
    return functional.linear(scaled, router.proj.weight)


_READERS: dict[str, Callable[[Any, Tensor, Any], Tensor]] = {
    "Gemma4TextRouter": _projected_after_norm,
    "InklingTopkRouter": _projected_in_float32,
    "LagunaTopKRouter": _projected,
    "LongcatFlashTopkRouter": _projected_in_float32,
}
