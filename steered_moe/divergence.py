"""How far apart two languages route: entropy-normalised Jensen-Shannon divergence by layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steered_moe.profile import RoutingProfile

_SMALLEST_MIXTURE = 1e-10
_SMALLEST_BOUND = 1e-6


def entropy(distribution: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; 0 log 0 counts as 0."""
    terms: Tensor = torch.special.entr(distribution.double())
    return terms.sum(dim=-1)


def normalised_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Entropy-normalised Jensen-Shannon divergence (arXiv 2510.04694 Eqs. 6-8).

    ``JSD(p, q) / (log E - (H(p) + H(q)) / 2)``, natural logarithm: how much of the divergence
    that the two entropies leave room for is there, so that peaked and flat routing compare.

    Args:
        first: ``(..., experts)``, sums to 1 over experts.
        second: Same shape.

    Returns:
        float64 ``(...)`` in [0, 1].
    """
    p, q = first.double(), second.double()
    mixture = ((p + q) / 2).clamp_min(_SMALLEST_MIXTURE)
    mean_entropy = (entropy(p) + entropy(q)) / 2
    cross = -((p + q) / 2 * mixture.log()).sum(dim=-1)
    bound = (math.log(p.shape[-1]) - mean_entropy).clamp_min(_SMALLEST_BOUND)
    return (cross - mean_entropy).clamp_min(0) / bound


def divergence(profile: RoutingProfile, pivot: str = "en") -> dict[str, Tensor]:
    """Divergence of each language from ``pivot``, layer by layer.

    With the profile's sequences it is the mean over parallel sequences of the divergence of their
    mean softmax vectors (2510.04694 Eqs. 1, 2); without, that of the languages' selection
    frequencies over top-k.

    Args:
        profile: Needs ``pivot``.
        pivot: The language that the others are compared with.

    Returns:
        Language -> float64 ``(layers,)`` for every language but the pivot, in [0, 1].

    Raises:
        FormatError: ``pivot`` was not profiled.
    """
    profile.of([pivot])
    rows = profile.routing_distributions
    reference = rows[profile.languages.index(pivot)]
    return {
        language: normalised_divergence(rows[i], reference).mean(dim=0)
        for i, language in enumerate(profile.languages)
        if language != pivot
    }
