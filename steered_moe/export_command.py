"""``steered-moe export``: a steering for another project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steered_moe.embedded import named_model, named_repo
from steered_moe.exporting import export as run
from steered_moe.terminal import console, errors

Repo = Annotated[str, typer.Argument(help="Steering repo: a folder, a Hub id, id@revision.")]
Format = Annotated[str, typer.Option("--format", help="easysteer or steermoe.")]
Out = Annotated[Path, typer.Option(help="JSON file to write; new.")]
Strength = Annotated[float | None, typer.Option(help="Overrides the recorded strength.")]
Steering = Annotated[str | None, typer.Option(help="One of several; by default all, added up.")]
BaseModel = Annotated[str | None, typer.Option(help="Overrides the recorded base model.")]


def export(
    repo: Repo,
    kind: Format,
    out: Out,
    strength: Strength = None,
    steering: Steering = None,
    base_model: BaseModel = None,
) -> None:
    """Write a steering for EasySteer or SteerMoE, where it can be expressed exactly."""
    with errors():
        base = None if base_model is None else named_model(base_model)
        run(named_repo(repo), kind, out, strength=strength, steering=steering, base_model=base)
    console.print(f"written into {out}", markup=False, soft_wrap=True)
