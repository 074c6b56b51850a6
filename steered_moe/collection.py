"""Texts in, a `RoutingProfile` out: routing summed up during ordinary batched forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.answers import apart, check_settings, ends_of, room_for
from steered_moe.chat import Form
from steered_moe.collector import RoutingCollector
from steered_moe.encoding import check_rows, encode_rows
from steered_moe.errors import FormatError
from steered_moe.merging import stack
from steered_moe.profile import RoutingProfile

__all__ = ["RoutingCollector", "check_texts", "profile_generation", "profile_texts", "stack"]

Tick = Callable[[int], Any]


@torch.no_grad()
def profile_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 16,
    keep_sequences: bool = False,
    chat: bool = False,
    template_tokens: bool = True,
    generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
    tick: Tick = lambda rows: None,
) -> RoutingProfile:
    """Run ``texts`` through ``model`` and sum up what its routers did.

    ``about`` of the profile says the model's dtype, and how texts were put to it where that is not
    the default. 2510.04694 measures with ``chat=True, generation_prompt=False`` and
    ``template_kwargs={"enable_thinking": False}``.

    Args:
        model: Any MoE of transformers; if it is steered, the routing is the steered one.
        tokenizer: Its tokenizer; padding does not count.
        texts: Texts by language; row i should say the same in each if ``keep_sequences`` is set.
        batch_size: Texts per forward pass; it changes no number beyond rounding.
        keep_sequences: Keep each sequence's mean softmax vector too (2510.04694 Eq. 1), which its
            divergence needs: 4 bytes per sequence, layer and expert.
        chat: Put each text into the tokenizer's chat template, as a user's turn.
        template_tokens: Count the tokens that the chat template adds, too.
        generation_prompt: End with what the chat template puts before an answer.
        template_kwargs: For the chat template, such as ``{"enable_thinking": False}``.
        tick: Called with the number of rows done after each batch.

    Raises:
        FormatError: No texts, an empty language, a blank text, one that is longer than the
            model's context, languages of different length where sequences are kept, a chat
            template that is missing or changes the text, settings of it without ``chat``. All
            rows are looked at before the first is run.
        RouterError: The model has no router.
    """
    form = Form(chat, template_tokens, generation_prompt, template_kwargs)
    check_texts(texts, keep_sequences, batch_size)
    check_rows(model, tokenizer, texts, form)
    parts = []
    for language, rows in texts.items():
        collector = RoutingCollector(model, keep_sequences)
        for batch in _batches(rows, batch_size):
            inputs, mask = encode_rows(
                model,
                tokenizer,
                batch,
                chat=chat,
                template_tokens=template_tokens,
                generation_prompt=generation_prompt,
                template_kwargs=template_kwargs,
            )
            with collector.batch(mask):
                model(**inputs, use_cache=False)
            tick(len(batch))
        parts.append(collector.profile(language))
    return replace(stack(parts), about=measured(model, form))


@torch.no_grad()
def profile_generation(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 16,
    chat: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    tick: Tick = lambda rows: None,
    **generate_kwargs: Any,
) -> tuple[RoutingProfile, RoutingProfile]:
    """Let ``model`` answer ``prompts``; routing of the prompts' tokens and of the answers' tokens.

    The answers are made by ``generate`` and then run once more together with their prompts, where
    the routing is read. Counted is what ``generate`` itself routes for a prompt alone: its tokens,
    and those of its answer but the last, the end of the text or the one at ``max_new_tokens``,
    which no forward pass ever sees. A prompt whose answer has no other token adds none to the
    answers' profile, and no sequence.

    Args:
        model: Any MoE of transformers that generates.
        tokenizer: Its tokenizer.
        prompts: Prompts by language.
        batch_size: Prompts per batch.
        chat: Put each prompt into the tokenizer's chat template, as a user's turn.
        template_kwargs: For the chat template, such as ``{"enable_thinking": False}``.
        tick: Called with the number of rows done after each batch.
        generate_kwargs: For ``generate``; greedy unless they say otherwise. One answer per prompt,
            one beam, ended by ``eos_token_id`` or by length only.

    Returns:
        The profile of the prompts and that of the answers.

    Raises:
        FormatError: No prompts, an empty language, a blank prompt, one that leaves no room for
            its answer in the model's context, or settings of ``generate`` under which the routing
            of an answer cannot be told.
        RouterError: The model has no router.
    """
    form = Form(chat, template_kwargs=template_kwargs)
    check_settings(model, generate_kwargs)
    check_texts(prompts, False, batch_size)
    check_rows(model, tokenizer, prompts, form, room_for(model, generate_kwargs))
    ends = ends_of(model, generate_kwargs)
    parts: tuple[list[RoutingProfile], list[RoutingProfile]] = ([], [])
    for language, rows in prompts.items():
        collectors = RoutingCollector(model), RoutingCollector(model)
        for batch in _batches(rows, batch_size):
            inputs, _ = encode_rows(
                model,
                tokenizer,
                batch,
                chat=chat,
                template_kwargs=template_kwargs,
                padding_side="left",
            )
            _answer(model, inputs, ends, collectors, generate_kwargs)
            tick(len(batch))
        for collector, part in zip(collectors, parts, strict=True):
            part.append(collector.profile(language))
    about = measured(model, form)
    return replace(stack(parts[0]), about=about), replace(stack(parts[1]), about=about)


def _answer(
    model: Any,
    inputs: Mapping[str, Tensor],
    ends: list[int],
    collectors: tuple[RoutingCollector, RoutingCollector],
    kwargs: Mapping[str, Any],
) -> None:
    """Answer one batch, and count its prompts in the first collector, its answers in the other."""
    output = model.generate(**inputs, **{"do_sample": False, **kwargs})
    prompt, answer = apart(inputs["attention_mask"], output, ends)
    with collectors[0].batch(prompt), collectors[1].batch(answer, empty=True):
        model(output, attention_mask=prompt | answer, use_cache=False)


def measured(model: Any, form: Form) -> dict[str, Any]:
    """What a profile records of how it was measured: dtype, and what is not the default."""
    dtype = getattr(model, "dtype", None)
    known = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    return known | form.about


def check_texts(
    texts: Mapping[str, Sequence[str]], parallel: bool = False, batch_size: int = 1
) -> None:
    """Refuse texts that cannot be profiled.

    Args:
        texts: Texts by language.
        parallel: Whether each language needs as many.
        batch_size: How many are run at once.

    Raises:
        FormatError: Names the languages, or language and row.
    """
    if batch_size < 1:
        raise FormatError(f"batch_size is {batch_size}; it must be 1 or more")
    if not texts:
        raise FormatError("no texts; give texts by language, such as {'en': [...]}")
    if single := [language for language, rows in texts.items() if isinstance(rows, str)]:
        raise FormatError(f"{', '.join(single)}: one text instead of a list; give ['...']")
    lengths = {language: len(rows) for language, rows in texts.items()}
    if empty := [language for language, length in lengths.items() if length == 0]:
        raise FormatError(f"no texts in {', '.join(empty)}; leave the language out")
    if parallel and len(set(lengths.values())) > 1:
        raise FormatError(f"parallel texts need as many rows in each language, not {lengths}")
    for language, rows in texts.items():
        for i, row in enumerate(rows):
            _check_text(f"{language}, row {i}", row)


def _check_text(place: str, text: Any) -> None:
    if not isinstance(text, str):
        raise FormatError(f"{place} is no text but {text!r:.60}")
    if not text.strip():
        raise FormatError(f"{place} is {text!r:.60}, a blank text; leave it out in every language")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{place} is not valid Unicode at character {error.start}: {text!r:.60}; correct it"
        ) from error


def _batches(rows: Sequence[str], size: int) -> list[Sequence[str]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
