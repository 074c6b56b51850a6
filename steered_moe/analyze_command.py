"""``steered-moe analyze``: a profile to figures, numbers and a page."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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

logger = logging.getLogger(__name__)

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
            labels=None if labels is None else _names_of(labels),
            steering=None if steering is None else RouterSteering.load(named_repo(steering)),
        )
        _warn_of_languages(numbers.get("correlation", {}))
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


def _warn_of_languages(correlation: Mapping[str, Sequence[str]]) -> None:
    """Say which languages are in no correlation, as a code may be spelt in another way."""
    sides = {"without_score": "without a score", "not_profiled": "with a score but not profiled"}
    for part, what in sides.items():
        if codes := correlation.get(part):
            logger.warning("left out of the correlation, %s: %s", what, ", ".join(codes))


def _names_of(file: Path) -> dict[str, str]:
    found = read_json(file)
    for language, name in found.items():
        if not isinstance(name, str):
            raise FormatError(f"{file}: the label of {language} is {name!r}; write a text")
    return found


def _numbers_of(file: Path) -> dict[str, float]:
    found = read_json(file)
    for language, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FormatError(f"{file}: the score of {language} is {value!r}, no number")
    return found
