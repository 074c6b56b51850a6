"""Experts that one corpus needs more than another: differences of selection frequencies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from steered_moe.errors import EmptySelectionError, SteeringError
from steered_moe.profile import RoutingProfile
from steered_moe.provenance import check_same_model, provenance_of
from steered_moe.settings import in_words, layers_of, number, texts, whole
from steered_moe.steering import RouterSteering


def task_experts(
    task: RoutingProfile,
    general: RoutingProfile,
    *,
    threshold: float,
    layers: Iterable[int],
    mode: Literal["soft", "hard"] = "soft",
    language: str = "en",
    name: str = "task",
) -> RouterSteering:
    """Promote the experts that a task in English needs more than English text does.

    An expert is a task expert where ``mean_i a_i / L_i`` over task texts exceeds that over general
    texts by more than ``threshold`` (arXiv 2510.04694 Eq. 3; counts, not weights; each text weighs
    the same). The paper uses thresholds of 0.25 to 0.5.

    Args:
        task: Routing of task texts, from `profile_texts`.
        general: Routing of general texts, same model.
        threshold: Smallest difference of frequencies, in [0, 1).
        layers: 0-based decoder layers to steer; those without a task expert are left out.
        mode: "soft" adds standard deviations (Eq. 4; the paper reports strength 0.5), "hard"
            puts the experts among the selected ones (Eq. 5).
        language: The language of both profiles.
        name: Name of the steering.

    Returns:
        A steering of scale "std" with weight 1, or force +1, at each task expert.

    Raises:
        FormatError: A profile without sums over texts, or without ``language``.
        SteeringError: A threshold out of range, profiles of different models, or no expert found.
    """
    wanted = layers_of(layers)
    difference = frequency_difference(task, general, language, language)
    chosen = _above(difference, threshold, task.layers, wanted)
    settings = {"threshold": threshold, "mode": mode, "layers": in_words(wanted)}
    provenance = provenance_of("task_experts", settings, [language], task, general)
    return _promoted(chosen, task.layers, mode, name, provenance)


def multilingual_experts(
    general: RoutingProfile,
    *,
    threshold: float,
    layers: Iterable[int],
    mode: Literal["soft", "hard"] = "soft",
    pivot: str = "en",
    name: str = "multilingual",
) -> RouterSteering:
    """Promote the experts that some other language needs more than ``pivot`` does.

    An expert counts where the difference of `task_experts` between a language's general text and
    the pivot's exceeds ``threshold`` for any language but the pivot (arXiv 2510.04694 Sec. 5.2).
    The paper finds that steering to these harms, which makes it a control.

    Args:
        general: Routing of general texts in ``pivot`` and in other languages.
        threshold: Smallest difference of frequencies, in [0, 1).
        layers: 0-based decoder layers to steer; those without such an expert are left out.
        mode: As in `task_experts`.
        pivot: The language to differ from.
        name: Name of the steering.

    Raises:
        FormatError: A profile without sums over texts, or without ``pivot``.
        SteeringError: A threshold out of range, or no expert found.
    """
    wanted = layers_of(layers)
    others = [language for language in general.languages if language != pivot]
    if not others:
        raise SteeringError(f"the profile has no language but {pivot}; add general text in others")
    differences = [frequency_difference(general, general, other, pivot) for other in others]
    highest = torch.stack(differences).amax(dim=0)
    chosen = _above(highest, threshold, general.layers, wanted)
    settings = {
        "threshold": threshold,
        "mode": mode,
        "pivot": pivot,
        "layers": in_words(wanted),
    }
    provenance = provenance_of("multilingual_experts", settings, others, general)
    return _promoted(chosen, general.layers, mode, name, provenance)


def risk_difference(
    first: RoutingProfile,
    second: RoutingProfile,
    *,
    activate: int,
    deactivate: int,
    language: str = "en",
    layers: Iterable[int] | None = None,
    name: str = "risk-difference",
) -> RouterSteering:
    """Activate the experts of one behaviour and deactivate those of the other (SteerMoE).

    Experts of all layers are ranked together by the difference of their selection frequencies over
    tokens, each token weighing the same (arXiv 2509.09660 Sec. 3.1). The most positive are forced,
    at most top-k per layer, the most negative are banned.

    Args:
        first: Routing of the wanted behaviour.
        second: Routing of the other one, same model.
        activate: How many experts to force, over all layers.
        deactivate: How many experts to ban, over all layers.
        language: The language of both profiles.
        layers: 0-based decoder layers to choose from; all by default.
        name: Name of the steering.

    Returns:
        A steering of force +1 and -1.

    Raises:
        FormatError: A profile without ``language``.
        SteeringError: Numbers that cannot be met, or profiles of different models.
    """
    check_same_model(first, second)
    activate, deactivate = whole("activate", activate), whole("deactivate", deactivate)
    one, other = (profile.of(texts("language", [language])) for profile in (first, second))
    difference = one.frequency[0] - other.frequency[0]
    wanted = layers_of(first.layers if layers is None else layers)
    outside = torch.tensor([layer not in wanted for layer in first.layers])
    up = _capped(difference, outside, activate, one.top_k)
    down = _capped(-difference, outside, deactivate, None)
    for asked, found, word in ((activate, up, "activated"), (deactivate, down, "deactivated")):
        if asked < 0 or int(found.sum()) < asked:
            raise SteeringError(
                f"{asked} experts cannot be {word}: {int(found.sum())} differ in that direction "
                f"in layers {in_words(wanted)}"
            )
    force = up.to(torch.int8) - down.to(torch.int8)
    rows = (force != 0).any(dim=-1)
    settings = {"activate": activate, "deactivate": deactivate, "layers": in_words(wanted)}
    if not rows.any():
        raise SteeringError("activate and deactivate are both 0; nothing would be steered")
    return RouterSteering(
        name=name,
        layers=torch.tensor(first.layers)[rows],
        weights=torch.zeros(force[rows].shape),
        force=force[rows],
        provenance=provenance_of("risk_difference", settings, [language], first, second),
    )


def preferred(
    profile: RoutingProfile,
    target: str,
    *,
    layers: Iterable[int],
    threshold: float = 0.0,
    pivot: str = "en",
    name: str = "preferred",
) -> RouterSteering:
    """Promote the experts that ``pivot`` selects more often than ``target`` on parallel texts.

    Each is promoted by the difference of its frequencies over tokens, in standard deviations, so
    the routing of ``target`` is moved towards that of ``pivot`` where they differ most. The rule
    is ours; it follows the finding of 2510.04694 that the closer the routing, the better.

    Args:
        profile: Needs ``pivot`` and ``target``, on parallel texts.
        target: The language to steer for; the steering is meant for its prompts alone.
        layers: 0-based decoder layers to steer; those without such an expert are left out.
        threshold: Smallest difference of frequencies, in [0, 1).
        pivot: The language to come closer to.
        name: Name of the steering.

    Raises:
        FormatError: A language that was not profiled.
        SteeringError: A threshold out of range, or no such expert.
    """
    if target == pivot:
        raise SteeringError(f"target and pivot are both {pivot!r}; name another target")
    wanted = layers_of(layers)
    frequency = profile.of(texts("pivot and target", [pivot, target])).frequency
    difference = frequency[0] - frequency[1]
    chosen = _above(difference, threshold, profile.layers, wanted)
    rows = chosen.any(dim=-1)
    settings = {"threshold": threshold, "pivot": pivot, "layers": in_words(wanted)}
    return RouterSteering(
        name=name,
        layers=torch.tensor(profile.layers)[rows],
        weights=torch.where(chosen, difference, 0.0)[rows].float(),
        provenance=provenance_of("preferred", settings, [target], profile),
    )


def frequency_difference(
    first: RoutingProfile, second: RoutingProfile, language: str, other: str
) -> Tensor:
    """How much more often ``first`` selects each expert in ``language`` than ``second`` in
    ``other``: float64 ``(layers, experts)`` in [-1, 1] (2510.04694 Eq. 3).

    Raises:
        FormatError: A profile without sums over texts, or without the language.
        SteeringError: Profiles of different models.
    """
    check_same_model(first, second)
    one, two = first.of(texts("language", [language])), second.of(texts("language", [other]))
    return one.mean_frequency[0] - two.mean_frequency[0]


def _capped(difference: Tensor, outside: Tensor, count: int, per_layer: int | None) -> Tensor:
    """bool ``(layers, experts)``: the ``count`` most positive differences, at most ``per_layer``
    in one layer, none in the layers ``outside``; of equal ones the first."""
    allowed = difference.masked_fill(outside.unsqueeze(-1), 0).clamp_min(0)
    if per_layer is not None:
        last = allowed.argsort(dim=-1, descending=True, stable=True)[:, per_layer:]
        allowed = allowed.scatter(-1, last, 0.0)
    flat = allowed.flatten()
    best = flat.argsort(descending=True, stable=True)[: max(count, 0)]
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[best[flat[best] > 0]] = True
    return chosen.reshape(allowed.shape)


def _above(
    difference: Tensor, threshold: float, profiled: Sequence[int], wanted: Sequence[int]
) -> Tensor:
    """bool ``(layers, experts)``: differences above the threshold in the wanted layers."""
    if not 0 <= number("threshold", threshold) < 1:
        raise SteeringError(f"threshold is {threshold}; it must lie in [0, 1)")
    inside = torch.tensor([layer in wanted for layer in profiled])
    chosen = (difference > threshold) & inside.unsqueeze(-1)
    if not inside.any():
        raise SteeringError(
            f"none of the layers {in_words(wanted)} was profiled; there are {in_words(profiled)}"
        )
    if not chosen.any():
        raise EmptySelectionError(
            f"no expert in layers {in_words(wanted)} differs by more than {threshold}; the largest "
            f"difference there is {difference[inside].max().item():.3f}"
        )
    return chosen


def _promoted(
    chosen: Tensor,
    profiled: Sequence[int],
    mode: str,
    name: str,
    provenance: dict[str, Any],
) -> RouterSteering:
    if mode not in ("soft", "hard"):
        raise SteeringError(f"mode is {mode!r}; use 'soft' or 'hard'")
    rows = chosen.any(dim=-1)
    kept = chosen[rows]
    return RouterSteering(
        name=name,
        layers=torch.tensor(profiled)[rows],
        weights=kept.float() if mode == "soft" else torch.zeros(kept.shape),
        force=None if mode == "soft" else kept.to(torch.int8),
        provenance=provenance,
    )
