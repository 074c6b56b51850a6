"""Search for a setting on the dev split: successive halving over methods, layers and strengths."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from steered_moe.contrast import task_experts
from steered_moe.controls import BASE, System
from steered_moe.divergence import divergence
from steered_moe.errors import BaseModelError, EmptySelectionError, SteeredMoEError
from steered_moe.evaluation import Evaluation
from steered_moe.fit import check_force
from steered_moe.layers import middle_layers
from steered_moe.profile import RoutingProfile
from steered_moe.results import MEAN
from steered_moe.sharing import shared_experts
from steered_moe.steering import RouterSteering
from steered_moe.summary import ENGLISH, Line, summarise
from steered_moe.task_languages import usual

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
STRENGTHS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {"std": (0.25, 0.5, 1.0, 2.0), "abs": (0.01, 0.022, 0.034, 0.1)}
)
"""By scale of the edit. 2510.04694 steers at 0.5 or by force; 2601.14050 at 0.022 and 0.034."""
SHARED = (0.5, 0.7, 0.9)  # thresholds of shared_experts; 0.7 is that of 2601.14050
_TOP = 20 / 128  # of the experts, released code of 2601.14050
_METHODS = {"task_experts": "task", "shared_experts": "shared"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A steering and the strength to try it at."""

    steering: RouterSteering
    strength: float

    @property
    def name(self) -> str:
        """Of the system in a run; the same steering at another strength has another one."""
        return f"{self.steering.fingerprint[:12]}-{self.strength:g}"

    @property
    def label(self) -> str:
        """For people."""
        origin = self.steering.provenance
        settings = {k: v for k, v in origin["parameters"].items() if k != "layers_reason"}
        words = ", ".join(f"{name} {value}" for name, value in settings.items())
        return f"{origin['method']}, {words}, strength {self.strength:g}"


@dataclass(frozen=True)
class Trial:
    """What a candidate did on the dev items of one round.

    Args:
        candidate: What was tried.
        items: Items per language.
        gain: Mean gain over the languages but English, in points.
        english: Gain in English, in points; harm if it is negative. None if it was not asked.
    """

    candidate: Candidate
    items: int
    gain: float
    english: float | None


def candidates(
    task: RoutingProfile,
    general: RoutingProfile,
    *,
    methods: Sequence[str] = tuple(_METHODS),
    thresholds: Sequence[float] = THRESHOLDS,
    strengths: Sequence[float] | None = None,
    pivot: str = ENGLISH,
) -> list[Candidate]:
    """Layers x threshold x method x strength, without those that edit nothing or the same, or
    force more experts in a layer than a token gets (a warning says how many).

    Args:
        task: Routing of the task in the pivot language.
        general: Routing of parallel text, for the layers and for shared experts.
        methods: Of "task_experts" (soft and hard) and "shared_experts".
        thresholds: Of task_experts.
        strengths: Of the soft ones; forced experts have no strength. By default `STRENGTHS`.
        pivot: Language to steer towards.

    Raises:
        SteeredMoEError: An unknown method, a strength of 0, no candidate at all, profiles of
            different models, or a threshold out of range.
    """
    if 0 in (strengths or ()):
        raise SteeredMoEError("a strength of 0 steers nothing; leave it out")
    if unknown := sorted(set(methods) - set(_METHODS)):
        raise SteeredMoEError(f"no method {unknown[0]!r}; there are {', '.join(_METHODS)}")
    found: dict[str, Candidate] = {}
    made = list(_steerings(task, general, methods, thresholds, pivot))
    places = dict(
        zip(task.layers, task.frequency[0].sum(dim=-1).round().int().tolist(), strict=True)
    )
    fitting = [steering for steering in made if _fits(steering, places)]
    if len(fitting) < len(made):
        left_out = len(made) - len(fitting)
        logger.warning("%d settings force more experts than a token gets; left out", left_out)
    for steering in fitting:
        own = strengths or STRENGTHS[steering.scale]
        for strength in own if steering.weights.any() else (1.0,):
            candidate = Candidate(steering, strength)
            found.setdefault(candidate.name, candidate)
    _warn_of_none(methods, fitting)
    if not found:
        raise SteeredMoEError("no setting selects an expert; give smaller thresholds")
    return list(found.values())


def _warn_of_none(methods: Sequence[str], found: Sequence[RouterSteering]) -> None:
    tried = {str(steering.provenance["method"]) for steering in found}
    if empty := [name for name in methods if name not in tried]:
        logger.warning("%s: no setting selects an expert; it is not searched", ", ".join(empty))


def _fits(steering: RouterSteering, top_k: Mapping[int, int]) -> bool:
    try:
        for row, layer in enumerate(steering.layers.tolist()):
            force = None if steering.force is None else steering.force[row][None]
            check_force(force, layer, top_k[layer])
    except BaseModelError:
        return False
    return True


