"""Whether languages that route more like the pivot score higher, layer by layer."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import SteeredMoEError

_SMALLEST = 4  # languages; Fisher's interval needs more than three
_PERFECT = 1e-12  # a correlation as near to 1 or -1 as rounding leaves it


@dataclass(frozen=True)
class Correlation:
    """A correlation over languages at each layer, with its interval.

    Args:
        value: float64 ``(layers,)`` in [-1, 1]; nan where a side does not vary.
        low: float64 ``(layers,)``, lower end of the interval; nan where there is none: a side does
            not vary, or the correlation is 1 or -1.
        high: float64 ``(layers,)``, upper end, nan as ``low``.
        languages: How many languages entered.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    languages: int


def correlation(
    divergences: Mapping[str, Tensor],
    scores: Mapping[str, float],
    *,
    ranks: bool = False,
    level: float = 0.95,
) -> Correlation:
    """Correlation of divergence with a score per language, at each layer (2510.04694 Finding 2).

    Intervals are Fisher's: ``tanh(atanh(r) +- q / sqrt(n - 3))``, with 1.06 in place of 1 over
    ``n - 3`` for ranks (Fieller, Hartley and Pearson 1957). At a correlation of 1 or -1 the formula
    gives an interval of no width however few the languages are, four languages in the right order
    by chance included; so there both ends are nan, which says that nothing is known of the error.

    Args:
        divergences: Language -> ``(layers,)``, from `divergence`.
        scores: Language -> score; languages that only one side has are left out.
        ranks: Spearman's correlation in place of Pearson's.
        level: Of the interval, in (0, 1).

    Raises:
        SteeredMoEError: Fewer than four languages in common, a score that is no finite number, or
            a level out of range.
    """
    check_scores(scores)
    languages = [language for language in divergences if language in scores]
    if len(languages) < _SMALLEST:
        raise SteeredMoEError(
            f"{len(languages)} languages have both a divergence and a score; {_SMALLEST} are "
            f"needed. Divergences: {', '.join(divergences)}; scores: {', '.join(scores)}"
        )
    if not 0 < level < 1:
        raise SteeredMoEError(f"level is {level}; it must lie in (0, 1), such as 0.95")
    curves = torch.stack([divergences[language].double() for language in languages], dim=1)
    points = torch.tensor([float(scores[la]) for la in languages], dtype=torch.float64)
    if ranks:
        curves, points = _ranks(curves), _ranks(points)
    value = _pearson(curves, points).clamp(-1, 1)
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    half = quantile * math.sqrt((1.06 if ranks else 1.0) / (len(languages) - 3))
    centre = torch.atanh(value.where(value.abs() < 1 - _PERFECT, torch.nan))
    return Correlation(value, torch.tanh(centre - half), torch.tanh(centre + half), len(languages))


def check_scores(scores: Mapping[str, Any]) -> None:
    """Refuse scores that nothing can be correlated with.

    Raises:
        SteeredMoEError: There is none, or one is no finite number; names language and value.
    """
    if not scores:
        raise SteeredMoEError("there are no scores; give a mapping of languages to numbers")
    for language, score in scores.items():
        real = isinstance(score, Real) and not isinstance(score, bool)
        if not real or not abs(score) <= sys.float_info.max:
            raise SteeredMoEError(
                f"the score of {language} is {score!r}; it must be a finite number"
            )


def _pearson(curves: Tensor, points: Tensor) -> Tensor:
    x = curves - curves.mean(dim=-1, keepdim=True)
    y = points - points.mean()
    value: Tensor = (x * y).sum(dim=-1) / (x.square().sum(dim=-1) * y.square().sum()).sqrt()
    return value


def _ranks(values: Tensor) -> Tensor:
    """Ranks over the last dimension; equal values share their mean rank."""
    below = (values.unsqueeze(-1) > values.unsqueeze(-2)).sum(dim=-1)
    equal = (values.unsqueeze(-1) == values.unsqueeze(-2)).sum(dim=-1)
    return below + (equal.double() + 1) / 2
