"""What a model is asked in an evaluation: tasks, their items, and how answers are scored.

MGSM, Global-MMLU medicine, Belebele and XQuAD are put as lm-eval 0.4.13 puts them; FLORES and NTREX
are read for bits per byte; the embedded model has its own problems.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from steered_moe import task_data
from steered_moe import task_languages as languages_of
from steered_moe.corpora import KNOWN
from steered_moe.errors import CorpusError, SteeredMoEError
from steered_moe.extraction import PUNCTUATION, flexible_match, same_number
from steered_moe.task_data import Item

__all__ = ["RULES", "TASKS", "Item", "Part", "Task", "part_of", "task"]

Part = Literal["dev", "test", "all"]
Reader = Callable[[str, "Path | None"], "list[Item]"]
_DEV = 5  # one item in so many is for tuning
_EMBEDDED_ITEMS = 2000


def _flexible(answer: str, target: str) -> float:
    return float(flexible_match(answer, target))


def _final_number(answer: str, target: str) -> float:
    return float(same_number(answer, target))


def _f1(answer: str, target: str) -> float:
    said, right = _words(answer), _words(target)
    common = sum((Counter(said) & Counter(right)).values())
    if not said or not right:
        return float(said == right)
    precision, recall = common / len(said), common / len(right)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _same_words(answer: str, target: str) -> float:
    return float(_words(answer) == _words(target))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


RULES: Mapping[str, Callable[[str, str], float]] = MappingProxyType(
    {
        "flexible-extract": _flexible,
        "final_number": _final_number,
        "squad_f1": _f1,
        "squad_exact": _same_words,
    }
)
"""How an answer is scored against a target, from 0 to 1. ``flexible-extract`` is exact_match of
lm-eval's filter, ASCII digits alone; ``final_number`` reads the digits and formats of many
languages; the other two are SQuAD's, which split at blanks and so are harsh on th and zh."""


@dataclass(frozen=True)
class Task:
    """A kind of question in several languages.

    Args:
        name: As on the command line.
        kind: "generate" an answer, "choose" the likeliest choice, or read a "text".
        metric: What the score is.
        languages: Codes; FLORES codes of the same are understood by `code`.
        dataset: Id on the Hub; "" where there is none.
        read: Items of one of the languages, from a folder or the Hub.
        rule: Of `RULES`, for answers; another by ``dataclasses.replace(task, rule=...)``.
        stops: Texts that end an answer, by language.
        max_new_tokens: Longest answer. 256 is what lm-eval's HF backend has for these tasks.
        chat: Whether the prompts are meant for a chat template.
        subjects: Whether a score is the mean over subjects, which ids begin with.
    """

    name: str
    kind: Literal["generate", "choose", "text"]
    metric: str
    languages: tuple[str, ...]
    dataset: str
    read: Reader
    rule: str = ""
    stops: Callable[[str], tuple[str, ...]] = lambda language: ()
    max_new_tokens: int = 0
    chat: bool = False
    subjects: bool = False

    def code(self, language: str) -> str | None:
        """The code of `languages` for one that a user wrote, such as sw for swh_Latn, or None."""
        found = languages_of.usual(language)
        return found if found in self.languages else None

    def items(
        self, language: str, data: Path | None = None, limit: int | None = None, part: str = "test"
    ) -> list[Item]:
        """The items of a language, in the same order in each.

        Args:
            language: Code, as in `languages` or of FLORES.
            data: Folder with local copies (its layout: `task_data`); by default from the Hub.
            limit: The first ones only.
            part: "dev" (for tuning), "test" or "all"; see `part_of`.

        Raises:
            CorpusError: Another language or part, a limit below 1, or data that cannot be read.
        """
        code = self._checked(language, limit, part)
        try:
            found = self._read(code, data, limit, part)
        except (KeyError, IndexError, TypeError) as error:
            raise CorpusError(f"{self.name} in {language}: a row without {error}") from error
        if not found:
            raise CorpusError(f"{self.name} has no item of the {part} part in {language}")
        return found[:limit]

    def score(self, item: Item, answer: str) -> float:
        """How right an answer is, from 0 to 1.

        Args:
            item: What was asked.
            answer: What the model said, without the stop that ended it.

        Raises:
            SteeredMoEError: The task asks for no answer.
        """
        if self.kind != "generate":
            raise SteeredMoEError(f"{self.name} compares log-likelihoods; it scores no answer")
        return RULES[self.rule](answer, item.target)

    def mean(self, scores: Mapping[str, float]) -> float:
        """The score of a language.

        Args:
            scores: By id of the item.

        Raises:
            SteeredMoEError: No scores.
        """
        if not scores:
            raise SteeredMoEError(f"{self.name}: there are no scores")
        groups: dict[str, list[float]] = {}
        for name, value in scores.items():
            groups.setdefault(name.partition("/")[0] if self.subjects else "", []).append(value)
        means = [sum(values) / len(values) for values in groups.values()]
        return sum(means) / len(means)

    def _checked(self, language: str, limit: int | None, part: str) -> str:
        code = self.code(language)
        if code is None:
            raise CorpusError(f"{self.name} has no {language}; it has {', '.join(self.languages)}")
        if part not in get_args(Part):
            raise CorpusError(f"part is {part!r}, not one of {', '.join(get_args(Part))}")
        if limit is not None and limit < 1:
            raise CorpusError(f"a limit of {limit} leaves no item")
        return code

    def _read(self, code: str, data: Path | None, limit: int | None, part: str) -> list[Item]:
        return [item for item in self.read(code, data) if part in ("all", part_of(item.id))]


