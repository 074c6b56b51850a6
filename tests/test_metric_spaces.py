"""The folders of the metrics: loaded by ``evaluate``, their cases, front matter, and their apps."""

from __future__ import annotations

import copy
import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio
import pytest
from conftest import ROOT
from huggingface_hub import SpaceCard, metadata_load
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from test_space import COLORS, LICENSES, LONGEST, demo_gradio, is_emoji, project, satisfies

with pytest.MonkeyPatch.context() as patch:  # among the examples there is another evaluate.py
    patch.setattr(sys, "path", [p for p in sys.path if not p.endswith("tiny_multilingual_moe")])
    evaluate = pytest.importorskip("evaluate", reason="needs steered-moe[evaluation]")
    from steered_moe import metric_app, metrics

FOLDERS = sorted((ROOT / "spaces" / "metrics").iterdir())
FILES = {"README.md", "app.py", "requirements.txt", "tests.py"}
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def cases(folder: Path) -> list[dict[str, Any]]:
    found = runpy.run_path(str(folder / "tests.py"))["test_cases"]
    assert isinstance(found, list)
    return found


def same(found: Any, expected: Any) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(found, expected, abs_tol=1e-9)
    return bool(found == expected)


def passes(metric: Any, case: dict[str, Any]) -> bool:
    arguments = {name: value for name, value in case.items() if name != "result"}
    return same(metric.compute(**arguments), case["result"])


def test_every_metric_has_a_folder():
    names = {name for name, value in vars(metrics).items() if isinstance(value, type)
             and issubclass(value, evaluate.Metric) and not name.startswith("_")}  # fmt: skip
    assert {folder.name.title().replace("_", "") for folder in FOLDERS} == names
    for folder in FOLDERS:
        files = {path.name for path in folder.iterdir()} - {"__pycache__"}
        assert files == FILES | {f"{folder.name}.py"}


@every_folder
def test_evaluate_loads_it_and_its_cases_hold(folder: Path):
    metric = evaluate.load(str(folder))
    assert metric.name == folder.name
    assert len(cases(folder)) > 1
    for case in cases(folder):
        assert passes(metric, case)
        key = next(iter(case["result"]))  # the twin: another result does not pass
        assert not passes(metric, case | {"result": case["result"] | {key: 0.123}})
    swapped = copy.deepcopy(cases(folder)[0])  # the twin: nor does the answer to other questions
    swapped["predictions"] = [swapped["predictions"][-1]] * len(swapped["predictions"])
    assert not passes(metric, swapped)


def wrong(folder: Path) -> list[str]:
    """What is wrong in the front matter: keys that are missing, unknown or have no right value."""
    data = metadata_load(folder / "README.md") or {}
    rules: dict[str, Callable[[Any], bool]] = {
        "title": lambda v: isinstance(v, str) and v.strip() == v != "",
        "emoji": is_emoji,
        "colorFrom": COLORS.__contains__,
        "colorTo": COLORS.__contains__,
        "sdk": lambda v: v == "gradio",
        "sdk_version": lambda v: satisfies(v, demo_gradio().specifier),
        "python_version": lambda v: satisfies(v, SpecifierSet(project()["requires-python"])),
        "app_file": lambda v: isinstance(v, str) and (folder / v).is_file(),
        "pinned": lambda v: v is False,
        "license": lambda v: v in LICENSES and v == project()["license"].lower(),
        "short_description": lambda v: isinstance(v, str) and 0 < len(v) <= LONGEST,
        "tags": lambda v: isinstance(v, list) and v[:2] == ["evaluate", "metric"],
    }
    wrong_values = [name for name in rules if name in data and not rules[name](data[name])]
    return sorted({*(rules.keys() ^ data.keys()), *wrong_values})


@every_folder
def test_the_front_matter_keeps_the_rules(folder: Path):
    assert wrong(folder) == []
    SpaceCard.load(folder / "README.md")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        *[
            ("colorTo: green", "colorTo"),
            ("sdk_version: 6.31.0", "sdk_version"),
            ("- metric", "tags"),
        ],
        *[
            ("app_file: app.py", "app_file"),
            ("sdk: gradio", "sdk"),
            ("license: apache-2.0", "license"),
        ],
    ],
)
def test_each_rule_can_be_broken(line: str, name: str, tmp_path: Path):
    text = (ROOT / "spaces/metrics/mgsm_exact_match/README.md").read_text(encoding="utf-8")
    (tmp_path / "app.py").touch()
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert wrong(tmp_path) == []
    broken = text.replace(f"\n{line}\n", f"\n{line[:-2]}x\n", 1)
    (tmp_path / "README.md").write_text(broken, encoding="utf-8")
    assert wrong(tmp_path) == [name]


@every_folder
def test_requirements_and_imports(folder: Path):
    (required,) = map(Requirement, (folder / "requirements.txt").read_text().splitlines())
    assert (required.name, required.extras) == ("steered-moe", {"evaluation"})
    assert project()["version"] in required.specifier
    lines = (folder / f"{folder.name}.py").read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports == [f"from steered_moe.metrics import {folder.name.title().replace('_', '')}"]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert f'evaluate.load("steered-moe/{folder.name}")' in readme
    assert f'evaluate.load("spaces/metrics/{folder.name}")' in readme


@every_folder
def test_the_app_computes_its_examples_and_says_what_is_wrong(folder: Path, monkeypatch):
    launched: list[Any] = []
    monkeypatch.setattr(gradio.Interface, "launch", lambda app: launched.append(app))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "tests", raising=False)
    runpy.run_path(str(folder / "app.py"), run_name="__main__")
    monkeypatch.delitem(sys.modules, "tests", raising=False)
    (app,) = launched
    for [text], case in zip(app.examples, cases(folder), strict=True):
        assert same(app.fn(text), case["result"])
    for bad in ("{", "[]", '{"predictions": 3}', '{"predictions": ["x"]}', '{"nothing": ["x"]}'):
        with pytest.raises(gradio.Error):
            app.fn(bad)


def test_a_visitor_cannot_ask_for_endless_work():
    asked = {"predictions": [1], "references": [0]}
    with pytest.raises(gradio.Error, match="lists and words"):
        metric_app._computed(metrics.SteeringGain, json.dumps(asked | {"resamples": 10**12}))
    assert metric_app._computed(metrics.SteeringGain, json.dumps(asked))["steering_gain"] == 100


@every_folder
def test_the_example_of_the_readme_returns_what_it_says(folder: Path):
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python")[2].partition("```")[0]
    assert f'"steered-moe/{folder.name}"' in code
    code = code.replace(f'"steered-moe/{folder.name}"', repr(str(folder)))
    scope: dict[str, Any] = {}
    exec(code.replace("metric.compute(", "found = metric.compute("), scope)
    told = re.findall(r"'(\w+)': (-?[\d.]+)", code.rpartition("#")[2])
    assert told
    for name, value in told:
        assert scope["found"][name] == pytest.approx(float(value)), name
