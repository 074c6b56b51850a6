"""Strength: the number that turns a steering up, down or off, per batch or per row of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from steered_moe.errors import SteeringError

Strength = float | Sequence[float] | Tensor
"""One number for everything, or one per row of the batch (a sequence or a 1-D tensor)."""


def as_rows(strength: Strength) -> Tensor:
    """``strength`` as a float32 tensor ``(rows,)`` on the CPU; one row when it is a number.

    Raises:
        SteeringError: Not a number or a 1-D list of numbers, empty, or not finite.
    """
    if isinstance(strength, bool):
        raise SteeringError(f"strength is {strength}; give a number, 0 is off and 1 is full")
    try:
        with torch.inference_mode(False):
            rows = torch.as_tensor(strength, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SteeringError(
            f"strength is {strength!r}; give a number, or one number per row of the batch"
        ) from error
    if rows.dim() > 1 or rows.numel() == 0:
        raise SteeringError(
            f"strength has shape {tuple(rows.shape)}; give a number, or one per row of the batch"
        )
    if not torch.isfinite(rows).all():
        raise SteeringError(f"strength is {strength!r}; it must be finite")
    return rows.reshape(-1).clone()


def as_given(rows: Tensor) -> float | Tensor:
    """The inverse of `as_rows` for people: a float when one number holds for everything."""
    return float(rows) if len(rows) == 1 else rows.clone()


def by_name(
    strength: Strength | Mapping[str, Strength], names: Iterable[str]
) -> dict[str, Strength]:
    """One strength for each of ``names``, or those of a mapping.

    Raises:
        SteeringError: The mapping names a steering that is not there.
    """
    known = list(names)
    if not isinstance(strength, Mapping):
        return dict.fromkeys(known, strength)
    if unknown := sorted(set(strength) - set(known)):
        raise SteeringError(f"no steering named {unknown[0]!r}; there is {', '.join(known)}")
    return dict(strength)
