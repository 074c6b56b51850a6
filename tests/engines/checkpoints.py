"""Tiny random checkpoints that vLLM runs on a CPU, and steering repos for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steered_moe import RouterSteering, SteeredMoEForCausalLM

LAYERS, EXPERTS, TOP_K, VOCAB = 4, 8, 2, 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts": EXPERTS, "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False},
    "granitemoe": {},
    "glm4_moe": {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1,
                 "routed_scaling_factor": 1.5, "norm_topk_prob": True},
    "gpt_oss": {"layer_types": ["full_attention"] * LAYERS},
}  # fmt: skip
"""Model type -> what it needs beyond; glm4_moe has sigmoid, groups and a correction bias."""

PROMPTS = ([5, 9, 31, 77, 120, 8], [3, 44, 200], [17, 18, 19, 20, 21, 22, 23, 24, 25, 26])


def write_base(family: str, folder: Path) -> Path:
    """A checkpoint of the family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in model.state_dict().items():
        if "correction_bias" in name:
            tensor.copy_(torch.randn_like(tensor))
        elif name.endswith(("sinks", "router.bias")):
            tensor.normal_()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def steerings(force: bool) -> list[RouterSteering]:
    """One of each scale, and one that forces and bans."""
    generator = torch.Generator().manual_seed(1)
    made = [
        RouterSteering(scale, layers, torch.randn(2, EXPERTS, generator=generator), scale=scale)
        for scale, layers in (("std", [1, 2]), ("abs", [2, 3]), ("none", [1, 3]))
    ]
    if force:
        table = torch.zeros(2, EXPERTS)
        table[0, 3], table[1, 5], table[1, 0], table[1, 6] = 1, -1, 1, 1
        made.append(RouterSteering("force", [1, 2], torch.zeros(2, EXPERTS), table))
    return made


def write_repo(base: Path, folder: Path, force: bool) -> Path:
    """A steering repo for it."""
    model = SteeredMoEForCausalLM.from_base(base, steerings(force), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def reference(
    repo: Path, strength: Any, length: int, prompts: Any = PROMPTS
) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens of each prompt by the transformers wrapper, and their log-probabilities."""
    model = SteeredMoEForCausalLM.from_pretrained(repo, strength=strength, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        chances = []
        for _ in range(length):
            scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            chances.append(float(scores.max()))
        answers.append((ids[len(prompt) :], chances))
    return answers
