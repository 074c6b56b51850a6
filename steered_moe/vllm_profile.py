"""Texts through a vLLM engine, a `RoutingProfile` out.

llm = LLM(BASE, additional_config={"steered_moe": {"profile": True}},
          worker_extension_cls="steered_moe.vllm_worker.WorkerExtension")
profile = profile_with_vllm(llm, {"en": [...], "sw": [...]})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from steered_moe.chat import Form
from steered_moe.collection import check_texts
from steered_moe.encoding import token_ids
from steered_moe.errors import FormatError, InterventionError
from steered_moe.merging import stack
from steered_moe.profile import RoutingProfile
from steered_moe.vllm_settings import KEY, is_profiling

_FETCH = "steered_moe_profile"


def profile_with_vllm(
    llm: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    tokenizer: Any = None,
    chat: bool = False,
    generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> RoutingProfile:
    """Run ``texts`` through an engine and sum up what its routers did.

    The counts are those of `profile_texts` on the same model. Left out are numbers that need a
    text's own tokens (entropy, consistency, means over texts), and sums of routing weights, which
    vLLM scales in different places on different devices.

    Args:
        llm: vLLM's ``LLM``, started with ``profile`` and the worker extension. Nothing else may
            run on it meanwhile.
        texts: Texts by language.
        tokenizer: The engine's own by default.
        chat: Put each text into the tokenizer's chat template, as a user's turn.
        generation_prompt: End with what the chat template puts before an answer.
        template_kwargs: For the chat template.

    Raises:
        FormatError: No texts, an empty language or a blank text.
        InterventionError: The engine was not started for it, its processes have counted different
            things, or other requests ran meanwhile.
    """
    config = llm.llm_engine.vllm_config
    if not is_profiling(config.additional_config):
        raise InterventionError(
            f'the engine counts no routing; start it with additional_config={{"{KEY}": '
            '{"profile": True}}'
        )
    check_texts(texts)
    form = Form(chat, generation_prompt=generation_prompt, template_kwargs=template_kwargs)
    tokenizer = tokenizer or llm.get_tokenizer()
    parts = [_language(llm, name, token_ids(tokenizer, rows, form)) for name, rows in texts.items()]
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    return replace(stack(parts), about={"dtype": dtype, **form.about})


def _language(llm: Any, language: str, rows: Sequence[Sequence[int]]) -> RoutingProfile:
    from vllm import SamplingParams

    if empty := [i for i, row in enumerate(rows) if not row]:
        raise FormatError(f"{language}, row {empty[0]} has no token; leave it out")
    once = SamplingParams(max_tokens=1, detokenize=False, skip_reading_prefix_cache=True)
    prompts = [{"prompt_token_ids": list(row)} for row in rows]
    llm.collective_rpc(_FETCH)  # what ran before does not count
    llm.generate(prompts, once, use_tqdm=False)
    found = llm.collective_rpc(_FETCH)
    expected = sum(map(len, rows))
    if (seen := {one["tokens"] for one in found}) != {expected}:
        raise InterventionError(
            f"{language}: the engine has run {sorted(seen)} tokens, the texts have {expected}; "
            "let no other request run meanwhile, and give it more cache so that none is run twice"
        )
    return _profile(language, expected, _joined(found))


def _joined(found: Sequence[Mapping[str, Any]]) -> dict[int, list[float]]:
    """The layers of all workers; where two have the same layer they must agree."""
    layers: dict[int, list[float]] = {}
    for worker in found:
        for name, counts in worker["layers"].items():
            if layers.setdefault(int(name), counts) != counts:
                raise InterventionError(f"two processes have counted layer {name} differently")
    return dict(sorted(layers.items()))


def _profile(language: str, tokens: int, layers: Mapping[int, list[float]]) -> RoutingProfile:
    if not layers:
        raise InterventionError("this model hands no router to vLLM; profile it with transformers")
    if len(numbers := {len(row) for row in layers.values()}) > 1:
        raise FormatError(f"layers differ in their number of experts: {sorted(numbers)}")
    counts = torch.tensor([list(layers.values())], dtype=torch.float64)
    seen = torch.full((1, len(layers)), float(tokens), dtype=torch.float64)
    return RoutingProfile((language,), tuple(layers), counts, seen)
