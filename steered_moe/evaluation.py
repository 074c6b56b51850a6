"""Paired runs: base, steered and controls on identical prompts, example by example, resumable."""

from __future__ import annotations

import hashlib
import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import steered_moe
from steered_moe.answering import answers, changes_of_greedy, log_likelihoods
from steered_moe.controls import System
from steered_moe.errors import SteeredMoEError
from steered_moe.identity import model_sha256, tokenizer_sha256
from steered_moe.intervention import attached
from steered_moe.records import Record, Records
from steered_moe.sampling import Sampling
from steered_moe.tasks import Item, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How examples are put and answered; everything that changes a result.

    Args:
        part: "dev", "test" or "all" of a task's items.
        limit: At most so many items per language.
        batch_size: Prompts per pass. Answers do not depend on it beyond rounding.
        chat: Use the chat template; None for where a task's prompts are meant for one.
        thinking: Let a model that can think do so, through its chat template.
        sampling: None for greedy. Repetition penalties and the like of the model's generation
            config act on greedy answers too, as in lm-eval; a warning names them.
        seeds: Runs with sampling; one when greedy.
    """

    part: str = "test"
    limit: int | None = None
    batch_size: int = 16
    chat: bool | None = None
    thinking: bool = False
    sampling: Sampling | None = None
    seeds: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seeds < 1:
            raise SteeredMoEError("batch_size and seeds must be 1 or more")
        if self.limit is not None and self.limit < 1:
            raise SteeredMoEError(f"limit is {self.limit}; give 1 or more, or none")
        greedy = self.sampling is None or self.sampling.temperature == 0
        if greedy and self.seeds > 1:
            raise SteeredMoEError(
                f"{self.seeds} seeds without sampling would be the same run {self.seeds} times; "
                "give a temperature"
            )


@dataclass
class Evaluation:
    """One model, several systems, several tasks and languages.

    Args:
        model: Without steering.
        tokenizer: Its tokenizer.
        tasks: What is asked.
        languages: Codes; each task is asked in those that it has.
        systems: From `steered_moe.controls.systems`.
        settings: How.
        data: Folder with local copies of the tasks' data; by default they come from the Hub.
        about: What else a run records: repo, base model, revision.
    """

    model: PreTrainedModel
    tokenizer: Any
    tasks: Sequence[Task]
    languages: Sequence[str]
    systems: Sequence[System]
    settings: Settings
    data: Path | None = None
    about: Mapping[str, Any] | None = None

    def run(
        self, folder: str | Path, tick: Callable[[int, int], Any] = lambda done, total: None
    ) -> Records:
        """Run what is not done yet.

        Args:
            folder: For the records; of a killed run, to go on with it.
            tick: Called after each batch with the number of examples done and of all.

        Raises:
            FormatError: The folder holds another run, or a prompt does not fit into the model.
            SteeredMoEError: A steering is attached, the model is in training mode, no task has any
                of the languages, or it is to think and nothing asks it to.
        """
        self._check()
        batches = self._batches()
        records = Records(folder, self.description(batches))
        done, total = 0, sum(len(batch.items) for batch in batches)
        for system in self.systems:
            mine = [batch for batch in batches if batch.system is system]
            left = [batch for batch in mine if not records.has(*batch.key)]
            done += sum(len(batch.items) for batch in mine) - sum(len(b.items) for b in left)
            tick(done, total)
            with system.on(self.model) if left else nullcontext():
                for batch in left:
                    records.append(self._rows(batch))
                    done += len(batch.items)
                    tick(done, total)
        return records

    def _check(self) -> None:
        if attached(self.model) is not None:
            raise SteeredMoEError("the model is steered already; give it without its steering")
        if self.model.training:
            raise SteeredMoEError("the model is in training mode; call model.eval()")
        if not self.tasks:
            raise SteeredMoEError("there is no task; name one, such as mgsm_direct")
        asked = [task for task in self.tasks if self._chat(task) and self._template]
        if self.settings.thinking and not asked:
            raise SteeredMoEError(
                "thinking is asked for, but no task here uses a chat template that has "
                "enable_thinking; leave it out"
            )
        if penalties := changes_of_greedy(self.model):
            logger.warning("answers follow the generation config: %s", ", ".join(penalties))

    def description(self, batches: Sequence[_Batch]) -> dict[str, Any]:
        """Settings, versions and hashes that a run records."""
        first = [batch for batch in batches if batch.system is self.systems[0] and not batch.seed]
        rows = [f"{i.id}\0{i.prompt}\0{i.target}" for batch in first for i in batch.items]
        text = "\0".join(rows)
        return {
            **(self.about or {}),
            "tasks": [task.name for task in self.tasks],
            "rules": {one.name: [one.rule, one.max_new_tokens] for one in self.tasks},
            "languages": list(self.languages),
            "systems": [system.about for system in self.systems],
            "settings": asdict(self.settings),
            "items_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "model_sha256": model_sha256(self.model),
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            "generation_config": self.model.generation_config.to_diff_dict(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "versions": {
                "steered_moe": steered_moe.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _batches(self) -> list[_Batch]:
        """All batches in the order in which they are run, systems outermost."""
        pairs = self._pairs()
        items = {(task.name, code): self._items(task, code) for task, code in pairs}
        size = self.settings.batch_size
        return [
            _Batch(system, task, code, seed, number, items[task.name, code][start : start + size])
            for system in self.systems
            for task, code in pairs
            for seed in range(self.settings.seeds)
            for number, start in enumerate(range(0, len(items[task.name, code]), size))
        ]

    def _pairs(self) -> list[tuple[Task, str]]:
        """Each task with its languages; one that no task has is refused."""
        found = [
            (task, code)
            for task in dict.fromkeys(self.tasks)
            for code in dict.fromkeys(map(task.code, self.languages))
            if code is not None
        ]
        for name in self.languages:
            lacking = [task.name for task in self.tasks if task.code(name) is None]
            if len(lacking) == len(self.tasks):
                have = "; ".join(f"{t.name} has {', '.join(t.languages)}" for t in self.tasks)
                raise SteeredMoEError(f"no task has the language {name}; {have}")
            if lacking:
                logger.warning("%s: %s has no such language", name, ", ".join(lacking))
        return found

    def _items(self, task: Task, code: str) -> list[Item]:
        """The items of a language, those of like length together."""
        found = task.items(code, self.data, self.settings.limit, self.settings.part)
        return sorted(found, key=lambda item: -len((item.prompt or item.target).encode()))

    @property
    def _first_seed(self) -> int:
        return 0 if self.settings.sampling is None else self.settings.sampling.seed

    def _rows(self, batch: _Batch) -> list[Record]:
        ask = {"generate": self._generated, "choose": self._chosen, "text": self._read}
        measured = ask[batch.task.kind](batch)
        return [
            {**batch.label, "id": item.id, "of": len(batch.items), **values}
            for item, values in zip(batch.items, measured, strict=True)
        ]

    def _generated(self, batch: _Batch) -> list[Record]:
        task, settings = batch.task, self.settings
        said = answers(
            self.model, self.tokenizer, [item.prompt for item in batch.items],
            stops=task.stops(batch.language), max_new_tokens=task.max_new_tokens,
            chat=self._chat(task), sampling=settings.sampling, template_kwargs=self._template,
            seeds=[_seed(batch.seed + self._first_seed, item.id) for item in batch.items],
        )  # fmt: skip
        return [
            {"answer": text, "score": task.score(item, text)}
            for item, text in zip(batch.items, said, strict=True)
        ]

    def _chosen(self, batch: _Batch) -> list[Record]:
        bare = self._chat(batch.task)  # lm-eval puts no blank between a chat and an answer
        pairs = [
            (item.prompt, choice.lstrip() if bare else choice)
            for item in batch.items
            for choice in item.choices
        ]
        values = iter(
            log_likelihoods(
                self.model, self.tokenizer, pairs,
                chat=self._chat(batch.task), template_kwargs=self._template,
            )
        )  # fmt: skip
        rows = []
        for item in batch.items:
            mine = [next(values) for _ in item.choices]
            _check_numbers(batch, item, mine)
            right = mine.index(max(mine)) == int(item.target)
            rows.append({"log_likelihoods": mine, "score": float(right)})
        return rows

    def _read(self, batch: _Batch) -> list[Record]:
        pairs = [(item.prompt, item.target) for item in batch.items]
        values = log_likelihoods(self.model, self.tokenizer, pairs)
        for item, value in zip(batch.items, values, strict=True):
            _check_numbers(batch, item, [value])
        return [
            {"log_likelihood": value, "bytes": len(item.target.encode())}
            for item, value in zip(batch.items, values, strict=True)
        ]

    def _chat(self, task: Task) -> bool:
        if self.settings.chat is not None:
            return self.settings.chat
        return task.chat and self.tokenizer.chat_template is not None

    @property
    def _template(self) -> dict[str, Any]:
        known = "enable_thinking" in str(self.tokenizer.chat_template or "")
        return {"enable_thinking": self.settings.thinking} if known else {}


@dataclass(frozen=True)
class _Batch:
    """Some examples of one task, language, system and seed."""

    system: System
    task: Task
    language: str
    seed: int
    number: int
    items: Sequence[Item]

    @property
    def label(self) -> Record:
        return {
            "task": self.task.name, "language": self.language, "system": self.system.name,
            "seed": self.seed, "batch": self.number,
        }  # fmt: skip

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(self.label.values())


def _check_numbers(batch: _Batch, item: Item, values: Sequence[float]) -> None:
    if any(math.isnan(value) for value in values):
        raise SteeredMoEError(
            f"{batch.task.name} in {batch.language}, {item.id}: {batch.system.name} has a "
            "log-likelihood of nan; load it in bfloat16 or float32, or lower the strength"
        )


def _seed(run: int, item: str) -> int:
    """A seed for one example of one run, the same for all systems."""
    return int.from_bytes(hashlib.sha256(f"{run}\0{item}".encode()).digest()[:7], "big")
