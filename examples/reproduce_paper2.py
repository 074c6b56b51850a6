"""Reproduce the interventions of arXiv 2601.14050, "Understanding Multilingualism in MoE LLMs".

    python examples/reproduce_paper2.py --model qwen3-30b-a3b --out build/paper2 --dry-run
    python examples/reproduce_paper2.py --model qwen3-30b-a3b --out build/paper2
    python examples/reproduce_paper2.py --model phi-3.5-moe --tiny --data DATA --limit 2 --out OUT

``steering``: the experts that English and Chinese share are promoted in the middle layers, with
English or Chinese as the source of coefficients (presets of `steered_moe.selection`), beside random
experts and the paper's controls in early and late layers. ``masking``: the experts that a language
has for itself are never selected in one block of layers, each language masked and each evaluated.
Both read the routing of the MGSM questions. Settings are those of the released code, of whose three
maskings this is the one on MGSM; but it masks by the routing of ten Belebele files, which are not
at hand, and other texts and languages make other experts exclusive.

The paper steers on PolyMath (low); its data are not at hand, so **MGSM stands for it**, whose
questions are also those that were profiled (their answers were not). The released code covers
Qwen3-30B-A3B alone: for the other two models layers are scaled by depth and numbers of experts by
the experts per layer, which is an extrapolation of ours. Telling the language of answers needs
``pip install -e ".[evaluation]"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import typer
from reproducing import Bench, Corpus, Experiment, Options, asked, codes, shortened
from reproducing_run import command

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.controls import BASE, System, random_draws
from steered_moe.errors import SteeringError
from steered_moe.evaluation import Settings
from steered_moe.sampling import Sampling
from steered_moe.selection import PRESETS, Preset, exclusive_experts, method, preset
from steered_moe.tasks import Task, task

QUESTIONS = Corpus(
    "questions", codes("bn de en es fr ja sw zh"), "mgsm", "mgsm/mgsm_{language}.tsv",
    prompt=True,
)  # fmt: skip
"""MGSM questions as prompts, in the languages of the released recordings."""


@dataclass(frozen=True)
class Steered:
    """A steering of the paper: its preset, and other layers for the same rule (its controls)."""

    preset: str
    elsewhere: Mapping[str, range]


STEERINGS: Mapping[str, Steered] = {
    "english": Steered("qwen3-30b-a3b-english", {"early": range(8), "late": range(40, 48)}),
    "chinese": Steered("qwen3-30b-a3b-chinese", {}),
}
"""By system; the released script has the controls for English only, in 0-7 and 40-47."""
BLOCKS = (range(5), range(22, 27), range(43, 48))
MASK_TOP, MASK_THRESHOLD = 15, 0.4
"""Blocks of the masking, and its settings: defaults of the released README for MGSM."""
MASK_NOTE = (
    "the released code masks by the routing of ten Belebele files, here it is that of the MGSM "
    "questions in eight languages: other texts and languages make other experts exclusive"
)
STEERED_LANGUAGES = codes("ja sw fr es bn de")
SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20)
NEW_TOKENS = 4096
"""Decoding, and languages of the steering, in the released scripts."""
DEPTH, EXPERTS = 48, 128  # of Qwen3-30B-A3B, for which all layers and numbers above are
PAPERS_MODEL = PRESETS[STEERINGS["english"].preset].model
NOTES = (
    "PolyMath is not at hand: MGSM stands for it, and its questions were profiled too (not their "
    "answers)",
    "prompts are those of MGSM in the chat template; the paper asks for a boxed answer, in words "
    "that come with PolyMath",
    "the paper's numbers are not known; only its settings are compared",
)


def experiments(options: Options) -> list[Experiment]:
    """Steering and masking on one model."""
    asks = shortened(task("mgsm_direct"), options, NEW_TOKENS)
    # Chat answers end by themselves; one that reasons may well write "Question:" on its way.
    asks = replace(asks, rule="final_number", stops=lambda language: ())
    notes = (*NOTES, *_extrapolated(options))
    return [_steering(asks, options, notes), _masking(asks, options, notes)]


def _steering(asks: Task, options: Options, notes: tuple[str, ...]) -> Experiment:
    planned = [
        f"{name}{control}"
        for name, one in STEERINGS.items()
        for control in ("", "/random-0", *(f"/{where}" for where in one.elsewhere))
    ]
    languages, lacking = asked(asks, STEERED_LANGUAGES, options)
    return Experiment(
        "steering", asks, languages, _settings(options), (QUESTIONS,), (BASE, *planned),
        steered_systems, (*notes, *lacking), consistency=True,
    )  # fmt: skip


def _masking(asks: Task, options: Options, notes: tuple[str, ...]) -> Experiment:
    planned = [f"mask-{code}-{in_words(b)}" for code in QUESTIONS.languages for b in BLOCKS]
    languages, lacking = asked(asks, QUESTIONS.languages, options)
    notes = (*notes, *lacking, MASK_NOTE)
    return Experiment(
        "masking", asks, languages, _settings(options), (QUESTIONS,), (BASE, *planned),
        masked_systems, notes, saved=False, consistency=True,
    )  # fmt: skip


def _settings(options: Options) -> Settings:
    return Settings("all", options.limit, options.batch_size, chat=True, sampling=SAMPLING)


def steered_systems(
    bench: Bench, profiles: Mapping[str, RoutingProfile]
) -> tuple[list[System], list[str]]:
    """Base, shared experts by each preset, random experts and other layers."""
    made, notes = [System(BASE)], list[str]()
    for name, one in STEERINGS.items():
        known = preset(one.preset)
        steering = shared(known, known.layers, bench, profiles["questions"])
        steering = _noted(replace(steering, name=name), one.preset, bench)
        made.append(System(name, steering, known.strength))
        notes.append(f"{name}: {_counts(steering)}, strength {known.strength}")
        others = random_draws(steering, 1)
        for where, layers in one.elsewhere.items():
            control = shared(known, layers, bench, profiles["questions"])
            others.append(replace(control, name=where))
        made += [System(f"{name}/{other.name}", other, known.strength) for other in others]
    return made, notes


def shared(known: Preset, layers: range, bench: Bench, questions: RoutingProfile) -> RouterSteering:
    """The experts that the languages of a preset share in layers counted on Qwen3-30B-A3B."""
    settings = {**known.parameters, "top": _scaled(known.parameters["top"], questions)}
    return method(known.method)(questions, layers=at_depth(layers, depth(bench)), **settings)


def masked_systems(
    bench: Bench, profiles: Mapping[str, RoutingProfile]
) -> tuple[list[System], list[str]]:
    """Base, and for each language and block its exclusive experts, never selected."""
    made, notes, questions = [System(BASE)], list[str](), profiles["questions"]
    top = _scaled(MASK_TOP, questions)
    for code in questions.languages:
        for block in BLOCKS:
            name, layers = f"mask-{code}-{in_words(block)}", at_depth(block, depth(bench))
            try:
                mask = exclusive_experts(
                    questions, code, top=top, threshold=MASK_THRESHOLD, layers=layers, name=name
                )
            except SteeringError as error:
                notes.append(f"{name} left out: {error}")
                continue
            made.append(System(name, mask))
    return made, notes


def depth(bench: Bench) -> int:
    """Decoder layers of the model."""
    return int(bench.config.num_hidden_layers)


def at_depth(layers: range, number: int) -> range:
    """The same part of a model of another depth; at least one layer."""
    first, last = (round(edge * number / DEPTH) for edge in (layers.start, layers.stop))
    return range(first, max(last, first + 1))


def in_words(layers: range) -> str:
    """``10-39``."""
    return f"{layers[0]}-{layers[-1]}"


def _scaled(top: int, profile: RoutingProfile) -> int:
    """As large a share of the experts as it is of 128; at least 1."""
    return max(1, round(top * profile.num_experts / EXPERTS))


def _counts(steering: RouterSteering) -> str:
    layers = steering.layers.tolist()
    return f"{steering.num_steered_experts} experts in layers {layers[0]}-{layers[-1]}"


def _extrapolated(options: Options) -> list[str]:
    """Said of the models that the released code does not cover."""
    if preset(f"{options.model}-mgsm").model == PAPERS_MODEL:
        return []
    return [
        f"EXTRAPOLATION, not the paper's: its code covers {PAPERS_MODEL} alone; layers are scaled "
        "by depth, numbers of experts by experts per layer, strengths left as they are. Names of "
        "masks count layers on that model"
    ]


def _noted(steering: RouterSteering, name: str, bench: Bench) -> RouterSteering:
    notes: dict[str, Any] = {"preset": name, "preset_source": f"arXiv {PRESETS[name].source}"}
    notes |= {"weights_of_model": "random"} if bench.options.tiny else {}
    notes |= {"extrapolated": True} if bench.hub_id != PAPERS_MODEL else {}
    origin = steering.provenance
    return replace(steering, provenance={**origin, "parameters": {**origin["parameters"], **notes}})


if __name__ == "__main__":
    typer.run(command(experiments))