class _Embedded(Task):
    """Problems without end, in the parts of their own corpus; 2000 of each without a limit."""

    def _read(self, code: str, data: Path | None, limit: int | None, part: str) -> list[Item]:
        parts = ("dev", "test") if part == "all" else (part,)
        drawn = [task_data.embedded_problems(code, one, limit or _EMBEDDED_ITEMS) for one in parts]
        return [item for pair in zip(*drawn, strict=True) for item in pair]


def part_of(name: str) -> Literal["dev", "test"]:
    """The part that an item belongs to, by its id alone, so that it is the same in each language.

    One item in five or so is for tuning: 50 of 250 in MGSM, 177 of 900 in Belebele, 266 of 1190 in
    XQuAD, 200 of 1012 in FLORES. Items that `task_data.about` takes for one are in one part. The
    embedded model's problems keep the parts of their corpus.
    """
    return "test" if task_data.order(f"part {task_data.about(name)}") % _DEV else "dev"


def task(name: str) -> Task:
    """A task by its name.

    Raises:
        CorpusError: There is none; it says which there are.
    """
    if name not in TASKS:
        raise CorpusError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


_MEDICAL = tuple(sorted({*languages_of.GLOBAL_MMLU, *languages_of.MMLU_CLINICAL}))

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        one.name: one
        for one in (
            Task(
                "mgsm_direct", "generate", "exact_match", languages_of.MGSM, KNOWN["mgsm"].repo,
                task_data.mgsm_direct, "flexible-extract", task_data.mgsm_stops, 256,
            ),
            Task(
                "mgsm_cot", "generate", "exact_match", languages_of.MGSM, KNOWN["mgsm"].repo,
                task_data.mgsm_cot, "flexible-extract", task_data.mgsm_stops, 256,
            ),
            Task(
                "global_mmlu_medicine", "choose", "accuracy", _MEDICAL, KNOWN["global_mmlu"].repo,
                task_data.medicine, subjects=True,
            ),
            Task(
                "belebele", "choose", "accuracy", languages_of.BELEBELE, KNOWN["belebele"].repo,
                task_data.belebele,
            ),
            Task(
                "xquad", "generate", "f1", languages_of.XQUAD, task_data.XQUAD.repo,
                task_data.xquad, "squad_f1", lambda language: ("\n",), 256,
            ),
            _Embedded(
                "embedded", "generate", "exact_match", languages_of.EMBEDDED, "",
                lambda language, data: [], "flexible-extract", max_new_tokens=40, chat=True,
            ),
            Task(
                "perplexity", "text", "bits_per_byte", languages_of.FLORES_200,
                KNOWN["flores_plus"].repo, task_data.flores_text,
            ),
            Task(
                "perplexity_ntrex", "text", "bits_per_byte", tuple(sorted(languages_of.NTREX)), "",
                task_data.ntrex_text,
            ),
        )
    }
)  # fmt: skip
"""All tasks by name."""
