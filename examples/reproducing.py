"""Shared by ``reproduce_paper1.py`` and ``reproduce_paper2.py``: data, model, experiments.

A paper is a list of `Experiment`s: texts to profile, systems made of the profiles, and a task that
they answer. Nothing here knows what is steered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from steered_moe import RoutingProfile
from steered_moe.controls import System
from steered_moe.corpora import read_texts
from steered_moe.errors import CorpusError
from steered_moe.evaluation import Settings
from steered_moe.hub import commit_of
from steered_moe.quantizer import config_for
from steered_moe.selection import preset
from steered_moe.shards import profile_in_shards
from steered_moe.tasks import Task
from steered_moe.terminal import progress

MODELS = ("qwen3-30b-a3b", "phi-3.5-moe", "gpt-oss-20b")
SMALL = {
    **{"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1},
}
"""Sizes of ``--tiny``; layers, experts and top-k stay the real ones."""
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Corpus:
    """Texts to profile: where the Hub has them, and what stands for them in a data folder.

    Args:
        name: Folder of the profile.
        languages: Codes, as the tasks write them.
        hub: Source for `read_texts`.
        folder: Path below the data folder, with {language} in it.
        columns: Of the Hub's rows; None for the usual ones.
        folder_columns: Of the folder's.
        code: The source's code of a language.
        file: What stands for {language} in the folder, if not that code.
        rows: At most so many texts per language.
        drawn: Whether these are drawn by chance, with seed 0, or the first ones.
        prompt: Whether they end with what the chat template puts before an answer.
        parallel: Whether each text's routing is kept, for the divergence.
    """

    name: str
    languages: tuple[str, ...]
    hub: str
    folder: str
    columns: tuple[str, ...] | None = None
    folder_columns: tuple[str, ...] | None = None
    code: Callable[[str], str] = str
    file: str | None = None
    rows: int | None = None
    drawn: bool = False
    prompt: bool = False
    parallel: bool = False

    def texts(self, data: Path | None, limit: int | None) -> dict[str, list[str]]:
        """Texts by language; languages that a folder lacks are left out."""
        codes = {language: self.code(language) for language in self.languages}
        if data is None:
            found = read_texts(self.hub, list(codes.values()), columns=self.columns)
        else:
            names = {one: self.file or code for one, code in codes.items()}
            pattern = str(data / self.folder)
            exists = [o for o, n in names.items() if Path(pattern.format(language=n)).is_file()]
            codes = {one: names[one] for one in exists}
            found = read_texts(pattern, list(codes.values()), columns=self.folder_columns)
        return {one: self._kept(found[code], limit) for one, code in codes.items()}

    def _kept(self, rows: list[str], limit: int | None) -> list[str]:
        order = Random(0).sample(rows, len(rows)) if self.drawn else rows
        return order[: fewest(self.rows, limit)]


@dataclass(frozen=True)
class Options:
    """What a run is asked to do; the command line's options."""

    model: str
    out: Path
    data: Path | None = None
    limit: int | None = None
    languages: tuple[str, ...] | None = None
    tiny: bool = False
    load_in_4bit: bool = False
    batch_size: int = 16
    max_new_tokens: int | None = None


Systems = tuple[list[System], list[str]]


@dataclass(frozen=True)
class Experiment:
    """Systems on a task.

    Args:
        name: Folder of the run.
        task: What is asked.
        languages: In which.
        settings: How.
        corpora: What is profiled.
        planned: Names of the systems that there will be at most, base included.
        make: Systems and notes from the profiles, by name of the corpus.
        notes: What differs from the paper, and what the paper reports.
        saved: Whether the steerings become a steering repo.
        consistency: Whether the language of answers is measured.
    """

    name: str
    task: Task
    languages: tuple[str, ...]
    settings: Settings
    corpora: tuple[Corpus, ...]
    planned: tuple[str, ...]
    make: Callable[[Bench, Mapping[str, RoutingProfile]], Systems]
    notes: tuple[str, ...] = ()
    saved: bool = True
    consistency: bool = False


