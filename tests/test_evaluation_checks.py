"""What would make an evaluation say something else than it seems to: refused, or said."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe.answering import changes_of_greedy, log_likelihoods
from steered_moe.controls import BASE, System
from steered_moe.embedded import embedded_model
from steered_moe.errors import FormatError, SteeredMoEError
from steered_moe.evaluate_command import record_in
from steered_moe.evaluation import Evaluation, Settings
from steered_moe.results import Interval, Result, read_results
from steered_moe.storage import read_repo
from steered_moe.summary import summarise
from steered_moe.tasks import task

EMBEDDED = Path(embedded_model())
TEXT = {"task": "perplexity", "language": "sw", "seed": 0, "batch": 0, "of": 2}


@pytest.fixture(scope="module")
def loaded():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED.parent / "base", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(EMBEDDED.parent / "base")


def evaluation(loaded, **settings) -> Evaluation:
    given = Settings(**{"limit": 2, **settings})
    return Evaluation(*loaded, [task("embedded")], ["sw"], [System(BASE)], given)


def test_bits_per_byte_are_those_of_all_texts_over_all_their_bytes():
    bits = {BASE: {"0": 90.0, "1": 30.0}, "steered": {"0": 89.0, "1": 31.0}}
    sizes = {"0": 100, "1": 20}
    rows = [
        {**TEXT, "system": system, "id": name, "bytes": sizes[name],
         "log_likelihood": -value * math.log(2)}
        for system, values in bits.items() for name, value in values.items()
    ]  # fmt: skip
    (line,) = summarise(rows)
    assert line.base == pytest.approx(-(90 + 30) / (100 + 20))
    assert line.base != pytest.approx(-(90 / 100 + 30 / 20) / 2)  # a mean of the texts' own
    assert line.gain.mean == pytest.approx(0)
    alone = summarise([row for row in rows if row["id"] == "0"])[0]
    assert alone.gain.mean == pytest.approx(1000 / 100)  # thousandths of a bit


def test_thinking_that_no_template_knows_is_refused(loaded, tmp_path):
    with pytest.raises(SteeredMoEError, match="no task here uses a chat template that has"):
        evaluation(loaded, thinking=True).run(tmp_path / "a")
    model, tokenizer = loaded
    knows = copy.deepcopy(tokenizer)
    knows.chat_template += "{% if enable_thinking %}<think>{% endif %}"
    said = {
        thinking: evaluation((model, knows), thinking=thinking).run(tmp_path / str(thinking)).read()
        for thinking in (False, True)
    }
    assert said[False] != said[True]
    with pytest.raises(SteeredMoEError, match="no task here"):
        evaluation((model, knows), thinking=True, chat=False).run(tmp_path / "b")


def test_a_model_in_training_mode_and_no_task_are_refused(loaded, tmp_path):
    with pytest.raises(SteeredMoEError, match="there is no task"):
        replace(evaluation(loaded), tasks=[]).run(tmp_path)
    loaded[0].train()
    try:
        with pytest.raises(SteeredMoEError, match=r"call model\.eval"):
            evaluation(loaded).run(tmp_path)
    finally:
        loaded[0].eval()
    evaluation(loaded).run(tmp_path)


def test_a_penalty_of_the_generation_config_is_said(loaded, tmp_path, caplog, monkeypatch):
    first = evaluation(loaded, limit=20).run(tmp_path / "a").read()
    assert not changes_of_greedy(loaded[0])
    assert "generation config" not in caplog.text
    monkeypatch.setattr(loaded[0].generation_config, "repetition_penalty", 2.5)
    second = evaluation(loaded, limit=20).run(tmp_path / "b").read()
    assert "answers follow the generation config: repetition_penalty 2.5" in caplog.text
    assert [row["answer"] for row in first] != [row["answer"] for row in second]


def test_chats_without_a_template_are_refused(loaded):
    bare = copy.deepcopy(loaded[1])
    bare.chat_template = None
    with pytest.raises(FormatError, match="has no chat template"):
        log_likelihoods(loaded[0], bare, [("Which?", " A")], chat=True)


def test_results_of_another_strength_stay_beside_each_other(tmp_path):
    repo = read_repo(EMBEDDED)
    repo.write(tmp_path)
    own = repo.steerings[0]

    def result(strength: float, steered: float) -> Result:
        gain = Interval(100 * (steered - 0.5), -90, 90)
        return Result(own.name, own.fingerprint, strength, "embedded", "sw", "exact_match", 10,
                      0.5, steered, gain)  # fmt: skip

    record_in(tmp_path, [result(1.0, 0.6)])
    record_in(tmp_path, [result(2.0, 0.7)])
    assert [(one.strength, one.steered) for one in read_results(tmp_path)] == [(1, 0.6), (2, 0.7)]
    record_in(tmp_path, [result(1.0, 0.4)])
    found = [(one.strength, one.steered) for one in read_results(tmp_path)]
    assert sorted(found) == [(1, 0.4), (2, 0.7)]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "at strength 1" in card
    assert "at strength 2" in card
