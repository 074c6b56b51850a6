"""analyze: what it refuses, and the languages that have no score."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_cli import run

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.analysis import analyze_profile
from steered_moe.errors import BaseModelError, SteeredMoEError

LANGUAGES = ("en", "fr", "de", "es", "sw", "bn")


@pytest.fixture(scope="module")
def profile() -> RoutingProfile:
    """Six languages in six layers of 24 experts."""
    torch.manual_seed(0)
    scores = torch.rand(len(LANGUAGES), 6, 24)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(4).indices, 1.0)
    counts = 10 * chosen + 5 * chosen.roll(3, dims=-1)
    return RoutingProfile(LANGUAGES, tuple(range(6)), counts, counts.sum(-1) / 4)


@pytest.fixture
def folder(profile: RoutingProfile, tmp_path: Path) -> Path:
    profile.save(tmp_path / "p")
    return tmp_path


def write(file: Path, content: object) -> Path:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def refused(folder: Path, *options: object) -> str:
    """What the command says when it fails, in one line."""
    result = run("analyze", folder / "p", "--out", folder / "out", *options)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "out").exists()
    return result.stderr


@pytest.mark.parametrize(
    ("layers", "experts", "says"),
    [([2, 3], 64, "64 experts in layers 2-3"), ([2, 9], 24, "24 experts in layers 2, 9")],
)
def test_a_steering_of_another_model(
    profile: RoutingProfile, folder: Path, layers: Sequence[int], experts: int, says: str
):
    steering = RouterSteering("w", layers, torch.ones(2, experts))
    with pytest.raises(BaseModelError, match=f"has {says}, the profile 24 in layers 0-5"):
        analyze_profile(profile, folder / "out", steering=steering)
    steering.save(folder / "s")
    assert "they are not of one model" in refused(folder, "--steering", folder / "s")


@pytest.mark.parametrize("layers", ["2-9", "6-6", "30-130"])
def test_layers_beyond_the_model(folder: Path, layers: str):
    said = refused(folder, "--layers", layers)
    assert f"layers are {layers}; the last one profiled is 5" in said


def test_layers_that_are_no_range(profile: RoutingProfile, tmp_path: Path):
    for layers in ((3, 2), (-1, 3)):
        with pytest.raises(SteeredMoEError, match="the last one profiled is 5"):
            analyze_profile(profile, tmp_path, layers=layers)


def test_labels_have_to_be_texts(folder: Path):
    labels = write(folder / "labels.json", {"fr": "français", "de": 5})
    said = refused(folder, "--labels", labels)
    assert "labels.json: the label of de is 5; write a text" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "there are no scores"),
        ('{"fr": 1, "de": NaN, "es": 2, "sw": 3, "bn": 1}', "the score of de is nan"),
        ('{"fr": 1, "de": 1e999, "es": 2, "sw": 3, "bn": 1}', "the score of de is inf"),
        ('{"en": 1, "fra_Latn": 1, "deu_Latn": 2, "es": 3}', "1 languages have both"),
    ],
)
def test_scores_that_nothing_can_be_done_with(folder: Path, content: str, says: str):
    assert says in refused(folder, "--scores", write(folder / "scores.json", content))


def test_languages_without_a_partner_are_named(folder: Path, caplog: pytest.LogCaptureFixture):
    scores = {"en": 1, "fr": 0.4, "de": 0.3, "es": 0.2, "sw": 0.1, "ben_Beng": 0.6}
    options = ("--out", folder / "out", "--scores", write(folder / "scores.json", scores))
    with caplog.at_level(logging.WARNING, "steered_moe.analyze_command"):
        result = run("analyze", folder / "p", *options)
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "out" / "analysis.json").read_text())["correlation"]
    assert found["used"] == ["fr", "de", "es", "sw"]
    assert found["without_score"] == ["bn"]
    assert found["not_profiled"] == ["ben_Beng"]  # en is the pivot
    assert [record.message for record in caplog.records] == [
        "left out of the correlation, without a score: bn",
        "left out of the correlation, with a score but not profiled: ben_Beng",
    ]
    page = (folder / "out" / "index.html").read_text()
    assert "Languages: fr, de, es, sw; profiled, but without a score: bn; with a score" in page


def test_a_perfect_correlation_is_shown_without_an_interval(folder: Path):
    """Ranks of four languages agree by chance somewhere, or are made to."""
    curves = RoutingProfile.load(folder / "p")
    numbers = analyze_profile(curves, folder / "out", scores=dict.fromkeys(LANGUAGES, 1.0))
    assert numbers["correlation"]["languages"] == 5
    first = {code: -values[0] for code, values in numbers["divergence"].items()}
    found = analyze_profile(curves, folder / "out", scores=first)["correlation"]["spearman"]
    assert found["value"][0] == pytest.approx(-1)
    written = json.loads((folder / "out" / "analysis.json").read_text())["correlation"]
    assert written["spearman"]["low"][0] is None
    page = (folder / "out" / "index.html").read_text()
    assert "<td>spearman, value</td><td>-1.00</td>" in page
    assert "<td>spearman, high</td><td>–</td>" in page
    assert "nan" not in page
