"""The steerings that are tried on the dev split, and the controls of the one that is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.errors import SteeringError
from steered_moe.selection import (
    frequency_difference,
    random_experts,
    shared_experts,
    task_experts,
)

THRESHOLDS = (0.05, 0.1, 0.2, 0.3)
SOFT_STRENGTHS = (0.5, 1.0, 1.5)
SHARED_STRENGTHS = (0.1, 0.25, 0.5)
SHARED_SETTINGS = ((0.3, 0.7), (0.5, 0.7))  # top as a share of the experts, threshold


@dataclass(frozen=True)
class Profiles:
    """Routing of the base model: word problems in English, general text in every language."""

    task: RoutingProfile
    general: RoutingProfile


@dataclass(frozen=True)
class Candidate:
    """A steering at a strength; ``label`` says how it was made."""

    label: str
    steering: RouterSteering
    strength: float


def middle_ranges(num_layers: int) -> list[range]:
    """Ranges of layers that leave out some first and last ones."""
    cuts = [(1, 1), (2, 2), (3, 2)]
    return [range(a, num_layers - b) for a, b in cuts]


def candidates(profiles: Profiles, ranges: Sequence[range], top_k: int) -> Iterator[Candidate]:
    """Every method at every setting; those that find no expert are left out."""
    seen: set[tuple[str, float]] = set()
    for layers in ranges:
        for made in (*_task(profiles, layers, top_k), *_shared(profiles, layers)):
            key = (made.steering.fingerprint, made.strength)
            if key not in seen:
                seen.add(key)
                yield made


def _task(profiles: Profiles, layers: range, top_k: int) -> Iterator[Candidate]:
    for threshold in THRESHOLDS:
        for mode, strengths in (("soft", SOFT_STRENGTHS), ("hard", (1.0,))):
            try:
                steering = task_experts(
                    profiles.task, profiles.general, threshold=threshold, layers=layers, mode=mode
                )
            except SteeringError:  # no expert above this threshold
                continue
            if mode == "hard" and int((steering.force > 0).sum(dim=1).max()) > top_k:
                continue
            for strength in strengths:
                label = f"task {mode}, threshold {threshold}, layers {layers[0]}-{layers[-1]}"
                yield Candidate(label, steering, strength)


def _shared(profiles: Profiles, layers: range) -> Iterator[Candidate]:
    general = profiles.general
    for share, threshold in SHARED_SETTINGS:
        top = max(1, round(share * general.num_experts))
        try:
            steering = shared_experts(
                general, ("en", "zh"), top=top, threshold=threshold, layers=layers
            )
        except SteeringError:
            continue
        for strength in SHARED_STRENGTHS:
            label = f"shared en/zh, top {top}, layers {layers[0]}-{layers[-1]}"
            yield Candidate(label, steering, strength)


def controls_of(
    chosen: Candidate, profiles: Profiles, num_layers: int, top_k: int
) -> list[Candidate]:
    """What should not help, with as many experts as ``chosen`` and at its strength."""
    like, strength = chosen.steering, chosen.strength
    steered = like.layers.tolist()
    outside = [layer for layer in range(num_layers) if not steered[0] <= layer <= steered[-1]]
    edges = [layer for layer in (0, num_layers - 1) if layer in outside] or [0, num_layers - 1]
    middle = range(steered[0], steered[-1] + 1)
    result = [
        Candidate(f"random experts, seed {seed}", random_experts(like, seed=seed), strength)
        for seed in range(3)
    ]
    difference = frequency_difference(profiles.task, profiles.general, "en", "en")
    result.append(Candidate("first and last layer", _top(like, difference, edges, top_k), strength))
    others = [la for la in profiles.general.languages if la != "en"]
    general = profiles.general
    most = torch.stack([frequency_difference(general, general, la, "en") for la in others])
    highest = most.amax(dim=0)
    result.append(
        Candidate("multilingual experts", _top(like, highest, list(middle), top_k), strength)
    )
    banned = replace(
        like, weights=torch.zeros_like(like.weights), force=-_edited(like).to(torch.int8)
    )
    result.append(Candidate("deactivation", banned, 1.0))
    if like.weights.any():
        result.append(Candidate("negative strength", like, -strength))
    return result


def _edited(steering: RouterSteering) -> torch.Tensor:
    edited = steering.weights != 0
    return edited if steering.force is None else edited | (steering.force != 0)


def _top(
    like: RouterSteering, difference: torch.Tensor, layers: list[int], top_k: int
) -> RouterSteering:
    """As many experts as ``like`` has, those of ``layers`` with the largest difference; where they
    are forced, not more than top-k per layer can be."""
    hard = like.force is not None and bool(like.force.any())
    inside = difference[layers]
    if hard:
        lowest = inside.topk(top_k, dim=1).values[:, -1:]
        inside = inside.masked_fill(inside < lowest, -torch.inf)
    count = min(like.num_steered_experts, int((inside > -torch.inf).sum()))
    chosen = torch.zeros(inside.numel(), dtype=torch.bool)
    chosen[inside.flatten().topk(count).indices] = True
    chosen = chosen.reshape(inside.shape)
    mean = float(like.weights[like.weights != 0].mean()) if like.weights.any() else 0.0
    force = chosen.to(torch.int8) if hard else None
    return RouterSteering("control", layers, chosen.float() * mean, force, like.scale)
