"""Which layers are the middle ones: a rule that reads them off the divergence curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steered_moe.errors import SteeredMoEError

_LAYERS_PER_GAP = 24


@dataclass(frozen=True)
class MiddleLayers:
    """Layers to steer, and why these.

    Args:
        first: 0-based decoder layer.
        last: 0-based decoder layer, included.
        reason: A sentence for people.
        u_shaped: Whether the curve rises on both sides of them.
    """

    first: int
    last: int
    reason: str
    u_shaped: bool

    @property
    def layers(self) -> range:
        """The layers, first and last included."""
        return range(self.first, self.last + 1)


def middle_layers(divergences: Mapping[str, Tensor], layers: tuple[int, ...]) -> MiddleLayers:
    """Propose the middle layers: the longest run in which languages diverge less than on average.

    The curve is the mean over languages. A layer belongs to a run where the curve lies below its
    own mean over all layers; up to ``1 + layers // 24`` layers in a row that lie above do not end
    a run. The papers choose by eye (2510.04694: 8-35 of 48, counted from 1; 2601.14050: 10-39,
    counted from 0); this rule gives 5-39 on the routing that the latter measured.

    Args:
        divergences: Language -> ``(layers,)``, from `divergence`.
        layers: The decoder layers that the curve is over, `RoutingProfile.layers`.

    Raises:
        SteeredMoEError: No language, or fewer than three layers.
    """
    if not divergences or len(layers) < 3:
        raise SteeredMoEError(
            f"the middle of {len(layers)} layers and {len(divergences)} curves is not defined; "
            "profile at least one language besides the pivot on a model of three layers or more"
        )
    curve = torch.stack(list(divergences.values())).double().mean(dim=0)
    runs = _runs((curve < curve.mean()).tolist(), 1 + len(layers) // _LAYERS_PER_GAP)
    first, last = max(runs, key=lambda run: (run[1] - run[0], -run[0])) if runs else (0, 0)
    inside = float(curve[first : last + 1].mean())
    outside = {"before": curve[:first], "after": curve[last + 1 :]}
    u_shaped = all(len(part) and float(part.mean()) > inside for part in outside.values())
    around = " and ".join(_beside(part, where) for where, part in outside.items())
    shape = "" if u_shaped else "; the curve is not U-shaped, so choose the layers yourself"
    reason = (
        f"mean divergence {inside:.3f} in layers {layers[first]}-{layers[last]}, {around}, "
        f"over {len(divergences)} languages{shape}"
    )
    return MiddleLayers(layers[first], layers[last], reason, u_shaped)


def layer_range(text: str) -> tuple[int, int]:
    """``first-last`` as two numbers.

    Raises:
        SteeredMoEError: It is written otherwise.
    """
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise SteeredMoEError(f"layers are {text!r}; write first-last, such as 8-34")
    return int(first), int(last)


def _beside(part: Tensor, where: str) -> str:
    return f"{float(part.mean()):.3f} {where}" if len(part) else f"no layers {where}"


def _runs(below: list[bool], gap: int) -> list[tuple[int, int]]:
    """First and last place of each run of true values, over gaps of up to ``gap`` false ones."""
    runs: list[tuple[int, int]] = []
    for place, inside in enumerate(below):
        if not inside:
            continue
        if runs and place - runs[-1][1] <= gap + 1:
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    return runs
