"""``steered-moe analyze``: a profile to figures, numbers and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steered_moe.analysis import analyze_profile
from steered_moe.embedded import named_repo
from steered_moe.errors import FormatError
from steered_moe.layers import layer_range
from steered_moe.profile import RoutingProfile
from steered_moe.profile_files import read_json
from steered_moe.steering import RouterSteering
from steered_moe.terminal import console, errors, table_of

Profile = Annotated[Path, typer.Argument(help="Folder of a profile.")]
Out = Annotated[Path, typer.Option(help="Folder for figures, numbers and page.")]
Pivot = Annotated[str, typer.Option(help="Language that the others are compared with.")]
Layers = Annotated[
    str | None, typer.Option(help="Middle layers, first-last, in place of those proposed.")
]
Scores = Annotated[
    Path | None, typer.Option(help="JSON file, language -> score, to colour and correlate by.")
]
ScoreName = Annotated[str, typer.Option(help="What the scores are.")]
Labels = Annotated[Path | None, typer.Option(help="JSON file, language -> name to show.")]
Steering = Annotated[str | None, typer.Option(help="Steering repo to draw as well.")]


def analyze(
    profile: Profile,
    out: Out,
    pivot: Pivot = "en",
    layers: Layers = None,
    scores: Scores = None,
    score_name: ScoreName = "score",
    labels: Labels = None,
    steering: Steering = None,
) -> None:
    """Draw and tabulate how languages are routed; open index.html in the folder."""
    with errors():
        numbers = analyze_profile(
            RoutingProfile.load(profile),
            out,
            pivot=pivot,
            layers=None if layers is None else layer_range(layers),
            scores=None if scores is None else _numbers_of(scores),
            score_name=score_name,
            labels=None if labels is None else read_json(labels),
            steering=None if steering is None else RouterSteering.load(named_repo(steering)),
        )
    first, last = numbers["middle_layers"]["used"]
    rows = {
        "middle layers": f"{first}-{last}",
        "why": numbers["middle_layers"]["proposed"],
        **{
            f"divergence of {language}, there": f"{value:.3f}"
            for language, value in numbers["divergence_in_the_middle"].items()
        },
        "page": str(out / "index.html"),
    }
    console.print(table_of("analysis", rows))


def _numbers_of(file: Path) -> dict[str, float]:
    found = read_json(file)
    for language, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FormatError(f"{file}: the score of {language} is {value!r}, no number")
    return found
