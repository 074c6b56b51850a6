"""Figures of the papers. Needs matplotlib: ``pip install "steered-moe[plots]"``.

Each function writes one file; its ending says the format (.png, .svg, .pdf). An .svg keeps text as
text, so that a browser draws every script; a .png shows a language's code where no font that
matplotlib has can draw its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import SteeredMoEError
from steered_moe.figure import COLOURS, DASHES, EVEN, SIGNED, Labels, figure, shown
from steered_moe.profile import RoutingProfile
from steered_moe.similarity import linkage, similarity
from steered_moe.steering import RouterSteering

Range = tuple[int, int]


def plot_divergence(
    divergences: Mapping[str, Tensor],
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    pivot: str = "en",
    steered: Range | None = None,
    scores: Mapping[str, float] | None = None,
    score_name: str = "score",
    labels: Labels | None = None,
) -> None:
    """Divergence by layer, one line per language (arXiv 2510.04694, the U-shape).

    Args:
        divergences: Language -> ``(layers,)``, from `divergence`.
        path: Where to write.
        layers: The decoder layers of the curves; counted from 0 by default.
        pivot: The language that the others were compared with.
        steered: First and last steered layer, which are shaded.
        scores: Language -> score, to colour the lines by; grey where there is none.
        score_name: What the scores are.
        labels: Language -> name to show.

    Raises:
        SteeredMoEError: matplotlib is not installed.
    """
    with figure(path) as (drawing, axes):
        scale = _score_scale(drawing, axes, scores, score_name)
        _lines(axes, divergences, layers, shown(divergences, labels, path), scale)
        _shade(axes, steered)
        axes.set(ylabel=f"divergence from {pivot}", ylim=(0, None))


def plot_by_layer(
    profile: RoutingProfile,
    measure: str,
    path: str | Path,
    *,
    steered: Range | None = None,
    labels: Labels | None = None,
) -> None:
    """A measure of each language by layer: routing entropy or within-text consistency.

    Args:
        profile: From `profile_texts`.
        measure: "entropy" (nats) or "consistency" (Jaccard overlap).
        path: Where to write.
        steered: First and last steered layer, which are shaded.
        labels: Language -> name to show.

    Raises:
        SteeredMoEError: An unknown measure, a profile without it, or no matplotlib.
    """
    titles = {"entropy": "routing entropy (nats)", "consistency": "within-text consistency"}
    if measure not in titles:
        raise SteeredMoEError(f"measure is {measure!r}; use one of {', '.join(titles)}")
    values: Tensor = getattr(profile, measure)
    curves = dict(zip(profile.languages, values, strict=True))
    with figure(path) as (_, axes):
        _lines(axes, curves, profile.layers, shown(curves, labels, path), None)
        _shade(axes, steered)
        axes.set(ylabel=titles[measure])


def plot_selected(
    steering: RouterSteering, num_layers: int, path: str | Path, steered: Range | None = None
) -> None:
    """How many experts a steering edits in each layer, with the layers it was chosen from shaded.

    Args:
        steering: Any steering.
        num_layers: Decoder layers of the model.
        path: Where to write.
        steered: First and last layer of the range that was asked for.
    """
    edited = steering.weights != 0
    if steering.force is not None:
        edited |= steering.force != 0
    counts = torch.zeros(num_layers)
    counts[steering.layers] = edited.sum(dim=1).float()
    with figure(path) as (_, axes):
        axes.bar(range(num_layers), counts.tolist(), color=COLOURS[0])
        _shade(axes, steered)
        axes.set(xlabel="layer", ylabel="experts steered")


def plot_steering(steering: RouterSteering, num_layers: int, path: str | Path) -> None:
    """Layer by expert map of a steering's weights; forced experts are dots, banned ones crosses.

    Args:
        steering: Any steering.
        num_layers: Decoder layers of the model.
        path: Where to write.
    """
    grid = torch.zeros(num_layers, steering.num_experts)
    grid[steering.layers] = steering.weights
    top = max(float(grid.abs().max()), 1e-9)
    with figure(path) as (drawing, axes):
        image = axes.imshow(grid.tolist(), cmap=SIGNED, vmin=-top, vmax=top, aspect="auto")
        if steering.weights.any():
            drawing.colorbar(image, ax=axes, label="weight")
        for sign, marker in ((1, "o"), (-1, "x")):
            rows, experts = _forced(steering, sign)
            axes.scatter(experts, rows, marker=marker, s=9, color="black", linewidths=0.8)
        axes.set(xlabel="expert", ylabel="layer")


def plot_shares(
    shares: Tensor, layers: Sequence[int], path: str | Path, label: str, signed: bool = False
) -> None:
    """Layer by expert map of how many tokens select each expert, or of how that changed.

    Args:
        shares: ``(layers, experts)``, in [0, 1], or in [-1, 1] when ``signed``.
        layers: The decoder layers of the rows.
        path: Where to write.
        label: What the numbers are.
        signed: Whether 0 is the middle of the colours.
    """
    with figure(path) as (drawing, axes):
        limits = (-1, 1) if signed else (0, 1)
        image = axes.imshow(shares.tolist(), cmap=SIGNED if signed else EVEN, vmin=limits[0],
                            vmax=limits[1], aspect="auto")  # fmt: skip
        drawing.colorbar(image, ax=axes, label=label)
        step = max(1, len(layers) // 12)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set(xlabel="expert", ylabel="layer")


def plot_similarity(
    profile: RoutingProfile,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    labels: Labels | None = None,
) -> None:
    """Heat map of the languages' similarity, in the order of a dendrogram beside it.

    Args:
        profile: At least two languages.
        path: Where to write.
        layers: 0-based decoder layers to average over; all by default.
        labels: Language -> name to show.

    Raises:
        SteeredMoEError: One language only, or matplotlib or scipy is not installed.
    """
    table = similarity(profile, layers)
    merged = linkage(table)
    names = shown(dict.fromkeys(profile.languages), labels, path)
    with figure(path, columns=(1, 3)) as (drawing, (tree, axes)):
        from scipy.cluster.hierarchy import dendrogram

        drawn = dendrogram(merged.numpy(), orientation="left", ax=tree, no_labels=True,
                           color_threshold=0, above_threshold_color="black")  # fmt: skip
        order = drawn["leaves"]
        image = axes.imshow(table[order][:, order].tolist(), cmap=EVEN, origin="lower",
                            aspect="auto")  # fmt: skip
        ticks = [names[profile.languages[i]] for i in order]
        axes.set_xticks(range(len(order)), ticks, rotation=90)
        axes.set_yticks(range(len(order)), ticks)
        tree.axis("off")
        drawing.colorbar(image, ax=axes, label="cosine of selection frequencies")


def _lines(
    axes: Any,
    curves: Mapping[str, Tensor],
    layers: Sequence[int] | None,
    names: Labels,
    scale: Any,
) -> None:
    """One line per language with its name at the right end."""
    for i, (language, curve) in enumerate(curves.items()):
        colour = scale(language) if scale else COLOURS[i % len(COLOURS)]
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        places = list(range(len(curve)) if layers is None else layers)
        axes.plot(places, curve.tolist(), dash, color=colour, label=names[language])
        axes.annotate(names[language], (places[-1], float(curve[-1])), (4, 0), color=colour,
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.set(xlabel="layer")
    axes.legend(ncols=2, fontsize=8, frameon=False)


def _score_scale(drawing: Any, axes: Any, scores: Mapping[str, float] | None, name: str) -> Any:
    """Language -> colour of its score, with a colour bar; None without scores."""
    if not scores:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours: Any = ScalarMappable(Normalize(min(scores.values()), max(scores.values())),
                             colormaps[EVEN])  # fmt: skip
    drawing.colorbar(colours, ax=axes, label=name)
    return lambda language: colours.to_rgba(scores[language]) if language in scores else "0.6"


def _shade(axes: Any, steered: Range | None) -> None:
    if steered is not None:
        axes.axvspan(steered[0] - 0.5, steered[1] + 0.5, color="0.92", zorder=0)


def _forced(steering: RouterSteering, sign: int) -> tuple[list[int], list[int]]:
    """Layers and experts whose force is ``sign``."""
    if steering.force is None:
        return [], []
    rows, experts = (steering.force == sign).nonzero(as_tuple=True)
    return steering.layers[rows].tolist(), experts.tolist()
