"""Figures of the papers. Needs matplotlib: ``pip install "steered-moe[plots]"``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steered_moe.errors import SteeredMoEError

# Colours that colour-blind readers tell apart (Okabe and Ito), and dashes for when they run out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")


def plot_divergence(
    divergences: Mapping[str, Tensor],
    path: str | Path,
    *,
    pivot: str = "en",
    steered: tuple[int, int] | None = None,
) -> None:
    """Divergence by layer, one line per language (arXiv 2510.04694, the U-shape).

    Args:
        divergences: Language -> ``(layers,)``, from `divergence`.
        path: Where to write; the ending says the format (.png, .svg, .pdf).
        pivot: The language that the others were compared with.
        steered: First and last steered layer, which are shaded.

    Raises:
        SteeredMoEError: matplotlib is not installed.
    """
    figure, axes = _figure()
    for i, (language, curve) in enumerate(divergences.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        dash = _DASHES[i // len(_COLOURS) % len(_DASHES)]
        axes.plot(range(len(curve)), curve.tolist(), dash, color=colour, label=language)
        axes.annotate(language, (len(curve) - 1, float(curve[-1])), (4, 0), color=colour,
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    if steered is not None:
        axes.axvspan(steered[0] - 0.5, steered[1] + 0.5, color="0.92", zorder=0)
    axes.set(xlabel="layer", ylabel=f"divergence from {pivot}", ylim=(0, None))
    axes.legend(ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata=_metadata(path))


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SteeredMoEError(
            'figures need matplotlib: pip install "steered-moe[plots]"'
        ) from error
    figure = Figure(figsize=(6, 4))
    return figure, figure.subplots()


def _metadata(path: str | Path) -> dict[str, None] | None:
    """No date in the file, so that the same figure is the same bytes."""
    return {"Date": None} if Path(path).suffix == ".svg" else None
