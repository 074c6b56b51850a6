"""Which languages route alike: similarity of their selection frequencies, and clusters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from steered_moe.errors import SteeredMoEError
from steered_moe.profile import RoutingProfile
from steered_moe.settings import in_words, layers_of


def similarity(profile: RoutingProfile, layers: Iterable[int] | None = None) -> Tensor:
    """Cosine of two languages' selection frequencies, averaged over layers.

    2601.14050 finds that routing follows language families; its released code has no measure of
    that, so this one is ours.

    Args:
        profile: At least two languages.
        layers: 0-based decoder layers to average over; all by default.

    Returns:
        float64 ``(languages, languages)`` in [0, 1], symmetric, 1 on the diagonal.

    Raises:
        SteeredMoEError: One language only, or none of the layers was profiled.
    """
    if len(profile.languages) < 2:
        raise SteeredMoEError(f"similarity needs two languages, not {len(profile.languages)}")
    wanted = layers_of(profile.layers if layers is None else layers)
    rows = [i for i, layer in enumerate(profile.layers) if layer in wanted]
    if not rows:
        raise SteeredMoEError(
            f"none of the layers {in_words(wanted)} was profiled; there are "
            f"{in_words(profile.layers)}"
        )
    vectors = torch.nn.functional.normalize(profile.frequency[:, rows], dim=-1)
    return torch.einsum("ale,ble->abl", vectors, vectors).mean(dim=-1).clamp(0, 1)


def linkage(similarities: Tensor) -> Tensor:
    """Average-linkage clustering of ``1 - similarity``, as scipy lays it out.

    Args:
        similarities: ``(languages, languages)``, from `similarity`.

    Returns:
        float64 ``(languages - 1, 4)``: the two clusters that merge, their distance, the size.

    Raises:
        SteeredMoEError: scipy is not installed.
    """
    try:
        from scipy.cluster.hierarchy import linkage as scipy_linkage
        from scipy.spatial.distance import squareform
    except ImportError as error:
        raise SteeredMoEError('clusters need scipy: pip install "steered-moe[plots]"') from error
    distances = (1 - similarities).clamp_min(0)
    distances = (distances + distances.T) / 2
    distances.fill_diagonal_(0)
    merged = scipy_linkage(squareform(distances.numpy(), checks=False), method="average")
    return torch.from_numpy(merged)


def nearest(profile: RoutingProfile, similarities: Tensor) -> dict[str, str]:
    """Language -> the language that it routes most like.

    Args:
        profile: What ``similarities`` was computed from.
        similarities: ``(languages, languages)``, from `similarity`.
    """
    others = similarities.clone().fill_diagonal_(-1)
    names = profile.languages
    return {names[i]: names[j] for i, j in enumerate(others.argmax(dim=1).tolist())}
