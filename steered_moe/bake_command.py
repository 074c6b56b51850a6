"""``steered-moe bake``: a steering into the weights of a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steered_moe.baking import bake as run
from steered_moe.embedded import named_model, named_repo
from steered_moe.terminal import console, errors

Repo = Annotated[str, typer.Argument(help="Steering repo: a folder, a Hub id, id@revision.")]
Out = Annotated[Path, typer.Option(help="Folder to write; new or empty.")]
Strength = Annotated[float | None, typer.Option(help="Overrides the recorded strength.")]
Steering = Annotated[str | None, typer.Option(help="One of several; by default all of them.")]
BaseModel = Annotated[str | None, typer.Option(help="Overrides the recorded base model.")]


def bake(
    repo: Repo,
    out: Out,
    strength: Strength = None,
    steering: Steering = None,
    base_model: BaseModel = None,
) -> None:
    """Add a steering of the scale none to the biases of routers that have one, as gpt-oss."""
    with errors():
        base = None if base_model is None else named_model(base_model)
        found = run(named_repo(repo), out, strength=strength, steering=steering, base_model=base)
    console.print(
        f"{len(found)} router biases changed, rounded by at most {max(found.values()):.2g}; "
        f"written into {out}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
