"""The edit itself: arithmetic on router logits, and the scope in which a router feels it.

A router computes logits with one matrix product and picks experts with ``topk`` (or ``max``). Both
operations are seen through a `torch.overrides.TorchFunctionMode` that is active only inside the
router's own forward, so no routing code of any architecture is copied here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

BAN_MARGIN = 1.0
"""A banned logit lies this far below the token's minimum. SteerMoE uses 0.01 (2509.09660 Eq. 8),
which vanishes in bfloat16 at magnitudes above 4; selection is decided by rank in any case."""


class Edit(NamedTuple):
    """The edit of one router, strength included; each tensor is ``(rows, columns)`` or None.

    ``rows`` is 1, or one per row of the batch. ``columns`` is the width of the router's logits,
    which exceeds ``experts`` where a router also scores shared experts: those stay as they are.

    Args:
        experts: Number of columns that can be selected.
        std: float32 coefficients of the token's standard deviation (2510.04694 Eq. 4).
        abs: float32 coefficients of ``|z|`` (released code of 2601.14050).
        none: float32 numbers that are added.
        force: int8 of +1 (selected for every token), -1 (never selected), 0.
    """

    experts: int
    std: Tensor | None = None
    abs: Tensor | None = None
    none: Tensor | None = None
    force: Tensor | None = None

    @property
    def rows(self) -> int:
        """1, or the number of batch rows that have a strength of their own."""
        present = (t for t in (self.std, self.abs, self.none, self.force) if t is not None)
        return next((int(t.shape[0]) for t in present), 1)

    def logits(self, logits: Tensor) -> Tensor:
        """Edited router logits: soft part first, then force, in float32, cast back.

        The standard deviation is the population one (``correction=0``). The paper does not say
        which it uses; the population one is what the only re-implementation that cites its
        equations uses, and it stays defined for any number of experts.

        Args:
            logits: ``(tokens, columns)`` or ``(batch, positions, columns)``, before softmax.

        Returns:
            Same shape and dtype, finite where ``logits`` are: what would leave the range of the
            dtype ends at its border. Where all coefficients are 0 the values are those of
            ``logits``.
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        z = logits.to(wide).reshape(self.rows, -1, logits.shape[-1])
        edited = z
        if self.std is not None:
            spread = z[..., : self.experts].std(dim=-1, keepdim=True, correction=0)
            edited = torch.addcmul(edited, self.std.unsqueeze(1).to(wide), spread)
        if self.abs is not None:
            edited = torch.addcmul(edited, self.abs.unsqueeze(1).to(wide), z.abs())
        if self.none is not None:
            edited = edited + self.none.unsqueeze(1).to(wide)
        if edited is not z:
            edited = edited.clamp(-torch.finfo(logits.dtype).max, torch.finfo(logits.dtype).max)
        if self.force is not None:
            edited = self._forced(edited, self.force.unsqueeze(1))
        return edited.reshape(logits.shape).to(logits.dtype)

    def _forced(self, z: Tensor, force: Tensor) -> Tensor:
        routed = z[..., : self.experts]
        highest = routed.amax(dim=-1, keepdim=True)
        lowest = routed.amin(dim=-1, keepdim=True) - BAN_MARGIN
        return torch.where(force > 0, highest, torch.where(force < 0, lowest, z))

    def ranked(self, scores: Tensor) -> Tensor:
        """``scores`` with forced experts above all others and banned ones below.

        A score of -inf marks an expert that a router has already taken (sparsemixer picks one
        expert at a time), so it stays at -inf.
        """
        if self.force is None:
            return scores
        force = self.force[:, None, : self.experts]
        rows = scores.reshape(self.rows, -1, self.experts)
        wanted = (force > 0) & (rows > -torch.inf)
        ranked = torch.where(wanted, torch.inf, torch.where(force < 0, -torch.inf, rows))
        return ranked.reshape(scores.shape)

    def unmasked(self, mask: Tensor) -> Tensor:
        """A group mask (True = dropped) that spares the forced experts."""
        if self.force is None:
            return mask
        force = self.force[:, None, : self.experts]
        rows = mask.reshape(self.rows, -1, self.experts)
        return (rows & (force <= 0)).reshape(mask.shape)


