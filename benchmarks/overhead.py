"""What steering costs: decode and prefill speed, steered over unsteered, in one interleaved run.

    python benchmarks/overhead.py [--pairs 9] [--tokens 16] [--force] [--no-compile]

Two models share the same random weights, one of them is steered. They take turns, so a machine
whose speed drifts hits both alike; each figure is the median of the paired ratios, with the
quartiles. Without a GPU the model has the width of a small Qwen3-MoE (1.3 B parameters, 128 experts
top-8, 8 layers, 5 of them steered); with one it has the shape of Qwen3-30B-A3B (48 layers, 30
steered). A ratio of steered over itself gives the noise of the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel, Qwen3MoeConfig

from steered_moe import RouterSteering, attach
from steered_moe.intervention import attached

CPU = {"hidden_size": 1024, "moe_intermediate_size": 384, "num_hidden_layers": 8, "head_dim": 128}
GPU = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "head_dim": 128}
COMMON = {
    "vocab_size": 32000, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "eos_token_id": None, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip


def build(device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models over the same weights."""
    config = Qwen3MoeConfig(**COMMON, **(GPU if device == "cuda" else CPU))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        first = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for router in (layer.mlp.gate for layer in first.model.layers):
            torch.nn.init.normal_(router.weight, std=0.02)
    with torch.device("meta"):
        second = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    second.load_state_dict(first.state_dict(), assign=True)
    second.model.rotary_emb = first.model.rotary_emb
    return first, second


def steering_for(model: PreTrainedModel, force: bool) -> RouterSteering:
    """Five eighths of the layers, 14 experts each, as the released steering of 2601.14050."""
    count = model.config.num_hidden_layers
    layers = list(range(count // 5, count // 5 + count * 5 // 8))
    weights = torch.zeros(len(layers), 128)
    weights[:, :14] = 0.5
    forced = torch.zeros(len(layers), 128, dtype=torch.int8)
    forced[:, 0] = 1
    return RouterSteering("bench", layers, weights, forced if force else None, scale="abs")


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def ratio(base: Callable[[], object], other: Callable[[], object], pairs: int) -> dict[str, float]:
    """Speed of ``other`` over ``base``: median and quartiles of interleaved pairs."""
    base(), other()
    found = []
    for index in range(pairs):
        runs = (base, other) if index % 2 == 0 else (other, base)
        times = {run: seconds(run) for run in runs}
        found.append(times[base] / times[other])
    low, middle, high = statistics.quantiles(found, n=4)
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def decode(model: PreTrainedModel, tokens: int, **options: object) -> Callable[[], object]:
    """Greedy decoding of ``tokens`` tokens from a prompt of four."""
    prompt = torch.tensor([[5, 6, 7, 8]], device=model.device)
    mask = torch.ones_like(prompt)
    return lambda: model.generate(
        prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **options
    )


def prefill(model: PreTrainedModel, length: int = 256) -> Callable[[], object]:
    """One forward pass over a prompt."""
    prompt = torch.arange(length, device=model.device).unsqueeze(0)
    return lambda: model(input_ids=prompt, use_cache=False)


@torch.inference_mode()
def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--force", action="store_true", help="also force one expert per layer")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    base, steered = build("cuda" if torch.cuda.is_available() else "cpu")
    steering = steering_for(steered, options.force)
    attach(steered, steering)
    result: dict[str, object] = {
        "parameters": sum(p.numel() for p in base.parameters()),
        "layers": f"{len(steering.layers)} of {base.config.num_hidden_layers}",
        "force": options.force,
        "buffer_bytes": attached(steered).buffer_bytes,
    }
    kinds: dict[str, dict[str, object]] = {"decode_eager": {}}
    if not options.no_compile:
        config = CompileConfig(fullgraph=True, mode=None)
        config._compile_all_devices = True
        kinds["decode_compiled"] = {"cache_implementation": "static", "compile_config": config}
    for name, extra in kinds.items():
        runs = [decode(model, options.tokens, **extra) for model in (base, steered)]
        result[name] = ratio(*runs, options.pairs)
        result[f"{name}_noise"] = ratio(
            runs[0], decode(base, options.tokens, **extra), options.pairs
        )
    result["prefill"] = ratio(prefill(base), prefill(steered), options.pairs)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
