"""``steered-moe tune``: search on the dev split, report once on the test split, write the repo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from steered_moe.base_model import repo_for
from steered_moe.cards import write_card
from steered_moe.controls import systems
from steered_moe.embedded import named_model
from steered_moe.errors import SteeredMoEError
from steered_moe.evaluate_command import (
    BatchSize,
    Chat,
    Data,
    DeviceMap,
    Draws,
    Dtype,
    Languages,
    Tasks,
    bar,
    record_in,
    settings_of,
    table_of_lines,
    write_lines,
)
from steered_moe.evaluation import Evaluation, Settings
from steered_moe.figure import check_matplotlib
from steered_moe.gain_plots import plot_pareto
from steered_moe.hub import split
from steered_moe.loading import check_dtype, load_model
from steered_moe.profile import RoutingProfile
from steered_moe.summary import results, summarise
from steered_moe.tasks import task
from steered_moe.terminal import console, errors
from steered_moe.tuning import Trial, candidates, halve, pareto

Model = Annotated[str, typer.Argument(help="Base model: a folder, a Hub id, or embedded.")]
TaskProfile = Annotated[Path, typer.Argument(help="Profile of the task in English.")]
GeneralProfile = Annotated[Path, typer.Argument(help="Profile of parallel general text.")]
Out = Annotated[Path, typer.Option(help="Folder of the search; of a killed one, to go on.")]
Items = Annotated[int, typer.Option(min=1, help="Dev items per language in the last round.")]
Rounds = Annotated[int, typer.Option(min=1, help="Each halves the settings, doubles the items.")]
Harm = Annotated[float, typer.Option(min=0, help="Points that English may lose.")]
TestItems = Annotated[int | None, typer.Option(min=1, help="Test items per language.")]
Methods = Annotated[str, typer.Option(help="With commas between.")]
Numbers = Annotated[str | None, typer.Option(help="With commas between.")]


def tune(
    model: Model,
    task_profile: TaskProfile,
    general_profile: GeneralProfile,
    tasks: Tasks,
    languages: Languages,
    out: Out,
    data: Data = None,
    items: Items = 40,
    rounds: Rounds = 3,
    test_items: TestItems = None,
    draws: Draws = 1,
    most_harm: Harm = 1.0,
    methods: Methods = "task_experts,shared_experts",
    thresholds: Numbers = None,
    strengths: Numbers = None,
    batch_size: BatchSize = 16,
    chat: Chat = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Search layers, threshold, strength and method; write the best as a steering repo."""
    with errors():
        check_dtype(dtype)
        check_matplotlib()
        routing = RoutingProfile.load(task_profile), RoutingProfile.load(general_profile)
        grid: dict[str, Any] = {"methods": [name.strip() for name in methods.split(",")]}
        if thresholds and "task_experts" not in grid["methods"]:
            raise SteeredMoEError("--thresholds are those of task_experts; leave them out")
        grid |= {"thresholds": _numbers(thresholds)} if thresholds else {}
        grid |= {"strengths": _numbers(strengths)} if strengths else {}
        tried = candidates(*routing, **grid)
        loaded, tokenizer, revision = load_model(model, dtype, device_map)
        name = split(named_model(model))[0]
        run = Evaluation(
            loaded, tokenizer, [task(one.strip()) for one in tasks.split(",")],
            [code.strip() for code in languages.split(",")], [],
            Settings("dev", items, batch_size, chat), data,
            {"base_model": name, "base_revision": revision},
        )  # fmt: skip
        console.print(f"{len(tried)} settings, {rounds} rounds up to {items} dev items")
        with bar("tuning") as tick:
            table = halve(
                run, tried, out, items=items, rounds=rounds, most_harm=most_harm,
                tick=lambda number, done, total: tick(done, total),
            )  # fmt: skip
        _report_search(table, out)
        _warn(table[-1][0], most_harm)
        best = table[-1][0].candidate
        made = systems([(best.steering, best.strength)], _layers(loaded), draws)
        final = replace(run, systems=made, settings=Settings("test", test_items, batch_size, chat))
        with bar("test split") as tick:
            records = final.run(out / "test", tick)
        lines = summarise(records.read())
        write_lines(lines, out)
        console.print(table_of_lines(lines))
        folder = out / "steering"
        repo = repo_for(best.steering, best.strength, name, revision, folder)
        repo.write(folder)
        write_card(repo, folder)
        metrics = {one.name: one.metric for one in run.tasks}
        record_in(folder, results(lines, made, metrics, settings_of(out / "test")))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise SteeredMoEError(f"{text!r} are no numbers; write 0.1,0.2") from error


def _layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _report_search(table: Sequence[Sequence[Trial]], out: Path) -> None:
    """``search.json``, ``pareto.svg`` and a table of the last round."""
    front = {id(trial) for trial in pareto(table[-1])}
    rounds = [[_as_json(trial) for trial in trials] for trials in table]
    text = json.dumps({"rounds": rounds}, indent=1, ensure_ascii=False) + "\n"
    (out / "search.json").write_text(text, encoding="utf-8")
    points = [(t.gain, t.english, id(t) in front) for t in table[-1] if t.english is not None]
    if points:
        plot_pareto(points, out / "pareto.svg")
    shown = Table("setting", "gain", "English", title=f"best on {table[-1][0].items} dev items")
    for trial in table[-1][:10]:
        english = "" if trial.english is None else f"{trial.english:+.2f}"
        shown.add_row(escape(trial.candidate.label), f"{trial.gain:+.2f}", english)
    console.print(shown)


def _warn(best: Trial, most_harm: float) -> None:
    """Say it where harm to English was not looked at, or none keeps within what is allowed."""
    if best.english is None:
        console.print("English is not among the languages, so harm to it was not looked at")
    elif best.english < -most_harm:
        console.print(
            f"no setting keeps within --most-harm {most_harm:g}; the best one harms English by "
            f"{-best.english:.2f} points"
        )


def _as_json(trial: Trial) -> dict[str, Any]:
    return {
        "setting": trial.candidate.label,
        "fingerprint": trial.candidate.steering.fingerprint,
        "strength": trial.candidate.strength,
        "items": trial.items,
        "gain": round(trial.gain, 4),
        "english": None if trial.english is None else round(trial.english, 4),
    }