class RouterScope(TorchFunctionMode):
    """Applies one `Edit` while a router runs, and notes what it saw.

    Args:
        edit: What to do.
        weight_shape: ``(columns, features)`` of the router's weight: the product with it is the
            one that makes the logits.

    Attributes:
        leading: Leading shape of the logits, known once they are made; set it where they were
            made outside this scope.
        products: How many products made logits; anything but 1 means that the edit missed.
        logits: Router logits after the edit, once they are made.
        selected: Indices that each selecting operation returned, in order.
    """

    def __init__(self, edit: Edit, weight_shape: tuple[int, int]) -> None:
        super().__init__()
        self.edit = edit
        self.weight_shape = weight_shape
        self.leading: tuple[int, ...] | None = None
        self.products = 0
        self.logits: Tensor | None = None
        self.selected: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(self, func, args, kwargs or {})

    def _scores_experts(self, tensor: Any) -> bool:
        """Whether ``tensor`` holds one score per selectable expert of each token."""
        shape = (*(self.leading or ()), self.edit.experts)
        return isinstance(tensor, Tensor) and self.leading is not None and tensor.shape == shape

    def _product(self, func: Callable[..., Any], args: Any, kwargs: Any, transposed: bool) -> Any:
        result = func(*args, **kwargs)
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        columns, features = self.weight_shape
        expected = (features, columns) if transposed else (columns, features)
        if not isinstance(weight, Tensor) or weight.shape != expected:
            return result
        self.products += 1
        self.leading = result.shape[:-1]
        self.logits = self.edit.logits(result)
        return self.logits

    def linear(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``F.linear(hidden, weight)``."""
        return self._product(func, args, kwargs, transposed=False)

    def matmul(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``hidden @ weight.t()``."""
        return self._product(func, args, kwargs, transposed=True)

    def select(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``topk`` or ``max``: the choice goes by rank, the values stay the router's own."""
        scores, over = (*args, None, None)[:2]
        if not self._scores_experts(scores) or isinstance(over, Tensor):
            return func(*args, **kwargs)
        result = func(self.edit.ranked(scores), *args[1:], **kwargs)
        if isinstance(result, Tensor):  # `max` over everything: a number, not a choice
            return func(*args, **kwargs)
        self.selected.append(result[1])
        if self.edit.force is None:
            return result
        return type(result)((_gather(scores, result[1]), result[1]))

    def mask(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``masked_fill`` of a group limit: forced experts are spared, -inf becomes the lowest
        finite number so that experts of dropped groups still rank above banned ones."""
        if self.edit.force is None or not self._scores_experts(args[0]) or len(args) < 3:
            return func(*args, **kwargs)
        scores, mask, fill = args
        if fill == -torch.inf:
            fill = torch.finfo(scores.dtype).min
        return func(scores, self.edit.unmasked(mask), fill)


def _gather(scores: Tensor, indices: Tensor) -> Tensor:
    """Scores at ``indices``, which lack the last dimension when ``max`` did not keep it."""
    if indices.dim() == scores.dim():
        return scores.gather(-1, indices)
    return scores.gather(-1, indices.unsqueeze(-1)).squeeze(-1)


_HANDLERS: Mapping[Any, Callable[..., Any]] = {
    functional.linear: RouterScope.linear,
    torch.mm: RouterScope.matmul,
    torch.matmul: RouterScope.matmul,
    torch.topk: RouterScope.select,
    Tensor.topk: RouterScope.select,
    torch.max: RouterScope.select,
    Tensor.max: RouterScope.select,
    torch.masked_fill: RouterScope.mask,
    Tensor.masked_fill: RouterScope.mask,
}