def _steerings(
    task: RoutingProfile,
    general: RoutingProfile,
    methods: Sequence[str],
    thresholds: Sequence[float],
    pivot: str,
) -> Iterator[RouterSteering]:
    for layers in layer_ranges(general, pivot):
        makers: list[Callable[[], RouterSteering]] = []
        for threshold in thresholds if "task_experts" in methods else ():
            for mode in ("soft", "hard"):
                makers.append(partial(task_experts, task, general, threshold=threshold, mode=mode,
                                     layers=layers, language=pivot))  # fmt: skip
        for threshold in SHARED if "shared_experts" in methods else ():
            two, top = _two(general, pivot), _top(general)
            makers.append(partial(shared_experts, general, two, top=top, threshold=threshold,
                                  layers=layers))  # fmt: skip
        for make in makers:
            try:
                yield make()
            except EmptySelectionError:
                continue


def _two(general: RoutingProfile, pivot: str) -> tuple[str, str]:
    """The pivot and Chinese, as 2601.14050 has it, or else the first other language."""
    others = [code for code in general.languages if code != pivot]
    if not others:
        raise SteeredMoEError(f"the general profile has no language besides {pivot}")
    return pivot, next((code for code in others if code.startswith("zh")), others[0])


def _top(profile: RoutingProfile) -> int:
    return max(1, round(_TOP * profile.num_experts))


def layer_ranges(general: RoutingProfile, pivot: str) -> list[range]:
    """The middle layers that divergence proposes, a narrower and a wider range."""
    middle = middle_layers(divergence(general, pivot), general.layers)
    first, last = middle.first, middle.last
    step = max(1, (last - first + 1) // 4)
    wider = range(max(first - step, general.layers[0]), min(last + step, general.layers[-1]) + 1)
    narrower = range(first + step, last - step + 1)
    ranges = [range(first, last + 1), narrower, wider]
    return [layers for i, layers in enumerate(ranges) if layers and layers not in ranges[:i]]


def halve(
    run: Evaluation,
    tried: Sequence[Candidate],
    folder: Path,
    *,
    items: int,
    rounds: int,
    most_harm: float = 1.0,
    tick: Callable[[int, int, int], Any] = lambda number, done, total: None,
) -> list[list[Trial]]:
    """Successive halving (arXiv 1502.07943): all candidates on few dev items, the better half on
    twice as many, and so on.

    Args:
        run: The evaluation; its systems and part are replaced. It is run on the dev split alone.
        tried: The candidates.
        folder: For the records of each round; a killed search goes on with it.
        items: Items per language of the last round.
        rounds: How many.
        most_harm: A candidate that costs English more points than this comes behind all others.
        tick: Called with the round and the examples done and of all.

    Returns:
        The trials of each round, best first.
    """
    if set(map(usual, run.languages)) <= {ENGLISH}:
        raise SteeredMoEError("tuning needs a language besides English")
    if len({one.metric == "bits_per_byte" for one in run.tasks}) > 1:
        raise SteeredMoEError("bits per byte and scores have no common mean; tune them apart")
    table: list[list[Trial]] = []
    for number in range(rounds):
        count = max(1, math.ceil(items / 2 ** (rounds - 1 - number)))
        chosen = [System(c.name, c.steering, c.strength) for c in tried]
        part = replace(
            run, systems=[System(BASE), *chosen],
            settings=replace(run.settings, part="dev", limit=count),
        )  # fmt: skip
        records = part.run(folder / f"round-{number}", partial(tick, number))
        trials = _trials(summarise(records.read()), tried)
        table.append(sorted(trials, key=lambda one: _rank(one, most_harm)))
        keep = max(1, math.ceil(len(tried) / 2))
        tried = [trial.candidate for trial in table[-1][:keep]]
    return table


def _trials(lines: Iterable[Line], tried: Sequence[Candidate]) -> list[Trial]:
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        if not line.language.startswith(MEAN):
            by_name.setdefault(line.system, []).append(line)
    trials = []
    for candidate in tried:
        mine = by_name[candidate.name]
        others = [line.gain.mean for line in mine if line.language != ENGLISH]
        english = [line.gain.mean for line in mine if line.language == ENGLISH]
        harm = sum(english) / len(english) if english else None
        items = min(line.items for line in mine)
        trials.append(Trial(candidate, items, sum(others) / len(others), harm))
    return trials


def _rank(trial: Trial, most_harm: float) -> tuple[bool, float]:
    """Those within the harm allowed by their gain, before the others by how little they harm."""
    if trial.english is not None and trial.english < -most_harm:
        return True, -trial.english
    return False, -trial.gain


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Those than which no other is better for the languages and at least as good for English."""
    known = [trial for trial in trials if trial.english is not None]
    return [one for one in known if not any(_dominates(other, one) for other in known)]


def _dominates(other: Trial, one: Trial) -> bool:
    mine, theirs = (one.gain, one.english or 0.0), (other.gain, other.english or 0.0)
    return theirs != mine and theirs[0] >= mine[0] and theirs[1] >= mine[1]
