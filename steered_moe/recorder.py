"""Import routing that others recorded: the recorder of arXiv 2601.14050, tables of counts."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import FormatError
from steered_moe.profile import RoutingProfile
from steered_moe.profile_files import read_json


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
    counted, weighed, seen = stacked
    return RoutingProfile(languages, layers[0], counted, seen, weight_sums=weighed)


def read_table(
    file: Path, top_k: int, language: str, count: str, where: Mapping[str, str]
) -> RoutingProfile:
    """See `RoutingProfile.from_table`."""
    found: dict[tuple[str, int, int], float] = {}
    for place, row in _rows(file, {language, count, "layer", "expert", *where}):
        if any(row[column] != value for column, value in where.items()):
            continue
        try:
            key = (row[language], int(row["layer"]), int(row["expert"]))
            value = float(row[count])
        except ValueError as error:
            raise FormatError(f"{place}: {error}") from error
        if key in found:
            raise FormatError(f"{place}: {key} is there twice; choose rows with where=")
        found[key] = value
    if not found:
        raise FormatError(f"{file} has no row where {dict(where)}")
    languages = tuple(dict.fromkeys(key[0] for key in found))
    layers = tuple(sorted({key[1] for key in found}))
    counts = torch.zeros(len(languages), len(layers), max(key[2] for key in found) + 1)
    counts = counts.double()
    for (name, layer, expert), value in found.items():
        counts[languages.index(name), layers.index(layer), expert] = value
    return RoutingProfile(languages, layers, counts, _tokens(file, counts, top_k))


def _rows(file: Path, columns: set[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a table by column, and where they are."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} cannot be read: {error}") from error
    reader = csv.DictReader(text.splitlines(), delimiter="," if file.suffix == ".csv" else "\t")
    if missing := columns - set(reader.fieldnames or ()):
        raise FormatError(
            f"{file} has no column {', '.join(sorted(missing))}; it has "
            f"{', '.join(reader.fieldnames or ())}"
        )
    rows = [(f"{file}, line {i}", row) for i, row in enumerate(reader, 2)]
    for place, row in rows:
        if None in row or None in row.values():
            raise FormatError(f"{place} has not as many columns as the header")
    return rows


def _tokens(file: Path, counts: Tensor, top_k: int) -> Tensor:
    """Tokens ``(languages, layers)`` behind the counts; every layer has seen the same."""
    tokens = counts.sum(dim=-1) / top_k
    if (tokens != tokens[:, :1]).any() or (tokens != tokens.round()).any():
        raise FormatError(
            f"{file}: counts over top_k={top_k} are not one whole number of tokens in every layer "
            f"but {tokens[:, 0].tolist()} in the first; give another top_k"
        )
    return tokens


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
