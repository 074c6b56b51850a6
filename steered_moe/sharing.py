"""Experts that languages share, and experts that a language has for itself (2601.14050)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from steered_moe.errors import EmptySelectionError, SteeringError
from steered_moe.profile import RoutingProfile
from steered_moe.provenance import provenance_of
from steered_moe.settings import in_words, layers_of, number, texts, whole
from steered_moe.steering import RouterSteering


def shared_experts(
    profile: RoutingProfile,
    languages: Sequence[str] = ("en", "zh"),
    *,
    top: int = 20,
    threshold: float = 0.7,
    layers: Iterable[int] = range(10, 40),
    source: str | None = None,
    name: str = "shared",
) -> RouterSteering:
    """Promote the experts that all of ``languages`` use (released code of arXiv 2601.14050).

    Per layer, keep the ``top`` most frequent experts of each language and let ``r`` be the share
    of each language in an expert's kept frequency. An expert is shared when some share is above 0
    and all are below ``threshold``; its weight is the share of ``source``. The defaults are the
    released settings for Qwen3-30B-A3B; steer with strength 0.022 then.

    Args:
        profile: Needs ``counts`` and ``tokens`` of ``languages``.
        languages: Languages that compete for an expert; which ones are given changes the result.
        top: Experts kept per language and layer.
        threshold: All shares lie below it in a shared expert, in (0, 1). At 1 an expert of a
            single language would pass too: its share is ``g / (g + 1e-10)``, just below 1.
        layers: 0-based decoder layers to steer; those without a shared expert are left out.
        source: Language whose share becomes the weight; the first one by default.
        name: Name of the steering.

    Returns:
        A steering of scale "abs".

    Raises:
        FormatError: A language that was not profiled.
        SteeringError: Settings out of range, or no shared expert in any of the layers.
    """
    languages, wanted = texts("languages", languages), layers_of(layers)
    source = languages[0] if source is None else source
    top, threshold = _checked(profile, languages, top, threshold)
    if source not in languages:
        raise SteeringError(f"source is {source!r}; it must be one of {', '.join(languages)}")
    share = language_shares(profile.of(languages), top)
    shared = (share > 0).any(dim=0) & (share < threshold).all(dim=0)
    weights = torch.where(shared, share[languages.index(source)], 0.0)
    rows = [i for i, layer in enumerate(profile.layers) if layer in wanted and weights[i].any()]
    if not rows:
        raise EmptySelectionError(
            f"no expert in layers {in_words(wanted)} is shared by {', '.join(languages)} with "
            f"top={top} and threshold={threshold}; raise one of them"
        )
    settings = {"top": top, "threshold": threshold, "source": source, "layers": in_words(wanted)}
    return RouterSteering(
        name=name,
        layers=torch.tensor([profile.layers[i] for i in rows]),
        weights=weights[rows],
        scale="abs",
        provenance=provenance_of("shared_experts", settings, languages, profile),
    )


def exclusive_experts(
    profile: RoutingProfile,
    language: str | Sequence[str],
    *,
    top: int = 15,
    threshold: float = 0.4,
    layers: Iterable[int],
    name: str = "exclusive",
) -> RouterSteering:
    """Mask the experts that a language has mostly for itself (released code of 2601.14050).

    Shares are those of `shared_experts` over all languages of the profile, so which languages it
    has changes the result. An expert is exclusive to some languages when their shares in it sum to
    more than ``threshold``. It is never selected while the steering acts.

    Args:
        profile: Needs at least two languages.
        language: The language, or the languages, whose experts are masked.
        top: Experts kept per language and layer; 15 in the released code.
        threshold: The share, in (0, 1), that has to be exceeded; 0.4 in the released code.
        layers: 0-based decoder layers; those without an exclusive expert are left out.
        name: Name of the steering.

    Returns:
        A steering of force -1 at each exclusive expert.

    Raises:
        FormatError: A language that was not profiled.
        SteeringError: Settings out of range, or no exclusive expert in any of the layers.
    """
    languages, wanted = texts("language", language), layers_of(layers)
    if len(set(languages)) < len(languages):
        raise SteeringError(f"language is {languages}; name each language once")
    profile.of(languages)
    top, threshold = _checked(profile, profile.languages, top, threshold)
    rows = [profile.languages.index(code) for code in languages]
    exclusive = language_shares(profile, top)[rows].sum(dim=0) > threshold
    exclusive &= torch.tensor([layer in wanted for layer in profile.layers]).unsqueeze(-1)
    kept = exclusive.any(dim=-1)
    if not kept.any():
        raise SteeringError(
            f"no expert in layers {in_words(wanted)} is exclusive to {', '.join(languages)} with "
            f"top={top} and threshold={threshold}; lower the threshold"
        )
    settings = {
        "top": top,
        "threshold": threshold,
        "against": [code for code in profile.languages if code not in languages],
        "layers": in_words(wanted),
    }
    return RouterSteering(
        name=name,
        layers=torch.tensor(profile.layers)[kept],
        weights=torch.zeros(exclusive[kept].shape),
        force=-exclusive[kept].to(torch.int8),
        provenance=provenance_of("exclusive_experts", settings, languages, profile),
    )


def language_shares(profile: RoutingProfile, top: int) -> Tensor:
    """Share of each language in an expert's frequency: float64 ``(languages, layers, experts)``.

    Frequencies outside a language's ``top`` most frequent experts of a layer count as 0
    (2601.14050, released code: ``r = g / (sum g + 1e-10)``). Of experts that are equally frequent
    the first ones are kept, so that the same profile gives the same shares everywhere.
    """
    frequency = profile.frequency
    kept = torch.zeros_like(frequency)
    best = frequency.argsort(dim=-1, descending=True, stable=True)[..., :top]
    kept.scatter_(-1, best, frequency.gather(-1, best))
    return kept / (kept.sum(dim=0, keepdim=True) + 1e-10)


def _checked(
    profile: RoutingProfile, languages: Sequence[str], top: int, threshold: float
) -> tuple[int, float]:
    """``top`` and ``threshold``, of ``languages`` that compete."""
    top, threshold = whole("top", top), number("threshold", threshold)
    if len(set(languages)) < 2 or len(set(languages)) < len(languages):
        raise SteeringError(f"languages are {list(languages)}; name at least two different ones")
    if not 1 <= top <= profile.num_experts:
        raise SteeringError(f"top is {top}; it must lie between 1 and {profile.num_experts}")
    if not 0 < threshold < 1:
        raise SteeringError(f"threshold is {threshold}; it must lie in (0, 1), without 0 and 1")
    return top, threshold
