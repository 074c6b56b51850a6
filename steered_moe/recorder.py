"""Import routing that others recorded: the recorder of arXiv 2601.14050, tables of counts."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import FormatError
from steered_moe.profile import RoutingProfile
from steered_moe.profile_files import read_json
from steered_moe.text_files import CODE

_TOTAL = "total_tokens"


def read_recordings(folder: str | Path) -> RoutingProfile:
    """See `RoutingProfile.from_recorder`."""
    files = _files_by_language(folder)
    tables = [_recorded(file) for file in files.values()]
    layers, counts, sums, tokens = zip(*tables, strict=True)
    if len({(la, c.shape) for la, c in zip(layers, counts, strict=True)}) > 1:
        raise FormatError(f"files in {folder} differ in layers or experts")
    stacked = [torch.stack(tables) for tables in (counts, sums, tokens)]
    counted, weighed, seen = stacked
    return RoutingProfile(tuple(files), layers[0], counted, seen, weight_sums=weighed)


def language_of(name: str) -> str:
    """The language in ``<corpus>_<language>``, where either part may have underscores.

    It is the code that the name ends in, with its script and region; without such a code, what
    follows the last underscore.
    """
    code = re.search(rf"_({CODE})$", name)
    return code[1] if code else name.rpartition("_")[2]


def _files_by_language(folder: str | Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(Path(folder).glob("*_*.json")):
        language = language_of(file.stem)
        if language in files:
            raise FormatError(
                f"{files[language]} and {file} are both of {language}; keep one of them, or put "
                "each corpus into a folder of its own"
            )
        files[language] = file
    if not files:
        raise FormatError(f"{folder} holds no <corpus>_<language>.json of a routing recorder")
    return files


def read_table(
    file: Path,
    top_k: int,
    language: str,
    count: str,
    where: Mapping[str, str],
    num_experts: int | None,
) -> RoutingProfile:
    """See `RoutingProfile.from_table`."""
    found: dict[tuple[str, int, int], float] = {}
    for place, row in _rows(file, {language, count, "layer", "expert", *where}):
        if any(row[column] != value for column, value in where.items()):
            continue
        key, value = _entry(place, row, language, count)
        if key in found:
            raise FormatError(f"{place}: {key} is there twice; choose rows with where=")
        found[key] = value
    if not found:
        raise FormatError(f"{file} has no row where {dict(where)}")
    experts = _experts(file, max(key[2] for key in found) + 1, top_k, num_experts)
    languages = tuple(dict.fromkeys(key[0] for key in found))
    layers = tuple(sorted({key[1] for key in found}))
    counts = torch.zeros(len(languages), len(layers), experts).double()
    for (name, layer, expert), value in found.items():
        counts[languages.index(name), layers.index(layer), expert] = value
    return RoutingProfile(languages, layers, counts, _tokens(file, counts, top_k))


def _entry(
    place: str, row: Mapping[str, str], language: str, count: str
) -> tuple[tuple[str, int, int], float]:
    try:
        key = (row[language], int(row["layer"]), int(row["expert"]))
        value = float(row[count])
    except ValueError as error:
        raise FormatError(f"{place}: {error}") from error
    if min(key[1:]) < 0:
        raise FormatError(f"{place}: layer {key[1]}, expert {key[2]}; both count from 0")
    return key, value


def _experts(file: Path, there: int, top_k: int, num_experts: int | None) -> int:
    """Experts per layer of a table that names ``there`` of them."""
    experts = there if num_experts is None else num_experts
    if experts < there:
        raise FormatError(f"{file} names expert {there - 1}, but num_experts is {experts}")
    if not 1 <= top_k <= experts:
        raise FormatError(
            f"{file}: top_k is {top_k}; it must lie between 1 and {experts}, the number of experts "
            "(num_experts= gives it, if the last ones are missing)"
        )
    return experts


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
    if (counts > tokens.unsqueeze(-1)).any():
        raise FormatError(
            f"{file}: with top_k={top_k} an expert is counted more often than there are tokens; "
            "give a smaller top_k"
        )
    return tokens


def _recorded(path: Path) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """Layers, counts ``(layers, experts)``, weight sums and tokens ``(layers,)`` of one file."""
    content = read_json(path)
    try:
        layers = sorted(content, key=int)
        experts = sorted(set(content[layers[0]]) - {_TOTAL}, key=int)
        _check_experts(path, content, layers, experts)
        counts = _table(content, layers, experts, "activation_tokens")
        sums = _table(content, layers, experts, "gate_values_sum")
        tokens = torch.tensor([content[la][_TOTAL] for la in layers], dtype=torch.float64)
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FormatError(f"{path} is not a file of the routing recorder: {error!r}") from error
    return tuple(int(layer) for layer in layers), counts, sums, tokens


def _check_experts(
    path: Path, content: Mapping[str, Any], layers: Sequence[str], experts: Sequence[str]
) -> None:
    for layer in layers:
        if odd := sorted((set(content[layer]) - {_TOTAL}) ^ set(experts)):
            raise FormatError(
                f"{path}: layer {layer} has not the experts of layer {layers[0]}; "
                f"{', '.join(odd[:8])} is in one of them only"
            )


def _table(
    content: Mapping[str, Any], layers: Sequence[str], experts: Sequence[str], field: str
) -> Tensor:
    rows = [[content[layer][expert][field] for expert in experts] for layer in layers]
    return torch.tensor(rows, dtype=torch.float64)
