"""Profiling that survives an interruption: finished parts are kept on disk until all are done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import nn

from steered_moe.chat import Form
from steered_moe.collection import Tick, check_texts, measured, profile_texts
from steered_moe.encoding import check_rows
from steered_moe.errors import FormatError
from steered_moe.identity import model_sha256, tokenizer_sha256
from steered_moe.merging import stack
from steered_moe.profile import RoutingProfile
from steered_moe.profile_files import PROFILE_CONFIG, read_json, write_text

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
    batch_size: int = 16,
    keep_sequences: bool = False,
    tick: Tick = lambda rows: None,
    **form: Any,
) -> RoutingProfile:
    """`profile_texts` into ``folder``; run again after an interruption, it goes on.

    Parts of ``rows_per_shard`` rows are written as they are done and read back when the same call
    is made again, so an interrupted run ends with the profile that an uninterrupted one gives. A
    profile that the same call has finished is read and returned. Nothing is written before every
    text has been looked at.

    Args:
        model: Any MoE of transformers.
        tokenizer: Its tokenizer.
        texts: Texts by language.
        folder: Where the profile goes, and the finished parts until then.
        about: What is profiled, for the record. To go on, a later call has to say the same, with
            the same texts, options, dtype, tokenizer and model (its config and routers).
        rows_per_shard: Rows that an interruption loses at most.
        batch_size: As `profile_texts` takes it; it may be another one in a later call.
        keep_sequences: As `profile_texts` takes it.
        tick: Called with the number of rows done.
        form: How the texts are put to the model, as `profile_texts` takes it: ``chat``,
            ``template_tokens``, ``generation_prompt``, ``template_kwargs``.

    Raises:
        FormatError: Unusable texts or options, or ``folder`` is a file, or has a profile or parts
            of another run; names what differs.
    """
    if rows_per_shard < 1:
        raise FormatError(f"rows_per_shard is {rows_per_shard}; it must be 1 or more")
    check_folder(folder)
    check_texts(texts, keep_sequences, batch_size)
    asked = Form(**form)
    check_rows(model, tokenizer, texts, asked)
    record = _plain({**about, **measured(model, asked), **_fingerprints(model, tokenizer, texts)})
    unfinished = Path(folder) / _FOLDER
    profile = _finished(Path(folder), record, keep_sequences)
    if profile is not None:
        tick(sum(map(len, texts.values())))
    else:
        extent = {"keep_sequences": keep_sequences, "rows_per_shard": rows_per_shard}
        _check_same_run(unfinished, record | extent)
        options = {"batch_size": batch_size, "keep_sequences": keep_sequences, **form}
        run = partial(_shard, model, tokenizer, tick=tick, options=options)
        profile = replace(_in_parts(run, texts, unfinished, rows_per_shard), about=record)
        profile.save(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    return profile


def check_folder(folder: str | Path) -> None:
    """Refuse a place for a profile that is a file, or below one.

    Raises:
        FormatError: Names the file.
    """
    for path in (Path(folder), *Path(folder).parents):
        if path.exists() and not path.is_dir():
            raise FormatError(f"{path} is a file; give a folder for the profile")


def _in_parts(
    run: Callable[[Mapping[str, Sequence[str]], Path], RoutingProfile],
    texts: Mapping[str, Sequence[str]],
    unfinished: Path,
    rows_per_shard: int,
) -> RoutingProfile:
    parts = []
    for language, rows in texts.items():
        shards = [
            run(
                {language: rows[start : start + rows_per_shard]}, unfinished / f"{language}-{start}"
            )
            for start in range(0, len(rows), rows_per_shard)
        ]
        parts.append(reduce(add, shards))
    return stack(parts)


def _shard(
    model: nn.Module,
    tokenizer: Any,
    part: Mapping[str, Sequence[str]],
    place: Path,
    *,
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


def _fingerprints(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    digest = hashlib.sha256(json.dumps(texts, default=list).encode()).hexdigest()
    return {
        "model_sha256": model_sha256(model),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "texts_sha256": digest,
    }


def _finished(
    folder: Path, record: Mapping[str, Any], keep_sequences: bool
) -> RoutingProfile | None:
    """The profile that the same run has left in a folder.

    Raises:
        FormatError: There is one of another run.
    """
    if not (folder / PROFILE_CONFIG).exists():
        return None
    found = RoutingProfile.load(folder)
    kept = {"keep_sequences": found.probabilities is not None}
    differing = _differing({**found.about, **kept}, {**record, "keep_sequences": keep_sequences})
    if differing:
        raise FormatError(
            f"{folder} has a finished profile of another run: {differing}. Give another folder "
            "(--out), or delete this one"
        )
    return found


def _check_same_run(unfinished: Path, settings: Mapping[str, Any]) -> None:
    path = unfinished / _SETTINGS
    advice = f"Delete {unfinished} to start again, or choose another place for the profile"
    if not path.exists() and not any(unfinished.glob("*-*")):
        unfinished.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        found = read_json(path)
    except FormatError as error:
        raise FormatError(f"{error}, so whose parts these are is not known. {advice}") from error
    if differing := _differing(found, settings):
        raise FormatError(f"{unfinished} has parts of another run: {differing}. {advice}")


def _differing(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What two records do not say alike, in words."""
    names = [k for k in dict.fromkeys([*settings, *found]) if found.get(k) != settings.get(k)]
    return ", ".join(f"{k} is {found.get(k)!r} there and {settings.get(k)!r} here" for k in names)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """As it is read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain
