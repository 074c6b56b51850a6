"""A `RoutingProfile` on disk: ``profile.json`` and ``profile.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steered_moe.errors import FormatError
from steered_moe.profile import OPTIONAL, REQUIRED, RoutingProfile

PROFILE_CONFIG = "profile.json"
PROFILE_TENSORS = "profile.safetensors"
FORMAT_VERSION = 1


def write_profile(profile: RoutingProfile, folder: Path) -> None:
    """See `RoutingProfile.save`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format_version": FORMAT_VERSION,
        "languages": profile.languages,
        "layers": profile.layers,
        "about": dict(profile.about),
    }
    (folder / PROFILE_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in profile.tensors().items()}
    save_file(tensors, folder / PROFILE_TENSORS, metadata={"format": "pt"})


def read_profile(folder: Path) -> RoutingProfile:
    """See `RoutingProfile.load`."""
    config = read_json(folder / PROFILE_CONFIG)
    if config.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{folder}: profile format {config.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}"
        )
    try:
        with safe_open(folder / PROFILE_TENSORS, framework="pt") as file:
            present = [name for name in OPTIONAL if name in set(file.keys())]
            tensors = {name: file.get_tensor(name) for name in (*REQUIRED, *present)}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{folder}: {PROFILE_TENSORS} cannot be read: {error}") from error
    languages, layers = config.get("languages"), config.get("layers")
    if not isinstance(languages, list) or not isinstance(layers, list):
        raise FormatError(f"{folder}: {PROFILE_CONFIG} lacks its lists of languages and layers")
    return RoutingProfile(tuple(languages), tuple(layers), **tensors, about=config.get("about", {}))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FormatError: The file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is not a JSON object")
    return content
