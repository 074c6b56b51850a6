"""Records of an evaluation to numbers: scores, paired gains with intervals, tests, controls."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from steered_moe.controls import BASE, OF, System
from steered_moe.errors import SteeredMoEError
from steered_moe.records import Record
from steered_moe.results import MEAN, Interval, Result
from steered_moe.statistics import holm, mcnemar, paired_gain, sign_flips
from steered_moe.task_data import about
from steered_moe.tasks import TASKS

ENGLISH = "en"


@dataclass(frozen=True)
class Line:
    """One system on one task in one language, against the base model on the same items.

    Args:
        task: Its name.
        language: Code, or "mean of N languages".
        system: A steering, or "steering/control".
        items: How many, each with all its seeds.
        base: Mean score of the base model.
        score: Mean score of the system.
        gain: Score minus base in points (of bits per byte, which are those of all texts over their
            bytes: in thousandths of a bit), with its 95 % interval, from a bootstrap over items
            that holds their sizes fixed.
        p: Of McNemar's test, or where items share texts of the test by groups; None where a score
            is not right or wrong, or is a mean.
        p_adjusted: The same after Holm's correction over the languages of the task.
    """

    task: str
    language: str
    system: str
    items: int
    base: float
    score: float
    gain: Interval
    p: float | None = None
    p_adjusted: float | None = None


Scores = dict[str, float]
"""Item -> score, the mean over seeds."""


def summarise(records: Iterable[Record]) -> list[Line]:
    """All systems but the base, by task and language, and means over the languages but English.

    Raises:
        SteeredMoEError: Systems that have not answered the same items.
    """
    table = _table(records)
    lines: list[Line] = []
    for task, by_language in table.items():
        systems = next(iter(by_language.values()))
        for system in (name for name in systems if name != BASE):
            mine = [
                _line(task, code, system, scores[BASE], scores[system])
                for code, scores in by_language.items()
            ]
            lines += _corrected(mine) + _mean(task, system, by_language)
    return lines


def results(
    lines: Sequence[Line],
    systems: Sequence[System],
    metrics: Mapping[str, str],
    settings: Mapping[str, object] = MappingProxyType({}),
) -> list[Result]:
    """What ``evaluation.json`` of a steering repo holds; tasks without a score from 0 to 1, such
    as bits per byte, are left out.

    Args:
        lines: From `summarise`.
        systems: What was evaluated.
        metrics: Task -> what its score is.
        settings: How it was run, for each result.
    """
    controls: dict[tuple[str, str, str], dict[str, Interval]] = {}
    for line in lines:
        name, _, control = line.system.partition(OF)
        if control:
            controls.setdefault((line.task, line.language, name), {})[control] = line.gain
    known = {system.name: system for system in systems if OF not in system.name}
    return [
        replace(
            _result(line, known[line.system], metrics[line.task], controls), settings=dict(settings)
        )
        for line in lines
        if line.system in known and metrics[line.task] != "bits_per_byte"
    ]


def _result(
    line: Line,
    system: System,
    metric: str,
    controls: Mapping[tuple[str, str, str], Mapping[str, Interval]],
) -> Result:
    if system.steering is None:
        raise SteeredMoEError(f"{system.name} has no steering to record results of")
    return Result(
        steering=system.name, fingerprint=system.steering.fingerprint, strength=system.strength,
        task=line.task, language=line.language, metric=metric, items=line.items,
        base=line.base, steered=line.score, gain=line.gain,
        controls=controls.get((line.task, line.language, system.name), {}),
    )  # fmt: skip


def as_json(lines: Sequence[Line]) -> list[dict[str, object]]:
    """The lines as JSON values."""
    return [asdict(line) for line in lines]


def _table(records: Iterable[Record]) -> dict[str, dict[str, dict[str, Scores]]]:
    """Task -> language -> system -> scores."""
    sums: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    sizes: dict[tuple[str, str], dict[str, int]] = {}
    for row in records:
        key = row["task"], row["language"], row["system"]
        sums.setdefault(key, {}).setdefault(row["id"], []).append(_score(row))
        if "bytes" in row:
            sizes.setdefault(key[:2], {})[row["id"]] = int(row["bytes"])
    table: dict[str, dict[str, dict[str, Scores]]] = {}
    for (task, language, system), items in sums.items():
        _check_seeds(task, language, system, items, sums.get((task, language, BASE), items))
        per_byte = _per_byte(sizes.get((task, language)))
        means = {name: sum(values) / len(values) * per_byte for name, values in items.items()}
        table.setdefault(task, {}).setdefault(language, {})[system] = means
    for task, by_language in table.items():
        for language, systems in by_language.items():
            _check(task, language, systems)
    return table


def _check_seeds(
    task: str,
    language: str,
    system: str,
    mine: Mapping[str, Sequence[float]],
    base: Mapping[str, Sequence[float]],
) -> None:
    seeds = {len(values) for values in (*mine.values(), *base.values())}
    if len(seeds) > 1:
        raise SteeredMoEError(
            f"{task} in {language}: {system} and base have answered with different numbers of "
            f"seeds ({sorted(seeds)}); finish the run in the same folder"
        )


def _score(row: Record) -> float:
    """The score; of a text its bits, negated so that more is better."""
    if "score" in row:
        return float(row["score"])
    return float(row["log_likelihood"]) / math.log(2)


def _per_byte(sizes: Mapping[str, int] | None) -> float:
    """What turns the bits of texts into numbers whose mean is all bits over all bytes, as lm-eval
    counts; 1 for scores."""
    return 1.0 if sizes is None else len(sizes) / sum(sizes.values())


def _check(task: str, language: str, systems: Mapping[str, Scores]) -> None:
    if BASE not in systems:
        raise SteeredMoEError(f"{task} in {language} has no answers of the base model; run it")
    for name, scores in systems.items():
        if scores.keys() != systems[BASE].keys():
            raise SteeredMoEError(
                f"{task} in {language}: base has answered {len(systems[BASE])} items and {name} "
                f"{len(scores)}; finish the run in the same folder"
            )


def _tensors(task: str, base: Scores, system: Scores) -> tuple[Tensor, Tensor]:
    """Scores of the same items, weighted so that their mean is the task's score."""
    names = sorted(base)
    by_subject = task in TASKS and TASKS[task].subjects
    weights = _weights(names) if by_subject else torch.ones(len(names)).double()
    pairs = ([scores[name] for name in names] for scores in (base, system))
    old, new = (torch.tensor(values, dtype=torch.float64) * weights for values in pairs)
    return old, new


