"""The steering repo on disk, format version 1: ``config.json`` and ``steering.safetensors``.

Only safetensors and JSON are read, and everything is checked before a base model is touched.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steered_moe.errors import FormatError
from steered_moe.steering import SCALES, RouterSteering
from steered_moe.strength import Strength
from steered_moe.validation import RESERVED

CONFIG_FILE = "config.json"
TENSOR_FILE = "steering.safetensors"
CARD_FILE = "README.md"
FORMAT_VERSION = 1
MODEL_TYPE = "steered_moe"
ARCHITECTURE = "SteeredMoEForCausalLM"

BASE_FIELDS = {
    "base_model_name_or_path": str,
    "base_model_revision": str,
    "base_model_type": str,
    "num_hidden_layers": int,
    "num_experts": int,
    "num_experts_per_tok": int,
}
"""Fields of ``config.json`` that describe the base model; each may be null."""

_FIXED_FIELDS = ("model_type", "architectures", "format_version", "steerings")
_IGNORED_FIELDS = ("transformers_version", "dtype", "auto_map")  # transformers' own bookkeeping
_PROVENANCE = ("method", "parameters", "languages", "corpora", "profile_sha256", "parts")
_DTYPES = {"layers": torch.int64, "weights": torch.float32, "force": torch.int8}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SteeringRepo:
    """What a steering repo holds.

    Args:
        base: The fields of `BASE_FIELDS`; None where unknown.
        steerings: At least one, each under its own name.
        strengths: Strength of each steering; a number where it is written.
        extra: Fields of a newer minor format, kept as they are.
    """

    base: Mapping[str, Any]
    steerings: Sequence[RouterSteering]
    strengths: Sequence[Strength]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        entries = [_entry(s, x) for s, x in zip(self.steerings, self.strengths, strict=True)]
        return {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            "format_version": FORMAT_VERSION,
            **{name: self.base.get(name) for name in BASE_FIELDS},
            "steerings": entries,
            **self.extra,
        }

    def write(self, folder: str | Path) -> None:
        """Write both files; the same value always gives the same bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _check_free(folder / CONFIG_FILE)
        text = json.dumps(self.config(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        tensors = {}
        for steering in self.steerings:
            for part in _DTYPES:
                tensor = getattr(steering, part)
                if tensor is not None:
                    tensors[f"{steering.name}.{part}"] = tensor.contiguous()
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})


def _check_free(path: Path) -> None:
    """Refuse to overwrite the config of something else, such as the base model itself."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        found = "unreadable"
    if found != MODEL_TYPE:
        raise FormatError(
            f"{path} belongs to something else (model_type {found!r}); save to a folder of its own"
        )


def read_repo(folder: str | Path) -> SteeringRepo:
    """Read and check a local steering repo.

    Raises:
        FormatError: A file is missing, damaged, of a newer format or inconsistent.
        SteeringError: The tensors cannot be a steering.
    """
    config = read_config(Path(folder) / CONFIG_FILE)
    entries = config["steerings"]
    tensors = _read_tensors(Path(folder) / TENSOR_FILE, [entry["name"] for entry in entries])
    steerings = [_steering(entry, tensors) for entry in entries]
    for steering in steerings:
        if config.get("num_experts") not in (None, steering.num_experts):
            raise FormatError(
                f"steering {steering.name!r} has {steering.num_experts} experts but {CONFIG_FILE} "
                f"says num_experts={config['num_experts']}; the two files do not belong together"
            )
    known = {*BASE_FIELDS, *_FIXED_FIELDS, *_IGNORED_FIELDS}
    return SteeringRepo(
        base={name: config.get(name) for name in BASE_FIELDS},
        steerings=steerings,
        strengths=[float(entry.get("strength", 1.0)) for entry in entries],
        extra={key: value for key, value in config.items() if key not in known},
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a ``config.json``; unknown fields are kept, with a warning.

    Raises:
        FormatError: Not a readable config of a steering repo; names field and fix.
    """
    if not path.is_file():
        raise FormatError(f"{path} is missing; a steering repo holds {CONFIG_FILE}, {TENSOR_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    check_config(config, str(path))
    return dict(config)


def check_config(config: Any, where: str = CONFIG_FILE) -> None:
    """Check the fields of a ``config.json``.

    Raises:
        FormatError: Names field, value and fix.
    """
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise FormatError(
            f"{where}: model_type is {found!r}, not {MODEL_TYPE!r}; this is not a steering repo. "
            "To steer a plain model use SteeredMoEForCausalLM.from_base(model, steering)"
        )
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"{where}: format_version is {version!r}; it must be {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where}: format_version {version} needs a newer steered-moe (this one reads up to "
            f"{FORMAT_VERSION}); pip install -U steered-moe"
        )
    for name, kind in BASE_FIELDS.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise FormatError(f"{where}: {name} is {value!r}; it must be a {kind.__name__}")
    _check_entries(config.get("steerings"), where)
    _warn_unknown(config, {*BASE_FIELDS, *_FIXED_FIELDS, *_IGNORED_FIELDS}, where)


