"""Metrics for Hugging Face ``evaluate``. Needs ``steered-moe[evaluation]``; nothing is downloaded.

Each class works by itself, ``MgsmExactMatch().compute(predictions=..., references=...)``, and as a
folder, ``evaluate.load("spaces/metrics/mgsm_exact_match")``. The thin layer over functions that
need no ``evaluate``: `extraction`, `divergence`, `language_id`, `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import evaluate
import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from steered_moe.divergence import normalised_divergence
from steered_moe.errors import SteeredMoEError
from steered_moe.extraction import flexible_match, same_number
from steered_moe.language_id import detect, language_code
from steered_moe.statistics import aligned_items, holm, mcnemar, paired_gain, sign_flips

__all__ = [
    "LanguageConsistency",
    "MgsmExactMatch",
    "MultipleChoiceAccuracy",
    "RoutingDivergence",
    "SteeringGain",
]

_TEXT, _NUMBER = Value("string"), Value("float64")
_NUMBERS = ListOf(_NUMBER)
_TOLERANCE = 1e-3  # of a sum of probabilities, which may come from float16


class _Metric(evaluate.Metric):
    """Keeps what it is given in memory, not in a cache file, unless it is asked to."""

    source = ""
    inputs: Mapping[str, Any]

    def __init__(
        self, config_name: str | None = None, keep_in_memory: bool | None = None, **options: Any
    ) -> None:
        alone = options.get("num_process", 1) == 1
        super().__init__(
            config_name, alone if keep_in_memory is None else keep_in_memory, **options
        )

    def _info(self) -> Any:
        documentation = type(self).__doc__ or ""
        return evaluate.MetricInfo(
            description=documentation.partition("\n")[0],
            citation=self.source,
            inputs_description="\n" + documentation,
            features=Features(dict(self.inputs)),
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        if len(predictions) == 0:
            raise SteeredMoEError("there are no predictions")
        return self.score(predictions, references, **options)

    score: Callable[..., dict[str, Any]]


class MgsmExactMatch(_Metric):
    """Share of answers whose number is the expected one.

    Args:
        predictions: What the model wrote, str.
        references: The numbers as str, such as "18" or "2,125".
        extraction: "final_number" reads boxed answers, answer phrases, digits and formats of many
            languages, and compares values. "flexible-extract" does what lm-eval 0.4.13 does for
            its mgsm tasks: last ASCII digits, punctuation dropped, compared as text.

    Returns:
        ``exact_match``, 0 to 1.

    Raises:
        SteeredMoEError: No predictions, another extraction, or a reference without a number.
    """

    source = "arXiv:2210.03057 (MGSM)"
    inputs = MappingProxyType({"predictions": _TEXT, "references": _TEXT})

    def score(
        self, predictions: Sequence[str], references: Sequence[str],
        extraction: str = "final_number",
    ) -> dict[str, Any]:  # fmt: skip
        rules = {"final_number": same_number, "flexible-extract": flexible_match}
        if extraction not in rules:
            raise SteeredMoEError(f"extraction is {extraction!r}; there are {', '.join(rules)}")
        return {"exact_match": _mean(rules[extraction], predictions, references)}


class MultipleChoiceAccuracy(_Metric):
    """Share of questions whose right choice has the largest log-likelihood.

    Args:
        predictions: For each question the log-likelihoods of its choices, in nats.
        references: Index of the right choice, from 0.
        choices: For each question the texts of its choices, without the blank before them.

    Returns:
        ``acc``; with ``choices`` also ``acc_norm``, log-likelihoods divided by the length of the
        choice in characters, as in lm-eval 0.4.13. The first of equal ones counts as chosen.

    Raises:
        SteeredMoEError: No predictions, NaN, or references or choices that do not fit them.
    """

    source = "https://github.com/EleutherAI/lm-evaluation-harness"
    inputs = MappingProxyType({"predictions": _NUMBERS, "references": Value("int64")})

    def score(
        self, predictions: Sequence[Sequence[float]], references: Sequence[int],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        for row, right in zip(predictions, references, strict=True):
            if not 0 <= right < len(row) or any(x != x for x in row):
                raise SteeredMoEError(f"choice {right} of the log-likelihoods {list(row)}")
        result = {"acc": _mean(_is_largest, predictions, references)}
        if choices is not None:
            result["acc_norm"] = _mean(_is_largest, _by_length(predictions, choices), references)
        return result


class LanguageConsistency(_Metric):
    """Share of answers that are in the language that was asked for.

    An answer counts as in the language that prevails in it, so that a name or a formula does no
    harm, and Chinese is Chinese under every code. Answers without a language (numbers, formulas,
    a letter) are left out; ``judged`` says how many were not.

    Args:
        predictions: What the model wrote, str.
        references: Code of the language that it should be in.
        among: Every language that answers can be in; all that are known by default. It keeps id
            and ms apart, but must not leave out English or whatever else the model may drift to.

    Returns:
        ``language_consistency``, 0 to 1, None if there was nothing to judge, and ``judged``.

    Raises:
        SteeredMoEError: No predictions, or a language that cannot be detected.
    """

    source = "https://github.com/adbar/py3langid"
    inputs = MappingProxyType({"predictions": _TEXT, "references": _TEXT})

    def score(
        self, predictions: Sequence[str], references: Sequence[str],
        among: Sequence[str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        found = [detect(text, among) for text in predictions]
        asked = map(language_code, references)
        right = [one == code for one, code in zip(found, asked, strict=True) if one is not None]
        share = sum(right) / len(right) if right else None
        return {"language_consistency": share, "judged": len(right)}


class RoutingDivergence(_Metric):
    """Entropy-normalised Jensen-Shannon divergence of routing distributions.

    Args:
        predictions: One distribution over experts a row, such as a layer's, or a sequence's.
        references: The distributions that they are compared with, row by row.

    Returns:
        ``routing_divergence``, the mean over rows, 0 to 1, and ``by_row``.

    Raises:
        SteeredMoEError: No predictions, or rows that are no distributions over the same experts.
    """

    source = "arXiv:2510.04694, Eqs. 6-8"
    inputs = MappingProxyType({"predictions": _NUMBERS, "references": _NUMBERS})

    def score(self, predictions: Any, references: Any) -> dict[str, Any]:
        rows = [
            float(normalised_divergence(*_distributions(p, q)))
            for p, q in zip(predictions, references, strict=True)
        ]
        return {"routing_divergence": sum(rows) / len(rows), "by_row": rows}


class SteeringGain(_Metric):
    """What steering gains over the base model on the same problems, in percentage points.

    Args:
        predictions: Scores of the steered model, 0 to 1.
        references: Scores of the base model on the same items.
        languages: Language of each item; one language by default.
        problems: Which problem each item is, the same in every language; in order by default.
        groups: What each item is about, such as the passage of a question: items of one group are
            not independent. By default all are.
        resamples: Of the bootstrap.

    Returns:
        ``steering_gain`` with ``low`` and ``high`` (95 %, paired bootstrap over problems), and
        ``by_language`` the same with ``p`` (McNemar, exact; with groups their signs are flipped)
        and ``p_adjusted`` (Holm); the p are None if a score is neither 0 nor 1.

    Raises:
        SteeredMoEError: No predictions, a score that is not from 0 to 1, or languages that do not
            have the same problems and groups.
    """

    source = "McNemar, Psychometrika 12 (1947); Holm, Scand. J. Statist. 6 (1979)"
    inputs = MappingProxyType({"predictions": _NUMBER, "references": _NUMBER})

    def score(
        self, predictions: Sequence[float], references: Sequence[float],
        languages: Sequence[str] | None = None, problems: Sequence[Any] | None = None,
        groups: Sequence[Any] | None = None, resamples: int = 10_000,
    ) -> dict[str, Any]:  # fmt: skip
        items = aligned_items(languages or ["all"] * len(predictions), problems)
        if (places := torch.tensor(list(items.values()))).numel() != len(predictions):
            raise SteeredMoEError(f"{len(predictions)} scores and {places.numel()} languages")
        new, old = (torch.tensor(x).double()[places] for x in (predictions, references))
        if any(((x < 0) | (x > 1)).any() for x in (new, old)):
            raise SteeredMoEError("scores lie from 0 to 1; divide percentages by 100")
        binary = bool(torch.isin(torch.stack([old, new]), torch.tensor([0.0, 1.0])).all())
        about = None if groups is None else _common_groups(groups, places)
        test = mcnemar if about is None else partial(sign_flips, groups=about)
        p = dict(zip(items, map(test, old, new), strict=True)) if binary else {}
        adjusted = holm(p)
        points = partial(_points, groups=about, resamples=resamples)
        by_language = {
            code: {**points(a, b), "p": p.get(code), "p_adjusted": adjusted.get(code)}
            for code, a, b in zip(items, old, new, strict=True)
        }
        return {**points(old, new), "by_language": by_language}


def _common_groups(groups: Sequence[Any], places: Tensor) -> list[Any]:
    """The group of each problem, the same in every language."""
    if len(groups) != places.numel():
        raise SteeredMoEError(f"{places.numel()} scores and {len(groups)} groups")
    rows = [[groups[place] for place in row] for row in places.tolist()]
    if any(row != rows[0] for row in rows):
        raise SteeredMoEError("a problem is in different groups in different languages")
    return rows[0]


def _points(
    old: Tensor, new: Tensor, groups: Sequence[Any] | None, resamples: int
) -> dict[str, float]:
    gain = paired_gain(old, new, groups=groups, resamples=resamples)
    return {"steering_gain": 100 * gain.mean, "low": 100 * gain.low, "high": 100 * gain.high}


def _mean(rule: Callable[[Any, Any], bool], left: Sequence[Any], right: Sequence[Any]) -> float:
    return sum(map(rule, left, right)) / len(left)


def _is_largest(values: Sequence[float], place: int) -> bool:
    return list(values).index(max(values)) == place


def _by_length(
    predictions: Sequence[Sequence[float]], choices: Sequence[Sequence[str]]
) -> list[list[float]]:
    if list(map(len, predictions)) != list(map(len, choices)) or any("" in row for row in choices):
        raise SteeredMoEError("choices need one text, not empty, for every log-likelihood")
    return [
        [value / len(text) for value, text in zip(values, texts, strict=True)]
        for values, texts in zip(predictions, choices, strict=True)
    ]


def _distributions(*rows: Sequence[float]) -> list[Tensor]:
    tensors = [torch.tensor(row).double() for row in rows]
    for row in tensors:
        fits = len(row) == len(tensors[0]) > 1 and bool((row >= 0).all())
        if not fits or abs(float(row.sum()) - 1) > _TOLERANCE:
            raise SteeredMoEError(f"not distributions over the same experts: {rows}")
    return tensors