def _weights(names: Sequence[str]) -> Tensor:
    """Weights under which each subject, the first part of an id, counts the same; mean 1."""
    subjects = [name.partition("/")[0] for name in names]
    counts = Counter(subjects)
    return torch.tensor([len(names) / len(counts) / counts[one] for one in subjects]).double()


def _line(task: str, language: str, system: str, base: Scores, scores: Scores) -> Line:
    old, new = _tensors(task, base, scores)
    binary = {*base.values(), *scores.values()} <= {0.0, 1.0}
    groups = _groups(base)
    p = _p(old, new, groups) if binary else None
    return Line(
        task, language, system, len(old), float(old.mean()), float(new.mean()),
        _interval(old, new, groups), p,
    )  # fmt: skip


def _groups(scores: Scores) -> list[str]:
    """What each item is about: items about one text are not independent."""
    return [about(name) for name in sorted(scores)]


def _p(old: Tensor, new: Tensor, groups: Sequence[str]) -> float:
    """Of McNemar's test; of the test by groups where items share texts."""
    if len(set(groups)) == len(groups):
        return mcnemar(old.bool(), new.bool())
    return sign_flips(old, new, groups)


def _interval(old: Tensor, new: Tensor, groups: Sequence[str]) -> Interval:
    gain = paired_gain(old, new, groups=groups)
    scale = 100 if float(old.min()) >= 0 else 1000  # bits per byte are negated, so below 0
    return Interval(*(scale * value for value in (gain.mean, gain.low, gain.high)))


def _corrected(lines: Sequence[Line]) -> list[Line]:
    """Holm's correction over the languages of one task and system."""
    known = {line.language: line.p for line in lines if line.p is not None}
    adjusted = holm(known)
    return [replace(line, p_adjusted=adjusted.get(line.language)) for line in lines]


def _mean(task: str, system: str, by_language: Mapping[str, Mapping[str, Scores]]) -> list[Line]:
    """The mean over all languages but English; a bootstrap draws parallel items together."""
    others = {code: scores for code, scores in by_language.items() if code != ENGLISH}
    names = {frozenset(scores[BASE]) for scores in others.values()}
    if len(others) < 2 or len(names) > 1:
        return []
    pairs = [_tensors(task, scores[BASE], scores[system]) for scores in others.values()]
    old, new = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
    title = f"{MEAN} {len(others)} languages"
    return [
        Line(task, title, system, old.shape[1], float(old.mean()), float(new.mean()),
             _interval(old, new, _groups(next(iter(others.values()))[BASE])))
    ]  # fmt: skip
