"""What the parts of a model weigh, and what each would weigh in 16 bit."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from steered_moe.packed_experts import PackedExperts

LARGE = 0.01
"""Tensors of one name in all layers that are more than this share of a model in 16 bit are named
when they are not in 4 bit."""


@dataclass
class Part:
    """Bytes of a part of a model: as it is, and in 16 bit."""

    bytes: int = 0
    half: int = 0

    def add(self, size: int, weights: int) -> None:
        """Count a tensor of so many bytes that stands for so many weights."""
        self.bytes += size
        self.half += 2 * weights


def memory_by_part(model: nn.Module) -> dict[str, Part]:
    """Bytes by part: "experts", "linear" (other layers in 4 bit), "unquantized".

    Experts are counted under "experts" only where they are packed.
    """
    parts = {name: Part() for name in ("experts", "linear", "unquantized")}
    counted: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            _count_packed(module, parts["experts"], counted)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) in counted:
                continue
            counted.add(id(weight))
            state = getattr(weight, "quant_state", None)
            if state is None:
                parts["unquantized"].add(weight.nbytes, weight.numel())
            else:
                size = weight.nbytes + state.absmax.nbytes
                parts["linear"].add(size, state.shape.numel())
    return parts


def _count_packed(steps: nn.Module, part: Part, counted: set[int]) -> None:
    state, packed = cast(Any, steps)[0], cast(Any, steps).original
    if isinstance(state, PackedExperts):
        scales = sum(buffer.nbytes for buffer in state.buffers())
        part.add(packed.nbytes + scales, state.experts * state.count)
        counted.add(id(packed))


def report(model: nn.Module, logger: logging.Logger) -> None:
    """Log the parts, and warn of what is large and not in 4 bit, but for embeddings and head."""
    parts = memory_by_part(model)
    logger.info(
        "4 bit: %s",
        "; ".join(f"{n} {p.half:,} -> {p.bytes:,} bytes" for n, p in parts.items() if p.half),
    )
    large = LARGE * sum(part.half for part in parts.values())
    kept = _embeddings(model)
    alike: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, weight in model.named_parameters():
        plain = weight.is_floating_point() and getattr(weight, "quant_state", None) is None
        if plain and weight.dim() > 1 and id(weight) not in kept:
            alike.setdefault(re.sub(r"\d+", "*", name), []).append((name, weight))
    for group in alike.values():
        name, weight = group[0]
        if sum(2 * one.numel() for _, one in group) > large:
            others = f" and {len(group) - 1} like it stay" if len(group) > 1 else " stays"
            logger.warning("%s %s%s in %s", name, tuple(weight.shape), others, weight.dtype)


def _embeddings(model: nn.Module) -> set[int]:
    """Weights of the embeddings and of the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    modules += [head] if isinstance(head, nn.Module) else []
    return {id(weight) for module in modules for weight in module.parameters(recurse=False)}
