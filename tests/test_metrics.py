"""The metrics of ``evaluate``: values by hand and by lm-eval's rules, refusals, and no network."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from steered_moe.errors import SteeredMoEError
from steered_moe.statistics import mcnemar, paired_gain, sign_flips

with pytest.MonkeyPatch.context() as patch:  # among the examples there is another evaluate.py
    patch.setattr(sys, "path", [p for p in sys.path if not p.endswith("tiny_multilingual_moe")])
    pytest.importorskip("evaluate", reason="needs steered-moe[evaluation]")
    from steered_moe.metrics import (
        LanguageConsistency,
        MgsmExactMatch,
        MultipleChoiceAccuracy,
        RoutingDivergence,
        SteeringGain,
    )

TABLE = json.loads((ROOT / "tests" / "answers.json").read_text(encoding="utf-8"))
ANSWERS = [(text, right or "7") for rows in TABLE.values() for text, right in rows]


def computed(
    metric: type[Any], predictions: Any, references: Any, **options: Any
) -> dict[str, Any]:
    result = metric().compute(predictions=predictions, references=references, **options)
    assert isinstance(result, dict)
    return result


def test_numbers_are_compared_by_value():
    texts, right = ["উত্তর: ১৮", "$18.00", "She has 17."], ["18"] * 3
    assert computed(MgsmExactMatch, texts, right) == {"exact_match": 2 / 3}
    assert computed(MgsmExactMatch, texts, ["17"] * 3) == {"exact_match": 1 / 3}


def lm_eval(text: str, right: str) -> bool:
    """The filter and the metric of mgsm_direct_* in lm-eval 0.4.13, as their YAML has them."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    last = next(part for part in found[-1] if part).strip() if found else "[invalid]"
    first, second = (
        "".join(c for c in side.lower() if c not in string.punctuation) for side in (last, right)
    )
    return first == second


def test_flexible_extract_scores_as_lm_eval_does():
    ours, differ = [], 0
    for text, right in ANSWERS:
        one = computed(MgsmExactMatch, [text], [right], extraction="flexible-extract")
        ours.append(one["exact_match"])
        differ += one != computed(MgsmExactMatch, [text], [right])
    assert ours == [lm_eval(text, right) for text, right in ANSWERS]
    assert differ > 30  # the twin: the default reads what lm-eval does not
    assert 30 < sum(ours) < len(ours) - 30


def test_choices_are_those_of_argmax_and_length_counts_characters():
    generator = np.random.default_rng(0)
    texts = [["a" * int(n) for n in row] for row in generator.integers(1, 9, (300, 4))]
    values = generator.integers(-20, 0, (300, 4)).astype(float)  # with ties
    right = generator.integers(0, 4, 300)
    lengths = np.array([[len(text) for text in row] for row in texts])
    found = computed(MultipleChoiceAccuracy, values, right, choices=texts)
    assert found["acc"] == np.mean(values.argmax(1) == right)
    assert found["acc_norm"] == np.mean((values / lengths).argmax(1) == right) != found["acc"]
    last = 3 - values[:, ::-1].argmax(1)
    assert found["acc"] != np.mean(last == right)  # the twin: ties go to the first
    assert computed(MultipleChoiceAccuracy, values.tolist(), right) == {"acc": found["acc"]}
    uneven = computed(MultipleChoiceAccuracy, [[-1.0, -2.0], [-3.0, -2.0, -1.0]], [0, 2])
    assert uneven == {"acc": 1.0}
    thai = computed(MultipleChoiceAccuracy, [[-2.0, -1.8]], [1], choices=[["ทท", "ab"]])
    assert thai["acc_norm"] == 1  # characters: with six bytes the first would have -2 / 6


def test_divergence_by_hand():
    p, q = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]
    h = [-sum(x * math.log(x) for x in row) for row in (p, q)]
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    jsd = -sum(x * math.log(x) for x in middle) - sum(h) / 2
    found = computed(RoutingDivergence, [p, p], [q, p])
    assert found["by_row"] == pytest.approx([jsd / (math.log(3) - sum(h) / 2), 0])
    assert found["by_row"][0] != pytest.approx(jsd / math.log(2), rel=0.05)  # the plain one
    assert found["routing_divergence"] == pytest.approx(sum(found["by_row"]) / 2)
    tensors = computed(RoutingDivergence, torch.tensor([p]), torch.tensor([q]))
    assert tensors["by_row"] == pytest.approx(found["by_row"][:1], rel=1e-5)


