"""One process of a parallel run: logits, tokens and routing of a steered model, into a file.

torchrun --nproc-per-node 2 parallel_worker.py REPO MODE OUT
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from steered_moe import SteeredMoEForCausalLM
from steered_moe.collection import profile_texts

TEXTS = {
    "en": ["A router sends each token", "to a few experts"],
    "sw": ["Kipanga njia hutuma", "kila tokeni kwa wataalamu wachache"],
}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def run(repo: str, mode: dict[str, int]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if mode:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(**mode)
    model = SteeredMoEForCausalLM.from_pretrained(repo, dtype=torch.float32, **options)
    ids = torch.tensor([[5, 9, 31, 7, 12, 8]])
    found = {"steered": whole(model(ids).logits)}
    with model.unsteered():
        found["base"] = whole(model(ids).logits)
    with model.steered(0.5):
        found["half"] = whole(model(ids).logits)
    found["tokens"] = model.generate(ids, max_new_tokens=8, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    profile = profile_texts(model, tokenizer, TEXTS, keep_sequences=True)
    return found | {f"profile {name}": tensor for name, tensor in profile.tensors().items()}


if __name__ == "__main__":
    result = run(sys.argv[1], json.loads(sys.argv[2]))
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(result, sys.argv[3])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
