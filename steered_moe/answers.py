"""What ``generate`` is told, where its answers end, and which of their tokens it routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import FormatError

_INPUTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
_ONE = ("num_return_sequences", "num_beams")
_UNTOLD = ("return_dict_in_generate", "stop_strings", "stopping_criteria")
_NEW_TOKENS = 20  # what ``generate`` does when nothing says how long an answer may be


def check_settings(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse settings of ``generate`` under which the routing of an answer cannot be told.

    Args:
        model: Its ``generation_config`` counts where ``kwargs`` say nothing.
        kwargs: Those of ``generate``.

    Raises:
        FormatError: Names the setting.
    """
    given = [f"{name}" for name in _INPUTS if name in kwargs]
    several = [
        f"{n}={_setting(model, kwargs, n)}" for n in _ONE if _more_than_one(model, kwargs, n)
    ]
    untold = [name for name in _UNTOLD if _setting(model, kwargs, name)]
    if refused := [*given, *several, *untold]:
        raise FormatError(
            f"profile_generation cannot work with {', '.join(refused)}: it makes the inputs, and "
            "one answer per prompt that eos_token_id or its length ends; leave it out"
        )


def ends_of(model: Any, kwargs: Mapping[str, Any]) -> list[int]:
    """Tokens that end an answer; none where ``eos_token_id`` is None."""
    ends = _setting(model, kwargs, "eos_token_id")
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


def room_for(model: Any, kwargs: Mapping[str, Any]) -> int:
    """Tokens of the context that the longest answer takes.

    Raises:
        FormatError: ``max_length`` is more than the context.
    """
    new = _setting(model, kwargs, "max_new_tokens")
    total = kwargs.get("max_length")
    if new is not None or total is None:
        return _NEW_TOKENS if new is None else int(new)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and total > context:
        raise FormatError(f"max_length is {total}, but the model's context is {context}")
    return 1


def apart(prompt: Tensor, output: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """Masks of the prompts' tokens and of those that ``generate`` routed of the answers.

    Args:
        prompt: bool or int ``(sequences, positions)``, the prompts without padding.
        output: int64 ``(sequences, positions)``, prompts and answers.
        ends: Tokens that end an answer.

    Returns:
        Two bool tensors of the shape of ``output``.
    """
    answer = output[:, prompt.shape[1] :]
    ended = torch.isin(answer, torch.tensor(ends, dtype=answer.dtype, device=answer.device))
    routed = ended.int().cumsum(dim=1) == 0
    routed[:, -1:] = False
    blank = torch.zeros_like(routed)
    return (
        torch.cat([prompt.bool(), blank], dim=1),
        torch.cat([torch.zeros_like(prompt.bool()), routed], dim=1),
    )


def _more_than_one(model: Any, kwargs: Mapping[str, Any], name: str) -> bool:
    return (_setting(model, kwargs, name) or 1) > 1


def _setting(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """As ``generate`` looks it up: its keyword, its ``generation_config``, the model's."""
    if name in kwargs:
        return kwargs[name]
    config = kwargs.get("generation_config") or model.generation_config
    return getattr(config, name, None)
