"""Figures: the lines that were asked for, in the file format that was asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.errors import FormatError, SteeredMoEError
from steered_moe.figure import shown
from steered_moe.gain_plots import _style, plot_gains, plot_pareto
from steered_moe.plots import (
    plot_by_layer,
    plot_divergence,
    plot_selected,
    plot_similarity,
    plot_steering,
)
from steered_moe.results import Interval
from steered_moe.summary import Line

CURVES = {"de": torch.tensor([0.3, 0.1, 0.2]), "bn": torch.tensor([0.5, 0.3, 0.4])}


def test_each_language_is_a_line_that_follows_its_numbers(tmp_path: Path):
    plot_divergence(CURVES, tmp_path / "a.svg", steered=(1, 1))
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    paths = [
        [tuple(map(float, p.split())) for p in element.get("d").replace("M", "L").split("L")[1:]]
        for element in root.iter("{http://www.w3.org/2000/svg}path")
        if element.get("style")
        and "stroke: #" in element.get("style")
        and element.get("d")
        and "z" not in element.get("d")
    ]
    lines = [p for p in paths if len(p) == 3 and len({y for _, y in p}) > 1]  # no legend
    assert len(lines) == len(CURVES)
    for line, curve in zip(lines, CURVES.values(), strict=True):
        heights = torch.tensor([-y for _, y in line])
        assert torch.corrcoef(torch.stack([heights, curve]))[0, 1] > 0.9999


def texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return ["".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_same_figure_is_the_same_bytes_and_names_stay_text(tmp_path: Path):
    labels = {"bn": "বাংলা", "de": "Deutsch"}
    for name in ("a.svg", "b.svg"):
        plot_divergence(CURVES, tmp_path / name, labels=labels)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert {"বাংলা", "Deutsch"} <= set(texts(tmp_path / "a.svg"))
    plot_divergence(CURVES, tmp_path / "c.svg")
    assert {"bn", "de"} <= set(texts(tmp_path / "c.svg"))


def test_a_raster_figure_shows_the_code_where_no_font_has_the_label(tmp_path: Path):
    path = tmp_path / "a.png"
    assert shown(CURVES, {"bn": "বাংলা", "de": "Русский"}, path) == {"bn": "bn", "de": "Русский"}


def test_scores_colour_the_lines(tmp_path: Path):
    plot_divergence(CURVES, tmp_path / "a.svg", scores={"de": 0.9, "bn": 0.2}, score_name="MGSM")
    assert "MGSM" in texts(tmp_path / "a.svg")
    plot_divergence(CURVES, tmp_path / "b.svg", scores={"de": 0.2, "bn": 0.9}, score_name="MGSM")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()


@pytest.fixture
def profile() -> RoutingProfile:
    torch.manual_seed(0)
    counts = torch.randint(1, 50, (3, 4, 8)).double()
    sums = torch.rand(3, 4, dtype=torch.float64)
    return RoutingProfile(
        ("en", "de", "bn"), (0, 1, 2, 3), counts, counts.sum(-1) / 2,
        sequences=torch.full((3,), 2.0), entropy_sums=sums, consistency_sums=sums,
    )  # fmt: skip


def test_measures_by_layer(profile: RoutingProfile, tmp_path: Path):
    plot_by_layer(profile, "entropy", tmp_path / "a.svg", steered=(1, 2))
    assert "routing entropy (nats)" in texts(tmp_path / "a.svg")
    plot_by_layer(profile, "consistency", tmp_path / "b.svg")
    with pytest.raises(SteeredMoEError, match="use one of entropy, consistency"):
        plot_by_layer(profile, "weight", tmp_path / "c.svg")
    bare = RoutingProfile(profile.languages, profile.layers, profile.counts, profile.tokens)
    with pytest.raises(FormatError, match="no entropy_sums"):
        plot_by_layer(bare, "entropy", tmp_path / "c.svg")
    assert not (tmp_path / "c.svg").exists()


def test_similarity_is_ordered_by_cluster(profile: RoutingProfile, tmp_path: Path):
    plot_similarity(profile, tmp_path / "a.svg", labels={"bn": "বাংলা"})
    names = [text for text in texts(tmp_path / "a.svg") if text in {"en", "de", "বাংলা"}]
    assert sorted(names) == sorted(["en", "de", "বাংলা"] * 2)


def test_maps_of_a_steering(tmp_path: Path):
    weights = torch.zeros(2, 8)
    weights[0, :3] = 0.5
    force = torch.zeros(2, 8)
    force[1, 5], force[1, 6] = 1, -1
    steering = RouterSteering("x", [1, 3], weights, force=force)
    plot_steering(steering, 6, tmp_path / "a.svg")
    plot_steering(steering.restrict([1]), 6, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").stat().st_size > (tmp_path / "b.svg").stat().st_size
    plot_selected(steering, 6, tmp_path / "c.svg", steered=(1, 4))
    assert "experts steered" in texts(tmp_path / "c.svg")


def line(task: str, language: str, system: str, mean: float) -> Line:
    return Line(task, language, system, 100, 0.5, 0.5, Interval(mean, mean - 2, mean + 1))


def circles(path: Path) -> list[float]:
    """Places along x of the round marks, without the legend's, which stand highest."""
    marks = [
        e
        for e in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}use")
        if "fill: #" in e.get("style", "") and "fill: #ffffff" not in e.get("style", "")
    ]
    lowest = sorted(marks, key=lambda e: float(e.get("y")))
    return [float(e.get("x")) for e in lowest]


