"""Reproduce the steering of arXiv 2510.04694, "Multilingual Routing in Mixture-of-Experts".

    python examples/reproduce_paper1.py --model qwen3-30b-a3b --out build/paper1 --dry-run
    python examples/reproduce_paper1.py --model qwen3-30b-a3b --out build/paper1
    python examples/reproduce_paper1.py --model gpt-oss-20b --tiny --data DATA --limit 2 --out OUT

For MGSM and for medicine: find the experts that English texts of the task select more often than
general English text (Eq. 3), promote them in the middle layers (Eq. 4 or 5) with the paper's
setting for the model, a preset of `steered_moe.selection`, and answer the task in all languages,
beside the controls of which the paper says that they do harm: random experts, layers outside the
middle, multilingual experts, suppression (Sec. 5). With ``--tiny`` the model has the architecture,
layers, experts and top-k of the real one, and random weights.

What is known of the paper is second-hand in part; its prompts for GPT-OSS and its draws of texts
and items are not known. What stands for data that a folder lacks (``--data``) is in the notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import typer
from reproducing import Bench, Corpus, Experiment, Options, asked, codes, fewest, shortened
from reproducing_run import command

from steered_moe import RouterSteering, RoutingProfile, find_routers
from steered_moe.controls import BASE, System, controls
from steered_moe.divergence import divergence
from steered_moe.errors import SteeringError
from steered_moe.evaluation import Settings
from steered_moe.selection import Preset, method, multilingual_experts, preset
from steered_moe.task_languages import flores, usual
from steered_moe.tasks import task

_FLORES = (
    "eng_Latn bam_Latn fra_Latn tha_Thai pes_Arab arb_Arab arb_Latn ary_Arab hin_Deva zho_Hans "
    "srp_Cyrl lit_Latn ory_Orya ben_Beng asm_Beng"
)
GENERAL = Corpus(
    "general", tuple(map(usual, codes(_FLORES))), "belebele",
    "flores200/devtest/{language}.txt", code=flores, rows=488, parallel=True,
)  # fmt: skip
"""The 488 passages of FLORES-200 in Belebele, in the languages of the authors' code; in a folder,
as many sentences of FLORES-200."""
MATHS = Corpus(
    "maths", ("en",), "gsm8k", "gsm8k/{language}.jsonl",
    folder_columns=("question", "answer"), file="train", rows=500, drawn=True,
)  # fmt: skip
"""500 solved problems of GSM8K train, of which the paper's GSM8KInstruct is made."""
MEDICINE = Corpus(
    "medicine", ("en",), "hub:lavita/AlpaCare-MedInstruct-52k", "tico19/{language}.txt",
    columns=("instruction", "output"), rows=500, drawn=True,
)  # fmt: skip
"""500 medical instructions with answers; in a folder, sentences on COVID-19 of TICO-19."""


@dataclass(frozen=True)
class Subject:
    """A task of the paper.

    Args:
        task: Name of the task here.
        texts: English texts of it.
        languages: Of the paper's evaluation (lm-eval's task lists in the authors' evaluator).
        items: Per language; None for all.
    """

    task: str
    texts: Corpus
    languages: tuple[str, ...]
    items: int | None = None


SUBJECTS: Mapping[str, Subject] = {
    "mgsm": Subject("mgsm_direct", MATHS, codes("bn de en es fr ru sw te th ja zh")),
    "medicine": Subject(
        "global_mmlu_medicine", MEDICINE,
        codes("ar bn de en es fr hi id it ja ko pt sw yo zh"), 7 * 60,
    ),
}  # fmt: skip
"""By the end of a preset's name. Items take turns by subject, so 420 are 60 of each of 7."""


@dataclass(frozen=True)
class Reported:
    """What the paper reports: experts steered in all, mean scores in percent (Tables 2 and 3)."""

    experts: int
    base: float
    steered: float


REPORTED: Mapping[str, Reported] = {
    "qwen3-30b-a3b-mgsm": Reported(22, 76.4, 78.0),
    "phi-3.5-moe-mgsm": Reported(12, 57.5, 58.9),
    "gpt-oss-20b-mgsm": Reported(9, 68.9, 71.5),
    "qwen3-30b-a3b-medicine": Reported(23, 68.2, 69.1),
    "phi-3.5-moe-medicine": Reported(2, 57.8, 58.8),
    "gpt-oss-20b-medicine": Reported(6, 63.8, 64.5),
}
"""By preset; from a second-hand note of the paper, not checked against its PDF."""
NOTES = (
    "layers count from 0; the last layer of the paper's range is taken to be steered, too",
    "the paper's draws of task texts and of Global-MMLU items are not known: seed 0, and the first "
    "60 items of each subject",
    "question and answer of a task text are one user turn; the paper's are a user's and an "
    "assistant's",
)
_IN_FOLDER = {
    "mgsm": "data from a folder: general texts are sentences of FLORES-200 devtest, not passages, "
    "in those of the languages that it has",
    "medicine": "data from a folder: medical texts are sentences of TICO-19, not AlpaCare; items "
    "are those of MMLU that it has, in fewer subjects but for English",
}


def experiments(options: Options) -> list[Experiment]:
    """MGSM and medicine on one model."""
    return [_experiment(name, subject, options) for name, subject in SUBJECTS.items()]


