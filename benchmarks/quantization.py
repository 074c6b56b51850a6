"""4-bit experts: footprint, peak memory while loading, and speed of decoding, in one run.

    python benchmarks/quantization.py [--rounds 3] [--tokens 16]

A random bfloat16 checkpoint is written to disk (the model of overhead.py: 1.3 B parameters without
a GPU, the shape of Qwen3-30B-A3B with one) and loaded in three ways, each in a process of its own,
which take turns: "bf16"; "ours", with ``ExpertsIn4bitConfig``; "bitsandbytes", with
``replace_parameter_4bit`` on each expert tensor after loading in 4 bit. The speeds of a round are
divided by each other; given are the medians over rounds with the least and the most.

Footprint: parameters and buffers, and the scales of packed weights. Peak: of anonymous memory of
the process while it loads (of the GPU's memory, where there is one), less what it had before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from overhead import COMMON, CPU, GPU, seconds
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Qwen3MoeConfig

from steered_moe.quantization import expert_parameters
from steered_moe.quantizer import ExpertsIn4bitConfig

WAYS = ("bf16", "ours", "bitsandbytes")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def write(folder: Path) -> None:
    """A checkpoint of random weights, layer by layer small enough for the memory of a GPU."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**COMMON, **(GPU if DEVICE == "cuda" else CPU))
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)
    model.save_pretrained(folder)


def load(way: str, folder: str) -> PreTrainedModel:
    """The model in one of `WAYS`."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": DEVICE}
    if way == "ours":
        options["quantization_config"] = ExpertsIn4bitConfig(**NF4)
    if way == "bitsandbytes":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **NF4)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if way == "bitsandbytes":
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for _, module, name in list(expert_parameters(model)):
            replace_parameter_4bit(module, name, quant_type="nf4")
    return model


class Peak:
    """The most memory that a block takes, less what was taken before."""

    def __enter__(self) -> Peak:
        self.stop, self.first = threading.Event(), now()
        self.most = self.first
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self.most = max(self.most, now())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.watcher.join()
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else self.most
        self.bytes = peak - self.first


def now() -> int:
    """Bytes taken: of the GPU, or anonymous memory of this process."""
    if DEVICE == "cuda":
        return int(torch.cuda.memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def footprint(model: PreTrainedModel) -> int:
    """Bytes of parameters, buffers, and the quantization states that are neither."""
    states = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    states += [getattr(module, "quant_state", None) for module in model.modules()]
    return int(model.get_memory_footprint()) + sum(s.absmax.nbytes for s in states if s is not None)


@torch.inference_mode()
def measure(way: str, folder: str, tokens: int) -> dict[str, float]:
    """Numbers of one way, in this process."""
    with Peak() as peak:
        start = time.perf_counter()
        model = load(way, folder)
        loading = time.perf_counter() - start
    prompt = torch.randint(1, 1000, (1, 16), device=DEVICE)

    def decode(count: int) -> None:
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    decode(2)
    prefill = seconds(lambda: decode(1))
    speed = tokens / (seconds(lambda: decode(tokens + 1)) - prefill)
    numbers = {"footprint": footprint(model), "peak": peak.bytes, "loading_s": loading}
    return {**numbers, "prefill_16_s": prefill, "tokens_per_s": speed}


def main(rounds: int, tokens: int) -> dict[str, Any]:
    """Print and return the table."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        torch.cuda.empty_cache()
        for turn in range(rounds):
            for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
                command = [sys.executable, __file__, "--way", way, "--folder", folder]
                run = subprocess.run(
                    [*command, "--tokens", str(tokens)], capture_output=True, text=True, check=True
                )
                found[way].append(json.loads(run.stdout.splitlines()[-1]))
                print(turn, way, found[way][-1], flush=True)
    table: dict[str, Any] = {
        way: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for way, rows in found.items()
    }
    for other in ("bf16", "bitsandbytes"):
        ratios = [
            ours["tokens_per_s"] / theirs["tokens_per_s"]
            for ours, theirs in zip(found["ours"], found[other], strict=True)
        ]
        table[f"decode, ours / {other}"] = [min(ratios), statistics.median(ratios), max(ratios)]
    print(json.dumps(table, indent=1))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.folder, arguments.tokens)))
    else:
        main(arguments.rounds, arguments.tokens)
