"""Figures: the lines that were asked for, in the file format that was asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from steered_moe.errors import SteeredMoEError
from steered_moe.plots import plot_divergence

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


def test_png_and_a_missing_matplotlib(tmp_path: Path, monkeypatch):
    plot_divergence(CURVES, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SteeredMoEError, match=r"steered-moe\[plots\]"):
        plot_divergence(CURVES, tmp_path / "b.png")
