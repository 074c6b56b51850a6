"""Methods that turn a routing profile into a steering."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from steered_moe.errors import SteeringError
from steered_moe.profile import RoutingProfile
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
    corpora: Sequence[str] = (),
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
        threshold: Largest share that still counts as shared, in (0, 1].
        layers: 0-based decoder layers to steer; those without a shared expert are left out.
        source: Language whose share becomes the weight; the first one by default.
        name: Name of the steering.
        corpora: What the profile was measured on, for the record.

    Returns:
        A steering of scale "abs".

    Raises:
        FormatError: A language that was not profiled.
        SteeringError: Settings out of range, or no shared expert in any of the layers.
    """
    source = languages[0] if source is None else source
    wanted = [layer for layer in profile.layers if layer in set(layers)]
    _check_settings(profile, languages, source, top, threshold)
    share = language_shares(profile.of(languages), top)
    shared = (share > 0).any(dim=0) & (share < threshold).all(dim=0)
    weights = torch.where(shared, share[list(languages).index(source)], 0.0)
    rows = [i for i, layer in enumerate(profile.layers) if layer in wanted and weights[i].any()]
    if not rows:
        raise SteeringError(
            f"no expert in layers {wanted} is shared by {', '.join(languages)} with top={top} and "
            f"threshold={threshold}; raise one of them"
        )
    return RouterSteering(
        name=name,
        layers=torch.tensor([profile.layers[i] for i in rows]),
        weights=weights[rows],
        scale="abs",
        provenance={
            "method": "shared_experts",
            "parameters": {"top": top, "threshold": threshold, "source": source},
            "languages": list(languages),
            **({"corpora": list(corpora)} if corpora else {}),
        },
    )


def task_experts(
    task: RoutingProfile,
    general: RoutingProfile,
    *,
    threshold: float,
    layers: Iterable[int],
    mode: Literal["soft", "hard"] = "soft",
    language: str = "en",
    name: str = "task",
    corpora: Sequence[str] = (),
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
        corpora: What the profiles were measured on, for the record.

    Returns:
        A steering of scale "std" with weight 1, or force +1, at each task expert.

    Raises:
        FormatError: A profile without sums over texts, or without ``language``.
        SteeringError: A threshold out of range, profiles of different models, or no expert found.
    """
    difference = frequency_difference(task, general, language, language)
    chosen = _above(difference, threshold, task.layers, layers)
    provenance = {
        "method": "task_experts",
        "parameters": {"threshold": threshold, "mode": mode},
        "languages": [language],
        **({"corpora": list(corpora)} if corpora else {}),
    }
    return _promoted(chosen, task.layers, mode, name, provenance)


def multilingual_experts(
    general: RoutingProfile,
    *,
    threshold: float,
    layers: Iterable[int],
    mode: Literal["soft", "hard"] = "soft",
    pivot: str = "en",
    name: str = "multilingual",
    corpora: Sequence[str] = (),
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
        corpora: What the profile was measured on, for the record.

    Raises:
        FormatError: A profile without sums over texts, or without ``pivot``.
        SteeringError: A threshold out of range, or no expert found.
    """
    others = [language for language in general.languages if language != pivot]
    if not others:
        raise SteeringError(f"the profile has no language but {pivot}; add general text in others")
    differences = [frequency_difference(general, general, other, pivot) for other in others]
    highest = torch.stack(differences).amax(dim=0)
    chosen = _above(highest, threshold, general.layers, layers)
    provenance = {
        "method": "multilingual_experts",
        "parameters": {"threshold": threshold, "mode": mode, "pivot": pivot},
        "languages": others,
        **({"corpora": list(corpora)} if corpora else {}),
    }
    return _promoted(chosen, general.layers, mode, name, provenance)


def random_experts(like: RouterSteering, *, seed: int = 0, name: str = "random") -> RouterSteering:
    """A matched control: as many experts per layer with the same numbers, drawn at random.

    Args:
        like: The steering to match; each of its rows is permuted over the experts.
        seed: Of the draw.
        name: Name of the steering.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack(
        [torch.randperm(like.num_experts, generator=generator) for _ in like.layers]
    )
    return replace(
        like,
        name=name,
        weights=like.weights.gather(1, orders),
        force=None if like.force is None else like.force.gather(1, orders),
        provenance={
            "method": "random_experts",
            "parameters": {"seed": seed},
            "like": {"name": like.name, **dict(like.provenance)},
        },
    )


def frequency_difference(
    first: RoutingProfile, second: RoutingProfile, language: str, other: str
) -> Tensor:
    """How much more often ``first`` selects each expert in ``language`` than ``second`` in
    ``other``: float64 ``(layers, experts)`` in [-1, 1] (2510.04694 Eq. 3).

    Raises:
        FormatError: A profile without sums over texts, or without the language.
        SteeringError: Profiles of different layers or numbers of experts.
    """
    if first.layers != second.layers or first.num_experts != second.num_experts:
        raise SteeringError(
            f"profiles of {len(first.layers)} layers x {first.num_experts} experts and "
            f"{len(second.layers)} x {second.num_experts} are not of one model"
        )
    return first.of([language]).mean_frequency[0] - second.of([other]).mean_frequency[0]


def language_shares(profile: RoutingProfile, top: int) -> Tensor:
    """Share of each language in an expert's frequency: float64 ``(languages, layers, experts)``.

    Frequencies outside a language's ``top`` most frequent experts of a layer count as 0
    (2601.14050, released code: ``r = g / (sum g + 1e-10)``).
    """
    frequency = profile.frequency
    kept = torch.zeros_like(frequency)
    best = frequency.topk(top, dim=-1).indices
    kept.scatter_(-1, best, frequency.gather(-1, best))
    return kept / (kept.sum(dim=0, keepdim=True) + 1e-10)


def _above(
    difference: Tensor, threshold: float, profiled: Sequence[int], layers: Iterable[int]
) -> Tensor:
    """bool ``(layers, experts)``: differences above the threshold in the wanted layers."""
    if not 0 <= threshold < 1:
        raise SteeringError(f"threshold is {threshold}; it must lie in [0, 1)")
    wanted = sorted(set(layers))
    inside = torch.tensor([layer in wanted for layer in profiled])
    chosen = (difference > threshold) & inside.unsqueeze(-1)
    if not chosen.any():
        highest = difference[inside].max().item() if inside.any() else float("nan")
        raise SteeringError(
            f"no expert in layers {wanted} differs by more than {threshold}; the largest "
            f"difference there is {highest:.3f}"
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


def _check_settings(
    profile: RoutingProfile, languages: Sequence[str], source: str, top: int, threshold: float
) -> None:
    if len(set(languages)) < 2 or len(set(languages)) < len(languages):
        raise SteeringError(f"languages are {list(languages)}; name at least two different ones")
    if source not in languages:
        raise SteeringError(f"source is {source!r}; it must be one of {', '.join(languages)}")
    if not 1 <= top <= profile.num_experts:
        raise SteeringError(f"top is {top}; it must lie between 1 and {profile.num_experts}")
    if not 0 < threshold <= 1:
        raise SteeringError(f"threshold is {threshold}; it must lie in (0, 1]")
