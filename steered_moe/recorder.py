"""Import what the routing recorder of arXiv 2601.14050 writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import FormatError
from steered_moe.profile import RoutingProfile, read_json


def read_recordings(folder: str | Path) -> RoutingProfile:
    """See `RoutingProfile.from_recorder`."""
    files = sorted(Path(folder).glob("*_*.json"))
    if not files:
        raise FormatError(f"{folder} holds no <corpus>_<language>.json of a routing recorder")
    languages = tuple(file.stem.partition("_")[2] for file in files)
    tables = [_recorded(file) for file in files]
    layers, counts, sums, tokens = zip(*tables, strict=True)
    if len({(la, c.shape) for la, c in zip(layers, counts, strict=True)}) > 1:
        raise FormatError(f"files in {folder} differ in layers or experts")
    stacked = [torch.stack(tables) for tables in (counts, sums, tokens)]
    return RoutingProfile(languages, layers[0], stacked[0], stacked[1], stacked[2])


def _recorded(path: Path) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """Layers, counts ``(layers, experts)``, weight sums and tokens ``(layers,)`` of one file."""
    content = read_json(path)
    try:
        layers = sorted(content, key=int)
        experts = sorted((e for e in content[layers[0]] if e != "total_tokens"), key=int)
        counts = _table(content, layers, experts, "activation_tokens")
        sums = _table(content, layers, experts, "gate_values_sum")
        tokens = torch.tensor([content[la]["total_tokens"] for la in layers], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FormatError(f"{path} is not a file of the routing recorder: {error!r}") from error
    return tuple(int(layer) for layer in layers), counts, sums, tokens


def _table(
    content: Mapping[str, Any], layers: Sequence[str], experts: Sequence[str], field: str
) -> Tensor:
    rows = [[content[layer][expert][field] for expert in experts] for layer in layers]
    return torch.tensor(rows, dtype=torch.float64)
