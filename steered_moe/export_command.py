"""``steered-moe bake`` and ``export``: a steering where this library is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steered_moe import baking, exporting
from steered_moe.embedded import named_model, named_repo
from steered_moe.terminal import console, errors

Repo = Annotated[str, typer.Argument(help="Steering repo: a folder, a Hub id, id@revision.")]
Folder = Annotated[Path, typer.Option("--out", help="Folder to write; new or empty.")]
File = Annotated[Path, typer.Option("--out", help="JSON file to write; new.")]
Format = Annotated[str, typer.Option("--format", help="easysteer or steermoe.")]
Strength = Annotated[float | None, typer.Option(help="Overrides the recorded strength.")]
Steering = Annotated[str | None, typer.Option(help="One of several; by default all, added up.")]
BaseModel = Annotated[str | None, typer.Option(help="Overrides the recorded base model.")]


def bake(
    repo: Repo,
    folder: Folder,
    strength: Strength = None,
    steering: Steering = None,
    base_model: BaseModel = None,
) -> None:
    """Add a steering of the scale none to the biases of routers that have one, as gpt-oss."""
    with errors():
        chosen = _chosen(strength, steering, base_model)
        found = baking.bake(named_repo(repo), folder, **chosen)
    text = f"{len(found)} router biases changed, rounded by at most {max(found.values()):.2g}"
    console.print(f"{text}; written into {folder}", markup=False, soft_wrap=True)


def export(
    repo: Repo,
    kind: Format,
    file: File,
    strength: Strength = None,
    steering: Steering = None,
    base_model: BaseModel = None,
) -> None:
    """Write a steering for EasySteer or SteerMoE, where it can be expressed exactly."""
    with errors():
        chosen = _chosen(strength, steering, base_model)
        exporting.export(named_repo(repo), kind, file, **chosen)
    console.print(f"written into {file}", markup=False, soft_wrap=True)


def _chosen(strength: float | None, steering: str | None, base: str | None) -> dict[str, Any]:
    base = None if base is None else named_model(base)
    return {"strength": strength, "steering": steering, "base_model": base}
