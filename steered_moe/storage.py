"""The steering repo on disk, format version 1: ``config.json`` and ``steering.safetensors``.

Only safetensors and JSON are read, and everything is checked before a base model is touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steered_moe.errors import FormatError
from steered_moe.repo_config import (
    ARCHITECTURE,
    BASE_FIELDS,
    CONFIG_FILE,
    FORMAT_VERSION,
    KNOWN_FIELDS,
    LARGEST_COUNT,
    MODEL_TYPE,
    TENSOR_FILE,
    printable,
    read_config,
    short,
    short_list,
)
from steered_moe.steering import RouterSteering
from steered_moe.strength import Strength, by_name
from steered_moe.validation import RESERVED

LARGEST_TENSORS = 32 * 2**20
"""Bytes; a hundred steerings of 61 layers x 256 experts have eight million."""

LARGEST_HEADER = 2 * 2**20
"""Bytes of names, types and shapes; those of a hundred steerings have forty thousand."""

_DTYPES = {"layers": torch.int64, "weights": torch.float32, "force": torch.int8}


@dataclass(frozen=True)
class SteeringRepo:
    """What a steering repo holds.

    Args:
        base: The fields of `BASE_FIELDS`; None where unknown.
        steerings: At least one, each under its own name.
        strengths: Strength of each steering; a number where it is written.
        extra: Fields of a newer minor format, kept as they are.
        default: Name of the steering that is meant when none is named; None means all of them.
    """

    base: Mapping[str, Any]
    steerings: Sequence[RouterSteering]
    strengths: Sequence[Strength]
    extra: Mapping[str, Any] = field(default_factory=dict)
    default: str | None = None

    def only(self, names: str | Sequence[str] | None = None) -> SteeringRepo:
        """Those of the steerings that are asked for; the default, or else all, if none is named.

        Raises:
            FormatError: No such name; names those there are.
        """
        if names is None and self.default is None:
            return self
        names = self.default if names is None else names
        asked = [names] if isinstance(names, str) else list(names or ())
        found = [steering.name for steering in self.steerings]
        if missing := [name for name in asked if name not in found]:
            raise FormatError(
                f"no steering named {short(missing[0])}; choose one of: {short_list(found)}"
            )
        rows = [found.index(name) for name in asked]
        return replace(
            self,
            steerings=[self.steerings[row] for row in rows],
            strengths=[self.strengths[row] for row in rows],
            default=None,
        )

    def at(self, strength: Strength | Mapping[str, Strength]) -> SteeringRepo:
        """The same steerings at another strength: one for all of them, or by name."""
        names = [steering.name for steering in self.steerings]
        strengths = dict(zip(names, self.strengths, strict=True)) | by_name(strength, names)
        return replace(self, strengths=[strengths[name] for name in names])

    def of_base(self, fields: Mapping[str, Any]) -> SteeringRepo:
        """The same steerings with other facts about the base model."""
        return replace(self, base={**self.base, **fields})

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        entries = [_entry(s, x) for s, x in zip(self.steerings, self.strengths, strict=True)]
        return {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            "format_version": FORMAT_VERSION,
            **{name: self.base.get(name) for name in BASE_FIELDS},
            "steerings": entries,
            **({} if self.default is None else {"default_steering": self.default}),
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


def joined(repos: Sequence[SteeringRepo], default: str | None = None) -> SteeringRepo:
    """Several steering repos of one base model as one.

    Args:
        repos: At least one.
        default: The steering that is loaded when none is named. Of one repo it is what the repo
            says unless it is given, of several the first steering.

    Raises:
        FormatError: Other bases, a name twice, or no steering of the default's name.
    """
    first = repos[0]
    if other := next((repo for repo in repos if repo.base != first.base), None):
        name = next(key for key in first.base if first.base[key] != other.base.get(key))
        raise FormatError(
            f"steerings of one repo need one base model: {name} is {first.base[name]!r} and "
            f"{other.base.get(name)!r}"
        )
    steerings = [steering for repo in repos for steering in repo.steerings]
    names = [steering.name for steering in steerings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FormatError(f"two steerings are called {twice[0]!r}; give them names of their own")
    if default is not None and default not in names:
        raise FormatError(f"no steering named {default!r}; choose one of: {', '.join(names)}")
    strengths = [strength for repo in repos for strength in repo.strengths]
    extra = {key: value for repo in reversed(repos) for key, value in repo.extra.items()}
    meant = default or (names[0] if len(repos) > 1 else first.default)
    return SteeringRepo(first.base, steerings, strengths, extra, meant)


def _check_free(path: Path) -> None:
    """Refuse to overwrite the config of something else, such as the base model itself."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, RecursionError, AttributeError):
        found = "unreadable"
    if found != MODEL_TYPE:
        raise FormatError(
            f"{path} belongs to something else (model_type {short(found)}); save to a folder of "
            "its own"
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
        if (layer := int(steering.layers[-1])) >= LARGEST_COUNT:
            raise FormatError(
                f"steering {short(steering.name)} has layer {layer}; no model has so many layers"
            )
        if config.get("num_experts") not in (None, steering.num_experts):
            raise FormatError(
                f"steering {short(steering.name)} has {steering.num_experts} experts but "
                f"{CONFIG_FILE} says num_experts={config['num_experts']}; the two files do not "
                "belong together"
            )
    return SteeringRepo(
        base={name: config.get(name) for name in BASE_FIELDS},
        steerings=steerings,
        strengths=[float(entry.get("strength", 1.0)) for entry in entries],
        extra={key: value for key, value in config.items() if key not in KNOWN_FIELDS},
        default=config.get("default_steering"),
    )


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
    """The tensors that the config names; of a file that holds others, none is read."""
    if not path.is_file():
        raise FormatError(f"{path} is missing; a steering repo holds {CONFIG_FILE}, {TENSOR_FILE}")
    if (size := path.stat().st_size) > LARGEST_TENSORS:
        raise FormatError(f"{path} has {size} bytes; more than {LARGEST_TENSORS} are never read")
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _check_keys(path, keys, names)
            tensors = {key: file.get_tensor(key) for key in keys}
    except FormatError:
        raise
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(
            f"{path} is not a readable safetensors file ({printable(str(error))}); it is "
            "truncated, damaged or of another kind. Download it again; pickles are never read"
        ) from error
    for key, tensor in tensors.items():
        wanted = _DTYPES[key.rpartition(".")[2]]
        if tensor.dtype != wanted:
            raise FormatError(f"{path}: {printable(key)} is {tensor.dtype}; it must be {wanted}")
    return tensors


def _check_header(path: Path) -> None:
    """A header of many megabytes would be taken apart before a single name in it is looked at."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:
        raise FormatError(
            f"{path} is not a readable safetensors file (a header of {size} bytes); it is damaged "
            "or of another kind. Download it again; pickles are never read"
        )


def _check_keys(path: Path, keys: Sequence[str], names: Sequence[str]) -> None:
    required = {f"{name}.{part}" for name in names for part in ("layers", "weights")}
    allowed = required | {f"{name}.force" for name in names}
    if missing := sorted(required - set(keys)):
        raise FormatError(f"{path} lacks {short_list(missing)}, which {CONFIG_FILE} promises")
    if extra := sorted(set(keys) - allowed):
        raise FormatError(f"{path} holds {short_list(extra)}, which {CONFIG_FILE} does not name")


def save_steering(steering: RouterSteering, folder: str | Path) -> None:
    """Write one steering without a base model; `RouterSteering.save`."""
    base = {"num_experts": steering.num_experts}
    SteeringRepo(base, [steering], [1.0]).write(folder)


def pick(repo: SteeringRepo, name: str | None) -> RouterSteering:
    """The steering called ``name``, the default one, or the only one.

    Raises:
        FormatError: No such name, or several steerings, no default and no name.
    """
    found = repo.only(name).steerings
    if len(found) > 1:
        names = short_list([steering.name for steering in found])
        raise FormatError(f"there are several steerings; choose one of: {names}")
    return found[0]