def test_gains_stand_where_their_numbers_say(tmp_path: Path):
    gains = {"sw": 4.0, "bn": -2.0, "te": 1.0}
    lines = [line("embedded", code, "task", gain) for code, gain in gains.items()]
    plot_gains(lines, tmp_path / "a.svg")
    places = torch.tensor(circles(tmp_path / "a.svg")[-3:])
    expected = torch.tensor(list(gains.values()))
    assert torch.corrcoef(torch.stack([places, expected]))[0, 1] > 0.9999
    wrong = torch.tensor(list(gains.values())[::-1])
    assert torch.corrcoef(torch.stack([places, wrong]))[0, 1] < 0.9  # the twin
    assert {"sw", "bn", "te", "task", "embedded", "gain, points"} <= set(texts(tmp_path / "a.svg"))
    assert "controls" not in texts(tmp_path / "a.svg")


def test_controls_and_tasks_of_another_unit_are_told_apart(tmp_path: Path):
    lines = [line("embedded", "sw", name, 1) for name in ("task", "shared", "task/random-0")]
    plot_gains([*lines, line("perplexity", "sw", "task", 1)], tmp_path / "a.svg")
    said = texts(tmp_path / "a.svg")
    assert {"controls", "task", "shared", "gain, thousandths of a bit per byte"} <= set(said)
    assert "task/random-0" not in said
    assert "-18.5" not in said
    far = line("embedded", "sw", "task/outside-middle", -18.5)
    plot_gains([*lines, far], tmp_path / "a.svg")
    assert "-18.5" in texts(tmp_path / "a.svg")  # beyond the edge: a number
    with pytest.raises(SteeredMoEError, match="no gains to plot"):
        plot_gains([], tmp_path / "b.svg")
    plot_pareto([(1.0, 0.5, True), (0.2, 0.1, False)], tmp_path / "c.svg")
    assert {"tried", "Pareto front"} <= set(texts(tmp_path / "c.svg"))


def test_every_steering_has_a_name_and_a_look_of_its_own(tmp_path: Path):
    names = [f"steering {i}" for i in range(9)]
    plot_gains([line("embedded", "sw", name, 1) for name in names], tmp_path / "a.svg")
    assert set(names) <= set(texts(tmp_path / "a.svg"))
    assert len({_style(number) for number in range(16)}) == 16


def test_png_and_a_missing_matplotlib(tmp_path: Path, monkeypatch):
    plot_divergence(CURVES, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SteeredMoEError, match=r"steered-moe\[plots\]"):
        plot_divergence(CURVES, tmp_path / "b.png")
