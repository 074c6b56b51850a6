"""``config.json`` of a steering repo, format version 1: its fields, read with suspicion."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steered_moe.errors import FormatError, SteeringError
from steered_moe.steering import SCALES
from steered_moe.validation import RESERVED, as_provenance, check_name

CONFIG_FILE = "config.json"
TENSOR_FILE = "steering.safetensors"
FORMAT_VERSION = 1
MODEL_TYPE = "steered_moe"
ARCHITECTURE = "SteeredMoEForCausalLM"
LARGEST_CONFIG = 2 * 2**20
"""Bytes; the config of a hundred steerings has a few hundred thousand."""

DEEPEST = 100
"""Levels of lists and mappings in a JSON file; far fewer than Python can go down."""

LONGEST = 1000
"""Characters in the name or type of a base model."""

LARGEST_COUNT = 10_000
"""Layers, experts, or experts per token of a base model."""

BASE_FIELDS = {
    "base_model_name_or_path": str,
    "base_model_revision": str,
    "base_model_type": str,
    "num_hidden_layers": int,
    "num_experts": int,
    "num_experts_per_tok": int,
}
"""Fields of ``config.json`` that describe the base model; each may be null."""

_FIXED = ("model_type", "architectures", "format_version", "steerings", "default_steering")
_IGNORED = ("transformers_version", "dtype", "auto_map")  # transformers' own bookkeeping
KNOWN_FIELDS = frozenset({*BASE_FIELDS, *_FIXED, *_IGNORED})
_PROVENANCE = ("method", "parameters", "languages", "corpora", "profile_sha256", "parts", "like")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a terminal's cursor, reverse the order of text, or are half a character."""

