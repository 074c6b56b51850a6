"""The search: which settings are tried, that it halves, sees the dev split alone, and reports."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from corpus import problems, sentences
from grammar import Language
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from steered_moe import RouterSteering, RoutingProfile, attach
from steered_moe.cli import app
from steered_moe.collection import profile_texts
from steered_moe.contrast import task_experts
from steered_moe.embedded import embedded_model
from steered_moe.errors import BaseModelError, SteeredMoEError
from steered_moe.evaluation import Evaluation, Settings
from steered_moe.results import read_results
from steered_moe.tasks import part_of, task
from steered_moe.tuning import (
    STRENGTHS,
    Candidate,
    Trial,
    _rank,
    candidates,
    halve,
    layer_ranges,
    pareto,
)

BASE = Path(embedded_model()).parent / "base"


@pytest.fixture(scope="module")
def loaded():
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def profiles(loaded, tmp_path_factory) -> tuple[Path, Path]:
    """Of solved problems in English, and of parallel text in three languages."""
    folder = tmp_path_factory.mktemp("profiles")
    texts = list(sentences("dev", 40, seed=3))
    rows = {code: [one.text(Language(code)) for one in texts] for code in ("en", "es", "zh", "sw")}
    english = Language("en")
    solved = [one.prompt(english) + one.solution for one in problems("dev", 40, seed=5)]
    profile_texts(*loaded, {"en": solved}).save(folder / "task")
    profile_texts(*loaded, rows, keep_sequences=True).save(folder / "general")
    return folder / "task", folder / "general"


def candidate(number: int, strength: float = 1.0) -> Candidate:
    weights = torch.zeros(1, 24)
    weights[0, number] = 1.0
    origin = {"method": "task_experts", "parameters": {"threshold": 0.1}}
    steering = RouterSteering("task", torch.tensor([3]), weights, provenance=origin)
    return Candidate(steering, strength)


def test_candidates_are_all_different_and_edit_something(profiles):
    task_profile, general = map(RoutingProfile.load, profiles)
    tried = candidates(task_profile, general, thresholds=[0.05, 0.1], strengths=[0.5, 1.0])
    assert len({one.name for one in tried}) == len(tried) > 8
    assert all(one.steering.num_steered_experts for one in tried)
    assert {one.strength for one in tried if not one.steering.weights.any()} <= {1.0}
    methods = {one.steering.provenance["method"] for one in tried}
    assert methods == {"task_experts", "shared_experts"}
    with pytest.raises(SteeredMoEError, match="no method 'magic'"):
        candidates(task_profile, general, methods=["magic"])
    with pytest.raises(SteeredMoEError, match="smaller thresholds"):
        candidates(task_profile, general, methods=["task_experts"], thresholds=[0.999])


def test_settings_that_force_more_than_a_token_gets_are_left_out(profiles, loaded, caplog):
    """They would be refused when they are attached, in the middle of a search."""
    task_profile, general = map(RoutingProfile.load, profiles)
    given = {"methods": ["task_experts"], "thresholds": [0.01], "strengths": [1.0]}
    tried = candidates(task_profile, general, **given)
    assert "settings force more experts than a token gets; left out" in caplog.text
    too_many = task_experts(
        task_profile, general, threshold=0.01, mode="hard", layers=range(1, 7), language="en"
    )
    with pytest.raises(BaseModelError, match="force at most 2"):
        attach(loaded[0], too_many)
    for one in tried:
        attach(loaded[0], one.steering).remove()


def test_what_goes_wrong_in_a_method_is_said(profiles, caplog):
    """An error is not taken for a setting that selects nothing."""
    task_profile, general = map(RoutingProfile.load, profiles)
    with pytest.raises(SteeredMoEError, match="threshold is 40"):
        candidates(task_profile, general, thresholds=[40])
    with pytest.raises(SteeredMoEError, match="experts"):
        candidates(narrower(task_profile), general)
    found = candidates(task_profile, general, thresholds=[0.999])
    assert {one.steering.provenance["method"] for one in found} == {"shared_experts"}
    assert "task_experts: no setting selects an expert; it is not searched" in caplog.text


def narrower(profile: RoutingProfile) -> RoutingProfile:
    """Of a model of 16 experts."""
    parts = {
        name: value[..., :16]
        if isinstance(value, torch.Tensor) and value.shape[-1] == 24
        else value
        for name, value in vars(profile).items()
    }
    return RoutingProfile(**parts)


def test_strengths_go_by_the_scale_of_the_edit(profiles):
    """2601.14050 steers at 0.022 and 0.034, 2510.04694 at 0.5."""
    tried = candidates(*map(RoutingProfile.load, profiles), thresholds=[0.1])
    by_scale: dict[str, set[float]] = {}
    for one in tried:
        if one.steering.weights.any():
            by_scale.setdefault(one.steering.scale, set()).add(one.strength)
    assert by_scale == {scale: set(values) for scale, values in STRENGTHS.items()}
    assert 0.022 in by_scale["abs"]
    assert 0.5 in by_scale["std"]


def test_shared_experts_are_those_of_the_pivot_and_chinese(profiles):
    tried = candidates(*map(RoutingProfile.load, profiles), methods=["shared_experts"])
    origins = [one.steering.provenance for one in tried]
    assert {tuple(one["languages"]) for one in origins} == {("en", "zh")}  # es comes before zh
    assert {one["parameters"]["top"] for one in origins} == {round(20 / 128 * 24)}


def test_layer_ranges_are_the_middle_and_around_it(profiles):
    ranges = layer_ranges(RoutingProfile.load(profiles[1]), "en")
    middle = ranges[0]
    assert len(ranges) == len(set(ranges)) > 1
    assert all(set(one) & set(middle) for one in ranges)


def test_of_an_odd_number_the_middle_one_stays(loaded, tmp_path):
    tried = [candidate(number, 6.0) for number in range(3)]
    run = Evaluation(*loaded, [task("embedded")], ["es"], [], Settings(batch_size=8))
    assert [len(trials) for trials in halve(run, tried, tmp_path, items=2, rounds=2)] == [3, 2]
    with pytest.raises(SteeredMoEError, match="a language besides English"):
        halve(replace(run, languages=["eng_Latn"]), tried, tmp_path / "en", items=2, rounds=1)
    assert not (tmp_path / "en").exists()


def test_halving_keeps_the_better_half_and_sees_dev_items_alone(loaded, tmp_path):
    tried = [candidate(number, 6.0) for number in range(4)]
    run = Evaluation(*loaded, [task("embedded")], ["en", "es"], [], Settings(batch_size=8))
    rounds = halve(run, tried, tmp_path, items=8, rounds=3)
    assert [len(trials) for trials in rounds] == [4, 2, 1]
    assert [trials[0].items for trials in rounds] == [2, 4, 8]
    for before, after in pairwise(rounds):
        kept = {trial.candidate.name for trial in before[: len(after)]}
        assert kept == {trial.candidate.name for trial in after}
    dev = {item.id for item in task("embedded").items("es", None, 8, "dev")}
    test = {item.id for item in task("embedded").items("es", None, 8, "test")}
    records = [json.loads(line) for line in (tmp_path / "round-2/records.jsonl").open()]
    assert {row["id"] for row in records} == dev
    assert not dev & test


def test_harm_to_english_comes_behind_and_the_front_is_pareto():
    gains = [(3.0, -5.0), (2.0, 0.0), (1.0, 0.5), (0.5, 0.2)]
    trials = [Trial(candidate(i), 8, gain, english) for i, (gain, english) in enumerate(gains)]
    assert pareto(trials) == trials[:3]
    ranked = sorted(trials, key=lambda one: _rank(one, 1.0))
    assert ranked == [trials[1], trials[2], trials[3], trials[0]]
    harmful = [
        Trial(candidate(i), 8, gain, harm) for i, (gain, harm) in enumerate([(9, -20), (1, -5)])
    ]
    assert sorted(harmful, key=lambda one: _rank(one, 1.0)) == harmful[::-1]
    assert pareto([]) == []


def test_what_has_no_common_mean_and_what_steers_nothing_is_refused(loaded, profiles, tmp_path):
    asks = [task("embedded"), task("perplexity")]
    run = Evaluation(*loaded, asks, ["en", "es"], [], Settings(batch_size=8))
    with pytest.raises(SteeredMoEError, match="no common mean"):
        halve(run, [candidate(0)], tmp_path, items=8, rounds=1)
    with pytest.raises(SteeredMoEError, match="0 steers nothing"):
        candidates(*profiles, strengths=(0.5, 0))


def test_a_round_says_how_many_items_there_were(loaded, tmp_path):
    class Few(type(task("embedded"))):
        def items(self, *args, **kwargs):
            return super().items(*args, **kwargs)[:3]

    few = Few(**vars(task("embedded")))
    run = Evaluation(*loaded, [few], ["en", "es"], [], Settings(batch_size=8))
    [[trial]] = halve(run, [candidate(0, 6.0)], tmp_path, items=8, rounds=1)
    assert trial.items == 3


def test_parts_are_the_same_in_every_language():
    assert {part_of(f"mgsm/{i}") for i in range(250)} == {"dev", "test"}
    assert part_of("passage 7#1") == part_of("passage 7#2")


def test_the_command_searches_reports_once_and_writes_a_repo(profiles, tmp_path):
    out = tmp_path / "search"
    command = [
        "tune", "embedded", *map(str, profiles), "--tasks", "embedded", "--languages", "en,es,zh",
        "--out", str(out), "--items", "4", "--rounds", "2", "--test-items", "6",
        "--thresholds", "0.1", "--strengths", "0.5", "--methods", "task_experts",
        "--controls", "0", "--batch-size", "6", "--dtype", "float32",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    search = json.loads((out / "search.json").read_text())
    assert len(search["rounds"]) == 2
    assert (out / "pareto.svg").is_file()
    steering = RouterSteering.load(out / "steering")
    assert steering.fingerprint == search["rounds"][-1][0]["fingerprint"]
    found = read_results(out / "steering")
    assert {one.strength for one in found} == {search["rounds"][-1][0]["strength"]}
    assert found[0].settings["settings"]["part"] == "test"
    assert {one.language for one in found} == {"en", "es", "zh", "mean of 2 languages"}
    assert {one.items for one in found} == {6}
    assert "exact_match" in (out / "steering" / "README.md").read_text()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    wrong = CliRunner().invoke(app, [*command[:-1], "float64"])
    assert wrong.exit_code == 1
    place = command.index("task_experts")
    unused = CliRunner().invoke(app, [*command[:place], " shared_experts", *command[place + 1 :]])
    assert "--thresholds are those of task_experts" in unused.output
