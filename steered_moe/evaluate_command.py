"""``steered-moe evaluate``: base, steerings and controls on the same items, in a resumable run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers import AutoTokenizer

from steered_moe import hub
from steered_moe.cards import write_card
from steered_moe.controls import systems
from steered_moe.embedded import named_repo
from steered_moe.errors import SteeredMoEError
from steered_moe.evaluation import Evaluation, Settings
from steered_moe.figure import check_matplotlib
from steered_moe.gain_plots import plot_gains
from steered_moe.loading import check_dtype
from steered_moe.modeling import SteeredMoEForCausalLM
from steered_moe.records import RUN_FILE
from steered_moe.results import MEAN, Result, read_results, write_results
from steered_moe.sampling import Sampling
from steered_moe.steering import RouterSteering
from steered_moe.storage import read_repo
from steered_moe.summary import ENGLISH, Line, as_json, results, summarise
from steered_moe.task_languages import usual
from steered_moe.tasks import Task, task
from steered_moe.terminal import console, errors

RESULTS = "results.json"

Repo = Annotated[
    str, typer.Argument(help="Steering repo: a folder, a Hub id, id@revision, or embedded.")
]
Tasks = Annotated[str, typer.Option(help="Names with commas between, such as mgsm_direct.")]
Languages = Annotated[str, typer.Option(help="Codes with commas between, such as bn,sw,te.")]
Out = Annotated[Path, typer.Option(help="Folder of the run; of a killed one, to go on with it.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder with local copies of the data; else from the Hub.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="First items of each language only.")]
Part = Annotated[str, typer.Option(help="Items to use: test, dev (those that tune sees) or all.")]
Draws = Annotated[
    int, typer.Option("--controls", min=0, help="Random controls; 0 leaves all controls out.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per pass.")]
Chat = Annotated[bool | None, typer.Option(help="Chat template; by default as the task is made.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Let a model that can think do so.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="With a temperature.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs with sampling, averaged.")]
Strength = Annotated[float | None, typer.Option(help="Overrides the recorded strength.")]
Steering = Annotated[str | None, typer.Option(help="One of several; by default each of them.")]
BaseModel = Annotated[str | None, typer.Option(help="Overrides the recorded base model.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="For example auto, cpu or cuda:0.")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Load the base in 4 bit.")]
Plot = Annotated[Path | None, typer.Option(help="Write a figure of the gains, .svg, .png or .pdf.")]
Record = Annotated[
    bool, typer.Option("--record", help="Write the results into the repo (a folder) and its card.")
]


def evaluate(
    repo: Repo,
    tasks: Tasks,
    languages: Languages,
    out: Out,
    data: Data = None,
    limit: Limit = None,
    part: Part = "test",
    draws: Draws = 1,
    batch_size: BatchSize = 16,
    chat: Chat = None,
    thinking: Thinking = False,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seeds: Seeds = 1,
    strength: Strength = None,
    steering: Steering = None,
    base_model: BaseModel = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    load_in_4bit: FourBit = False,
    plot: Plot = None,
    record: Record = False,
) -> None:
    """Measure what each steering of a repo gains, paired with the base model and with controls."""
    with errors():
        check_dtype(dtype)
        if plot is not None:
            check_matplotlib()
            if not plot.parent.is_dir():
                raise SteeredMoEError(f"--plot {plot} is in no folder that exists; make it first")
        asked = [task(name.strip()) for name in tasks.split(",")]
        if top_p != 1 and not temperature:
            raise SteeredMoEError(f"--top-p {top_p} needs a --temperature above 0")
        unusual = part != "test" or base_model is not None or load_in_4bit
        if record and (unusual or temperature or thinking or chat is not None):
            raise SteeredMoEError(
                "--record is for greedy answers to the test part by the recorded base model as it "
                "is; leave out --part, --base-model, --load-in-4bit, --temperature, --thinking and "
                "--chat, or --record"
            )
        sampling = Sampling(temperature, top_p) if temperature else None
        settings = Settings(part, limit, batch_size, chat, thinking, sampling, seeds)
        codes = [code.strip() for code in languages.split(",")]
        folder = _own_folder(repo) if record else None
        if folder is not None:
            _check_fewer(folder, limit, asked, codes)
        options: dict[str, Any] = {"dtype": dtype, "load_in_4bit": load_in_4bit}
        options |= {} if device_map is None else {"device_map": device_map}
        model, steerings = unsteered(repo, steering, strength, base_model, **options)
        base, revision = model.config.name_or_path, model.base_model_revision
        made = systems(steerings, model.config.get_text_config().num_hidden_layers, draws)
        run = Evaluation(
            model, AutoTokenizer.from_pretrained(base, revision=revision), asked,
            codes, made, settings, data,
            {"repo": repo, "base_model": base, "base_revision": revision},
        )  # fmt: skip
        with bar("evaluating") as tick:
            records = run.run(out, tick)
        lines = summarise(records.read())
        write_lines(lines, out)
        console.print(table_of_lines(lines))
        if plot is not None:
            plot_gains(lines, plot)
        if folder is not None:
            metrics = {one.name: one.metric for one in asked}
            record_in(folder, results(lines, made, metrics, settings_of(out)))


def unsteered(
    repo: str,
    steering: str | None,
    strength: float | None,
    base_model: str | None,
    **options: Any,
) -> tuple[SteeredMoEForCausalLM, list[tuple[RouterSteering, float]]]:
    """The base model of a steering repo, and its steerings, which fit it, with their strengths."""
    model = SteeredMoEForCausalLM.from_pretrained(
        named_repo(repo), steering=steering, strength=strength, base_model=base_model, **options
    )
    found = [(one, float(model.strengths[name])) for name, one in model.steerings.items()]
    for one, _ in found:
        model.remove_steering(one.name)
    return model, found


def write_lines(lines: Sequence[Line], folder: Path) -> None:
    """Write ``results.json``."""
    text = json.dumps(as_json(lines), indent=1, ensure_ascii=False) + "\n"
    (folder / RESULTS).write_text(text, encoding="utf-8")


def table_of_lines(lines: Sequence[Line]) -> Table:
    """Scores and gains for the terminal."""
    table = Table()
    for name in ("task", "language"):
        table.add_column(name, overflow="fold")
    table.add_column("system", min_width=max((len(line.system) for line in lines), default=0))
    for name in ("items", "base", "score", "gain, points", "p, Holm"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        p = "" if line.p_adjusted is None else f"{line.p_adjusted:.3f}"
        table.add_row(
            line.task, line.language, line.system, str(line.items), f"{line.base:.3f}",
            f"{line.score:.3f}", str(line.gain), p,
        )  # fmt: skip
    return table


def record_in(folder: Path, new: Sequence[Result]) -> None:
    """Put results into a steering repo and its card, in place of those of the same steering,
    strength, task and language, and of means over languages that are measured anew."""
    kinds = {_kind(one) for one in new}
    stale = {_kind(one)[:3] for one in new if one.language != ENGLISH}
    kept = [
        one
        for one in read_results(folder)
        if _kind(one) not in kinds
        and not (one.language.startswith(MEAN) and _kind(one)[:3] in stale)
    ]
    write_results([*kept, *new], folder)
    write_card(read_repo(folder), folder)
    console.print(f"written into {escape(str(folder))}")


def settings_of(folder: Path) -> dict[str, Any]:
    """What the description of a finished run says of how it was asked."""
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    names = ("settings", "dtype", "device", "versions", "items_sha256", "model_sha256")
    return {name: run[name] for name in names}


def _check_fewer(
    folder: Path, limit: int | None, asked: Sequence[Task], codes: Sequence[str]
) -> None:
    """Refuse to put a result of fewer items in the place of one of more."""
    for old in read_results(folder):
        mine = old.task in {one.name for one in asked} and old.language in map(usual, codes)
        if mine and limit is not None and limit < old.items:
            raise SteeredMoEError(
                f"--record: {folder} has {old.items} items of {old.task} in {old.language}; a "
                f"--limit of {limit} would replace that by less"
            )


def _kind(one: Result) -> tuple[str, float, str, str]:
    return one.fingerprint, one.strength, one.task, one.language


def _own_folder(repo: str) -> Path:
    folder = hub.fetch(named_repo(repo))
    if hub.from_hub(folder):
        raise SteeredMoEError(
            f"--record writes into a folder, and {repo} is on the Hub; pull it first"
        )
    return folder


@contextmanager
def bar(what: str) -> Iterator[Any]:
    """A bar with the time left; yields a function of the number done and of all."""
    columns = (
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        row = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(row, completed=done, total=total)
