"""``steered-moe evaluate``: each steering of a repo with its controls, into its card."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from steered_moe.cli import app
from steered_moe.embedded import embedded_model
from steered_moe.results import MEAN, Result, read_results
from steered_moe.storage import read_repo
from steered_moe.tasks import task

EXAMPLE = Path(embedded_model()).parent
METHODS = ("task-soft", "shared", "task-hard")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repo of three steerings without results."""
    folder = tmp_path / "example" / "methods"
    shutil.copytree(EXAMPLE / "methods", folder)
    (folder / "evaluation.json").unlink(missing_ok=True)
    (tmp_path / "example" / "base").symlink_to((EXAMPLE / "base").resolve())
    return folder


def evaluate(repo: Path, out: Path, *more: str):
    asked = ["--tasks", "embedded", "--languages", "en,es,sw", "--limit", "5", "--dtype", "float32"]
    return CliRunner().invoke(app, ["evaluate", str(repo), *asked, "--out", str(out), *more])


def test_methods_and_controls_are_measured_and_recorded(repo: Path, tmp_path: Path):
    out = tmp_path / "run"
    done = evaluate(repo, out, "--controls", "2", "--plot", str(tmp_path / "a.svg"), "--record")
    assert done.exit_code == 0, done.output
    own = {one.name: one for one in read_repo(repo).steerings}
    assert tuple(own) == METHODS
    results = read_results(repo)
    assert {(one.steering, one.fingerprint) for one in results} == {
        (name, own[name].fingerprint) for name in METHODS
    }
    assert all({*one.controls} == {"random-0", "random-1", "outside-middle"} for one in results)
    systems = json.loads((out / "run.json").read_text())["systems"]
    ran = {one["name"]: one.get("fingerprint") for one in systems}
    assert len(ran) == 1 + 3 * 4
    strengths = {one["name"]: one.get("strength") for one in systems}
    own_strengths = dict(zip(METHODS, read_repo(repo).strengths, strict=True))
    assert own_strengths["shared"] == pytest.approx(0.1)
    for name, strength in strengths.items():  # a control is as strong as what it controls for
        assert strength == pytest.approx(own_strengths.get(name.partition("/")[0]))
    assert len(set(ran.values())) >= 12  # soft and hard ones differ though their expert is the same
    card = (repo / "README.md").read_text()
    assert all(name in card for name in METHODS)
    assert (tmp_path / "a.svg").is_file()
    lines = json.loads((out / "results.json").read_text())
    by_key = {(line["system"], line["language"]): line for line in lines}
    for one in results:
        line = by_key[one.steering, one.language]
        assert (one.base, one.steered, one.items) == (line["base"], line["score"], 5)
        for name, gain in one.controls.items():
            control = by_key[f"{one.steering}/{name}", one.language]["gain"]
            assert gain.mean == pytest.approx(control["mean"])


def test_the_stored_table_is_whole_and_the_readme_shows_its_means():
    results = read_results(EXAMPLE / "methods")
    own = {one.name: one.fingerprint for one in read_repo(EXAMPLE / "methods").steerings}
    languages = {*task("embedded").languages, f"{MEAN} 11 languages"}
    assert {(one.steering, one.fingerprint, one.language) for one in results} == {
        (name, own[name], language) for name in METHODS for language in languages
    }
    assert all(one.items == 1000 and len(one.controls) == 4 for one in results)
    shown = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    means = [one for one in results if one.language.startswith(MEAN)]
    assert [line for line in shown if line.startswith("| `task-") or "| `shared`" in line] == [
        row(one) for one in means
    ]
    assert row(replace(means[0], steered=means[0].base)) not in shown


def row(one: Result) -> str:
    """A row of the table in the README."""
    random = [f"{gain.mean:+.2f}" for name, gain in one.controls.items() if "random" in name]
    scores = f"{100 * one.base:.2f} | {100 * one.steered:.2f} | {one.gain}"
    outside = one.controls["outside-middle"]
    return f"| `{one.steering}` | {scores} | {', '.join(random)} | {outside} |"


def test_one_of_them_can_be_chosen(repo: Path, tmp_path: Path):
    done = evaluate(repo, tmp_path / "run", "--controls", "0", "--steering", "shared")
    assert done.exit_code == 0, done.output
    lines = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {line["system"] for line in lines} == {"shared"}
    assert not read_results(repo)
    wrong = evaluate(repo, tmp_path / "other", "--steering", "nothing")
    assert wrong.exit_code == 1
    assert "task-soft" in wrong.output


def test_what_is_no_test_result_of_the_recorded_base_is_not_recorded(repo: Path, tmp_path: Path):
    for more in (
        ["--part", "dev"], ["--base-model", str(repo)], ["--load-in-4bit"], ["--thinking"],
        ["--temperature", "1"], ["--no-chat"],
    ):  # fmt: skip
        done = evaluate(repo, tmp_path / "run", "--record", *more)
        assert done.exit_code == 1
        assert "--record is for greedy answers to the test part" in done.output
    assert not read_results(repo)
    done = evaluate(repo, tmp_path / "run", "--top-p", "0.3")
    assert "--top-p 0.3 needs a --temperature above 0" in done.output


def test_more_items_are_not_replaced_by_fewer_and_means_that_are_stale_go(
    repo: Path, tmp_path: Path
):
    more = ["--controls", "0", "--steering", "shared", "--record"]
    assert evaluate(repo, tmp_path / "first", *more).exit_code == 0
    first = {one.language: one for one in read_results(repo)}
    assert set(first) == {"en", "es", "sw", f"{MEAN} 2 languages"}
    assert first["es"].settings["versions"].keys() >= {"steered_moe", "transformers"}
    assert first["es"].settings["settings"]["batch_size"] == 16
    asked = ["--tasks", "embedded", "--dtype", "float32", *more]

    def again(limit: int, languages: str) -> str:
        out = tmp_path / f"{limit}-{languages}"
        given = ["--languages", languages, "--limit", str(limit), "--out", str(out)]
        return CliRunner().invoke(app, ["evaluate", str(repo), *asked, *given]).output

    assert "5 items of embedded in es; a --limit of 4 would replace that by less" in again(4, "es")
    assert {one.language: one for one in read_results(repo)} == first
    assert "written into" in again(6, "es")
    found = {one.language: one.items for one in read_results(repo)}
    assert found == {"en": 5, "sw": 5, "es": 6}


def test_a_figure_in_no_folder_is_refused_before_the_run(repo: Path, tmp_path: Path):
    done = evaluate(repo, tmp_path / "run", "--plot", str(tmp_path / "none" / "a.svg"))
    assert "is in no folder that exists" in done.output
    assert not (tmp_path / "run").exists()
