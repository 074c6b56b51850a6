"""Methods that turn routing profiles into a steering, by name, and the papers' settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from steered_moe.contrast import (
    frequency_difference,
    multilingual_experts,
    preferred,
    risk_difference,
    task_experts,
)
from steered_moe.errors import SteeringError
from steered_moe.settings import whole
from steered_moe.sharing import exclusive_experts, language_shares, shared_experts
from steered_moe.steering import RouterSteering

__all__ = [
    "METHODS",
    "PRESETS",
    "Preset",
    "exclusive_experts",
    "frequency_difference",
    "language_shares",
    "method",
    "multilingual_experts",
    "preferred",
    "preset",
    "random_experts",
    "risk_difference",
    "shared_experts",
    "task_experts",
]


def random_experts(like: RouterSteering, *, seed: int = 0, name: str = "random") -> RouterSteering:
    """A matched control: as many experts per layer with the same numbers, drawn at random.

    Args:
        like: The steering to match; each of its rows is permuted over the experts.
        seed: Of the draw.
        name: Name of the steering.

    Raises:
        SteeringError: A seed that is no whole number, or one beyond 64 bits.
    """
    if not -(2**63) <= whole("seed", seed) < 2**64:
        raise SteeringError(f"seed is {seed}; it must lie between -2**63 and 2**64 - 1")
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack(
        [torch.randperm(like.num_experts, generator=generator) for _ in like.layers]
    )
    return replace(
        like,
        name=name,
        weights=like.weights.gather(1, orders),
        force=None if like.force is None else like.force.gather(1, orders),
        provenance={
            "method": "random_experts",
            "parameters": {"seed": seed},
            "like": {"name": like.name, **dict(like.provenance)},
        },
    )


METHODS: dict[str, Callable[..., RouterSteering]] = {
    "task_experts": task_experts,
    "multilingual_experts": multilingual_experts,
    "shared_experts": shared_experts,
    "exclusive_experts": exclusive_experts,
    "risk_difference": risk_difference,
    "preferred": preferred,
    "random": random_experts,
}
"""Method by name; put your own in to make it known to the command line and to cards."""


def method(name: str) -> Callable[..., RouterSteering]:
    """A method of `METHODS`.

    Raises:
        SteeringError: No such method; names those there are.
    """
    if name not in METHODS:
        raise SteeringError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


_QWEN3, _PHI = "Qwen/Qwen3-30B-A3B", "microsoft/Phi-3.5-MoE-instruct"
_GPT_OSS = "openai/gpt-oss-20b"


@dataclass(frozen=True)
class Preset:
    """Settings that a paper reports for one model and task.

    Args:
        model: Hub id.
        task: What was steered for.
        source: arXiv number.
        method: Name in `METHODS`.
        layers: 0-based decoder layers.
        parameters: Further arguments of the method.
        strength: At run time.
    """

    model: str
    task: str
    source: str
    method: str
    layers: range
    parameters: Mapping[str, Any]
    strength: float


def _task(
    model: str, task: str, layers: tuple[int, int], threshold: float, mode: str, strength: float
) -> Preset:
    """A row of 2510.04694. Its layers count from 1; whether the last one is included is not
    certain, and is taken to be so."""
    zero_based = range(layers[0] - 1, layers[1])
    parameters = {"threshold": threshold, "mode": mode}
    return Preset(model, task, "2510.04694", "task_experts", zero_based, parameters, strength)


def _shared(source: str, languages: tuple[str, str], strength: float) -> Preset:
    """A run of the released code of 2601.14050, whose layers count from 0."""
    parameters = {"languages": languages, "top": 20, "threshold": 0.7}
    task = f"maths, {source}"
    return Preset(_QWEN3, task, "2601.14050", "shared_experts", range(10, 40), parameters, strength)


PRESETS: Mapping[str, Preset] = {
    "qwen3-30b-a3b-mgsm": _task(_QWEN3, "MGSM", (8, 35), 0.4, "soft", 0.5),
    "phi-3.5-moe-mgsm": _task(_PHI, "MGSM", (8, 17), 0.3, "soft", 0.5),
    "gpt-oss-20b-mgsm": _task(_GPT_OSS, "MGSM", (4, 19), 0.3, "hard", 1.0),
    "qwen3-30b-a3b-medicine": _task(_QWEN3, "medicine", (8, 35), 0.5, "hard", 1.0),
    "phi-3.5-moe-medicine": _task(_PHI, "medicine", (8, 17), 0.25, "soft", 0.5),
    "gpt-oss-20b-medicine": _task(_GPT_OSS, "medicine", (4, 19), 0.3, "soft", 0.5),
    "qwen3-30b-a3b-english": _shared("English as source", ("en", "zh"), 0.022),
    "qwen3-30b-a3b-chinese": _shared("Chinese as source", ("zh", "en"), 0.034),
}
"""Settings of the papers by name."""


def preset(name: str) -> Preset:
    """A preset of `PRESETS`.

    Raises:
        SteeringError: No such preset; names those there are.
    """
    if name not in PRESETS:
        raise SteeringError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
