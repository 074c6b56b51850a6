"""Checks around each forward pass of a steered model, so that nothing goes wrong silently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.errors import InterventionError, SteeringError
from steered_moe.steered_router import SteeredRouter


class Guard:
    """Two hooks on the decoder, the module that runs the layers however the model is called.

    Args:
        decoder: The module.
        routers: Layer -> steered router; may change while the guard stands.
        rewrite: Called when the numbers of steering were cast along with the model.

    Attributes:
        rows: 1, or the number of batch rows that have a strength of their own.
        meta: Whether steering was attached while there were no weights.
        fired: Whether an eager forward has shown that no steered router is bypassed.
    """

    def __init__(
        self,
        decoder: nn.Module,
        routers: Mapping[int, SteeredRouter],
        rewrite: Callable[[], None],
    ) -> None:
        self.decoder, self.routers, self._rewrite = decoder, routers, rewrite
        self.rows, self.meta, self.fired = 1, False, False
        self._hooks: list[Any] = []

    def stand(self) -> None:
        """Put the hooks on, unless they are."""
        if not self._hooks:
            before = self.decoder.register_forward_pre_hook(self._before, with_kwargs=True)
            self._hooks = [before, self.decoder.register_forward_hook(self._after)]

    def leave(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def expect(self) -> None:
        """From the next forward on, every steered router has to run its edit once more."""
        self.fired = False
        for steered in self.routers.values():
            steered.fired = False

    def _before(self, decoder: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.meta:
            raise InterventionError(
                "steering was attached while the model was on the meta device, so its numbers "
                "went with the weights; remove it, and attach it after loading"
            )
        if not torch.compiler.is_compiling() and self._is_cast():
            self._rewrite()
        if self.rows > 1:
            self._check_batch((*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")))

    def _is_cast(self) -> bool:
        """Casting a model casts all of it, so one router tells."""
        first = next(iter(self.routers.values()), None)
        return first is not None and first.cast

    def _check_batch(self, values: tuple[Any, ...]) -> None:
        """Rows of a batch are repeated evenly, as generate repeats prompts for beams."""
        batches = [value.shape[0] for value in values if isinstance(value, Tensor)]
        if batches and batches[0] % self.rows:
            raise SteeringError(
                f"strength has {self.rows} rows but the batch has {batches[0]}; give one per row "
                "of the batch, or a single number"
            )

    def _after(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self.fired:
            return
        silent = [s.router.path for s in self.routers.values() if not s.fired]
        if silent:
            raise InterventionError(
                f"{len(silent)} steered routers were bypassed, the first is {silent[0]!r}: "
                "something computes routing without them (use_kernels=True, native MXFP4). "
                "Load without kernels, or with Mxfp4Config(dequantize=True)"
            )
        self.fired = True
