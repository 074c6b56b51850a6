"""Fingerprints of a model and a tokenizer, cheap enough to take before every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from steered_moe.routers import find_routers

_LEFT_OUT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_NUMBERS = 256
_MATRIX = 2  # a router's own tensors; experts that lie in the same module have more dimensions


def model_sha256(model: nn.Module) -> str:
    """sha256 (hex) over a model's config, the weights of its routers, edits of them included, and
    some numbers of every other tensor.

    Args:
        model: Any MoE of transformers, offloaded or not; what is offloaded is read once.

    Raises:
        RouterError: The model has no router.
    """
    config: Any = model.config
    fields = {k: v for k, v in config.to_diff_dict().items() if k not in _LEFT_OUT}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    routers = {id(router.module) for router in find_routers(model)}
    for path, module in model.named_modules():
        for name, tensor in _own(module, id(module) in routers):
            digest.update(f"{path} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _own(module: nn.Module, whole: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one module, without those of modules inside it, or some numbers of each."""
    if next(module.parameters(recurse=False), next(module.buffers(recurse=False), None)) is None:
        return
    with align_module_device(module, "cpu" if whole else None):
        kinds = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in chain(*kinds):
            if not tensor.is_meta:
                yield name, tensor if whole and tensor.dim() <= _MATRIX else _some(tensor)


def _some(tensor: Tensor) -> Tensor:
    """A few numbers of a tensor, from all over it; of a sharded one, of what is here."""
    here = getattr(tensor, "to_local", lambda: tensor)().detach().reshape(-1)
    return here[:: max(1, len(here) // _NUMBERS)]


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
