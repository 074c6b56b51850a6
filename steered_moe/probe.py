"""Prove on the model itself that an edit of the logits reaches the selection of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.edit import Edit
from steered_moe.errors import InterventionError
from steered_moe.steered_router import SteeredRouter, execution_device


def is_meta(module: nn.Module) -> bool:
    """Whether a module has no weights yet (accelerate's offload does not count as that)."""
    return execution_device(module).type == "meta"


def prove(model: nn.Module, routers: Mapping[int, SteeredRouter], rows: int = 1) -> None:
    """Run two tokens through ``model`` and try each steered router on the states it really gets.

    Args:
        model: The steered model.
        routers: Layer -> steered router.
        rows: Rows of the batch that have a strength of their own.

    Raises:
        InterventionError: An edit that misses the logits, or does not change what the router
            hands on, or a force that is not obeyed; names the router.
    """
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        for steered in routers.values():
            hook = steered.router.module.register_forward_pre_hook(
                partial(_try, steered), with_kwargs=True
            )
            stack.callback(hook.remove)
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        first = embedding if any(True for _ in embedding.parameters()) else model  # a later stage
        tokens = torch.tensor([[1, 2]] * rows, device=execution_device(first))
        model(input_ids=tokens, use_cache=False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _try(steered: SteeredRouter, module: nn.Module, args: Any, kwargs: Any) -> None:
    router, device = steered.router, execution_device(module)
    slope = torch.linspace(-8, 8, router.weight_shape[0], device=device).unsqueeze(0)
    scope, up = steered.run(Edit(router.num_experts, none=slope), args, kwargs)
    if scope.products != 1:
        raise InterventionError(
            f"router {router.path!r} ({type(module).__name__}) makes its logits in a way that is "
            f"not seen ({scope.products} products with its weight); is its linear layer quantized "
            "or replaced? Keep routers in 16 bit"
        )
    _, down = steered.run(Edit(router.num_experts, none=-slope), args, kwargs)
    if all(map(_same, up, down)):
        raise InterventionError(
            f"router {router.path!r} ({type(module).__name__}) selects the same experts with the "
            "same weights whatever its logits are; it cannot be steered"
        )
    if steered.edit.force is not None:
        _try_force(steered, args, kwargs)


def _try_force(steered: SteeredRouter, args: Any, kwargs: Any) -> None:
    """Ban all experts but the last top-k ones: the selection must be these."""
    router = steered.router
    first = router.num_experts - router.top_k
    force = torch.zeros(1, router.weight_shape[0], dtype=torch.int8)
    force[:, :first] = -1
    device = execution_device(router.module)
    scope, _ = steered.run(Edit(router.num_experts, force=force.to(device)), args, kwargs)
    if not scope.selected or any(bool((i < first).any()) for i in scope.selected):
        raise InterventionError(
            f"router {router.path!r} ({type(router.module).__name__}) does not obey forced and "
            "banned experts; use a steering without force"
        )


def _same(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)
