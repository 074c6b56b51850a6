"""What a run of `reproducing` would do and need, from data and configs alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reproducing import Bench, Corpus, Experiment, Options
from rich.markup import escape
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

from steered_moe import find_routers
from steered_moe.quantization import expert_parameters
from steered_moe.routers import Router
from steered_moe.tasks import Item
from steered_moe.terminal import console

BYTES_PER_TOKEN = 2.2
"""UTF-8 bytes per token, the least of 8 languages: the MGSM questions over the tokens, template
included, that the routing files of 2601.14050 count for Qwen3-30B-A3B (sw 2.25, bn 2.31, de 2.93,
es 2.93, zh 2.92, fr 2.94, en 3.29, ja 3.46). So there will be fewer tokens than estimated."""
BITS_IN_4BIT = 4.5  # nf4, and a float32 scale per 64 weights


@dataclass(frozen=True)
class Step:
    """A part of a plan; tokens and calls are the most that there can be."""

    what: str
    systems: int
    languages: int
    items: int
    calls: int
    read: int
    written: int


def steps(bench: Bench, experiments: Sequence[Experiment]) -> list[Step]:
    """Everything that a run does, from the data alone."""
    return [
        *(_profile_step(corpus, bench.options) for corpus in _corpora(experiments)),
        *(_evaluation_step(one, bench.options) for one in experiments),
    ]


def _corpora(experiments: Sequence[Experiment]) -> list[Corpus]:
    """Each corpus once."""
    return list({corpus.name: corpus for one in experiments for corpus in one.corpora}.values())


def _items(one: Experiment, options: Options) -> list[list[Item]]:
    """The items of each language."""
    limit, part = one.settings.limit, one.settings.part
    return [one.task.items(code, options.data, limit, part) for code in one.languages]


def _profile_step(corpus: Corpus, options: Options) -> Step:
    texts = corpus.texts(options.data, options.limit)
    count = sum(map(len, texts.values()))
    calls = sum(math.ceil(len(rows) / options.batch_size) for rows in texts.values())
    read = sum(_tokens(row) for rows in texts.values() for row in rows)
    return Step(f"profile {corpus.name}", 1, len(texts), count, calls, read, 0)


def _evaluation_step(one: Experiment, options: Options) -> Step:
    items = _items(one, options)
    systems, count = len(one.planned), sum(map(len, items))
    calls = sum(math.ceil(len(rows) / options.batch_size) for rows in items)
    read = sum(_tokens(item.prompt) for rows in items for item in rows)
    written = count * one.task.max_new_tokens
    calls *= max(1, one.task.max_new_tokens)
    return Step(
        f"evaluate {one.name}", systems, len(items), count, systems * calls, systems * read,
        systems * written,
    )  # fmt: skip


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def room(bench: Bench, experiments: Sequence[Experiment]) -> dict[str, int]:
    """Parameters, and bytes of weights, KV cache and profiles, from the config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(bench.config)
    weights, packed = sum(p.numel() for p in model.parameters()), _packed(model)
    tokens = bench.options.batch_size * _longest(bench.options, experiments)
    return {
        "parameters": weights,
        "weights in bfloat16": 2 * weights,
        "weights in 4 bit": 2 * (weights - packed) + round(packed * BITS_IN_4BIT / 8),
        "KV cache of a batch": tokens * _cache_per_token(bench.config),
        "profiles on disk": _disk(bench.options, experiments, find_routers(model)),
    }


def _longest(options: Options, experiments: Sequence[Experiment]) -> int:
    """Tokens of the longest prompt that is answered, and of its answer."""
    return max(
        _tokens(item.prompt) + one.task.max_new_tokens
        for one in experiments
        if one.task.kind == "generate"
        for rows in _items(one, options)
        for item in rows
    )


def _cache_per_token(config: Any) -> int:
    """Bytes of keys and values in bfloat16; sliding windows, which need fewer, are not counted."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * config.num_key_value_heads * head * 2)


def _disk(options: Options, experiments: Sequence[Experiment], routers: Sequence[Router]) -> int:
    """Per language three float64 by expert and three by layer; per text a float32 by expert."""
    cells, total = sum(router.num_experts for router in routers), 0
    for corpus in _corpora(experiments):
        texts = corpus.texts(options.data, options.limit)
        total += len(texts) * 3 * 8 * (cells + len(routers))
        total += sum(map(len, texts.values())) * cells * 4 * corpus.parallel
    return total


def _packed(model: nn.Module) -> int:
    """Weights that ``--load-in-4bit`` packs: experts and linear layers but routers and head."""
    kept = {router.path for router in find_routers(model)}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = [
        module.weight.numel()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and path not in kept
    ]
    experts = [getattr(module, name).numel() for _, module, name in expert_parameters(model)]
    return int(sum(linear) + sum(experts))


def plan(
    bench: Bench, experiments: Sequence[Experiment], rate: float, prompt_rate: float
) -> dict[str, Any]:
    """Print what a run would do, and write it to ``plan.json``; no model is loaded."""
    rows = []
    console.print(f"plan for {escape(bench.place)}")
    for step in steps(bench, experiments):
        seconds = step.written / rate + step.read / prompt_rate
        rows.append({**asdict(step), "seconds": seconds})
        console.print(
            f"* {step.what}: {step.systems} systems x {step.items:,} items in {step.languages} "
            f"languages; {step.calls:,} model calls; {step.read:,} tokens read, {step.written:,} "
            f"written; {seconds / 3600:.2f} h",
            soft_wrap=True,
        )
    sizes = room(bench, experiments)
    total = sum(row["seconds"] for row in rows)
    console.print(
        f"time: {total / 3600:.2f} h at most, at {rate:g} tokens/s written and {prompt_rate:g} "
        f"read (rates assumed, not measured; each answer as long as allowed; {BYTES_PER_TOKEN} "
        f"bytes per token)\nparameters: {sizes['parameters']:,}",
        soft_wrap=True,
    )
    for name in list(sizes)[1:]:
        console.print(f"{name}: {sizes[name] / 2**30:.2f} GiB")
    tell(note for one in experiments for note in one.notes)
    if present := getattr(bench.config, "quantization_config", None):
        tell([f"published in {present['quant_method']}: --load-in-4bit is refused, not needed"])
    found = {"model": bench.place, "steps": rows, "seconds": total, **sizes}
    write(bench.options.out / "plan.json", found)
    return found


def tell(notes: Iterable[str]) -> None:
    """Print each note once."""
    for note in dict.fromkeys(notes):
        console.print(f"* {escape(note)}", soft_wrap=True)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
