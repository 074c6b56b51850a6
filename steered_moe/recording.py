"""See which experts are selected, on any model, steered or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.edit import Edit, RouterScope
from steered_moe.routers import Router, find_routers
from steered_moe.steered_router import Entry

Selections = dict[int, list[Tensor]]
"""Layer -> one int64 ``(tokens, top_k)`` tensor of expert indices per forward pass."""


@contextmanager
def record_selections(model: nn.Module) -> Iterator[Selections]:
    """Record the experts that each router selects inside the block, in eager mode.

    On a steered model these are the experts after the edit.

    Raises:
        RouterError: The model has no router that can be seen.
    """
    selections: Selections = {}
    with ExitStack() as stack:
        for router in find_routers(model):
            for module, name in router.entries:
                entry = Entry(module, name)
                entry.replace(partial(_watch, router, selections, entry.original, name))
                stack.callback(entry.restore)
        yield selections


def _watch(
    router: Router,
    selections: Selections,
    original: Callable[..., Any],
    name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    scope = RouterScope(Edit(router.num_experts), router.weight_shape)
    if name != "forward":
        scope.leading = args[-1].shape[:-1]
    with scope:
        output = original(*args, **kwargs)
    if scope.selected:
        picks = [indices.reshape(-1, indices.shape[-1]) for indices in scope.selected]
        selections.setdefault(router.layer, []).append(torch.cat(picks, dim=-1))
    return output
