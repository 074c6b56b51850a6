"""``evaluation.json`` of a steering repo: what a steering was measured to gain, with controls."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from steered_moe.errors import FormatError
from steered_moe.repo_config import is_finite, read_json, short
from steered_moe.steering import RouterSteering

RESULTS_FILE = "evaluation.json"
MEAN = "mean of"
"""What the name of a row begins with that is no language but a mean over some."""

_LARGEST = 4 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interval:
    """A difference in percentage points with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.mean <= self.high:
            raise FormatError(f"an interval of {self.low} to {self.high} around {self.mean}")

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


@dataclass(frozen=True)
class Result:
    """One steering on one task in one language, against its base on the same items.

    Args:
        steering: Name of the steering.
        fingerprint: Its `RouterSteering.fingerprint`, which says whether it still is the same.
        strength: At which it ran.
        task: What was asked, for people.
        language: Code, or words for an average over several.
        metric: Such as "accuracy".
        items: How many prompts.
        base: Score of the base model, 0 to 1.
        steered: Score of the steered model, 0 to 1.
        gain: Steered minus base in points, paired.
        controls: The same difference for control steerings, by name.
        dataset: Hub id of the benchmark, when it has one.
        task_id: Task within that benchmark.
        settings: How it was asked: decoding, dtype, versions, hashes of items and model.

    Raises:
        FormatError: A score outside 0 to 1, no items, or a number that is not finite.
    """

    steering: str
    fingerprint: str
    strength: float
    task: str
    language: str
    metric: str
    items: int
    base: float
    steered: float
    gain: Interval
    controls: Mapping[str, Interval] = field(default_factory=dict)
    dataset: str | None = None
    task_id: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("base", "steered"):
            if not 0 <= getattr(self, name) <= 1:
                raise FormatError(f"{name} score is {getattr(self, name)}; scores are 0 to 1")
        if self.items < 1 or not math.isfinite(self.strength):
            raise FormatError(f"items is {self.items} and strength {self.strength}")

    def model_index(self) -> EvalResult:
        """What the metadata of a card says of it."""
        name = f"{self.metric} ({self.language}, strength {self.strength:g}, {self.items} items)"
        return EvalResult(
            task_type="text-generation",
            dataset_type=self.dataset or re.sub(r"\W+", "-", self.task),
            dataset_name=self.task,
            metric_type=self.metric,
            metric_name=name,
            metric_value=round(self.steered, 4),
        )

    def entry(self) -> EvalResultEntry:
        """What ``.eval_results/`` says of it, for a benchmark of the Hub."""
        return EvalResultEntry(
            dataset_id=str(self.dataset),
            task_id=self.task_id or self.language,
            value=round(100 * self.steered, 2),
            notes=f"steering {self.steering} at strength {self.strength:g}, gain {self.gain}",
        )


def write_results(results: Sequence[Result], folder: str | Path) -> None:
    """Write ``evaluation.json`` into a steering repo."""
    content = {"results": [asdict(result) for result in results]}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (Path(folder) / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")


def read_results(folder: str | Path) -> list[Result]:
    """The results of a steering repo; none if it has no ``evaluation.json``.

    Raises:
        FormatError: A file that is damaged, with the field that is wrong.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        return []
    content = read_json(path, _LARGEST)
    rows = content.get("results") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise FormatError(f"{path} has no list of results")
    return [_result(row, f"{path}, result {number}") for number, row in enumerate(rows)]


def current(results: Sequence[Result], steerings: Sequence[RouterSteering]) -> list[Result]:
    """The results that were measured with these very steerings; of others it is said so."""
    fingerprints = {steering.name: steering.fingerprint for steering in steerings}
    fit = [r for r in results if fingerprints.get(r.steering) == r.fingerprint]
    if len(fit) < len(results):
        logger.warning(
            "%d of %d results in %s are of other steerings than these and are left out",
            len(results) - len(fit),
            len(results),
            RESULTS_FILE,
        )
    return fit


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("steering", "fingerprint", "task", "language", "metric"), str),
    **dict.fromkeys(("dataset", "task_id"), (str, type(None))),
    **dict.fromkeys(("strength", "base", "steered"), (int, float)),
    "items": int,
    "gain": dict,
    "controls": dict,
    "settings": dict,
}


def _result(row: Any, where: str) -> Result:
    known = {f.name for f in fields(Result)}
    required = known - {"controls", "dataset", "task_id", "settings"}
    if not isinstance(row, dict) or set(row) - known or required - set(row):
        raise FormatError(f"{where}: its fields must be {', '.join(sorted(required))}")
    for name, value in row.items():
        number = isinstance(value, (int, float)) and not is_finite(value)
        if not isinstance(value, _KINDS[name]) or isinstance(value, bool) or number:
            raise FormatError(f"{where}: {name} is {short(value)}")
    gain = _interval(row["gain"], where)
    controls = {name: _interval(one, where) for name, one in row.get("controls", {}).items()}
    return Result(**{**row, "gain": gain, "controls": controls})


def _interval(value: Any, where: str) -> Interval:
    names = {f.name for f in fields(Interval)}
    if (
        not isinstance(value, dict)
        or set(value) != names
        or not all(map(is_finite, value.values()))
    ):
        raise FormatError(f"{where}: an interval needs {', '.join(sorted(names))}: {short(value)}")
    return Interval(**value)
