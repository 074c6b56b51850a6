"""What the embedded model loses in 4 bit: the script runs, and the committed numbers are of it."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT
from four_bit import measure

FOLDER = ROOT / "examples" / "tiny_multilingual_moe"


@pytest.fixture(scope="module")
def written() -> dict:
    return json.loads((FOLDER / "quantization.json").read_text(encoding="utf-8"))


def test_the_script_measures_every_way_on_few_problems(written: dict):
    found = measure(FOLDER, 12, 4)
    assert found.keys() == written.keys()
    for way in ("bfloat16", "4 bit"):
        for name in ("base", "steered"):
            accuracy = found[way][name]["accuracy"]
            assert accuracy["en"] >= 0.8
            assert accuracy.keys() == written[way][name]["accuracy"].keys()
            ratio = found[way][name]["perplexity"]["en"] / written[way][name]["perplexity"]["en"]
            assert 0.7 < ratio < 1.4
    assert found["4 bit"]["bytes"] < 0.4 * found["bfloat16"]["bytes"]
    different = found["bfloat16"]["base"]["perplexity"], found["4 bit"]["base"]["perplexity"]
    assert different[0] != different[1]


def test_the_readme_says_what_was_measured(written: dict):
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name, start in (("base", "each, by"), ("steered", "steered by")):
        change = written[f"change by 4 bit, {name}"]
        said = f"{start} {change['mean']:+.2f}"
        assert said in readme
        assert f"({change['low']:+.2f} to {change['high']:+.2f})" in readme
    means = [sum(written[way]["base"]["perplexity"].values()) / 12 for way in ("bfloat16", "4 bit")]
    assert re.search(rf"perplexity from {means[0]:.3f} to {means[1]:.3f}", readme)
