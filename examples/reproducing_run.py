"""Run the experiments of `reproducing`, report them; the command line of both papers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from reproducing import MODELS, Bench, Experiment, Options
from reproducing_plan import plan, tell, write
from rich.markup import escape

from steered_moe.base_model import repo_for
from steered_moe.cards import write_card
from steered_moe.controls import BASE, OF, System
from steered_moe.errors import SteeredMoEError
from steered_moe.evaluate_command import bar, record_in, settings_of, write_lines
from steered_moe.evaluation import Evaluation
from steered_moe.language_id import detect
from steered_moe.results import MEAN
from steered_moe.summary import Line, results, summarise
from steered_moe.terminal import console, errors

MEANINGLESS = "TINY: random weights; these numbers mean nothing, they show that everything runs."


def run(bench: Bench, experiments: Sequence[Experiment]) -> dict[str, Any]:
    """Everything; a killed run goes on where it was. Returns what ``results.json`` holds."""
    if any(one.consistency for one in experiments):
        detect("ready")  # its package is missing? better now than after hours
    if bench.options.tiny:
        tell([MEANINGLESS])
    found = {one.name: _outcome(bench, one) for one in experiments}
    head = [f"# {bench.hub_id}", *([MEANINGLESS] if bench.options.tiny else [])]
    text = "\n\n".join([*head, *(_section(name, part) for name, part in found.items())])
    (bench.options.out / "report.md").write_text(text + "\n", encoding="utf-8")
    lines = {name: {**p, "lines": [asdict(x) for x in p["lines"]]} for name, p in found.items()}
    write(bench.options.out / "results.json", lines)
    return lines


def _outcome(bench: Bench, one: Experiment) -> dict[str, Any]:
    profiles = {corpus.name: bench.profile(corpus) for corpus in one.corpora}
    systems, notes = one.make(bench, profiles)
    notes = [*one.notes, *notes]
    folder = bench.options.out / one.name
    about = {
        "base_model": bench.place,
        "base_revision": bench.revision,
        "max_new_tokens": one.task.max_new_tokens,
        "notes": notes,
    }
    evaluation = Evaluation(
        bench.model, bench.tokenizer, [one.task], one.languages, systems, one.settings,
        bench.options.data, about,
    )  # fmt: skip
    with bar(one.name) as tick:
        rows = list(evaluation.run(folder / "run", tick).read())
    lines = summarise(rows)
    write_lines(lines, folder)
    if one.saved:
        _save(bench, one, systems, lines)
    found = {
        "notes": notes,
        "systems": [{**system.about, **_experts(system)} for system in systems],
        "consistency": _consistency(rows) if one.consistency else {},
        "lines": lines,
    }
    console.print(_section(one.name, found), markup=False, highlight=False, soft_wrap=True)
    return found


def _experts(system: System) -> dict[str, Any]:
    if system.steering is None:
        return {}
    layers = [int(layer) for layer in system.steering.layers]
    return {"experts": system.steering.num_steered_experts, "layers": layers}


def _save(bench: Bench, one: Experiment, systems: Sequence[System], lines: Sequence[Line]) -> None:
    """A steering repo of the steerings, not of their controls, with what they gain in its card."""
    folder = bench.options.out / one.name / "steering"
    mine = [
        (s.steering, s.strength) for s in systems if s.steering is not None and OF not in s.name
    ]
    repo = repo_for(*mine[0], bench.place, bench.revision, folder)
    steerings, strengths = map(list, zip(*mine, strict=True))
    repo = replace(repo, steerings=steerings, strengths=strengths)
    repo.write(folder)
    write_card(repo, folder)
    metrics = {one.task.name: one.task.metric}
    settings = settings_of(bench.options.out / one.name / "run")
    record_in(folder, results(lines, systems, metrics, settings))


def _consistency(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Share of answers that are in the language of their question, by system and language; those
    of numbers alone are in none and do not count, as in the metric."""
    right: dict[str, dict[str, list[bool]]] = {BASE: {}}
    for row in rows:
        if (said := detect(row["answer"])) is not None:
            mine = right.setdefault(row["system"], {})
            mine.setdefault(row["language"], []).append(said == row["language"])
    return {name: {la: fmean(x) for la, x in found.items()} for name, found in right.items()}


def _section(name: str, part: Mapping[str, Any]) -> str:
    spoken = part["consistency"]
    columns = ["language", "system", "items", "base", "score", "gain, points", "p, Holm"]
    columns += ["own language"] if spoken else []
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in part["lines"]:
        p = "" if line.p_adjusted is None else f"{line.p_adjusted:.3f}"
        cells = [line.language, line.system, line.items, f"{line.base:.3f}", f"{line.score:.3f}"]
        cells += [str(line.gain), p]
        if line.language in spoken.get(line.system, {}):
            cells.append(f"{spoken[line.system][line.language]:.3f}")
        rows.append(f"| {' | '.join(map(str, cells))} |")
    rows += [f"| {' | '.join(cells)} |" for cells in _means(part["lines"])]
    notes = [f"* {note}" for note in part["notes"]]
    if spoken:
        shares = ", ".join(f"{la} {x:.3f}" for la, x in spoken[BASE].items())
        notes.append(f"* answers of the base model in the language of the question: {shares}")
    return "\n".join([f"## {name}", "", *notes, "", *rows])


def _means(lines: Sequence[Line]) -> Iterable[list[str]]:
    """Rows of the mean over all languages, English included, which a paper may report."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if not line.language.startswith(MEAN):
            found.setdefault(line.system, []).append(line)
    for system, mine in found.items():
        base, score = fmean(x.base for x in mine), fmean(x.score for x in mine)
        gain = f"{100 * (score - base):+.2f}"
        yield [f"all {len(mine)}", system, "", f"{base:.3f}", f"{score:.3f}", gain, ""]


Model = Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")]
Out = Annotated[Path, typer.Option(help="Folder for everything; of a killed run, to go on.")]
Data = Annotated[Path | None, typer.Option(help="Folder with the data; else from the Hub.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Texts and items per language at most.")]
Languages = Annotated[str | None, typer.Option(help="Languages to evaluate, as bn,sw.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Same layers and experts, random weights.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Print the plan; load nothing.")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Load the model in 4 bit.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts per pass.")]
Longest = Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")]
Rate = Annotated[float, typer.Option(min=0.1, help="Written, all rows of a batch; an assumption.")]
Read = Annotated[float, typer.Option(min=0.1, help="Of prompts; an assumption.")]


def command(experiments: Callable[[Options], list[Experiment]]) -> Callable[..., None]:
    """The command line of a paper."""

    def reproduce(
        model: Model,
        out: Out,
        data: Data = None,
        limit: Limit = None,
        languages: Languages = None,
        tiny: Tiny = False,
        dry_run: Dry = False,
        load_in_4bit: FourBit = False,
        batch_size: Batch = 16,
        max_new_tokens: Longest = None,
        tokens_per_second: Rate = 300,
        prompt_tokens_per_second: Read = 5000,
    ) -> None:
        """Run the experiments of a paper on one model."""
        with errors():
            if model not in MODELS:
                raise SteeredMoEError(f"no model {model!r}; there are {', '.join(MODELS)}")
            among = tuple(languages.replace(",", " ").split()) if languages else None
            options = Options(
                model, out, data, limit, among, tiny, load_in_4bit, batch_size, max_new_tokens
            )
            made, bench = experiments(options), Bench(options)
            if dry_run:
                plan(bench, made, tokens_per_second, prompt_tokens_per_second)
            else:
                run(bench, made)
                console.print(f"written: {escape(str(out / 'report.md'))}")

    return reproduce