logger = logging.getLogger(__name__)


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a ``config.json``; unknown fields are kept, with a warning.

    Raises:
        FormatError: Not a readable config of a steering repo; names field and fix.
    """
    if not path.is_file():
        raise FormatError(f"{path} is missing; a steering repo holds {CONFIG_FILE}, {TENSOR_FILE}")
    config = read_json(path, LARGEST_CONFIG)
    check_config(config, str(path))
    return dict(config)


def read_json(path: Path, largest: int) -> Any:
    """The content of a JSON file of a steering repo.

    Raises:
        FormatError: Too large, not JSON, nested too deeply, or text with control characters.
    """
    if (size := path.stat().st_size) > largest:
        raise FormatError(f"{path} has {size} bytes; more than {largest} are never read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        texts = list(_texts(content))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON that can be read: {error}") from error
    for text in texts:
        if found := _CONTROL.search(text):
            raise FormatError(f"{path}: {short(text)} holds {found[0]!r}; remove that character")
    return content


def _texts(value: Any, levels: int = DEEPEST) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)) and levels == 0:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _texts(item, levels - 1)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, levels - 1)


def check_config(config: Any, where: str = CONFIG_FILE) -> None:
    """Check the fields of a ``config.json``.

    Raises:
        FormatError: Names field, value and fix.
    """
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise FormatError(
            f"{where}: model_type is {short(found)}, not {MODEL_TYPE!r}; this is not a steering "
            "repo. To steer a plain model use SteeredMoEForCausalLM.from_base(model, steering)"
        )
    _check_version(config.get("format_version"), where)
    for name, kind in BASE_FIELDS.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise FormatError(f"{where}: {name} is {short(value)}; it must be a {kind.__name__}")
        if isinstance(value, str) and len(value) > LONGEST:
            raise FormatError(f"{where}: {name} has {len(value)} characters; {LONGEST} are allowed")
        if isinstance(value, int) and not 1 <= value <= LARGEST_COUNT:
            raise FormatError(f"{where}: {name} is {short(value)}; it must be 1 to {LARGEST_COUNT}")
    _check_base_name(config, where)
    names = _check_entries(config.get("steerings"), where)
    default = config.get("default_steering")
    if default is not None and default not in names:
        raise FormatError(
            f"{where}: default_steering is {short(default)}; it must be one of {short(names)}"
        )
    _check_finite({k: v for k, v in config.items() if k not in KNOWN_FIELDS}, where)
    _warn_unknown(config, KNOWN_FIELDS, where)
    _warn_unknown(_fields_of(config["steerings"]), {*RESERVED, *_PROVENANCE}, where)


def _fields_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    return {key: None for entry in entries for key in entry}


def _check_finite(fields: Mapping[str, Any], where: str) -> None:
    """What is kept must be JSON that can be written again; 1e999 is read as infinity."""
    try:
        json.dumps(fields, allow_nan=False)
    except ValueError as error:
        raise FormatError(f"{where}: an unknown field is not JSON: {error}") from error


def _check_version(version: Any, where: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(
            f"{where}: format_version is {short(version)}; it must be {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where}: format_version {short(version)} needs a newer steered-moe (this one reads "
            f"up to {FORMAT_VERSION}); pip install -U steered-moe"
        )


def _check_base_name(config: Mapping[str, Any], where: str) -> None:
    """A base is a Hub id or a path; a revision is what can name one, not a way out of a cache."""
    name, revision = config.get("base_model_name_or_path"), config.get("base_model_revision")
    if revision is not None and (
        not re.fullmatch(r"\w[\w./-]{0,254}", revision) or ".." in revision
    ):
        raise FormatError(f"{where}: base_model_revision {short(revision)} is no revision")
    if name is not None and not is_path(name) and not is_repo_id(name):
        raise FormatError(
            f"{where}: base_model_name_or_path {short(name)} is neither a Hub id nor a path that "
            "begins with ./ ../ or /"
        )


def is_repo_id(name: str) -> bool:
    """Whether a text can be the id of a repo on the Hub."""
    plain = re.fullmatch(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", name, re.ASCII)
    return plain is not None and ".." not in name and "--" not in name


def is_path(base: str) -> bool:
    """Whether the recorded name of a base model is a path, not a Hub id."""
    return base.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", base) is not None


def _check_entries(entries: Any, where: str) -> list[str]:
    """The names of the steerings."""
    if not isinstance(entries, list) or not entries:
        raise FormatError(
            f"{where}: steerings is {short(entries)}; it must list at least one steering"
        )
    names = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise FormatError(f"{where}: a steering has no name: {short(entry)}")
        _check_entry(entry, where)
        names.append(entry["name"])
    if len(set(names)) < len(names):
        raise FormatError(f"{where}: two steerings share a name in {short(names)}")
    return names


def _check_entry(entry: Mapping[str, Any], where: str) -> None:
    name, scale, strength = entry["name"], entry.get("scale"), entry.get("strength", 1.0)
    if not isinstance(scale, str) or scale not in SCALES:
        raise FormatError(
            f"{where}: scale of {short(name)} is {short(scale)}; use one of {', '.join(SCALES)}"
        )
    if not is_finite(strength):
        raise FormatError(
            f"{where}: strength of {short(name)} is {short(strength)}; it must be finite"
        )
    try:
        check_name(name)
        as_provenance({key: value for key, value in entry.items() if key not in RESERVED})
    except (SteeringError, RecursionError) as error:
        raise FormatError(f"{where}: {_cut(str(error))}") from error


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _warn_unknown(fields: Mapping[str, Any], known: frozenset[str] | set[str], where: str) -> None:
    unknown = sorted(set(fields) - known)
    if unknown:
        logger.warning("%s: unknown fields are kept but not used: %s", where, short_list(unknown))


def short_list(names: Sequence[str]) -> str:
    """The first of many names as an error shows them, in one line."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return printable(", ".join(names[:10])) + more


def printable(text: str) -> str:
    """The start of a text from a file, in which nothing moves the cursor or reverses the order."""
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:201]))


def short(value: Any) -> str:
    """A value as an error shows it: of a hostile file it may have megabytes."""
    try:
        return _cut(repr(value))
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
