"""What an evaluation costs: its speed over that of a plain ``generate`` loop on the same batches.

    python benchmarks/evaluation.py [--pairs 9] [--items 64] [--batch 16] [--large]

The plain loop puts the same prompts into the chat template, generates greedily and decodes, and
keeps nothing. Both take turns, so a machine whose speed drifts hits both alike; each figure is the
median of the paired ratios, with the quartiles, and below 1 the evaluation is slower. "steered" is
the same with a steering attached. "noise" is the plain loop over itself. --large adds the random
model of overhead.py, 1.3 B parameters (on a GPU 30 B); minutes.

Exits with 1 if a median lies below the goal of 0.9.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from overhead import build, ratio, steering_for
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from steered_moe import RouterSteering
from steered_moe.controls import System
from steered_moe.embedded import named_model, named_repo
from steered_moe.evaluation import Evaluation, Settings
from steered_moe.storage import read_repo
from steered_moe.tasks import task

GOAL = 0.9
TASK, LANGUAGE = task("embedded"), "sw"


def plain(model: PreTrainedModel, tokenizer: Any, items: int, batch: int) -> None:
    """What everybody writes, on the batches of an evaluation: the longest prompts first."""
    prompts = [item.prompt for item in TASK.items(LANGUAGE, limit=items)]
    prompts.sort(key=lambda prompt: -len(prompt.encode()))
    for start in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": p}] for p in prompts[start : start + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=TASK.max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(new, skip_special_tokens=True)


def evaluated(model: PreTrainedModel, tokenizer: Any, system: System, run: Settings) -> None:
    """The same as an evaluation, in a new folder."""
    evaluation = Evaluation(model, tokenizer, [TASK], [LANGUAGE], [system], run)
    with tempfile.TemporaryDirectory() as folder:
        evaluation.run(folder)


def measure(
    model: PreTrainedModel, tokenizer: Any, steering: RouterSteering, options: SimpleNamespace
) -> dict[str, dict[str, float]]:
    """Ratios of one model."""
    settings = Settings(limit=options.items, batch_size=options.batch)

    def loop(system: System) -> None:
        with system.on(model):
            plain(model, tokenizer, options.items, options.batch)

    base = System("base")
    found = {"noise": ratio(lambda: loop(base), lambda: loop(base), options.pairs)}
    for system in (base, System("steered", steering)):
        found[system.name] = ratio(
            lambda system=system: loop(system),
            lambda system=system: evaluated(model, tokenizer, system, settings),
            options.pairs,
        )
    return found


def main(options: SimpleNamespace) -> int:
    """Print one JSON object."""
    tokenizer = AutoTokenizer.from_pretrained(named_model("embedded"), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(named_model("embedded"), dtype=torch.float32)
    steering = read_repo(named_repo("embedded")).steerings[0]
    result = {"embedded": measure(model.eval(), tokenizer, steering, options)}
    if options.large:
        model, _ = build("cuda" if torch.cuda.is_available() else "cpu")
        result["large"] = measure(model, tokenizer, steering_for(model, force=False), options)
    missed = [
        f"{model}, {name}: {GOAL:g} of the plain loop"
        for model, ratios in result.items()
        for name, found in ratios.items()
        if found["median"] < GOAL
    ]
    print(json.dumps({**result, "goals missed": missed}, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--large", action="store_true")
    sys.exit(main(parser.parse_args(namespace=SimpleNamespace())))
