"""The papers' experiments: tiny models of the real architectures to the end, and the plans."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reproduce_paper1 as paper1
import reproduce_paper2 as paper2
import reproducing_plan
import reproducing_run
import torch
import typer
from conftest import DATA, real_data
from reproducing import MODELS, Bench, Options
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from steered_moe import RoutingProfile, SteeredMoEForCausalLM
from steered_moe.controls import BASE
from steered_moe.errors import CorpusError, SteeringError
from steered_moe.records import Records
from steered_moe.selection import preset
from steered_moe.storage import read_repo
from steered_moe.task_languages import BELEBELE
from steered_moe.tasks import task

PAPERS = {"1": paper1, "2": paper2}
FOLDERS = ("belebele", "flores200", "gsm8k", "mgsm", "model_configs", "tico19", "tokenizers")
PARAMETERS = {  # what their makers publish, in billions
    "qwen3-30b-a3b": 30.5,
    "phi-3.5-moe": 41.9,
    "gpt-oss-20b": 20.9,
}


def data() -> Path:
    for folder in FOLDERS:
        real_data(folder)
    return DATA


@dataclass
class Ran:
    """Both papers on one tiny model, and what the plans said."""

    bench: Bench
    plans: dict[str, Any]
    found: dict[str, Any]
    files: dict[str, str]

    def repo(self, experiment: str) -> Any:
        return read_repo(self.bench.options.out / experiment / "steering")

    def records(self, experiment: str) -> list[Any]:
        folder = self.bench.options.out / experiment / "run"
        return list(Records(folder, json.loads((folder / "run.json").read_text())).read())


@pytest.fixture(scope="module", params=MODELS)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    out = tmp_path_factory.mktemp(request.param)
    options = Options(request.param, out, data(), limit=2, tiny=True, max_new_tokens=2)
    bench, plans, found, files = Bench(options), {}, {}, {}
    for name, paper in PAPERS.items():
        among = ("sw", "en") if paper is paper1 else ("sw",)
        experiments = paper.experiments(replace(options, languages=among))
        plans[name] = reproducing_plan.plan(bench, experiments, 300, 5000)
        found |= reproducing_run.run(bench, experiments)
        files[name] = (out / "report.md").read_text(encoding="utf-8")
    return Ran(bench, plans, found, files)


def test_both_papers_run_to_the_end(ran: Ran):
    assert list(ran.found) == ["mgsm", "medicine", "steering", "masking"]
    for text in ran.files.values():
        assert reproducing_run.MEANINGLESS in text
        assert ran.bench.hub_id in text
    steps = {row["what"]: row for plan in ran.plans.values() for row in plan["steps"]}
    for name, part in ran.found.items():
        planned = steps[f"evaluate {name}"]
        systems = [system["name"] for system in part["systems"]]
        left_out = sum("left out:" in note and "without data" not in note for note in part["notes"])
        assert len(systems) == planned["systems"] - left_out
        rows = Counter(row["system"] for row in ran.records(name))
        assert rows == dict.fromkeys(systems, planned["items"])


def test_the_tiny_model_has_the_real_architecture(ran: Ran):
    real = Bench(replace(ran.bench.options, tiny=False)).config
    for name in ("model_type", "num_hidden_layers", "num_experts_per_tok"):
        assert getattr(ran.bench.model.config, name) == getattr(real, name)
    profile = ran.bench.profiles["general"]
    assert len(profile.layers) == real.num_hidden_layers
    assert profile.top_k == real.num_experts_per_tok


def test_the_plan_says_how_large_profiles_are(ran: Ran):
    profiles = (ran.bench.options.out / "profiles").glob("*/profile.safetensors")
    planned = sum(plan["profiles on disk"] for plan in ran.plans.values())
    assert sum(file.stat().st_size for file in profiles) == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("subject", paper1.SUBJECTS)
def test_the_presets_reach_the_steering(ran: Ran, subject: str):
    name = f"{ran.bench.options.model}-{subject}"
    known, repo = preset(name), ran.repo(subject)
    (steering,) = repo.steerings
    assert repo.strengths == [known.strength]
    assert set(steering.layers.tolist()) <= set(known.layers)
    assert (steering.force is not None) == (known.parameters["mode"] == "hard")
    assert steering.provenance["parameters"]["preset"] == name
    threshold = steering.provenance["parameters"]["threshold"]
    told = any("random weights: threshold" in note for note in ran.found[subject]["notes"])
    assert told == (threshold != known.parameters["threshold"])
    said = f"paper says {paper1.REPORTED[name].experts} experts, found {counted(ran, subject)}"
    assert f"{name}: {said}" in ran.found[subject]["notes"]
    assert steering.num_steered_experts == counted(ran, subject)


def counted(ran: Ran, subject: str) -> int:
    """Eq. 3 by hand from the saved profiles."""
    folder = ran.bench.options.out / "profiles"
    (steering,) = ran.repo(subject).steerings
    means = []
    for name in (paper1.SUBJECTS[subject].texts.name, "general"):
        profile = RoutingProfile.load(folder / name).of(["en"])
        assert profile.frequency_sums is not None
        assert profile.sequences is not None
        means.append(profile.frequency_sums[0] / profile.sequences[0])
    layers = list(preset(f"{ran.bench.options.model}-{subject}").layers)
    above = (means[0] - means[1])[layers] > steering.provenance["parameters"]["threshold"]
    return int(above.sum())


def test_another_threshold_gives_other_experts(ran: Ran):
    known = preset(f"{ran.bench.options.model}-medicine")
    texts, general = (ran.bench.profiles[name] for name in ("medicine", "general"))
    counts = []
    for threshold in (0.02, 0.05):
        other = replace(known, parameters={"threshold": threshold, "mode": "soft"})
        counts.append(paper1.task_steering(other, texts, general)[0].num_steered_experts)
    assert counts[0] > counts[1]
    none = replace(known, parameters={**known.parameters, "threshold": 0.99})
    with pytest.raises(SteeringError, match=r"differs by more than 0.99"):
        paper1.task_steering(none, texts, general)


@pytest.mark.parametrize("subject", paper1.SUBJECTS)
def test_controls_are_what_they_are_called(ran: Ran, subject: str):
    known = preset(f"{ran.bench.options.model}-{subject}")
    systems = {system["name"]: system for system in ran.found[subject]["systems"]}
    task, random = systems["task"], systems["task/random-0"]
    assert task["strength"] == random["strength"] == known.strength
    assert (random["experts"], random["layers"]) == (task["experts"], task["layers"])
    assert random["fingerprint"] != task["fingerprint"]
    steered = range(task["layers"][0], task["layers"][-1] + 1)
    assert not set(systems["task/outside-middle"]["layers"]) & set(steered)
    suppressed = systems["task/suppressed"]
    if known.parameters["mode"] == "soft":
        assert suppressed["strength"] == -known.strength
    else:
        assert suppressed["fingerprint"] != task["fingerprint"]
    assert (suppressed["experts"], suppressed["layers"]) == (task["experts"], task["layers"])


def test_the_steering_acts_and_loads(ran: Ran):
    rows = [row for row in ran.records("medicine") if row["language"] == "en"]
    said = {row["system"]: row["log_likelihoods"] for row in rows if row["id"] == rows[0]["id"]}
    assert said["task"] != said[BASE]
    assert said["task/suppressed"] != said["task"]
    model = SteeredMoEForCausalLM.from_pretrained(ran.bench.options.out / "medicine" / "steering")
    assert model.steering == ran.repo("medicine").steerings[0]


def test_shared_experts_and_masks(ran: Ran):
    layers = paper2.depth(ran.bench)
    repo, mine = ran.repo("steering"), paper2.STEERINGS
    assert [s.name for s in repo.steerings] == list(mine)
    for steering, strength, one in zip(repo.steerings, repo.strengths, mine.values(), strict=True):
        known = preset(one.preset)
        assert strength == known.strength
        assert steering.scale == "abs"
        assert set(steering.layers.tolist()) <= set(paper2.at_depth(known.layers, layers))
        assert steering.provenance["parameters"]["source"] == known.parameters["languages"][0]
    for system in ran.found["masking"]["systems"][1:]:
        block = paper2.at_depth(range(int(system["name"].split("-")[2]), 48), layers)
        assert system["layers"][0] >= block[0]
        assert len(system["layers"]) <= 5
    extrapolated = any("EXTRAPOLATION" in note for note in ran.found["steering"]["notes"])
    assert extrapolated == (ran.bench.options.model != "qwen3-30b-a3b")


def test_a_threshold_is_adapted_to_random_weights_alone(ran: Ran):
    texts, general = (ran.bench.profiles[name] for name in ("medicine", "general"))
    known = preset(f"{ran.bench.options.model}-medicine")
    for threshold, mode in ((0.9, "soft"), (0.0001, "hard")):
        other = replace(known, parameters={"threshold": threshold, "mode": mode})
        with pytest.raises(SteeringError):
            paper1.task_steering(other, texts, general)
    high = replace(known, parameters={"threshold": 0.9, "mode": "hard"})
    steering, notes = paper1.task_steering(high, texts, general, adapt=True)
    assert 0 < int(steering.force.sum(dim=1).max()) <= general.top_k
    assert len(notes) == 1


def real_recordings() -> RoutingProfile:
    return RoutingProfile.from_recorder(real_data("real_routing/qwen3_30b_a3b_mgsm"))


def test_paper2_on_the_real_routing_of_qwen3():
    """The numbers that were computed from the recordings by other code."""
    profile = real_recordings()
    bench = Bench(Options("qwen3-30b-a3b", Path("unused"), data()))
    known = preset("qwen3-30b-a3b-english")
    steering = paper2.shared(known, known.layers, bench, profile)
    assert steering.num_steered_experts == 420
    assert steering.layers.tolist() == list(range(10, 40))
    assert float(steering.weights[steering.weights > 0].mean()) == pytest.approx(0.507, abs=5e-4)
    masks, left_out = paper2.masked_systems(bench, {"questions": profile})
    assert len(masks) + len(left_out) == 1 + 8 * 3
    per_layer = {s.name: s.steering.num_steered_experts / 5 for s in masks if s.steering}
    for name, expected in {
        "zh-22-26": 2.4,
        "zh-43-47": 11.6,
        "ja-22-26": 1.2,
        "ja-43-47": 7.6,
    }.items():
        assert per_layer[f"mask-{name}"] == pytest.approx(expected, abs=0.05)


def test_layers_are_scaled_by_depth_for_other_models_only():
    middle = preset("qwen3-30b-a3b-english").layers
    assert paper2.at_depth(middle, 48) == middle
    assert paper2.at_depth(middle, 24) == range(5, 20)
    assert paper2.at_depth(range(40, 48), 32) == range(27, 32)
    assert paper2.at_depth(range(0, 1), 24) == range(0, 1)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan loads no model")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def dry_run(paper: ModuleType, model: str, out: Path, *more: str) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(reproducing_run.command(paper.experiments))
    args = ["--model", model, "--out", str(out), "--data", str(data()), "--dry-run", *more]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    return json.loads((out / "plan.json").read_text())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_counts_the_real_model(model: str, tmp_path: Path):
    plan = dry_run(paper1, model, tmp_path, "--limit", "1", "--languages", "en")
    assert plan["parameters"] / 1e9 == pytest.approx(PARAMETERS[model], abs=0.05)
    assert plan["weights in bfloat16"] == 2 * plan["parameters"]
    config = Bench(Options(model, tmp_path, DATA)).config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expert = 3 * config.hidden_size * width
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    packed = config.num_hidden_layers * (experts * expert + heads * head * config.hidden_size)
    rest = plan["parameters"] - packed
    assert plan["weights in 4 bit"] == pytest.approx(2 * rest + packed * 4.5 / 8, abs=1)
    prompt = "Question: " + questions("en")[0] + "\nAnswer:"
    length = math.ceil(len(prompt.encode()) / reproducing_plan.BYTES_PER_TOKEN) + 256
    cache = 16 * length * config.num_hidden_layers * 2 * config.num_key_value_heads * head * 2
    assert plan["KV cache of a batch"] == cache


def questions(language: str) -> list[str]:
    lines = (DATA / "mgsm" / f"mgsm_{language}.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines]


@pytest.mark.usefixtures("no_weights")
def test_a_plan_counts_systems_items_and_tokens(tmp_path: Path):
    plan = dry_run(paper2, "qwen3-30b-a3b", tmp_path / "all", "--tokens-per-second", "100")
    rows = {row["what"]: row for row in plan["steps"]}
    profile, steering, masking = rows.values()
    texts = [q for la in ("bn", "de", "en", "es", "fr", "ja", "sw", "zh") for q in questions(la)]
    assert profile["items"] == len(texts) == 2000
    assert profile["read"] == sum(math.ceil(len(q.encode()) / 2.2) for q in texts)
    assert (profile["calls"], profile["written"]) == (8 * 16, 0)
    assert (steering["systems"], steering["items"]) == (1 + 2 * 2 + 2, 6 * 250)
    assert (masking["systems"], masking["items"]) == (1 + 8 * 3, 8 * 250)
    for row in (steering, masking):
        assert row["written"] == row["systems"] * row["items"] * 4096
        assert row["calls"] == row["systems"] * row["languages"] * 16 * 4096
    written, read = (sum(row[key] for row in rows.values()) for key in ("written", "read"))
    assert plan["seconds"] == pytest.approx(written / 100 + read / 5000)
    few = dry_run(paper2, "qwen3-30b-a3b", tmp_path / "few", "--limit", "125")
    assert [row["items"] * 2 for row in few["steps"]] == [row["items"] for row in plan["steps"]]


def test_settings_are_those_of_the_papers(tmp_path: Path):
    """Their numbers, written down once more from the papers' descriptions."""
    options = Options("qwen3-30b-a3b", tmp_path, data())
    first, second = paper1.experiments(options), paper2.experiments(options)
    assert (paper1.GENERAL.rows, paper1.MATHS.rows) == (488, 500)
    assert [one.settings.part for one in (*first, *second)] == ["all"] * 4
    for one in second:
        sampling = one.settings.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 20)
        assert (one.task.max_new_tokens, one.task.rule) == (4096, "final_number")
        assert one.settings.chat
        assert one.task.stops("de") == ()  # an answer may well say "Frage:" on its way
    assert task("mgsm_direct").stops("de")


