"""The command line, run as a person would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from steered_moe import SteeredMoEForCausalLM
from steered_moe.cli import app

PROMPT = "Un routeur envoie"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100"})


def test_inspect_shows_base_layers_and_picture(tiny: Path):
    result = run("inspect", tiny / "steered")
    assert result.exit_code == 0
    for text in ("qwen3_moe", "2510.04694 Eq. 4", "8 in 2 layers", "   2 |@@@@            |"):
        assert text in result.output


def test_inspect_of_the_real_steering():
    folder = Path(__file__).parent.parent / "examples" / "qwen3-30b-a3b-english-shared"
    result = run("inspect", folder)
    assert "Qwen/Qwen3-30B-A3B" in result.output
    assert "420 in 30 layers" in result.output


def test_generate_prints_what_the_model_generates(tiny: Path):
    model = SteeredMoEForCausalLM.from_pretrained(tiny / "steered", strength=-2.0)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    options = ("--max-new-tokens", 6, "--dtype", "float32")
    result = run("generate", tiny / "steered", PROMPT, "--strength", -2.0, *options)
    assert expected.strip() in result.output
    assert expected.strip() not in run("generate", tiny / "steered", PROMPT, *options).output


def test_compare_shows_both_texts_and_changed_choices(tiny: Path):
    result = run("compare", tiny / "steered", PROMPT, "--max-new-tokens", 4)
    assert result.exit_code == 0
    assert "steered, strength 2.0" in result.output
    rows = [line for line in result.output.splitlines() if "%" in line]
    assert len(rows) == 6
    assert [("yes" in row) for row in rows] == [False, False, True, True, False, False]
    assert "0.0%" in rows[0]
    assert "█" in rows[2]
    off = run("compare", tiny / "steered", PROMPT, "--max-new-tokens", 4, "--strength", 0)
    assert "█" not in off.output


def test_the_base_can_be_replaced_and_errors_are_one_line(tiny: Path, tmp_path: Path):
    same = run("generate", tiny / "steered", PROMPT, "--base-model", tiny / "base")
    assert same.exit_code == 0
    wrong = run("inspect", tmp_path)
    assert wrong.exit_code == 1
    assert "FormatError" in wrong.stderr
    assert "config.json is missing" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    assert "Traceback" not in wrong.output


def test_the_command_is_installed(tiny: Path):
    command = Path(sys.executable).parent / "steered-moe"
    if not command.exists():
        pytest.fail("the package was installed without its command")
    shown = subprocess.run(
        [command, "inspect", tiny / "steered"], capture_output=True, text=True, env=os.environ
    )
    assert shown.returncode == 0, shown.stderr
    assert "steering middle" in shown.stdout


def test_compare_takes_the_lines_of_a_file(tiny: Path, tmp_path: Path):
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"{PROMPT}\n\nA router sends\n", encoding="utf-8")
    result = run("compare", tiny / "steered", "--file", lines, "--max-new-tokens", 2)
    assert result.exit_code == 0
    assert result.output.count("steered, strength 2.0") == 2
    assert "A router sends" in result.output
    nothing = run("compare", tiny / "steered")
    assert nothing.exit_code == 1
    assert "no prompt" in nothing.output
