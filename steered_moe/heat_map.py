"""A layer x expert picture of a steering in plain text."""

from __future__ import annotations

from torch import Tensor

from steered_moe.steering import RouterSteering

_SHADES = " .:-=+*#%@"


def heat_map(steering: RouterSteering, width: int = 64) -> list[str]:
    """Layer x expert picture in text, one line per layer; neighbours share a column if need be.

    A digit of ``" .:-=+*#%@"`` is the largest absolute weight in the column relative to the
    largest of all; ``F`` is a forced expert, ``x`` a banned one. ``+`` and ``x`` at the end of the
    line count them.
    """
    columns = min(width, steering.num_experts)
    force = steering.weights * 0 if steering.force is None else steering.force
    lines = []
    for row, layer in enumerate(steering.layers.tolist()):
        parts = (tensor[row].tensor_split(columns) for tensor in (_levels(steering), force))
        cells = "".join(_cell(level, forced) for level, forced in zip(*parts, strict=True))
        lines.append(f"{layer:>4} |{cells}|{_force_note(steering, row)}")
    return lines


def _levels(steering: RouterSteering) -> Tensor:
    """Absolute weights; the largest of all is 1."""
    weights = steering.weights.abs()
    return weights / (float(weights.max()) or 1.0)


def _cell(levels: Tensor, force: Tensor) -> str:
    if (force != 0).any():
        return "F" if (force > 0).any() else "x"
    return _SHADES[round(float(levels.max()) * (len(_SHADES) - 1))]


def _force_note(steering: RouterSteering, row: int) -> str:
    if steering.force is None:
        return ""
    force = steering.force[row]
    return f" +{int((force > 0).sum())} x{int((force < 0).sum())}"
