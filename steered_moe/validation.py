"""Turn what people give for a steering into tensors of its own, or refuse it by value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import SteeringError

RESERVED = frozenset({"name", "scale", "strength", "layers"})
"""Fields of a steering's entry in ``config.json``; all others are its provenance."""

LISTS = frozenset({"languages", "corpora"})
"""Fields of provenance that are lists of texts."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,99}")


def check_name(name: str) -> None:
    """Refuse a name that cannot be a key of tensors on disk."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SteeringError(
            f"name is {str(name)[:200]!r}; use at most 100 letters, digits, '_', '-' and '+' "
            "(no dot, no space)"
        )


def _as_tensor(value: Tensor | Sequence[Any], what: str) -> Tensor:
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SteeringError(f"{what} is not a tensor: {error}") from error


def as_layers(value: Tensor | Sequence[int]) -> Tensor:
    """Layers as int64 ``(rows,)``: at least one, none negative, none twice."""
    layers = _as_tensor(value, "layers")
    whole = not (layers.is_floating_point() or layers.is_complex() or layers.dtype == torch.bool)
    if layers.dim() != 1 or len(layers) == 0 or not whole:
        raise SteeringError(
            f"layers have dtype {layers.dtype} and shape {tuple(layers.shape)}; "
            "give at least one whole number, as a list or an int64 tensor"
        )
    layers = layers.to(torch.int64)
    if int(layers.min()) < 0:
        raise SteeringError(f"layer {int(layers.min())} is negative; layers are counted from 0")
    found, count = torch.unique(layers, return_counts=True)
    if int(count.max()) > 1:
        raise SteeringError(f"layer {int(found[count.argmax()])} appears twice; give it one row")
    return layers.clone()


def as_weights(value: Tensor | Sequence[Any]) -> Tensor:
    """Weights as finite float32 ``(rows, experts)``."""
    weights = _as_tensor(value, "weights")
    if weights.dim() != 2 or weights.shape[1] == 0 or weights.is_complex():
        raise SteeringError(
            f"weights have dtype {weights.dtype} and shape {tuple(weights.shape)}; "
            "expected real numbers of shape (rows, experts)"
        )
    weights = weights.to(torch.float32)
    bad = (~torch.isfinite(weights)).nonzero()
    if len(bad):
        row, expert = bad[0].tolist()
        raise SteeringError(
            f"weights[{row}, {expert}] is {weights[row, expert].item()}; all must be finite"
        )
    return weights.clone()


def as_force(value: Tensor | Sequence[Any], weights: Tensor) -> Tensor:
    """Force as int8 of -1, 0, +1 in the shape of ``weights``."""
    force = _as_tensor(value, "force")
    if force.shape != weights.shape:
        raise SteeringError(
            f"force has shape {tuple(force.shape)} but weights have {tuple(weights.shape)}; "
            "they must agree"
        )
    wrong = ~torch.isin(force, torch.tensor([-1, 0, 1], dtype=force.dtype))
    if wrong.any():
        raise SteeringError(f"force holds {force[wrong][0].item()}; use -1, 0 or +1")
    return force.to(torch.int8)


def as_provenance(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of JSON values under names that the file format leaves free."""
    try:
        copy = json.loads(json.dumps(dict(value or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SteeringError(f"provenance is not JSON: {error}") from error
    if not isinstance(copy, dict):
        raise SteeringError("provenance must be a mapping of names to JSON values")
    if taken := sorted(RESERVED & set(copy)):
        raise SteeringError(f"provenance holds {taken[0]!r}, a field of the steering itself")
    for key in LISTS & set(copy):
        if not isinstance(copy[key], list) or not all(isinstance(x, str) for x in copy[key]):
            raise SteeringError(f"provenance {key} is {copy[key]!r}; it must be a list of texts")
    return copy
