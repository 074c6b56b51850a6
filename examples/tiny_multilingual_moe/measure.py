"""Measure the embedded model: quality, routing, and what steering gains.

    python examples/tiny_multilingual_moe/measure.py FOLDER quality
    python examples/tiny_multilingual_moe/measure.py FOLDER routing
    python examples/tiny_multilingual_moe/measure.py FOLDER search
    python examples/tiny_multilingual_moe/measure.py FOLDER test
    python examples/tiny_multilingual_moe/measure.py FOLDER controls

``FOLDER/base`` is a checkpoint of train.py. Each part writes ``FOLDER/<part>.json``. ``search``
uses the dev split alone and writes the steering that it chooses to ``FOLDER/steered``, and the best
of each method to ``FOLDER/methods``, which ``steered-moe evaluate`` compares; ``test`` reports them
on the test split, ``controls`` what should not help there. Right or wrong of every test problem is
kept in ``FOLDER/scores``, so that an interrupted run goes on where it was, and two parts can run at
the same time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from candidates import Candidate, Profiles, candidates, controls_of, middle_ranges
from corpus import problems, sentences
from grammar import Language, codes
from rich.progress import track
from rows import Problem
from safetensors.torch import load_file, save_file
from scoring import perplexity, right, solved
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from steered_moe import SteeredMoEForCausalLM, attach
from steered_moe.base_model import repo_for
from steered_moe.cards import write_card
from steered_moe.collection import profile_texts
from steered_moe.divergence import divergence
from steered_moe.statistics import paired_gain

DEV, FINAL, TEST, TEXTS = 120, 700, 2000, 300  # problems of search, finalists, test; profiled rows
FINALISTS = 3  # of each method
PIVOT = "en"


@dataclass
class Bench:
    """One checkpoint and everything that is measured on it."""

    folder: Path
    scale: float = 1.0  # of the number of problems and texts

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder / "base")

    @cached_property
    def languages(self) -> list[str]:
        trained = json.loads((self.folder / "training_log.json").read_text(encoding="utf-8"))
        return [code for code in codes() if code in trained["setting"]["mixture"]["languages"]]

    @cached_property
    def profiles(self) -> Profiles:
        """Routing on dev rows: general text in every language, solved problems in English."""
        rows = list(sentences("dev", self.size(TEXTS), seed=3))
        general = {c: [row.text(Language(c)) for row in rows] for c in self.languages}
        english = Language(PIVOT)
        solutions = [p.prompt(english) + p.solution for p in self.problems("dev", TEXTS, 5)]
        tokenizer, model = self.tokenizer, self.model
        task = profile_texts(model, tokenizer, {PIVOT: solutions}, batch_size=50)
        texts = profile_texts(model, tokenizer, general, batch_size=50, keep_sequences=True)
        return Profiles(
            replace(task, about={"corpus": f"{len(solutions)} solved problems, dev part"}),
            replace(texts, about={"corpus": f"{len(rows)} rows of general text, dev part"}),
        )

    def size(self, number: int) -> int:
        return max(4, round(number * self.scale))

    def problems(self, part: str, count: int, seed: int) -> list[Problem]:
        return list(problems(part, self.size(count), seed))

    def scores(self, rows: Sequence[Problem], score: Callable[..., Tensor]) -> Tensor:
        """bool ``(languages, problems)``, the pivot first."""
        return torch.stack(
            [score(self.model, self.tokenizer, rows, Language(c)) for c in self.languages]
        )

    def steered_scores(
        self, candidate: Candidate, rows: Sequence[Problem], score: Callable[..., Tensor]
    ) -> Tensor:
        handle = attach(self.model, candidate.steering, candidate.strength)
        try:
            return self.scores(rows, score)
        finally:
            handle.remove()

    def on_test(self, candidate: Candidate | None = None) -> Tensor:
        """Greedy scores of the test problems, by the base model or steered; kept on disk."""
        name = "base"
        if candidate is not None:
            name = f"{candidate.steering.fingerprint[:16]}_{candidate.strength}"
        path = self.folder / "scores" / f"{name}.safetensors"
        if not path.exists():
            rows = self.problems("test", TEST, 1)
            if candidate is None:
                scores = self.scores(rows, right)
            else:
                scores = self.steered_scores(candidate, rows, right)
            path.parent.mkdir(exist_ok=True)
            save_file({"right": scores}, path)
        return load_file(path)["right"]


def quality(bench: Bench) -> dict[str, Any]:
    """Greedy exact match on the test split and perplexity of held-out general text."""
    accuracy = bench.on_test().double().mean(dim=1)
    rows = list(sentences("test", bench.size(1000), seed=1))
    texts = {c: [row.text(Language(c)) for row in rows] for c in bench.languages}
    return {
        "problems": bench.size(TEST),
        "accuracy": dict(zip(bench.languages, accuracy.tolist(), strict=True)),
        "rows": len(rows),
        "perplexity": {
            c: perplexity(bench.model, bench.tokenizer, texts[c]) for c in bench.languages
        },
    }


def routing(bench: Bench) -> dict[str, Any]:
    """Divergence from English by layer, on parallel general text."""
    curves = divergence(bench.profiles.general, PIVOT)
    return {
        "rows": bench.size(TEXTS),
        "divergence": {c: [round(x, 4) for x in curve.tolist()] for c, curve in curves.items()},
        "u_shaped": [c for c, curve in curves.items() if is_u_shaped(curve)],
    }


def is_u_shaped(curve: Tensor) -> bool:
    """Whether first and last layer lie above the mean of the layers between them."""
    middle = curve[1:-1].mean()
    return bool(curve[0] > middle and curve[-1] > middle)


def search(bench: Bench) -> dict[str, Any]:
    """The best setting of each method on the dev split: all on few problems, finalists on more."""
    config = bench.model.config
    ranges = middle_ranges(config.num_hidden_layers)
    tried = list(candidates(bench.profiles, ranges, config.num_experts_per_tok))
    first = _ranked(bench, tried, bench.problems("dev", DEV, 7), "search")
    methods = sorted({c.label.split(",")[0] for _, c in first})
    finalists = [
        c
        for method in methods
        for _, c in [r for r in first if r[1].label.startswith(method)][:FINALISTS]
    ]
    final = _ranked(bench, finalists, bench.problems("dev", FINAL, 8), "finalists")
    best = [next(r for r in final if r[1].label.startswith(m)) for m in methods]
    best.sort(key=lambda r: -r[0]["mean"])
    _write_steered(bench, best[0][1])
    write_methods(bench, [c for _, c in best])
    return {
        "problems": [bench.size(DEV), bench.size(FINAL)],
        "search": [_line(gains, c) for gains, c in first],
        "finalists": [_line(gains, c) for gains, c in final],
        "chosen": [{"label": c.label, "strength": c.strength} for _, c in best],
    }


def _ranked(
    bench: Bench, tried: Sequence[Candidate], rows: Sequence[Problem], name: str
) -> list[tuple[dict[str, float], Candidate]]:
    """Candidates by mean gain over the languages but the pivot; those that move the pivot by a
    point or more come last."""
    base = bench.scores(rows, solved).double().mean(dim=1)
    results = []
    for candidate in track(tried, name):
        now = bench.steered_scores(candidate, rows, solved).double().mean(dim=1)
        gains = (100 * (now - base)).tolist()
        mean = sum(gains[1:]) / len(gains[1:])
        results.append((dict(zip(bench.languages, gains, strict=True)) | {"mean": mean}, candidate))
    return sorted(results, key=lambda r: (abs(r[0][PIVOT]) >= 1, -r[0]["mean"]))


def _line(gains: dict[str, float], candidate: Candidate) -> dict[str, Any]:
    return {
        "label": candidate.label,
        "strength": candidate.strength,
        "experts": candidate.steering.num_steered_experts,
        "gains": {c: round(gain, 2) for c, gain in gains.items()},
    }


def _write_steered(bench: Bench, chosen: Candidate) -> None:
    steering = replace(chosen.steering, name="task" if "task" in chosen.label else "shared")
    model = SteeredMoEForCausalLM.from_base(
        bench.folder / "base", steering, strength=chosen.strength
    )
    model.save_pretrained(bench.folder / "steered", tokenizer=bench.tokenizer)


def write_methods(bench: Bench, best: Sequence[Candidate]) -> None:
    """All of them in one steering repo, each under the name of its method."""
    folder = bench.folder / "methods"
    named = [replace(c.steering, name=_method(c)) for c in best]
    first = repo_for(named[0], best[0].strength, str(bench.folder / "base"), None, folder)
    repo = replace(first, steerings=named, strengths=[c.strength for c in best])
    repo.write(folder)
    write_card(repo, folder)


def _method(candidate: Candidate) -> str:
    """``task-soft``, ``task-hard`` or ``shared``."""
    words = candidate.label.split(",")[0].split()
    return "-".join(word for word in words if "/" not in word)


def test(bench: Bench) -> dict[str, Any]:
    """The chosen setting of each method on the test split, greedily."""
    return _on_test(bench, chosen(bench))


def controls(bench: Bench) -> dict[str, Any]:
    """The controls of the best method on the test split, greedily."""
    config = bench.model.config
    layers, top_k = config.num_hidden_layers, config.num_experts_per_tok
    return _on_test(bench, controls_of(chosen(bench)[0], bench.profiles, layers, top_k))


def chosen(bench: Bench) -> list[Candidate]:
    """What search chose, made again; the best method first."""
    config = bench.model.config
    ranges = middle_ranges(config.num_hidden_layers)
    tried = candidates(bench.profiles, ranges, config.num_experts_per_tok)
    made = {(c.label, c.strength): c for c in tried}
    found = json.loads((bench.folder / "search.json").read_text(encoding="utf-8"))["chosen"]
    return [made[line["label"], line["strength"]] for line in found]


def _on_test(bench: Bench, steered: Sequence[Candidate]) -> dict[str, Any]:
    base = bench.on_test()
    return {
        "problems": base.shape[1],
        "base": dict(zip(bench.languages, base.double().mean(dim=1).tolist(), strict=True)),
        "results": [_result(bench, c, base) for c in track(steered, "test split")],
    }


def _result(bench: Bench, candidate: Candidate, base: Tensor) -> dict[str, Any]:
    now = bench.on_test(candidate)
    gains = {c: paired_gain(base[i], now[i]) for i, c in enumerate(bench.languages)}
    gains["mean"] = paired_gain(base[1:], now[1:])
    points = {c: {k: round(100 * v, 2) for k, v in asdict(g).items()} for c, g in gains.items()}
    return {
        "label": candidate.label,
        "strength": candidate.strength,
        "experts": candidate.steering.num_steered_experts,
        "gains": points,
    }


PARTS = {
    "quality": quality,
    "routing": routing,
    "search": search,
    "test": test,
    "controls": controls,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of problems")
    args = parser.parse_args()
    result = PARTS[args.part](Bench(args.folder, args.scale))
    path = args.folder / f"{args.part}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
