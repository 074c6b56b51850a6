"""A layer x expert picture of a steering in plain text."""

from __future__ import annotations

from steered_moe.steering import RouterSteering

_SHADES = " .:-=+*#%@"


def heat_map(steering: RouterSteering, width: int = 64) -> list[str]:
    """Layer x expert picture in text, one line per layer; neighbours share a column if need be.

    A digit of ``" .:-=+*#%@"`` is the largest absolute weight in the column relative to the
    largest of all, ``+`` and ``x`` at the end of the line count forced and banned experts.
    """
    weights = steering.weights.abs()
    groups = weights.tensor_split(min(width, steering.num_experts), dim=1)
    top = float(weights.max()) or 1.0
    lines = []
    for row, layer in enumerate(steering.layers.tolist()):
        levels = [float(group[row].max()) / top for group in groups]
        cells = "".join(_SHADES[round(level * (len(_SHADES) - 1))] for level in levels)
        lines.append(f"{layer:>4} |{cells}|{_force_note(steering, row)}")
    return lines


def _force_note(steering: RouterSteering, row: int) -> str:
    if steering.force is None:
        return ""
    force = steering.force[row]
    return f" +{int((force > 0).sum())} x{int((force < 0).sum())}"
