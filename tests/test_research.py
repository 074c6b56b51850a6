"""profile, analyze, select: the commands, run as a person would run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_cli import run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from steered_moe import RouterSteering, RoutingProfile, SteeredMoEForCausalLM
from steered_moe.collection import profile_texts
from steered_moe.divergence import divergence
from steered_moe.layers import layer_range
from steered_moe.selection import METHODS, random_experts, shared_experts, task_experts

TEXTS = {
    "en": ["A router sends each token", "to a few experts", "of many", "in each layer", "again"],
    "fr": ["Un routeur envoie chaque mot", "aux experts", "du texte", "de la couche", "encore"],
    "de": ["Ein Router schickt jedes Wort", "zu Experten", "aus vielen", "je Schicht", "wieder"],
}
FIGURES = ("divergence", "similarity", "entropy", "consistency")


def write(folder: Path, texts: dict[str, list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for language, rows in texts.items():
        (folder / f"{language}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def failed(*arguments: object) -> str:
    """The one line that a command says when it fails."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert len(result.stderr.strip().splitlines()[-1:]) == 1
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def work(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and profiles of them made by the command."""
    folder = tmp_path_factory.mktemp("work")
    write(folder / "general", TEXTS)
    write(folder / "task", {"en": ["1 + 2 = 3", "40 - 2 = 38", "6 * 7 = 42"]})
    for kind in ("general", "task"):
        result = run(
            "profile", tiny / "base", "--data", folder / kind, "--out", folder / f"p-{kind}"
        )
        assert result.exit_code == 0, result.output
    return folder


def test_profile_is_that_of_the_library(tiny: Path, work: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    found = RoutingProfile.load(work / "p-general")
    expected = profile_texts(model, tokenizer, TEXTS, keep_sequences=True).of(found.languages)
    assert found.fingerprint == expected.fingerprint
    assert found.about["model"] == str(tiny / "base")
    assert found.about["corpus"] == str(work / "general")
    one = profile_texts(model, tokenizer, {"en": TEXTS["fr"]})
    assert not torch.equal(one.counts[0], found.of(["en"]).counts[0])


def test_profile_takes_languages_limit_and_chat(tiny: Path, work: Path, tmp_path: Path):
    options = ("--data", work / "general", "--languages", "de, en", "--limit", 2)
    result = run("profile", tiny / "base", *options, "--out", tmp_path, "--no-keep-sequences")
    assert "de, en" in result.output
    found = RoutingProfile.load(tmp_path)
    assert found.languages == ("de", "en")
    assert found.sequences.tolist() == [2, 2]
    assert found.probabilities is None
    assert "has no chat template" in failed(
        "profile", tiny / "base", *options, "--out", tmp_path / "chat", "--chat"
    )


def test_profile_leaves_the_template_out(work: Path, tmp_path: Path):
    tokens = {}
    for option in ("--template-tokens", "--no-template-tokens"):
        arguments = ("--data", work / "task", "--out", tmp_path / option, "--chat", option)
        assert run("profile", "embedded", *arguments).exit_code == 0
        tokens[option] = int(RoutingProfile.load(tmp_path / option).tokens[0, 0])
    # the embedded model's template adds a token before each of the three rows and one after it
    assert tokens["--template-tokens"] == tokens["--no-template-tokens"] + 6


def test_profile_records_how_it_measured(work: Path, tmp_path: Path):
    command = ("profile", "embedded", "--data", work / "task", "--out", tmp_path / "p")
    options = ("--chat", "--no-template-tokens", "--no-generation-prompt", "--no-thinking")
    options += ("--limit", 2, "--languages", "en", "--columns", "text", "--dtype", "float32")
    assert run(*command, *options).exit_code == 0
    about = RoutingProfile.load(tmp_path / "p").about
    hashes = {name: about.pop(name) for name in list(about) if name.endswith("_sha256")}
    assert sorted(hashes) == ["model_sha256", "texts_sha256", "tokenizer_sha256"]
    assert about == {
        "model": "embedded",
        "revision": None,
        "corpus": str(work / "task"),
        "columns": ["text"],
        "limit": 2,
        "languages": ["en"],
        "dtype": "float32",
        "chat": True,
        "template_tokens": False,
        "generation_prompt": False,
        "template_kwargs": {"enable_thinking": False},
    }


def test_a_finished_profile_is_not_overwritten(tiny: Path, work: Path, tmp_path: Path):
    command = ("profile", tiny / "base", "--out", tmp_path / "p")
    assert run(*command, "--data", work / "task").exit_code == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    assert run(*command, "--data", work / "task").exit_code == 0
    for options, name in (
        (("--data", work / "general"), "corpus"),
        (("--data", work / "task", "--dtype", "bfloat16"), "dtype"),
        (("--data", work / "task", "--no-keep-sequences"), "keep_sequences"),
    ):
        said = failed(*command, *options)
        assert f"{tmp_path / 'p'} has a finished profile of another run" in said
        assert f"{name} is" in said
        assert "--out" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()} == files


def test_what_can_be_told_before_loading(
    tiny: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("x")
    data, out = ("--data", work / "task"), ("--out", tmp_path / "p")
    cases = [
        ((tmp_path / "none", *data, *out), f"{tmp_path / 'none'}: no such folder"),
        ((tmp_path / "file", *data, *out), "is a file; name the folder of the model"),
        ((tiny / "base", *data, "--out", tmp_path / "file"), "file is a file; give a folder"),
        ((tiny / "base", *data, *out, "--dtype", "foo"), "no dtype 'foo'; use one of auto"),
        ((tiny / "base", *data, *out, "--no-template-tokens"), "template_tokens say how"),
        ((tiny / "base", *data, *out, "--no-generation-prompt"), "generation_prompt say how"),
        ((tiny / "base", *data, *out, "--no-thinking"), "template_kwargs say how"),
    ]
    monkeypatch.setattr("steered_moe.profile_command.load_model", None)
    monkeypatch.setattr("steered_moe.profile_command.read_texts", None)
    for arguments, says in cases:
        assert says in failed("profile", *arguments)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_dtype_that_there_is_not(tiny: Path, command: str):
    said = failed(command, tiny / "steered", "A router", "--dtype", "foo")
    assert "no dtype 'foo'; use one of auto, float32, bfloat16, float16" in said


def test_a_killed_run_goes_on_and_ends_with_the_same_profile(tiny: Path, tmp_path: Path):
    rows = {language: texts * 120 for language, texts in TEXTS.items()}
    data = write(tmp_path / "texts", rows)
    command = [str(Path(sys.executable).parent / "steered-moe"), "profile", str(tiny / "base")]
    command += ["--data", str(data), "--batch-size", "2"]
    process = subprocess.Popen([*command, "--out", tmp_path / "cut"], env=os.environ)
    unfinished = tmp_path / "cut" / "unfinished"
    while process.poll() is None and len(list(unfinished.glob("*-*"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
    assert not (tmp_path / "cut" / "profile.json").exists()
    done = {path: path.stat().st_mtime_ns for path in unfinished.glob("*-*/profile.json")}
    assert done
    for out in ("cut", "whole"):
        subprocess.run([*command, "--out", tmp_path / out], check=True, capture_output=True)
    cut, whole = (RoutingProfile.load(tmp_path / out) for out in ("cut", "whole"))
    assert cut.fingerprint == whole.fingerprint
    assert not unfinished.exists()


def test_an_unfinished_run_is_not_mixed_with_another(tiny: Path, work: Path, tmp_path: Path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "settings.json").write_text('{"model": "another"}')
    said = failed("profile", tiny / "base", "--data", work / "general", "--out", tmp_path)
    assert f"has parts of another run: model is 'another' there and '{tiny / 'base'}' here" in said


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ({"en": ["a", "b"], "fr": ["c"]}, (), "parallel texts need as many rows"),
        ({"en": ["a"], "fr": []}, (), "fr.txt, line 1 is blank"),
        ({"en": ["a"]}, ("--languages", "en,sw"), "has no sw; it has en"),
        ({"en": ["a"]}, ("--columns", "question"), "has no column question; it has text"),
        ({"en": ["a"]}, ("--split", "dev"), "has no split or revision"),
    ],
)
def test_texts_that_cannot_be_profiled(tiny: Path, tmp_path: Path, texts, options, says: str):
    write(tmp_path / "texts", texts)
    arguments = ("--data", tmp_path / "texts", "--out", tmp_path / "profile", *options)
    assert says in failed("profile", tiny / "base", *arguments)
    assert not (tmp_path / "profile" / "profile.json").exists()


def test_analyze_writes_figures_numbers_and_a_page(work: Path, tmp_path: Path):
    (tmp_path / "names.json").write_text('{"fr": "français", "de": "Deutsch"}')
    result = run(
        "analyze", work / "p-general", "--out", tmp_path, "--layers", "1-3",
        "--labels", tmp_path / "names.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for name in FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(tmp_path / f"{name}.svg")
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    profile = RoutingProfile.load(work / "p-general")
    curves = divergence(profile)
    assert numbers["divergence"] == {code: curve.tolist() for code, curve in curves.items()}
    assert numbers["divergence_in_the_middle"]["fr"] == pytest.approx(
        float(curves["fr"][1:4].mean())
    )
    assert numbers["middle_layers"]["used"] == [1, 3]
    assert numbers["entropy"]["en"] == profile.entropy[profile.languages.index("en")].tolist()
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for text in (*(f'src="{name}.svg"' for name in FIGURES), "français", "Divergence by layer"):
        assert text in page
    assert f"{numbers['divergence_in_the_middle']['fr']:.3f}" in page
    assert "<script" not in page


def test_analyze_draws_scores_and_a_steering(tiny: Path, work: Path, tmp_path: Path):
    five = {**TEXTS, "es": TEXTS["en"][::-1], "sw": TEXTS["fr"][::-1]}
    run("profile", tiny / "base", "--data", write(tmp_path / "t", five), "--out", tmp_path / "p")
    scores = {"fr": 0.9, "de": 0.8, "es": 0.3, "sw": 0.1}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    out = tmp_path / "out"
    result = run(
        "analyze", tmp_path / "p", "--out", out, "--scores", tmp_path / "scores.json",
        "--score-name", "MGSM", "--steering", tiny / "steered",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (out / "steering.svg").exists()
    assert (out / "selected.png").exists()
    found = json.loads((out / "analysis.json").read_text())["correlation"]
    assert (found["score"], found["languages"]) == ("MGSM", 4)
    assert len(found["pearson"]["value"]) == 6
    assert "MGSM" in (out / "index.html").read_text()
    (tmp_path / "scores.json").write_text('{"fr": "high"}')
    said = failed("analyze", tmp_path / "p", "--out", out, "--scores", tmp_path / "scores.json")
    assert "the score of fr is 'high', no number" in said


def test_names_are_escaped_on_the_page(work: Path, tmp_path: Path):
    (tmp_path / "names.json").write_text('{"fr": "<b>&"}')
    labels = ("--labels", tmp_path / "names.json")
    run("analyze", work / "p-general", "--out", tmp_path, "--layers", "1-3", *labels)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page


def test_analyze_of_one_language_and_of_nothing(work: Path, tmp_path: Path):
    assert "at least one language" in failed("analyze", work / "p-task", "--out", tmp_path)
    assert "sw not in the profile" in failed(
        "analyze", work / "p-general", "--out", tmp_path, "--pivot", "sw"
    )
    assert "profile.json cannot be read" in failed("analyze", tmp_path, "--out", tmp_path)


def test_select_writes_what_the_library_selects(tiny: Path, work: Path, tmp_path: Path):
    options = ("--layers", "1-4", "--set", "threshold=0.2", "--set", "mode=hard")
    arguments = ("select", "task_experts", work / "p-task", work / "p-general", *options)
    result = run(*arguments, "--out", tmp_path / "s", "--strength", 0.5)
    assert result.exit_code == 0, result.output
    task, general = (RoutingProfile.load(work / p) for p in ("p-task", "p-general"))
    expected = task_experts(task, general, threshold=0.2, mode="hard", layers=range(1, 5))
    assert RouterSteering.load(tmp_path / "s") == expected
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["steerings"][0]["profile_sha256"] == [task.fingerprint, general.fingerprint]
    assert config["base_model_type"] == "qwen3_moe"
    model = SteeredMoEForCausalLM.from_pretrained(tmp_path / "s", strength=1.0)
    assert model.steering == expected
    assert "task_experts" in (tmp_path / "s" / "README.md").read_text()
    other = task_experts(task, general, threshold=0.1, mode="hard", layers=range(1, 5))
    assert RouterSteering.load(tmp_path / "s").fingerprint != other.fingerprint


def test_select_by_languages_and_a_random_control(tiny: Path, work: Path, tmp_path: Path):
    run(
        "select", "shared_experts", work / "p-general", "--out", tmp_path / "s", "--layers", "all",
        "--set", "languages=en,fr", "--set", "top=4",
    )  # fmt: skip
    profile = RoutingProfile.load(work / "p-general")
    shared = shared_experts(profile, ["en", "fr"], top=4, layers=profile.layers)
    assert RouterSteering.load(tmp_path / "s") == shared
    run("select", "random", tmp_path / "s", "--out", tmp_path / "r", "--set", "seed=3")
    control = RouterSteering.load(tmp_path / "r")
    assert control == random_experts(shared, seed=3)
    assert control.fingerprint != random_experts(shared, seed=4).fingerprint
    assert SteeredMoEForCausalLM.from_pretrained(tmp_path / "r").steering == control


def test_a_preset_sets_method_layers_threshold_and_strength(work: Path, tmp_path: Path):
    """The tiny model has 6 layers, so the layers of the paper's 32 do not fit; others are given."""
    arguments = ("select", "phi-3.5-moe-mgsm", work / "p-task", work / "p-general")
    said = failed(*arguments, "--out", tmp_path / "s")
    assert "layers are 7-16; the last one profiled is 5" in said
    result = run(*arguments, "--out", tmp_path / "s", "--layers", "1-4", "--set", "threshold=0.2")
    assert result.exit_code == 0, result.output
    entry = json.loads((tmp_path / "s" / "config.json").read_text())["steerings"][0]
    assert entry["strength"] == 0.5
    assert entry["parameters"] == {
        "threshold": 0.2,
        "mode": "soft",
        "layers": "1-4",
        "preset": "phi-3.5-moe-mgsm",
        "preset_source": "arXiv 2510.04694",
    }


@pytest.mark.parametrize(
    ("method", "sources", "options", "says"),
    [
        ("best", ["p-task"], (), "no method or preset 'best'; there are task_experts"),
        ("task_experts", ["p-task"], (), "works on 2 folders (task, general), not 1"),
        ("task_experts", ["p-task", "p-general"], ("--set", "treshold=1"), "no such setting"),
        ("task_experts", ["p-task", "p-general"], ("--set", "threshold=2"), "must lie in [0, 1)"),
        ("task_experts", ["p-task", "p-general"], (), "missing a required"),
        ("shared_experts", ["p-general"], ("--set", "top=99"), "top is 99; it must lie between 1"),
        ("shared_experts", ["p-task"], ("--set", "top=4"), "zh not in the profile"),
        ("preferred", ["p-general"], ("--set", "target=sw"), "sw not in the profile"),
        ("preferred", ["p-general"], ("--layers", "4-2"), "write first-last"),
    ],
)
def test_what_select_refuses(work: Path, tmp_path: Path, method, sources, options, says: str):
    paths = [work / source for source in sources]
    layers = () if "--layers" in options else ("--layers", "1-4")
    said = failed("select", method, *paths, "--out", tmp_path / "s", *layers, *options)
    assert says in said
    assert not (tmp_path / "s").exists()


def test_the_middle_is_proposed_or_has_to_be_named(work: Path, tmp_path: Path):
    """Routing of two languages that is apart in the layers given, and the same elsewhere."""

    def profile(apart: list[int], folder: Path) -> Path:
        counts = torch.zeros(2, 6, 16)
        counts[:, :, :4] = 10
        counts[1, apart] = counts[0, apart].roll(8, dims=-1)
        about = RoutingProfile.load(work / "p-general").about
        RoutingProfile(
            ("en", "sw"), tuple(range(6)), counts, torch.full((2, 6), 10.0), about=about
        ).save(folder)
        return folder

    options = ("--set", "languages=en,sw", "--set", "top=4", "--out", tmp_path / "s")
    result = run("select", "shared_experts", profile([0, 5], tmp_path / "u"), *options)
    assert result.exit_code == 0, result.output
    assert "in layers 1-4" in result.output
    assert RouterSteering.load(tmp_path / "s").layers.tolist() == [1, 2, 3, 4]
    said = failed("select", "shared_experts", profile([4, 5], tmp_path / "slope"), *options)
    assert "not U-shaped, so choose the layers yourself: give --layers first-last" in said


def test_a_profile_of_another_model_is_refused(work: Path, tmp_path: Path, tiny: Path):
    config = AutoConfig.from_pretrained(tiny / "base", num_experts=8)
    other = tmp_path / "other"
    config.save_pretrained(other)
    arguments = ("select", "shared_experts", work / "p-general", "--out", tmp_path / "s")
    options = ("--layers", "1-4", "--set", "languages=en,fr", "--set", "top=4")
    said = failed(*arguments, *options, "--base-model", other)
    assert "16 experts" in said
    assert run(*arguments, *options, "--base-model", tiny / "base").exit_code == 0


def test_ranges_of_layers():
    assert layer_range("8-34") == (8, 34)
    assert set(METHODS) >= {"task_experts", "shared_experts", "random"}
