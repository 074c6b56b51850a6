"""Several steerings at their strengths become one edit per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steered_moe.errors import SteeringError
from steered_moe.steering import RouterSteering
from steered_moe.strength import as_rows

if TYPE_CHECKING:
    from steered_moe.storage import SteeringRepo


def combine(
    steerings: Mapping[str, RouterSteering], strengths: Mapping[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """All steerings summed at their strengths.

    Args:
        steerings: Name -> steering.
        strengths: Name -> float32 ``(rows,)``; rows is 1, or the same number everywhere.

    Returns:
        Layer -> part of an edit (a scale, or "force") -> ``(rows, experts)``. Layers and parts
        that no steering edits are left out.

    Raises:
        SteeringError: Different numbers of rows, an expert both forced and banned, or strengths
            so large that a product with a weight is not finite.
    """
    rows = {len(strength) for strength in strengths.values()} | {1}
    if len(rows) > 2:
        raise SteeringError(
            f"steerings have strengths of {sorted(rows - {1})} rows; use one number of rows"
        )
    tables: dict[int, dict[str, Tensor]] = {}
    for name, steering in steerings.items():
        strength = strengths[name].expand(max(rows)).unsqueeze(1)
        for row, layer in enumerate(steering.layers.tolist()):
            _add(tables.setdefault(layer, {}), steering, row, strength, layer)
    _check_finite(tables)
    return {layer: parts for layer, parts in tables.items() if parts}


def _check_finite(tables: Mapping[int, Mapping[str, Tensor]]) -> None:
    for layer, parts in tables.items():
        if not all(torch.isfinite(part).all() for part in parts.values()):
            raise SteeringError(
                f"layer {layer}: strength times weight is not finite; lower the strength"
            )


def constant_tables(repo: SteeringRepo) -> dict[int, dict[str, Tensor]]:
    """All steerings of a repo at its strengths, for what knows one strength only.

    Returns:
        Layer -> part of its edit -> ``(experts,)``; parts of zeros are left out.

    Raises:
        SteeringError: A steering with several strengths, or as `combine`.
    """
    names = [steering.name for steering in repo.steerings]
    rows = {name: as_rows(x) for name, x in zip(names, repo.strengths, strict=True)}
    if several := [name for name, row in rows.items() if len(row) != 1]:
        raise SteeringError(f"{several[0]} has several strengths; give one")
    combined = combine(dict(zip(names, repo.steerings, strict=True)), rows)
    live = {
        layer: {part: row[0] for part, row in parts.items() if row.any()}
        for layer, parts in combined.items()
    }
    return {layer: parts for layer, parts in live.items() if parts}


def _add(
    parts: dict[str, Tensor], steering: RouterSteering, row: int, strength: Tensor, layer: int
) -> None:
    weights = steering.weights[row]
    if weights.any():
        parts[steering.scale] = parts.get(steering.scale, 0) + strength * weights
    force = None if steering.force is None else steering.force[row]
    if force is not None and force.any():
        active = force * (strength != 0)
        others = parts.get("force", torch.zeros_like(active))
        clash = (others * active < 0).nonzero()
        if len(clash):
            raise SteeringError(
                f"layer {layer}, expert {int(clash[0, 1])} is forced by one steering and banned "
                f"by {steering.name!r}; set one of them to strength 0"
            )
        parts["force"] = torch.where(active != 0, active, others).to(torch.int8)
