"""select: which layers it takes when none are named, its settings, and what it records."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_cli import run

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.selection import exclusive_experts, risk_difference, task_experts

LAYERS, EXPERTS, TOP = 6, 16, 4
# By how many experts the routing of a language is shifted, layer by layer. Seen from en the first
# and the last layer lie apart; seen from fr the second one too.
GENERAL = {"en": [0] * 6, "fr": [8, 2, 0, 0, 0, 8], "de": [8, 0, 0, 0, 0, 8]}
TASK = {"en": [4] * 6, "de": [12, 12, 4, 4, 12, 12]}


def profile(shifts: Mapping[str, Sequence[int]], **about: Any) -> RoutingProfile:
    """Every token of a language selects four experts, of which the first is the shift."""
    counts = torch.zeros(len(shifts), LAYERS, EXPERTS)
    for row, places in zip(counts, shifts.values(), strict=True):
        for layer, shift in enumerate(places):
            row[layer, [(shift + i) % EXPERTS for i in range(TOP)]] = 10
    tokens = torch.full((len(shifts), LAYERS), 10.0)
    texts = torch.full((len(shifts),), 2.0)
    shares = counts / 10 * 2
    return RoutingProfile(
        tuple(shifts), tuple(range(LAYERS)), counts, tokens,
        sequences=texts, frequency_sums=shares, about=about,
    )  # fmt: skip


@pytest.fixture
def work(tiny: Path, tmp_path: Path) -> Path:
    """Profiles of general texts, with codes of two kinds, and of a task."""
    about = {"model": str(tiny / "base")}
    profile(GENERAL, **about).save(tmp_path / "general")
    profile(TASK, **about).save(tmp_path / "task")
    flores = {"eng_Latn": "en", "fra_Latn": "fr", "deu_Latn": "de"}
    for name, shifts in (("flores", GENERAL), ("flores-task", TASK)):
        named = {code: shifts[short] for code, short in flores.items() if short in shifts}
        profile(named, **about).save(tmp_path / name)
    return tmp_path


def selected(folder: Path, method: str, *arguments: object) -> RouterSteering:
    result = run("select", method, *arguments, "--out", folder / "s")
    assert result.exit_code == 0, result.output + result.stderr
    return RouterSteering.load(folder / "s")


def refused(folder: Path, *arguments: object) -> str:
    """What a command says that fails, in one line and without a traceback."""
    result = run("select", *arguments, "--out", folder / "s")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "s").exists()
    return result.stderr


def settings(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


def recorded(steering: RouterSteering) -> dict[str, Any]:
    return dict(steering.provenance["parameters"])


def test_the_masked_language_is_not_the_pivot_of_the_middle(work: Path):
    found = selected(work, "exclusive_experts", work / "general", *settings("language=fr", "top=4"))
    assert recorded(found)["layers"] == "1-4"  # from fr it would be 2-4
    expected = exclusive_experts(profile(GENERAL), "fr", top=4, layers=range(1, 5))
    assert found.fingerprint == expected.fingerprint
    assert found.layers.tolist() == [1]


@pytest.mark.parametrize(
    ("method", "texts", "language"),
    [
        ("exclusive_experts", ("language=fra_Latn", "top=4"), None),
        ("shared_experts", ("languages=eng_Latn,fra_Latn", "top=4"), None),
        ("preferred", ("target=fra_Latn",), "pivot"),
        ("multilingual_experts", ("threshold=.2",), "pivot"),
    ],
)
def test_pivots_of_other_codes(work: Path, method: str, texts: Sequence[str], language: str):
    arguments = (method, work / "flores", *settings(*texts))
    assert "the (last) profile has eng_Latn, fra_Latn" in refused(work, *arguments)
    found = selected(work, *arguments, "--pivot", "eng_Latn")
    assert recorded(found)["layers"] == "1-4"
    assert language is None or recorded(found)[language] == "eng_Latn"


def test_the_pivot_of_task_experts_is_their_language(work: Path):
    sources = (work / "flores-task", work / "flores")
    arguments = ("task_experts", *sources, *settings("threshold=.5"))
    found = selected(work, *arguments, "--pivot", "eng_Latn")
    assert found.provenance["languages"] == ["eng_Latn"]
    other = selected(work, *arguments, *settings("language=eng_Latn"))
    assert other == found
    said = run("select", *arguments, "--pivot", "fra_Latn", *settings("language=eng_Latn"),
               "--out", work / "x")  # fmt: skip
    assert "--pivot is fra_Latn and --set language=eng_Latn; give one" in said.stderr


def test_the_middle_is_that_of_general_text(work: Path):
    arguments = ("task_experts", work / "task", work / "general", *settings("threshold=.5"))
    found = selected(work, *arguments)
    assert recorded(found)["layers"] == "1-4"  # the task's own curve is low in 2-3 alone
    expected = task_experts(profile(TASK), profile(GENERAL), threshold=0.5, layers=range(1, 5))
    assert found.fingerprint == expected.fingerprint
    profile({"en": [0] * 6}, model=str(work)).save(work / "one")
    said = run("select", "task_experts", work / "task", work / "one", *settings("threshold=.5"),
               "--out", work / "x")  # fmt: skip
    assert "the (last) profile has en; give --pivot, or --layers first-last" in said.stderr


def test_why_is_recorded_where_nobody_asked_for_the_layers(work: Path):
    arguments = ("shared_experts", work / "general", *settings("languages=en,fr", "top=4"))
    reason = recorded(selected(work, *arguments))["layers_reason"]
    assert reason.startswith("mean divergence 0.031 in layers 1-4, 0.500 before and 0.500 after")
    assert reason in (work / "s" / "README.md").read_text()
    for layers, shown in (("2-3", "2-3"), ("all", "0-5")):
        found = recorded(selected(work, *arguments, "--layers", layers))
        assert found["layers"] == shown
        assert "layers_reason" not in found


def test_risk_differences_are_ranked_over_all_layers(tiny: Path, work: Path):
    """As in SteerMoE; the profiles here have too few languages to propose any layers from."""
    profile({"en": [4] * 6}).save(work / "first")
    profile({"en": [0] * 6}).save(work / "second")
    sources = (work / "first", work / "second", "--base-model", tiny / "base")
    options = settings("activate=24", "deactivate=24")
    found = selected(work, "risk_difference", *sources, *options)
    assert found.layers.tolist() == list(range(LAYERS))
    assert recorded(found)["layers"] == "0-5"
    first, second = profile({"en": [4] * 6}), profile({"en": [0] * 6})
    expected = risk_difference(first, second, activate=24, deactivate=24)
    assert found.fingerprint == expected.fingerprint


def test_numbers_and_lists_may_be_written_as_people_write_them(work: Path):
    arguments = ("shared_experts", work / "general", "--layers", "1-4")
    found = selected(work, *arguments, *settings("threshold=.7", "languages=en, fr", "top=4"))
    same = selected(work, *arguments, *settings("threshold=0.7", 'languages=["en","fr"]', "top=4"))
    assert found == same
    assert recorded(found)["threshold"] == 0.7


@pytest.mark.parametrize(
    ("method", "texts", "says"),
    [
        ("preferred", ("target=fr", "threshold=abc"), "threshold is 'abc'; it must be a finite"),
        ("preferred", ("target=fr", "threshold=NaN"), "threshold is nan; it must be a finite"),
        ("preferred", ("target=5",), "5 not in the profile; it has en, fr, de"),
        ("preferred", ("target=fr", "pivot=5"), "5 not in the profile"),
        ("preferred", ("target=",), "pivot and target is ['en', '']"),
        ("preferred", ("target=fr", "name=a b"), "name is 'a b'"),
        ("preferred", ("target=fr", "profile=x"), "preferred has no such setting"),
        ("shared_experts", ("languages=en,fr", "top=2.5"), "top is 2.5; it must be a whole number"),
        ("shared_experts", ("languages=en,fr", "top=true"), "top is True; it must be a whole"),
        ("shared_experts", ("languages=en",), "languages are ['en']; name at least two"),
        ("shared_experts", ("languages=[1,2]",), "languages is [1, 2]; name at least one"),
        (
            "shared_experts",
            ("languages=en,fr", "top=4", "source=5"),
            "source is '5'; it must be one of",
        ),
        ("shared_experts", ("languages=en,fr", "top=4", "threshold=1"), "it must lie in (0, 1)"),
        ("exclusive_experts", ("language=5",), "5 not in the profile"),
        ("exclusive_experts", ("language=fr,fr",), "name each language once"),
        ("multilingual_experts", ("threshold=.2", "mode=5"), "mode is 5; use 'soft' or 'hard'"),
    ],
)
def test_settings_that_make_no_sense(work: Path, method: str, texts: Sequence[str], says: str):
    layers = ("--layers", "1-4")
    assert says in refused(work, method, work / "general", *layers, *settings(*texts))


@pytest.mark.parametrize("text", ["seed=abc", "seed=1.5", "seed=1e3", "like=x"])
def test_seeds_that_make_no_sense(tiny: Path, tmp_path: Path, text: str):
    said = refused(tmp_path, "random", tiny / "steered", *settings(text))
    assert "seed is" in said or "no such setting" in said


def test_a_preset_of_another_model_is_warned_of(
    work: Path, tiny: Path, caplog: pytest.LogCaptureFixture
):
    preset = "qwen3-30b-a3b-english"
    options = ("--layers", "1-4", *settings("languages=en,fr", "top=4"))
    base = str(tiny / "base")
    with caplog.at_level(logging.WARNING, "steered_moe.select_command"):
        found = selected(work, preset, work / "general", *options)
    assert f"is for Qwen/Qwen3-30B-A3B, and the profile is of {base}" in caplog.text
    parameters = recorded(found)
    assert parameters["preset"] == preset
    assert parameters["preset_source"] == "arXiv 2601.14050"
    caplog.clear()
    for about in ({}, {"model": "Qwen/Qwen3-30B-A3B"}):
        profile(GENERAL, **about).save(work / "named")
        selected(work, preset, work / "named", *options, "--base-model", base)
    selected(work, "shared_experts", work / "general", *options)
    assert "is for" not in caplog.text


@pytest.mark.parametrize("option", [("--layers", "1-2"), ("--pivot", "de")])
def test_random_refuses_options_that_cannot_act(tmp_path: Path, option: tuple[str, str]):
    source = ROOT / "examples" / "qwen3-30b-a3b-english-shared"
    result = run("select", "random", source, "--out", tmp_path / "out", *option)
    assert result.exit_code == 1
    assert "leave out --layers and --pivot" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
