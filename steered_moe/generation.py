"""Prompts in, text out: base and steered in one batch, and what steering changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from steered_moe.modeling import SteeredMoEForCausalLM
from steered_moe.recording import Selections, record_selections


@dataclass(frozen=True)
class Comparison:
    """One prompt, answered by the base model and by the steered one.

    Args:
        base: Generated token ids of the base model, without padding.
        steered: Generated token ids at the steering's strength.
        changed: Layer -> share of the prompt's routing choices that steering changed, in [0, 1].
    """

    base: list[int]
    steered: list[int]
    changed: dict[int, float]


class Counter(BaseStreamer):
    """Calls back after each generated position, for a progress bar; any batch size.

    Args:
        tick: Called once per position; the prompt does not count.
    """

    def __init__(self, tick: Callable[[], Any]) -> None:
        self._tick = tick
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Called by generate with the prompt first, then with each new token."""
        if not self._prompt:
            self._tick()
        self._prompt = False

    def end(self) -> None:
        """Called by generate at the end."""


def compare(
    model: SteeredMoEForCausalLM,
    inputs: dict[str, Tensor],
    tick: Callable[[], Any] = lambda: None,
    **generate_kwargs: Any,
) -> Comparison:
    """Generate from one prompt with the base model and with the steered one, in one batch.

    Args:
        model: Steered at its present strengths, one number each.
        inputs: ``input_ids`` and ``attention_mask`` of shape ``(1, positions)``.
        tick: Called after each generated position.
        generate_kwargs: For ``generate``; greedy unless they say otherwise.

    Raises:
        SteeringError: The model has strengths per row.
    """
    twice = {key: value.to(model.device).repeat(2, 1) for key, value in inputs.items()}
    rows = {name: [0.0, float(x)] for name, x in model.strengths.items()}
    with model.steered(rows), record_selections(model) as selections, torch.no_grad():
        output = model.generate(
            **twice, streamer=Counter(tick), **{"do_sample": False, **generate_kwargs}
        )
    length = inputs["input_ids"].shape[1]
    base, steered = (_trim(row[length:].tolist(), model) for row in output)
    return Comparison(base, steered, _changed(selections, inputs["attention_mask"][0].bool()))


def _trim(tokens: list[int], model: SteeredMoEForCausalLM) -> list[int]:
    """Tokens up to the first end-of-sequence token."""
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def _changed(selections: Selections, mask: Tensor) -> dict[int, float]:
    """Share of choices of the prompt (first pass) that row 1 makes otherwise than row 0."""
    changed = {}
    for layer, passes in sorted(selections.items()):
        base, steered = passes[0].cpu().reshape(2, len(mask), -1)[:, mask.cpu()]
        kept = (base.unsqueeze(-1) == steered.unsqueeze(-2)).any(dim=-1)
        changed[layer] = 1.0 - float(kept.double().mean())
    return changed