def test_consistency_has_not_the_faults_of_the_released_code():
    """2601.14050 compares zh with zh-cn, and calls a text with a word of English inconsistent."""
    chinese, mixed = "她每天在农贸市场上卖九个鸡蛋。", "她每天在农贸市场上 sell 九个鸡蛋。"
    for code in ("zh", "zh-cn", "zh-Hant"):
        found = computed(LanguageConsistency, [chinese, mixed], [code, code])
        assert found == {"language_consistency": 1.0, "judged": 2}
    english = "She sells nine eggs at the market every day."
    found = computed(LanguageConsistency, [english, chinese, "18", r"\boxed{18}"], ["zh"] * 4)
    assert found == {"language_consistency": 0.5, "judged": 2}  # what is a number tells nothing
    found = computed(LanguageConsistency, ["18"], ["bn"])
    assert found == {"language_consistency": None, "judged": 0}
    among = computed(LanguageConsistency, [chinese], ["en"], among=["en", "bn"])
    assert among["judged"] == 0


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = torch.rand(3, 60, generator=generator) < 0.5
    other = torch.rand(3, 60, generator=generator) < torch.tensor([[0.4], [0.1], [0.2]])
    return old, torch.cat([old[:1] | other[:1], old[1:] ^ other[1:]])


def test_gain_is_paired_by_problem_and_language():
    old, new = scores()
    languages = [code for code in ("bn", "sw", "te") for _ in range(60)]
    problems = list(range(60)) * 3
    order = torch.randperm(180, generator=torch.Generator().manual_seed(1)).tolist()
    found = computed(
        SteeringGain, new.flatten()[order].double(), old.flatten()[order].double(),
        languages=[languages[i] for i in order], problems=[problems[i] for i in order],
        resamples=2000,
    )  # fmt: skip
    first = [problems[i] for i in order if languages[i] == languages[order[0]]]
    gain = paired_gain(old[:, first], new[:, first], resamples=2000)
    assert [found[key] for key in ("steering_gain", "low", "high")] == pytest.approx(
        [100 * value for value in (gain.mean, gain.low, gain.high)]
    )
    p = {code: mcnemar(old[i], new[i]) for i, code in enumerate(("bn", "sw", "te"))}
    assert {code: row["p"] for code, row in found["by_language"].items()} == p
    assert min(row["p_adjusted"] for row in found["by_language"].values()) == 3 * min(p.values())
    unpaired = computed(SteeringGain, new.flatten().double(), old.flatten()[order].double())
    assert unpaired["high"] - unpaired["low"] > 1.2 * (found["high"] - found["low"])


def test_mean_scores_have_an_interval_but_no_p():
    found = computed(SteeringGain, [0.5, 1, 0, 1], [0, 1, 0, 0], resamples=100)
    assert found["steering_gain"] == 37.5
    assert found["by_language"]["all"]["p"] is found["by_language"]["all"]["p_adjusted"] is None
    binary = computed(SteeringGain, [1, 1, 0, 1], [0, 1, 0, 0], resamples=100)
    assert binary["by_language"]["all"]["p"] == 0.5


