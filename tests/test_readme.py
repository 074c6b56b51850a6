"""Every code block and command of the README is run; what it says is printed is printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from conftest import HUB, ROOT

from steered_moe import RouterSteering
from steered_moe.cli import app

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PAIRS = [(code, BLOCKS[i + 1][1]) for i, (kind, code) in enumerate(BLOCKS) if kind == "python"]
PYTHON = [pair for pair in PAIRS if "OpenAI(" not in pair[0]]
[CLIENT] = [pair for pair in PAIRS if "OpenAI(" in pair[0]]
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]
MAKE = re.findall(r"`(make \w+)`", README)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    base = folder / "examples" / "tiny_multilingual_moe" / "base"
    HUB.commit("user/tiny-moe", {path.name: path.read_bytes() for path in base.iterdir()})
    return folder


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SCRIPTS = [block for kind, block in BLOCKS if kind == "bash" and "pip" not in block]
DEMO, SERVE = "steered-moe demo\n", "steered-moe serve embedded\n"  # run until interrupted
SHARE = next(script for script in SCRIPTS if "steered-moe push" in script)


@pytest.fixture(scope="module")
def shared(checkout: Path) -> None:
    """What the README pushes is on the Hub."""
    for command in SHARE.splitlines():
        assert run(shlex.split(command), checkout).strip(), command
        assert ("user/tiny-steered" in HUB.repos) == ("--dry-run" not in command)


@pytest.mark.parametrize(("code", "output"), PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_print_what_the_readme_says(checkout, shared, code: str, output: str):
    assert run([sys.executable, "-W", "ignore", "-c", code], checkout) == output


def test_what_is_pushed_is_listed_and_pulled(checkout: Path, shared: None):
    assert (checkout / "build" / "pulled" / "steering.safetensors").is_file()
    assert HUB.repos["user/tiny-steered"].named("refs/tags/")


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if script not in (SHARE, DEMO, SERVE)]
)
def test_commands_run_one_after_another(checkout: Path, script: str):
    for command in script.splitlines():
        shown = run(shlex.split(command), checkout)
        assert shown.strip() or command.startswith("python"), command
    if "select task_experts" in script:
        page = (checkout / "build" / "analysis" / "index.html").read_text(encoding="utf-8")
        assert '<img src="divergence.svg"' in page
        steering = RouterSteering.load(checkout / "build" / "steering")
        assert steering.provenance["method"] == "task_experts"


@contextmanager
def running(command: str, folder: Path, mark: str) -> Iterator[str]:
    """The line in which a command says where it runs; it is interrupted afterwards."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        shlex.split(command), cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield next(line for line in process.stdout if mark in line)
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (0, 130)  # 130 is what shells give for an interrupt


def test_the_demo_starts_and_stops(checkout: Path):
    assert DEMO in SCRIPTS
    with (
        running(DEMO, checkout, "Running on") as told,
        urllib.request.urlopen(told.split()[-1]) as page,
    ):
        assert b"steered-moe" in page.read()


def test_the_server_answers_a_client_with_what_the_readme_says(checkout: Path):
    assert SERVE in SCRIPTS
    code, output = CLIENT
    with running(SERVE, checkout, "Uvicorn running on http://127.0.0.1:8000"):
        assert run([sys.executable, "-c", code], checkout) == output


def test_every_block_and_command_is_covered():
    others = [c for c in COMMANDS if not c.startswith(("steered-moe", "python examples"))]
    assert others == ["pip install -e ."]  # what `make demo` and `make test` do as well
    assert len(SCRIPTS) == 7
    assert {kind for kind, _ in BLOCKS} == {"python", "text", "bash"}
    assert len(PYTHON) == 5
    assert set(MAKE) == {"make demo", "make test", "make engines"}


def test_commands_that_take_too_long_or_need_other_models_are_at_least_understood():
    """Those that are indented; their options are there, with values of the right kind."""
    commands = typer.main.get_command(app).commands
    named = re.findall(r"^ {4,6}steered-moe (.+)$", README, flags=re.MULTILINE)
    assert {line.split()[0] for line in named} == {"evaluate", "bake", "export"}
    for line in named:
        name, *arguments = shlex.split(line)
        commands[name].make_context(name, arguments)
        with pytest.raises(Exception, match="No such option: --nonsense"):
            commands[name].make_context(name, [*arguments, "--nonsense"])


def test_make_demo_shows_base_and_steered_answers(tmp_path: Path):
    ready = f"{sys.prefix}/.installed"
    shown = run(["make", "demo", f"VENV={sys.prefix}", "-o", ready], ROOT)
    assert shown.count("steered, strength") == 6
    assert shown.count("42/2=21, 21+6=27") >= 4  # English and one more, base and steered
    assert "routing choices changed" in shown
    assert "task_experts" in shown
    other = tmp_path / "questions.txt"
    other.write_text("Tom has 12 apples. Tom buys 5 more. How many apples does Tom have now?")
    shown = run(["make", "demo", f"VENV={sys.prefix}", "-o", ready, f"QUESTIONS={other}"], ROOT)
    assert shown.count("12+5=17") == 2


def test_make_test_installs_checks_and_tests_in_an_environment_of_its_own(tmp_path: Path):
    plan = run(["make", "--dry-run", "test", f"VENV={tmp_path}/new"], ROOT)
    for step in ("-m venv", 'pip install --quiet --editable ".[test]"', "mypy", "-m pytest"):
        assert f"{tmp_path}/new" in next(line for line in plan.splitlines() if step in line)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    plan = run(["make", "--dry-run", "engines", f"ENGINES={tmp_path}/new"], ROOT)
    assert f"{tmp_path}/new/bin/python -m pytest tests/engines" in plan
