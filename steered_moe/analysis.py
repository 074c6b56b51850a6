"""Everything that one profile says: numbers as JSON, figures, and a page that shows both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from steered_moe.correlation import check_scores, correlation
from steered_moe.divergence import divergence
from steered_moe.errors import BaseModelError, SteeredMoEError
from steered_moe.layers import MiddleLayers, middle_layers
from steered_moe.page import Figure, write_page
from steered_moe.plots import (
    plot_by_layer,
    plot_divergence,
    plot_selected,
    plot_similarity,
    plot_steering,
)
from steered_moe.profile import RoutingProfile
from steered_moe.settings import in_words
from steered_moe.sharing import language_shares
from steered_moe.similarity import nearest, similarity
from steered_moe.steering import RouterSteering, ranges

_SHARED_BELOW, _EXCLUSIVE_ABOVE = 0.7, 0.4  # shares, released code of 2601.14050
_TOP = 20 / 128  # of the experts, same source
_ENDINGS = (".png", ".svg")


def analyze_profile(
    profile: RoutingProfile,
    folder: str | Path,
    *,
    pivot: str = "en",
    layers: tuple[int, int] | None = None,
    scores: Mapping[str, float] | None = None,
    score_name: str = "score",
    labels: Mapping[str, str] | None = None,
    steering: RouterSteering | None = None,
) -> dict[str, Any]:
    """Write ``analysis.json``, figures as .png and .svg, and ``index.html`` into a folder.

    Args:
        profile: The pivot and at least one other language.
        folder: Where to write.
        pivot: The language that the others are compared with.
        layers: First and last middle layer; by default those that `middle_layers` proposes.
        scores: Language -> score, to colour and correlate by. The languages that were used, and
            those that only one side has, are listed under ``correlation``.
        score_name: What the scores are.
        labels: Language -> name to show.
        steering: Of the same model; drawn over its layers.

    Returns:
        The content of ``analysis.json``.

    Raises:
        FormatError: ``pivot`` was not profiled.
        BaseModelError: The steering has layers or experts that the profiled model has not.
        SteeredMoEError: One language only, layers that were not profiled, scores that are too few
            or no finite numbers, or no matplotlib or scipy.
    """
    folder = Path(folder)
    _check(profile, layers, scores, steering)
    curves = divergence(profile, pivot)
    proposed = middle_layers(curves, profile.layers)
    middle = layers or (proposed.first, proposed.last)
    numbers = _numbers(profile, curves, proposed, middle, pivot)
    if scores is not None:
        numbers["correlation"] = _correlations(curves, scores, score_name, pivot)
    folder.mkdir(parents=True, exist_ok=True)
    drawings = _of_languages(profile, curves, middle, pivot, scores, score_name, labels)
    if steering is not None:
        drawings |= _of_steering(steering, max(profile.layers) + 1, middle)
    for name, (draw, _) in drawings.items():
        for ending in _ENDINGS:
            draw(path=folder / f"{name}{ending}")
    text = json.dumps(_plain(numbers), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "analysis.json").write_text(text + "\n", encoding="utf-8")
    figures = [Figure(f"{name}.svg", caption) for name, (_, caption) in drawings.items()]
    write_page(folder / "index.html", numbers, figures, labels or {})
    return numbers


Drawing = tuple[Callable[..., None], str]


def _check(
    profile: RoutingProfile,
    layers: tuple[int, int] | None,
    scores: Mapping[str, float] | None,
    steering: RouterSteering | None,
) -> None:
    """Refuse what does not belong to the profile, before anything is computed."""
    if layers is not None and not 0 <= layers[0] <= layers[1] <= profile.layers[-1]:
        raise SteeredMoEError(
            f"layers are {layers[0]}-{layers[1]}; the last one profiled is {profile.layers[-1]}"
        )
    if scores is not None:
        check_scores(scores)
    if steering is None:
        return
    beyond = sorted(set(steering.layers.tolist()) - set(profile.layers))
    if beyond or steering.num_experts != profile.num_experts:
        raise BaseModelError(
            f"the steering {steering.name!r} has {steering.num_experts} experts in layers "
            f"{ranges(steering.layers)}, the profile {profile.num_experts} in layers "
            f"{in_words(profile.layers)}; they are not of one model"
        )


def _numbers(
    profile: RoutingProfile,
    curves: Mapping[str, Tensor],
    proposed: MiddleLayers,
    middle: tuple[int, int],
    pivot: str,
) -> dict[str, Any]:
    inside = [i for i, layer in enumerate(profile.layers) if middle[0] <= layer <= middle[1]]
    table = similarity(profile, range(middle[0], middle[1] + 1))
    numbers: dict[str, Any] = {
        "about": dict(profile.about),
        "profile_sha256": profile.fingerprint,
        "pivot": pivot,
        "languages": list(profile.languages),
        "layers": list(profile.layers),
        "tokens": dict(zip(profile.languages, profile.tokens[:, 0].tolist(), strict=True)),
        "middle_layers": {"used": list(middle), "proposed": proposed.reason},
        "divergence": {language: curve.tolist() for language, curve in curves.items()},
        "divergence_in_the_middle": {c: float(v[inside].mean()) for c, v in curves.items()},
        "nearest_language": nearest(profile, table),
        "similarity": table.tolist(),
        **_sharing(profile),
    }
    if profile.entropy_sums is not None:
        for name in ("entropy", "consistency"):
            values = getattr(profile, name).tolist()
            numbers[name] = dict(zip(profile.languages, values, strict=True))
    return numbers


def _sharing(profile: RoutingProfile) -> dict[str, Any]:
    """Experts per layer that languages share, and that a language has mostly for itself."""
    top = max(1, round(_TOP * profile.num_experts))
    share = language_shares(profile, top)
    shared = (share > 0).any(dim=0) & (share < _SHARED_BELOW).all(dim=0)
    exclusive = (share > _EXCLUSIVE_ABOVE).sum(dim=-1)
    return {
        "sharing_settings": {
            "top": top, "shared_below": _SHARED_BELOW, "exclusive_above": _EXCLUSIVE_ABOVE,
        },
        "shared_experts": shared.sum(dim=-1).tolist(),
        "exclusive_experts": dict(zip(profile.languages, exclusive.tolist(), strict=True)),
    }  # fmt: skip


def _correlations(
    curves: Mapping[str, Tensor], scores: Mapping[str, float], name: str, pivot: str
) -> dict[str, Any]:
    """Both correlations, and which languages are in them: the pivot never is."""
    found: dict[str, Any] = {
        "score": name,
        "scores": dict(scores),
        "used": [language for language in curves if language in scores],
        "without_score": [language for language in curves if language not in scores],
        "not_profiled": [code for code in scores if code not in curves and code != pivot],
    }
    for kind, ranks in (("pearson", False), ("spearman", True)):
        one = correlation(curves, scores, ranks=ranks)
        found["languages"] = one.languages
        found[kind] = {part: getattr(one, part).tolist() for part in ("value", "low", "high")}
    return found


def _of_languages(
    profile: RoutingProfile,
    curves: Mapping[str, Tensor],
    middle: tuple[int, int],
    pivot: str,
    scores: Mapping[str, float] | None,
    score_name: str,
    labels: Mapping[str, str] | None,
) -> dict[str, Drawing]:
    """Name -> how to draw it, and what it shows."""
    drawings: dict[str, Drawing] = {
        "divergence": (
            partial(plot_divergence, curves, layers=profile.layers, pivot=pivot, steered=middle,
                    scores=scores, score_name=score_name, labels=labels),
            f"Divergence from {pivot} by layer (2510.04694 Eqs. 1, 2); middle layers shaded",
        ),
        "similarity": (
            partial(plot_similarity, profile, layers=range(middle[0], middle[1] + 1),
                    labels=labels),
            "Cosine of selection frequencies in the middle layers, and average-linkage clusters",
        ),
    }  # fmt: skip
    if profile.entropy_sums is not None:
        captions = {
            "entropy": "Entropy of each text's mean routing, in nats (2510.04694)",
            "consistency": "Overlap of two tokens' experts within a text (2510.04694 Sec. 4.4)",
        }
        for name, caption in captions.items():
            draw = partial(plot_by_layer, profile, name, steered=middle, labels=labels)
            drawings[name] = (draw, caption)
    return drawings


def _of_steering(
    steering: RouterSteering, num_layers: int, middle: tuple[int, int]
) -> dict[str, Drawing]:
    count = partial(plot_selected, steering, num_layers, steered=middle)
    grid = partial(plot_steering, steering, num_layers)
    return {
        "selected": (count, f"Experts that the steering {steering.name} edits, by layer"),
        "steering": (grid, f"The steering {steering.name}, layer by expert"),
    }


def _plain(value: Any) -> Any:
    """JSON has no nan; a correlation of what does not vary is null."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