def test_problems_about_one_text_are_one_draw():
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(-1, 2, (60,), generator=generator)  # what a text does to its questions
    old = torch.randint(2, (60, 5), generator=generator).double()
    new = torch.where(shared[:, None] == 0, old, (shared[:, None] > 0).double())
    about = [text for text in range(60) for _ in range(5)]
    scores = new.flatten(), old.flatten()
    found = computed(SteeringGain, *scores, groups=about, resamples=2000)
    gain = paired_gain(old.flatten(), new.flatten(), groups=about, resamples=2000)
    assert (found["low"], found["high"]) == pytest.approx((100 * gain.low, 100 * gain.high))
    assert found["by_language"]["all"]["p"] == sign_flips(old.flatten(), new.flatten(), about)
    alone = computed(SteeringGain, *scores, resamples=2000)
    assert found["high"] - found["low"] > 1.3 * (alone["high"] - alone["low"])  # the twin
    assert alone["by_language"]["all"]["p"] < found["by_language"]["all"]["p"]


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        *[(m, {"predictions": [], "references": []}, "no predictions") for m in (
            MgsmExactMatch, MultipleChoiceAccuracy, LanguageConsistency, RoutingDivergence,
            SteeringGain)],
        (MgsmExactMatch, {"predictions": ["7"], "references": ["x"]}, "'x' has no number"),
        (MgsmExactMatch, {"predictions": ["7"], "references": ["7"], "extraction": "strict"},
         "extraction is 'strict'"),
        (MultipleChoiceAccuracy, {"predictions": [[-1.0]], "references": [1]}, "choice 1"),
        (MultipleChoiceAccuracy, {"predictions": [[-1.0]], "references": [-1]}, "choice -1"),
        (MultipleChoiceAccuracy, {"predictions": [[math.nan, 0.0]], "references": [1]}, "nan"),
        (MultipleChoiceAccuracy,
         {"predictions": [[-1.0, -2.0]], "references": [1], "choices": [["a"]]}, "one text"),
        (MultipleChoiceAccuracy,
         {"predictions": [[-1.0, -2.0]], "references": [1], "choices": [["a", ""]]}, "not empty"),
        (SteeringGain, {"predictions": [math.nan], "references": [1]}, "nan or infinite"),
        (SteeringGain, {"predictions": [1], "references": [1], "resamples": 0}, "resamples is 0"),
        (SteeringGain, {"predictions": [1], "references": [1], "groups": [1, 2]}, "2 groups"),
        (SteeringGain, {"predictions": [1, 1], "references": [1, 0], "languages": ["bn", "sw"],
                        "groups": ["a", "b"]}, "in different groups"),
        (RoutingDivergence, {"predictions": [[0.5, 0.6]], "references": [[0.5, 0.5]]}, "distrib"),
        (RoutingDivergence, {"predictions": [[1.5, -0.5]], "references": [[0.5, 0.5]]}, "distrib"),
        (RoutingDivergence, {"predictions": [[1.0]], "references": [[1.0]]}, "distrib"),
        (RoutingDivergence, {"predictions": [[0.5, 0.5]], "references": [[1.0, 0, 0]]}, "distrib"),
        (LanguageConsistency, {"predictions": ["a"], "references": ["xx"]}, "'xx' cannot"),
        (SteeringGain, {"predictions": [1, 1], "references": [1, 1], "languages": ["a"]},
         "2 scores and 1 languages"),
        (SteeringGain,
         {"predictions": [1, 1, 1], "references": [1, 1, 1], "languages": ["a", "a", "b"]},
         "problems of b"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(metric: Any, arguments: dict[str, Any], message: str):
    with pytest.raises(SteeredMoEError, match=message):
        metric().compute(**arguments)


def test_batches_add_up_and_leave_no_files(tmp_path: Path):
    for in_memory in (None, False):
        metric = MgsmExactMatch(keep_in_memory=in_memory, cache_dir=str(tmp_path))
        metric.add_batch(predictions=["3", "4"], references=["3", "5"])
        metric.add(prediction="6", reference="6")
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert bool(files) == (in_memory is False)
        assert metric.compute() == {"exact_match": 2 / 3}
        assert not list(tmp_path.rglob("*.arrow"))


PROBE = """
import sys
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        seen.append(args)
        raise OSError("no network here")
sys.addaudithook(watch)
import evaluate
from steered_moe import metrics as m
assert m.MgsmExactMatch().compute(predictions=["18"], references=["18"])["exact_match"] == 1
m.LanguageConsistency().compute(predictions=["Jibu ni 18."], references=["sw"])
m.SteeringGain().compute(predictions=[1, 0], references=[0, 0])
for name in ("multiple_choice_accuracy", "mgsm_exact_match", "routing_divergence"):
    evaluate.load(f"spaces/metrics/{name}")
assert not seen, seen
try:
    evaluate.load("accuracy")
except Exception:
    pass
print("reached" if seen else "silent")
"""


@pytest.mark.parametrize(("offline", "expected"), [("0", "reached"), ("1", "silent")])
def test_nothing_is_fetched(offline: str, expected: str, tmp_path: Path):
    """And the probe sees it when something is: ``evaluate.load`` of a metric of the Hub."""
    own = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    own |= {"HF_HUB_OFFLINE": offline, "HF_EVALUATE_OFFLINE": offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env={**os.environ, **own}, cwd=ROOT, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()[-1:]) == (0, [expected]), done.stderr[-2000:]


def needs(path: Path) -> set[str]:
    """What a module imports when it is imported."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


def test_only_this_module_needs_the_extra():
    optional = {"evaluate", "py3langid", "datasets", "steered_moe.metrics"}
    users = {p.name for p in (ROOT / "steered_moe").glob("*.py") if needs(p) & optional}
    assert users == {"metrics.py"}
