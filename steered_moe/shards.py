"""Profiling that survives an interruption: finished parts are kept on disk until all are done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import nn

from steered_moe.collection import Tick, check_texts, profile_texts, stack
from steered_moe.errors import FormatError
from steered_moe.profile import RoutingProfile

_FOLDER = "unfinished"
_SETTINGS = "settings.json"


def profile_in_shards(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    folder: str | Path,
    *,
    about: Mapping[str, Any],
    rows_per_shard: int = 128,
    tick: Tick = lambda rows: None,
    **options: Any,
) -> RoutingProfile:
    """`profile_texts` into ``folder``; run again after an interruption, it goes on.

    Parts of ``rows_per_shard`` rows are written as they are done and read back when the same call
    is made again, so an interrupted run ends with the profile that an uninterrupted one gives.

    Args:
        model: Any MoE of transformers.
        tokenizer: Its tokenizer.
        texts: Texts by language.
        folder: Where the profile goes, and the finished parts until then.
        about: What is profiled, for the record. A later call has to say the same, with the same
            texts and options, to go on.
        rows_per_shard: Rows that an interruption loses at most.
        tick: Called with the number of rows done.
        options: For `profile_texts`.

    Raises:
        FormatError: Unusable texts, or ``folder`` has parts of another run.
    """
    check_texts(texts, options.get("keep_sequences", False))
    unfinished = Path(folder) / _FOLDER
    settings = {key: value for key, value in options.items() if key != "batch_size"}
    digest = hashlib.sha256(json.dumps(texts, default=list).encode()).hexdigest()
    run = {**about, **settings, "rows_per_shard": rows_per_shard, "texts_sha256": digest}
    _check_same_run(unfinished, run)
    parts = []
    for language, rows in texts.items():
        shards = []
        for start in range(0, len(rows), rows_per_shard):
            part = {language: rows[start : start + rows_per_shard]}
            place = unfinished / f"{language}-{start}"
            shards.append(_shard(model, tokenizer, part, place, tick, options))
        parts.append(reduce(add, shards))
    profile = replace(stack(parts), about=about)
    profile.save(folder)
    shutil.rmtree(unfinished)
    return profile


def _shard(
    model: nn.Module,
    tokenizer: Any,
    part: Mapping[str, Sequence[str]],
    place: Path,
    tick: Tick,
    options: Mapping[str, Any],
) -> RoutingProfile:
    """One finished part, from disk if it is there; a half-written one is never taken for it."""
    if place.is_dir():
        tick(sum(map(len, part.values())))
        return RoutingProfile.load(place)
    profile = profile_texts(model, tokenizer, part, tick=tick, **options)
    half = place.with_name(f"{place.name}.part")
    profile.save(half)
    half.rename(place)
    return profile


def _check_same_run(unfinished: Path, settings: Mapping[str, Any]) -> None:
    path = unfinished / _SETTINGS
    content = json.loads(json.dumps(settings))
    if not path.exists():
        unfinished.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != content:
        raise FormatError(
            f"{unfinished} has parts of another run ({found}); this one is {content}. Delete the "
            "folder, or choose another place for the profile"
        )
