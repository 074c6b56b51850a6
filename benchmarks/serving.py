"""What steering costs in a vLLM engine: requests per second and time per token, steered over base.

    python benchmarks/serving.py [--pairs 9] [--requests 16] [--tokens 32] [--compile] [--small]

Two engines with the same random weights run at once, one with the plugin asked to steer, one not
asked. They take turns, so a machine whose speed drifts hits both alike; each figure is the median
of the paired ratios of speed, with the quartiles, and below 1 the steered one is slower. "mixed"
gives every second request of the steered engine a strength of its own. "noise" is the base over
itself. The model is that of overhead.py: 1.3 B parameters, on a GPU the shape of Qwen3-30B-A3B with
CUDA graphs (--compile); --small is for trying it out.

Exits with 1 if a median lies below the goal of 0.97.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import COMMON, CPU, GPU, ratio, steering_for
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from vllm import LLM, SamplingParams

from steered_moe.base_model import repo_for

GOAL = 0.97
SMALL = {"hidden_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 8, "head_dim": 64}


def write(folder: Path, shape: dict[str, int]) -> tuple[Path, Path]:
    """Configuration of a base model and a steering repo for it; weights are made by the engine."""
    base, repo = folder / "base", folder / "repo"
    config = Qwen3MoeConfig(**COMMON, **shape, architectures=["Qwen3MoeForCausalLM"])
    config.save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    steering = steering_for(model, force=False)
    repo_for(steering, 1.0, str(base), None, repo).write(repo)
    return base, repo


def engine(base: Path, repo: Path | None, graphs: bool) -> LLM:
    """An engine with random weights."""
    steered = {} if repo is None else {"steered_moe": {"repo_id": str(repo)}}
    return LLM(
        str(base), additional_config=steered, load_format="dummy", skip_tokenizer_init=True,
        max_model_len=512, max_num_seqs=32, enforce_eager=not graphs, disable_log_stats=True,
        enable_prefix_caching=False, gpu_memory_utilization=0.45, block_size=32,
    )  # fmt: skip


def answers(
    llm: LLM, requests: int, tokens: int, asked: tuple[Any, ...] = (None,)
) -> Callable[[], Any]:
    """Answer so many requests at once; they take turns in what they ask for."""
    prompts = [{"prompt_token_ids": list(range(5 + i, 69 + i))} for i in range(requests)]
    params = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args=None if (own := asked[i % len(asked)]) is None else {"steered_moe": own},
        )
        for i in range(requests)
    ]  # fmt: skip
    return lambda: llm.generate(prompts, params, use_tqdm=False)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="torch.compile; CUDA graphs")
    parser.add_argument("--small", action="store_true", help="a model of a few megabytes")
    options = parser.parse_args()
    shape = SMALL if options.small else GPU if torch.cuda.is_available() else CPU
    with tempfile.TemporaryDirectory() as folder:
        base_folder, repo = write(Path(folder), shape)
        base, steered = (engine(base_folder, one, options.compile) for one in (None, repo))
        many, one = (options.requests, options.tokens), (1, options.tokens)
        found = {
            "noise": ratio(answers(base, *many), answers(base, *many), options.pairs),
            "requests_per_second": ratio(
                answers(base, *many), answers(steered, *many), options.pairs
            ),
            "mixed": ratio(
                answers(base, *many), answers(steered, *many, (None, 0.5)), options.pairs
            ),
            "tokens_per_second_of_one_request": ratio(
                answers(base, *one), answers(steered, *one), options.pairs
            ),
        }
        for llm in (base, steered):
            llm.llm_engine.engine_core.shutdown()
    print(json.dumps(found, indent=2))
    low = [name for name, numbers in found.items() if numbers["median"] < GOAL]
    sys.exit(1 if set(low) - {"noise"} else 0)


if __name__ == "__main__":
    main()
