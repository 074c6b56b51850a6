"""See which experts are selected, and from which logits, on any model, steered or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.edit import Edit, RouterScope
from steered_moe.routers import Router, find_routers
from steered_moe.steered_router import Entry, current_edit, is_steered

Selections = dict[int, list[Tensor]]
"""Layer -> one int64 ``(tokens, top_k)`` tensor of expert indices per forward pass."""


@dataclass(frozen=True)
class Routing:
    """What one router did in one forward pass.

    Args:
        selected: int64 ``(tokens, top_k)``, the selected experts; tokens in order of the batch.
        weights: ``(tokens, top_k)``, the routing weights of these experts, in the same order.
        probabilities: float32 ``(tokens, experts)``, softmax of the logits over all experts.
    """

    selected: Tensor
    weights: Tensor
    probabilities: Tensor


class _Watcher:
    """Puts together what the entries of one router show, which may be two methods."""

    def __init__(self, router: Router, see: Callable[[Router, Routing], None]) -> None:
        self.router = router
        self.see = see
        self.logits: Tensor | None = None
        # A steering that is attached already edits the logits inside of what is watched here; one
        # that comes later edits them outside, so that they arrive edited.
        self.edited_inside = is_steered(router)

    def call(self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        scope = RouterScope(Edit(self.router.num_experts), self.router.weight_shape)
        if name != "forward":
            scope.leading = args[-1].shape[:-1]
        with scope:
            output = original(*args, **kwargs)
        self.logits = self.logits if scope.logits is None else scope.logits
        if scope.selected and self.logits is not None:
            self._show(self.logits, scope.selected, output)
        return output

    def forget(self) -> None:
        """Let go of the last logits, which would live until Python looks for cycles."""
        self.logits = None

    def _show(self, logits: Tensor, picks: list[Tensor], output: Any) -> None:
        if self.edited_inside and is_steered(self.router):
            logits = current_edit(self.router).logits(logits)
        logits = logits.reshape(-1, logits.shape[-1])[:, : self.router.num_experts]
        selected = torch.cat([pick.reshape(len(logits), -1) for pick in picks], dim=-1)
        probabilities = torch.softmax(logits.float(), dim=-1)
        parts = output if isinstance(output, tuple) else (output,)
        handed_on = [part for i, part in enumerate(parts) if i != self.router.logits_index]
        self.see(
            self.router,
            Routing(selected, _weights(handed_on, selected, probabilities), probabilities),
        )


def _weights(parts: list[Any], selected: Tensor, probabilities: Tensor) -> Tensor:
    """The weights that a router handed on, or the probabilities where it hands on none."""
    floats = [p for p in parts if isinstance(p, Tensor) and p.is_floating_point()]
    for part in floats:
        if part.numel() == selected.numel():
            return part.reshape(selected.shape).float()
        if part.numel() == probabilities.numel():
            return part.reshape(probabilities.shape).float().gather(-1, selected)
    return probabilities.gather(-1, selected)


@contextmanager
def watch_routing(model: nn.Module, see: Callable[[Router, Routing], None]) -> Iterator[None]:
    """Call ``see(router, routing)`` after each router has run, in eager mode.

    On a steered model this is the routing after the edit. Nothing is kept here.

    Raises:
        RouterError: The model has no router that can be seen.
    """
    with ExitStack() as stack:
        for router in find_routers(model):
            watcher = _Watcher(router, see)
            stack.callback(watcher.forget)
            for module, name in router.entries:
                entry = Entry(module, name)
                entry.replace(partial(watcher.call, entry.original, name))
                stack.callback(entry.restore)
        yield


@contextmanager
def record_selections(model: nn.Module) -> Iterator[Selections]:
    """Record the experts that each router selects inside the block, in eager mode.

    On a steered model these are the experts after the edit.

    Raises:
        RouterError: The model has no router that can be seen.
    """
    selections: Selections = {}

    def keep(router: Router, routing: Routing) -> None:
        selections.setdefault(router.layer, []).append(routing.selected)

    with watch_routing(model, keep):
        yield selections
