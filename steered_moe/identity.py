"""Fingerprints of a model and a tokenizer, cheap enough to take before every run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from steered_moe.routers import find_routers

_LEFT_OUT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_MATRIX = 2  # a router's own tensors; experts that lie in the same module have more dimensions


def model_sha256(model: nn.Module) -> str:
    """sha256 (hex) over a model's config and the weights of its routers, edits of them included.

    Other weights are not read, so that it costs nothing beside a run: two models that differ in
    them only look alike.

    Args:
        model: Any MoE of transformers, offloaded or not.

    Raises:
        RouterError: The model has no router.
    """
    config: Any = model.config
    fields = {k: v for k, v in config.to_diff_dict().items() if k not in _LEFT_OUT}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for router in find_routers(model):
        digest.update(router.path.encode())
        with align_module_device(router.module, "cpu"):
            for name, tensor in (*router.module.named_parameters(), *router.module.named_buffers()):
                if tensor.dim() <= _MATRIX and not tensor.is_meta:
                    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(_bytes(tensor))
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """sha256 (hex) over a tokenizer, its vocabulary and its chat template, without its padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    rules = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    parts = [
        type(tokenizer).__name__,
        rules or tokenizer.get_vocab(),
        tokenizer.chat_template,
        getattr(tokenizer, "bos_token", None),
        getattr(tokenizer, "eos_token", None),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
