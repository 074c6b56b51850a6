"""Paired comparison of two systems on the same problems."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steered_moe.errors import SteeredMoEError


@dataclass(frozen=True)
class Gain:
    """A difference of means with its bootstrap interval, in the unit of the scores.

    Args:
        mean: New minus old.
        low: Lower end of the interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def paired_gain(
    old: Tensor, new: Tensor, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Gain:
    """How much better ``new`` is than ``old``, with a percentile bootstrap interval over problems.

    A resample draws problems, and with each its scores in every language by both systems, so
    that neither the pairing nor what languages have in common is lost.

    Args:
        old: Scores ``(problems,)`` or ``(languages, problems)``; bool counts as 0 and 1.
        new: Same shape, same problems in the same order.
        resamples: Number of bootstrap resamples.
        level: Of the interval, in (0, 1).
        seed: Of the resampling.

    Raises:
        SteeredMoEError: Shapes that differ, no problems, or a level out of range.
    """
    if old.shape != new.shape or old.numel() == 0:
        raise SteeredMoEError(
            f"paired scores need the same problems: shapes {tuple(old.shape)}, {tuple(new.shape)}"
        )
    if not 0 < level < 1:
        raise SteeredMoEError(f"level is {level}; it must lie in (0, 1), such as 0.95")
    difference = new.double() - old.double()
    per_problem = difference.reshape(-1, difference.shape[-1]).mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    problems = len(per_problem)
    means = torch.stack(
        [
            per_problem[torch.randint(problems, (problems,), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Gain(float(per_problem.mean()), low, high)
