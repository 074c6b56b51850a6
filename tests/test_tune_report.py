"""What a search reports, what belongs to one run and no other, and what a model is asked."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpus import problems, sentences
from grammar import Language
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from steered_moe import RouterSteering, find_routers
from steered_moe.answering import log_likelihoods
from steered_moe.cli import app
from steered_moe.collection import profile_texts
from steered_moe.controls import BASE, System
from steered_moe.embedded import embedded_model
from steered_moe.errors import FormatError
from steered_moe.evaluation import Evaluation, Settings
from steered_moe.records import RECORDS_FILE, RUN_FILE
from steered_moe.results import read_results, write_results
from steered_moe.tasks import task
from steered_moe.tuning import Candidate, Trial, _rank, halve, pareto

EXAMPLE = Path(embedded_model()).parent


@pytest.fixture(scope="module")
def loaded():
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "base", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(EXAMPLE / "base")


def bans(first: int = 0) -> RouterSteering:
    """Sixteen of 24 experts in the middle are out of use: no answer is right any more."""
    force = torch.zeros(4, 24)
    force[:, first : first + 16] = -1
    return RouterSteering("bans", torch.arange(2, 6), torch.zeros(4, 24), force)


def evaluation(loaded, *others: System, languages=("es",), **settings) -> Evaluation:
    made = [System(BASE), *others]
    given = Settings(**{"limit": 1, **settings})
    return Evaluation(*loaded, [task("embedded")], languages, made, given)


@pytest.fixture(scope="module")
def searched(loaded, tmp_path_factory) -> tuple[list[str], Path]:
    """A search of two rounds: its command and its folder."""
    folder = tmp_path_factory.mktemp("searched")
    texts = list(sentences("dev", 12, seed=3))
    general = {code: [one.text(Language(code)) for one in texts] for code in ("en", "es")}
    english = Language("en")
    solved = [one.prompt(english) + one.solution for one in problems("dev", 12, seed=5)]
    profile_texts(*loaded, {"en": solved}).save(folder / "task")
    profile_texts(*loaded, general, keep_sequences=True).save(folder / "general")
    out = folder / "search"
    command = [
        "tune", "embedded", str(folder / "task"), str(folder / "general"), "--out", str(out),
        "--tasks", "embedded", "--languages", "en,es", "--items", "2", "--rounds", "2",
        "--test-items", "3", "--strengths", "1", "--controls", "0",
        "--methods", "shared_experts", "--dtype", "float32",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return command, out


def ids(records: Path) -> set[str]:
    return {json.loads(line)["id"] for line in records.open()}


def test_the_report_is_of_the_test_split(searched):
    _, out = searched
    assert json.loads((out / "test" / RUN_FILE).read_text())["settings"]["part"] == "test"
    asked = {item.id for item in task("embedded").items("es", None, 3, "test")}
    assert ids(out / "test" / RECORDS_FILE) == asked
    assert not asked & ids(out / "round-1" / RECORDS_FILE)


def test_the_best_of_the_last_round_is_reported(searched):
    """The last round is as if the second of the first one had answered all and others nothing."""
    command, out = searched
    rounds = json.loads((out / "search.json").read_text())["rounds"]
    second = rounds[0][1]
    name = f"{second['fingerprint'][:12]}-{second['strength']:g}"
    path = out / "round-1" / RECORDS_FILE
    rows = [json.loads(line) for line in path.open()]
    assert name in {row["system"] for row in rows}
    for row in rows:
        row["score"] = float(row["language"] == "en" or row["system"] == name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(out / "test")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    first, last = json.loads((out / "search.json").read_text())["rounds"]
    assert (first, last[0]["gain"], last[0]["english"]) == (rounds[0], 100, 0)
    assert first[0]["fingerprint"] != second["fingerprint"] == last[0]["fingerprint"]
    assert RouterSteering.load(out / "steering").fingerprint == second["fingerprint"]
    assert "no setting keeps within" not in done.output
    [_, ran] = json.loads((out / "test" / RUN_FILE).read_text())["systems"]
    assert ran["fingerprint"] == second["fingerprint"]


def test_english_is_no_part_of_the_gain(loaded, tmp_path):
    """Swahili is its weakest language, so it has less to lose."""
    tried = Candidate(bans(), 1.0)
    run = evaluation(loaded, languages=("en", "sw"))
    [[trial]] = halve(run, [tried], tmp_path, items=8, rounds=1)
    rows = [json.loads(line) for line in (tmp_path / "round-0" / RECORDS_FILE).open()]

    def points(language: str) -> float:
        mine = [row for row in rows if row["language"] == language]
        return sum((-1) ** (row["system"] == BASE) * 100 * row["score"] for row in mine) / 8

    assert points("en") < points("sw") - 10
    assert (trial.gain, trial.english) == pytest.approx((points("sw"), points("en")))


def trials(*gains: tuple[float, float]) -> list[Trial]:
    return [Trial(Candidate(bans(), 1.0), 8, gain, english) for gain, english in gains]


def test_harm_that_is_allowed_does_not_move_a_setting():
    some = trials((1.0, 0.2), (3.0, -1.5), (2.0, -0.5), (2.5, -1.0))
    ranked = sorted(some, key=lambda one: _rank(one, 1.0))
    assert [one.gain for one in ranked] == [2.5, 2.0, 1.0, 3.0]


def test_the_worse_of_two_that_are_equal_in_one_way_is_not_on_the_front():
    better, same_english, same_gain, twin = some = trials((2, 0), (1, 0), (2, -1), (2, 0))
    assert pareto(some) == [better, twin]
    assert pareto([same_english, same_gain]) == [same_english, same_gain]


def test_another_steering_or_strength_of_the_same_name_is_another_run(loaded, tmp_path):
    evaluation(loaded, System("bans", bans(), 1.0)).run(tmp_path)
    for steering, strength in ((bans(first=8), 1.0), (bans(), 0.5)):
        with pytest.raises(FormatError, match="holds a run with systems="):
            evaluation(loaded, System("bans", steering, strength)).run(tmp_path)
    evaluation(loaded, System("bans", bans(), 1.0)).run(tmp_path)


def test_another_dtype_is_another_run(loaded, tmp_path):
    """Also of a model that keeps its routers, whose bits the hash of the model has, in float32."""
    evaluation(loaded).run(tmp_path)
    model = copy.deepcopy(loaded[0]).bfloat16()
    for low, whole in zip(find_routers(model), find_routers(loaded[0]), strict=True):
        low.module.load_state_dict(whole.module.state_dict(), assign=True)
    with pytest.raises(FormatError, match="holds a run with dtype='float32', not 'bfloat16'"):
        evaluation((model, loaded[1])).run(tmp_path)


def test_a_model_thinks_only_where_it_was_asked_to(loaded, tmp_path):
    """The template puts another question where it may think."""
    model, tokenizer = loaded
    thinker = copy.deepcopy(tokenizer)
    other = "{{ bos_token }}{{ 'Tom tiene 42 sellos.\n' }}"
    thinker.chat_template = (
        f"{{% if enable_thinking %}}{other}{{% else %}}{tokenizer.chat_template}{{% endif %}}"
    )

    def said(name: str, tokenizer, **settings) -> list[str]:
        run = evaluation((model, tokenizer), limit=3, **settings)
        return [row["answer"] for row in run.run(tmp_path / name).read()]

    plain = said("plain", tokenizer)
    assert said("quiet", thinker) == plain
    assert len(set(plain)) > len(set(said("thinks", thinker, thinking=True))) == 1


def test_log_likelihoods_of_a_bfloat16_model_are_summed_in_float32(loaded):
    """Against float64 of the very logits that the model gave."""
    model, tokenizer = copy.deepcopy(loaded[0]).bfloat16(), loaded[1]
    context, text = "Tom tiene 42 sellos.", " Tom encuentra 6 sellos más."
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    [found] = log_likelihoods(model, tokenizer, [(context, text)])
    [logits] = seen
    before, ids = tokenizer.encode(context), tokenizer.encode(context + text)
    targets = torch.tensor(ids[len(before) :])
    exact = nn.functional.log_softmax(logits[0, -len(targets) :].double(), dim=-1)
    assert logits.dtype == torch.bfloat16
    assert found == pytest.approx(float(exact[range(len(targets)), targets].sum()), abs=1e-4)


def test_a_result_that_is_measured_again_takes_the_place_of_the_earlier(tmp_path):
    repo = tmp_path / "example" / "methods"
    shutil.copytree(EXAMPLE / "methods", repo)
    (repo / "evaluation.json").unlink()
    (repo.parent / "base").symlink_to((EXAMPLE / "base").resolve())
    command = [
        "evaluate", str(repo), "--tasks", "embedded", "--languages", "es", "--limit", "2",
        "--steering", "shared", "--controls", "0", "--dtype", "float32", "--record",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert CliRunner().invoke(app, command).exit_code == 0
    [first] = read_results(repo)
    write_results([replace(first, base=0.125, steered=0.125)], repo)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert read_results(repo) == [first]