def test_an_unknown_model_is_one_line(tmp_path: Path):
    app = typer.Typer()
    app.command()(reproducing_run.command(paper1.experiments))
    result = CliRunner().invoke(app, ["--model", "gpt-5", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "there are qwen3-30b-a3b, phi-3.5-moe, gpt-oss-20b" in result.stderr


def test_the_hub_has_the_general_texts_in_all_15_languages():
    codes = [paper1.GENERAL.code(language) for language in paper1.GENERAL.languages]
    assert len(set(codes)) == 15
    assert set(paper1.GENERAL.languages) <= set(BELEBELE)
    assert {"arb_Arab", "arb_Latn", "asm_Beng", "ory_Orya"} <= set(codes)


def test_languages_without_data_are_named(tmp_path: Path):
    options = Options("gpt-oss-20b", tmp_path, data())
    medicine = paper1.experiments(options)[1]
    assert medicine.languages == ("ar", "en", "hi")
    assert any(note.startswith("left out, without data: bn") for note in medicine.notes)
    assert medicine.settings.limit == 420
    with pytest.raises(CorpusError, match="none of xx"):
        paper2.experiments(replace(options, languages=("xx",)))


def test_drawn_texts_are_the_same_each_time_and_a_limit_keeps_the_first(tmp_path: Path):
    all_of_them = paper1.MATHS.texts(data(), None)["en"]
    assert len(all_of_them) == 500
    assert paper1.MATHS.texts(data(), 3)["en"] == all_of_them[:3]
    assert torch.unique(torch.tensor([len(text) for text in all_of_them])).numel() > 100