def _check_entries(entries: Any, where: str) -> None:
    if not isinstance(entries, list) or not entries:
        raise FormatError(f"{where}: steerings is {entries!r}; it must list at least one steering")
    names = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise FormatError(f"{where}: a steering has no name: {entry!r}")
        if entry.get("scale") not in SCALES:
            raise FormatError(
                f"{where}: scale of {entry['name']!r} is {entry.get('scale')!r}; "
                f"use one of {', '.join(SCALES)}"
            )
        strength = entry.get("strength", 1.0)
        number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        if not number or not math.isfinite(strength):
            raise FormatError(
                f"{where}: strength of {entry['name']!r} is {strength!r}; it must be finite"
            )
        names.append(entry["name"])
        _warn_unknown(entry, {*RESERVED, *_PROVENANCE}, where)
    if len(set(names)) < len(names):
        raise FormatError(f"{where}: two steerings share a name in {names}")


def _warn_unknown(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(fields) - known)
    if unknown:
        logger.warning("%s: unknown fields are kept but not used: %s", where, ", ".join(unknown))


def _entry(steering: RouterSteering, strength: Strength) -> dict[str, Any]:
    layers = steering.layers.tolist()
    return {
        "name": steering.name,
        "scale": steering.scale,
        "strength": strength,
        "layers": [layers[0], layers[-1]],
        **steering.provenance,
    }


def _steering(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RouterSteering:
    name = entry["name"]
    return RouterSteering(
        name=name,
        layers=tensors[f"{name}.layers"],
        weights=tensors[f"{name}.weights"],
        force=tensors.get(f"{name}.force"),
        scale=entry["scale"],
        provenance={key: value for key, value in entry.items() if key not in RESERVED},
    )


def _read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    if not path.is_file():
        raise FormatError(f"{path} is missing; a steering repo holds {CONFIG_FILE}, {TENSOR_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise FormatError(
            f"{path} is not a readable safetensors file ({error}); it is truncated, damaged or of "
            "another kind. Download it again; pickles are never read"
        ) from error
    required = {f"{name}.{part}" for name in names for part in ("layers", "weights")}
    allowed = required | {f"{name}.force" for name in names}
    if missing := sorted(required - set(tensors)):
        raise FormatError(f"{path} lacks {', '.join(missing)}, which {CONFIG_FILE} promises")
    if extra := sorted(set(tensors) - allowed):
        raise FormatError(f"{path} holds {', '.join(extra)}, which {CONFIG_FILE} does not name")
    for key, tensor in tensors.items():
        wanted = _DTYPES[key.rpartition(".")[2]]
        if tensor.dtype != wanted:
            raise FormatError(f"{path}: {key} is {tensor.dtype}; it must be {wanted}")
    return tensors


def save_steering(steering: RouterSteering, folder: str | Path) -> None:
    """Write one steering without a base model; `RouterSteering.save`."""
    base = {"num_experts": steering.num_experts}
    SteeringRepo(base, [steering], [1.0]).write(folder)


def pick(steerings: Sequence[RouterSteering], name: str | None) -> RouterSteering:
    """The steering called ``name``, or the only one.

    Raises:
        FormatError: No such name, or several steerings and no name.
    """
    if name is None and len(steerings) == 1:
        return steerings[0]
    for steering in steerings:
        if steering.name == name:
            return steering
    names = ", ".join(steering.name for steering in steerings)
    raise FormatError(f"no steering named {name!r}; choose one of: {names}")
