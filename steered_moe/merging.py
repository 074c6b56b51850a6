"""Profiles of one model put together: sums over the same or other languages, and their record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import FormatError
from steered_moe.profile import RoutingProfile

_CORPUS, _PARTS = "corpus", "parts"
_DEFAULTS: Mapping[str, Any] = {
    "model": None,
    "revision": None,
    "chat": False,
    "template_tokens": True,
    "generation_prompt": True,
    "template_kwargs": {},
}
"""What ``about`` has to agree in, and what it means where it is silent."""
_WHERE_KNOWN = ("dtype", "model_sha256", "tokenizer_sha256")
"""What it has to agree in where both say it; profiles made before these were recorded do not."""


def add(first: RoutingProfile, second: RoutingProfile) -> RoutingProfile:
    """See `RoutingProfile.__add__`."""
    check_same_kind([first, second])
    languages = tuple(dict.fromkeys(first.languages + second.languages))
    mine, theirs = first.tensors(), second.tensors()
    if "probabilities" in mine and first.languages != second.languages:
        raise FormatError("profiles that keep sequences add up over the same languages only")
    sums = {
        name: _summed(languages, (first, mine[name]), (second, theirs[name]))
        for name in mine
        if name != "probabilities"
    }
    if "probabilities" in mine:
        sums["probabilities"] = torch.cat([mine["probabilities"], theirs["probabilities"]], 1)
    about = joined_about([first.about, second.about])
    return RoutingProfile(languages, first.layers, **sums, about=about)


def stack(profiles: Sequence[RoutingProfile]) -> RoutingProfile:
    """One profile of the languages of several, which have no language in common.

    Raises:
        FormatError: No profile, profiles of different models, measured in different ways or with
            different sums, or a language that two have.
    """
    if not profiles:
        raise FormatError("profiles of one model are needed, at least one")
    check_same_kind(profiles)
    tensors = [profile.tensors() for profile in profiles]
    kept = [part["probabilities"].shape[1] for part in tensors if "probabilities" in part]
    if len(set(kept)) > 1:
        raise FormatError(f"profiles that keep sequences need as many each, not {kept}")
    joined: dict[str, Any] = {
        name: torch.cat([part[name] for part in tensors]) for name in tensors[0]
    }
    languages = tuple(language for profile in profiles for language in profile.languages)
    about = joined_about([profile.about for profile in profiles])
    return RoutingProfile(languages, profiles[0].layers, **joined, about=about)


def check_same_kind(profiles: Sequence[RoutingProfile]) -> None:
    """Refuse profiles of different models, or that were measured in different ways.

    Raises:
        FormatError: Names what differs.
    """
    first = _kind(profiles[0])
    for other in map(_kind, profiles[1:]):
        names = [
            name
            for name in (*first, *other)
            if first.get(name) != other.get(name)
            and not (name in _WHERE_KNOWN and None in (first.get(name), other.get(name)))
        ]
        if names:
            said = [f"{n} ({first.get(n)!r}, {other.get(n)!r})" for n in dict.fromkeys(names)]
            raise FormatError(
                "profiles of different models or kinds cannot be added; they differ in "
                f"{', '.join(said)}"
            )


def joined_about(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of profiles put together.

    What all say alike stays. ``corpus`` names every corpus, with "; " between. What else differs,
    such as limit or columns, is kept in ``parts``, one record for each profile.
    """
    first = dict(abouts[0])
    if all(about == first for about in abouts):
        return first
    same = {k: v for k, v in first.items() if all(k in a and a[k] == v for a in abouts)}
    same.pop(_PARTS, None)
    parts = [part for about in abouts for part in _parts(about, same)]
    corpora = [c for a in abouts if a.get(_CORPUS) for c in str(a[_CORPUS]).split("; ")]
    joined = {_CORPUS: "; ".join(dict.fromkeys(corpora))} if corpora else {}
    unique = [part for i, part in enumerate(parts) if part not in parts[:i]]
    return {**same, **joined, **({_PARTS: unique} if len(unique) > 1 else {})}


def _parts(about: Mapping[str, Any], same: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = {k: v for k, v in about.items() if k not in same and k != _PARTS}
    found = [{**own, **part} for part in about.get(_PARTS, [{}])]
    return [part for part in found if part]


def _kind(profile: RoutingProfile) -> dict[str, Any]:
    about = profile.about
    return {
        "layers": profile.layers,
        "experts": profile.num_experts,
        "sums": sorted(profile.tensors()),
        **{name: about.get(name, default) for name, default in _DEFAULTS.items()},
        **{name: about.get(name) for name in _WHERE_KNOWN},
    }


def _summed(languages: Sequence[str], *parts: tuple[RoutingProfile, Tensor]) -> Tensor:
    """Rows by language, summed over the profiles that have the language."""
    total = torch.zeros(len(languages), *parts[0][1].shape[1:], dtype=torch.float64)
    for profile, tensor in parts:
        total[[languages.index(language) for language in profile.languages]] += tensor
    return total
