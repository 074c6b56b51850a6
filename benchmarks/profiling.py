"""What profiling costs: speed over a plain forward pass, and memory by length of the corpus.

    python benchmarks/profiling.py [--pairs 9] [--texts 8] [--length 128]

Speed: plain forward, profiled forward, and ``output_router_logits=True`` with everything kept take
turns on the model of overhead.py; each figure is the median of paired ratios of tokens per second,
with the quartiles. "noise" is the plain forward over itself.

Memory: the peak of a process (of the GPU, where there is one) that profiles 1, 4 and 16 times as
many texts on a small random model, each in a process of its own; "plain" profiles nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from overhead import build, ratio
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from steered_moe.collection import RoutingCollector

SMALL = {
    "vocab_size": 1024, "hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 64,
    "num_experts_per_tok": 4,
}  # fmt: skip
WAYS = ("plain", "profiled", "output_router_logits")
TIMES = (1, 4, 16)
TEXTS, LENGTH = 64, 128  # of the shortest corpus of the memory check


def batch(model: PreTrainedModel, texts: int, length: int) -> dict[str, torch.Tensor]:
    """Random token ids without padding."""
    ids = torch.randint(1, model.config.vocab_size, (texts, length), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def profiled(
    model: PreTrainedModel, collector: RoutingCollector, inputs: dict[str, torch.Tensor]
) -> None:
    with collector.batch(inputs["attention_mask"]):
        model(**inputs, use_cache=False)


def kept(
    model: PreTrainedModel, everything: list[torch.Tensor], inputs: dict[str, torch.Tensor]
) -> None:
    output = model(**inputs, use_cache=False, output_router_logits=True)
    everything.append(torch.stack(output.router_logits))


@torch.inference_mode()
def speed(texts: int, length: int, pairs: int) -> dict[str, object]:
    """Tokens per second of the ways to record, over those of a plain forward pass."""
    model, _ = build("cuda" if torch.cuda.is_available() else "cpu")
    inputs = batch(model, texts, length)
    collector = RoutingCollector(model)
    plain = partial(model, **inputs, use_cache=False)
    ways: dict[str, Callable[[], object]] = {
        "noise": partial(model, **inputs, use_cache=False),
        "profiled": lambda: profiled(model, collector, inputs),
        "output_router_logits": lambda: kept(model, [], inputs),
    }
    return {name: ratio(plain, way, pairs) for name, way in ways.items()}


@torch.inference_mode()
def peak(way: str, texts: int) -> int:
    """Peak memory in MB of this process after so many texts."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL)).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    collector, everything = RoutingCollector(model), list[torch.Tensor]()
    for _ in range(texts // 8):
        inputs = batch(model, 8, LENGTH)
        if way == "plain":
            model(**inputs, use_cache=False)
        elif way == "profiled":
            profiled(model, collector, inputs)
        else:
            kept(model, everything, inputs)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def memory() -> dict[str, dict[str, int]]:
    """Peak memory in MB by way and by length of the corpus."""
    found: dict[str, dict[str, int]] = {}
    for way in WAYS:
        for times in TIMES:
            command = [sys.executable, __file__, "--peak", way, "--texts", str(TEXTS * times)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(way, {})[f"{times}x"] = int(done.stdout)
    return found


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--peak", choices=WAYS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.texts))
        return
    result = {
        "memory_mb": memory(),
        "tokens_per_s_over_plain": speed(options.texts, options.length, options.pairs),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