def _experiment(name: str, subject: Subject, options: Options) -> Experiment:
    known = f"{options.model}-{name}"
    asks, said = shortened(task(subject.task), options), REPORTED[known]
    languages, lacking = asked(asks, subject.languages, options)
    limit = fewest(subject.items, options.limit)
    notes = (
        *NOTES,
        *([_IN_FOLDER[name]] if options.data else []),
        *lacking,
        f"{known}: paper says {said.base} to {said.steered}, a mean over languages (second-hand)",
    )
    return Experiment(
        name, asks, languages, Settings("all", limit, options.batch_size),
        (GENERAL, subject.texts), (BASE, *(f"task{control}" for control in PLANNED)),
        partial(systems, known, subject.texts.name), notes,
    )  # fmt: skip


def systems(
    name: str, texts: str, bench: Bench, profiles: Mapping[str, RoutingProfile]
) -> tuple[list[System], list[str]]:
    """Base, task experts and their controls, and how many experts were found."""
    known, general = preset(name), profiles["general"]
    steering, notes = task_steering(known, profiles[texts], general, bench.options.tiny)
    steering = _noted(steering, name, known, bench.options.tiny)
    layers = find_routers(bench.model)[-1].layer + 1
    made = [System(BASE), System("task", steering, known.strength)]
    made += [System(f"task/{c.name}", c, known.strength) for c in controls(steering, layers)]
    for label, make in _CONTROLS.items():
        try:
            made.append(System(f"task/{label}", *make(known, steering, general)))
        except SteeringError as error:
            notes.append(f"control {label} left out: {error}")
    found, said = steering.num_steered_experts, REPORTED[name].experts
    notes.append(f"{name}: paper says {said} experts, found {found}")
    return made, [*notes, _divergence(general, known)]


def task_steering(
    known: Preset, texts: RoutingProfile, general: RoutingProfile, adapt: bool = False
) -> tuple[RouterSteering, list[str]]:
    """Task experts by a preset, and what has to be said of them.

    Args:
        known: The preset.
        texts: Routing of task texts.
        general: Routing of general texts.
        adapt: Try other thresholds where the preset's does not do, as random weights need it.
    """
    wanted = known.parameters["threshold"]
    others = [wanted * 1.1**n for n in range(1, 9)] + [wanted * 0.8**n for n in range(1, 30)]
    made = _first_that_does(
        lambda threshold: method(known.method)(
            texts, general, layers=known.layers, **{**known.parameters, "threshold": threshold}
        ),
        [wanted, *(others if adapt else [])],
        general.top_k,
    )
    used = made.provenance["parameters"]["threshold"]
    return made, [f"random weights: threshold {used:.3g}, not {wanted}"] if used != wanted else []


def _first_that_does(
    make: Callable[[float], RouterSteering], thresholds: Iterable[float], top_k: int
) -> RouterSteering:
    """The steering by the first threshold that any expert exceeds, and no more of them in a layer
    than can be forced there; else the error of the last one."""
    error = SteeringError("no threshold")
    for threshold in thresholds:
        try:
            made = make(threshold)
        except SteeringError as none:
            error = none
            continue
        if made.force is None or int((made.force > 0).sum(dim=1).max()) <= top_k:
            return made
        error = SteeringError(f"threshold {threshold:g} forces over {top_k} experts in a layer")
    raise error


Control = tuple[RouterSteering, float]


def _multilingual(known: Preset, like: RouterSteering, general: RoutingProfile) -> Control:
    """Experts that some other language selects more often than English (Sec. 5.2), by the
    threshold of the task experts; forced ones by one so high that they fit into top-k."""
    lowest, mode = like.provenance["parameters"]["threshold"], known.parameters["mode"]
    made = _first_that_does(
        lambda threshold: multilingual_experts(
            general, threshold=threshold, layers=known.layers, mode=mode
        ),
        [lowest + 0.05 * n for n in range(20)],
        general.top_k,
    )
    return made, known.strength


def _suppressed(known: Preset, like: RouterSteering, general: RoutingProfile) -> Control:
    """The task experts made less likely, or never selected (Sec. 5.3: lambda below 0)."""
    if like.force is None:
        return replace(like, name="suppressed"), -known.strength
    return replace(like, name="suppressed", force=-like.force), known.strength


_CONTROLS = {"multilingual": _multilingual, "suppressed": _suppressed}
PLANNED = ("", "/random-0", "/outside-middle", *(f"/{name}" for name in _CONTROLS))


def _noted(steering: RouterSteering, name: str, known: Preset, tiny: bool) -> RouterSteering:
    notes: dict[str, Any] = {"preset": name, "preset_source": f"arXiv {known.source}"}
    notes |= {"weights_of_model": "random"} if tiny else {}
    origin = steering.provenance
    return replace(steering, provenance={**origin, "parameters": {**origin["parameters"], **notes}})


def _divergence(general: RoutingProfile, known: Preset) -> str:
    """Mean divergence from English in the steered range and outside (Eqs. 2, 6-8)."""
    mean = torch.stack(list(divergence(general, "en").values())).mean(dim=0)
    inside = torch.tensor([layer in known.layers for layer in general.layers])
    middle, ends = float(mean[inside].mean()), float(mean[~inside].mean())
    first, last = known.layers[0], known.layers[-1]
    return f"divergence from English: {middle:.3f} in layers {first}-{last}, {ends:.3f} outside"


if __name__ == "__main__":
    typer.run(command(experiments))
