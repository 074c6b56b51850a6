"""A profile across the stages of a pipeline, each of which sees the layers that it holds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steered_moe.profile import RoutingProfile

_LAYER_DIM = {"probabilities": 2}  # in all other tensors it is 1
_WITHOUT_LAYERS = ("sequences",)


def across_stages(
    mine: RoutingProfile, elsewhere: Collection[int], device: torch.device
) -> RoutingProfile:
    """The profile of all layers, the same in every process.

    A layer that several processes hold, as with tensor parallelism inside a stage, is counted by
    each of them in full, so their sum is divided by their number.

    Args:
        mine: Of the layers of this process.
        elsewhere: Layers that other processes hold; with none the profile is whole already.
        device: Where the processes exchange tensors.
    """
    if not elsewhere:
        return mine
    layers = sorted({*mine.layers, *elsewhere})
    rows = torch.tensor([layers.index(layer) for layer in mine.layers])
    holders = torch.zeros(len(layers), dtype=torch.float64, device=device)
    holders[rows.to(device)] = 1
    dist.all_reduce(holders)
    routed = [row for row, number in enumerate(holders.tolist()) if number]
    tensors: dict[str, Any] = {}
    for name, tensor in mine.tensors().items():
        if name not in _WITHOUT_LAYERS:
            dim = _LAYER_DIM.get(name, 1)
            tensors[name] = _summed(tensor, dim, rows, holders)[_at(dim, routed)]
    return replace(mine, layers=tuple(layers[row] for row in routed), **tensors)


def _at(dim: int, rows: list[int]) -> tuple[slice | list[int], ...]:
    return (*[slice(None)] * dim, rows)


def _summed(tensor: Tensor, dim: int, rows: Tensor, holders: Tensor) -> Tensor:
    """The rows of all processes along ``dim``, on the CPU."""
    shape = list(tensor.shape)
    shape[dim] = len(holders)
    whole = torch.zeros(shape, dtype=tensor.dtype, device=holders.device)
    whole.index_copy_(dim, rows.to(whole.device), tensor.to(whole.device))
    dist.all_reduce(whole)
    ones = holders.clamp_min(1).to(whole.dtype)
    return (whole / ones.reshape(-1, *[1] * (whole.dim() - dim - 1))).cpu()
