"""A router tried alone: a copy with random weights, random tokens, and what it hands on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.edit import RouterScope
from steered_moe.errors import RouterError
from steered_moe.routers import Router

_TOKENS = 64
_BIAS = 0.1  # so that a bias does not select alone


class Trial:
    """A copy of a router on the CPU, in float32.

    Args:
        router: Of a model with or without weights.
        seed: Of weights and tokens.

    Attributes:
        module: The copy; its weights may be changed.
    """

    def __init__(self, router: Router, seed: int = 0) -> None:
        self.router = router
        self.module: nn.Module = copy.deepcopy(router.module).to_empty(device="cpu").float().eval()
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            size = 1.0 if tensor.dim() > 1 else _BIAS
            tensor.data.copy_(size * torch.randn(tensor.shape, generator=generator))
        width = router.weight_shape[1]
        self.hidden = torch.randn(_TOKENS, width, generator=generator) / width**0.5

    @torch.no_grad()
    def weights(self, edit: Any = None) -> Tensor:
        """Routing weight of each expert for each token, ``(tokens, experts)``, 0 where it is not
        selected.

        Args:
            edit: An `Edit`, or what has its methods; none by default.

        Raises:
            RouterError: The router cannot be called with hidden states alone, or does not hand on
                experts and weights.
        """
        name = type(self.module).__name__
        try:
            if edit is None:
                output = self.module(self.hidden)
            else:
                with RouterScope(edit, self.router.weight_shape):
                    output = self.module(self.hidden)
        except (TypeError, RuntimeError) as error:
            raise RouterError(f"{name} cannot be tried alone: {error}") from error
        parts = output if isinstance(output, tuple) else (output,)
        handed_on = [part for i, part in enumerate(parts) if i != self.router.logits_index]
        return self._dense(handed_on)

    def _dense(self, parts: Sequence[Any]) -> Tensor:
        tensors = [part for part in parts if isinstance(part, Tensor)]
        whole = [part for part in tensors if part.numel() % _TOKENS == 0]
        selected = [part for part in whole if not part.is_floating_point()]
        for part in (part for part in whole if part.is_floating_point()):
            if selected and part.numel() == selected[0].numel():
                zeros = torch.zeros(_TOKENS, self.router.weight_shape[0])
                places = selected[0].reshape(_TOKENS, -1)
                return zeros.scatter_add(1, places, part.reshape(_TOKENS, -1).float())
            if not selected and part.numel() == _TOKENS * self.router.weight_shape[0]:
                return part.reshape(_TOKENS, -1).float()
        raise RouterError(f"{type(self.module).__name__} alone does not say what it selects")