@dataclass
class Bench:
    """One model, real or tiny, and what is measured on it."""

    options: Options
    profiles: dict[str, RoutingProfile] = field(default_factory=dict)

    @property
    def hub_id(self) -> str:
        return preset(f"{self.options.model}-mgsm").model

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Of the real model; with ``--tiny`` its sizes are small."""
        data, name = self.options.data, self.hub_id.replace("/", "--")
        if data is None:
            raw = AutoConfig.from_pretrained(self.hub_id).to_dict()
        else:
            raw = json.loads(next((data / "model_configs").glob(f"{name}.*json")).read_text())
        if self.options.tiny:
            known = {key: value for key, value in SMALL.items() if key in raw}
            ids = {"pad_token_id": self.tokenizer.pad_token_id, "bos_token_id": None}
            ids |= {"vocab_size": len(self.tokenizer), "eos_token_id": self.tokenizer.eos_token_id}
            raw = {k: v for k, v in raw.items() if k != "quantization_config"} | known | ids
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's; with ``--tiny`` and a data folder that of OLMoE, with a plain template."""
        if not (self.options.tiny and self.options.data):
            return AutoTokenizer.from_pretrained(self.hub_id)
        file = self.options.data / "tokenizers" / "olmoe" / "tokenizer.json"
        special = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
        made = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
        made.chat_template = CHAT
        return made

    @property
    def place(self) -> str:
        """Hub id or folder of the model."""
        tiny = self.options.out / f"tiny-{self.options.model}"
        return str(tiny) if self.options.tiny else self.hub_id

    @cached_property
    def revision(self) -> str | None:
        return None if self.options.tiny else commit_of(self.model.name_or_path, None)

    @cached_property
    def model(self) -> Any:
        if self.options.tiny:
            self._write_tiny()
        present = getattr(self.config, "quantization_config", None)
        packed = config_for(None, self.options.load_in_4bit, "bfloat16", present)
        kind: dict[str, Any] = {} if packed is None else {"quantization_config": packed}
        kind |= {"dtype": "float32"} if self.options.tiny else {"dtype": "bfloat16"}
        kind |= {} if self.options.tiny else {"device_map": "auto"}
        return AutoModelForCausalLM.from_pretrained(self.place, **kind).eval()

    def _write_tiny(self) -> None:
        if not (Path(self.place) / "config.json").exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(self.config).save_pretrained(self.place)
            self.tokenizer.save_pretrained(self.place)

    def profile(self, corpus: Corpus) -> RoutingProfile:
        """Routing of a corpus, measured once and kept in ``profiles``."""
        if corpus.name not in self.profiles:
            texts = corpus.texts(self.options.data, self.options.limit)
            about = {"model": self.place, "revision": self.revision, "corpus": corpus.name}
            with progress(f"profiling {corpus.name}", sum(map(len, texts.values()))) as tick:
                self.profiles[corpus.name] = profile_in_shards(
                    self.model, self.tokenizer, texts, self.options.out / "profiles" / corpus.name,
                    about=about, batch_size=self.options.batch_size, tick=tick,
                    keep_sequences=corpus.parallel, **self._form(corpus),
                )  # fmt: skip
        return self.profiles[corpus.name]

    def _form(self, corpus: Corpus) -> dict[str, Any]:
        """In the chat template if there is one, without thinking if it knows of it."""
        template = self.tokenizer.chat_template
        if template is None:
            return {}
        quiet = {"enable_thinking": False} if "enable_thinking" in str(template) else None
        return {"chat": True, "generation_prompt": corpus.prompt, "template_kwargs": quiet}


def asked(
    task: Task, usual: Sequence[str], options: Options
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Languages to evaluate, those asked for or the usual ones, as far as there are data; and a
    note on the others."""
    wanted = options.languages or usual
    found = tuple(code for code in wanted if _has(task, code, options))
    if not found:
        raise CorpusError(f"{task.name} has none of {', '.join(wanted)}")
    lacking = [code for code in wanted if code not in found]
    return found, (f"left out, without data: {', '.join(lacking)}",) if lacking else ()


def _has(task: Task, code: str, options: Options) -> bool:
    if task.code(code) is None or options.data is None:
        return task.code(code) is not None
    try:
        return bool(task.items(code, options.data, 1, "all"))
    except CorpusError:
        return False


def shortened(task: Task, options: Options, usual: int | None = None) -> Task:
    """The task with answers of at most so many tokens; with ``--tiny`` 8 unless asked, and no texts
    that end an answer, for which transformers needs longer than a tiny model for its answers."""
    if task.kind != "generate":
        return task
    if options.tiny:
        task = replace(task, stops=lambda language: ())
    length = options.max_new_tokens or (8 if options.tiny else usual or task.max_new_tokens)
    return replace(task, max_new_tokens=length)


def codes(text: str) -> tuple[str, ...]:
    """Languages, with blanks between."""
    return tuple(text.split())


def fewest(*limits: int | None) -> int | None:
    """The lowest of the limits that there are."""
    return min((limit for limit in limits if limit is not None), default=None)
