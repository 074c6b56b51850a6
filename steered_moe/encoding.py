"""Texts to token ids: chat templates, padding, and which tokens count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.chat import Form
from steered_moe.errors import FormatError

Inputs = dict[str, Tensor]
_AT_ONCE = 256  # rows that are tokenized together to see how long they are


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    chat: bool | None = None,
    *,
    generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Inputs:
    """Left-padded inputs for generate.

    Args:
        tokenizer: A tokenizer of transformers.
        prompts: The texts.
        chat: Put each into the chat template as a user's turn; None means if there is one.
        generation_prompt: End with what the template puts before an answer.
        template_kwargs: For the template, such as ``{"enable_thinking": False}``.

    Raises:
        FormatError: A chat that the tokenizer has no template for, or settings of one without it.
    """
    use_chat = tokenizer.chat_template is not None if chat is None else chat
    form = Form(use_chat, generation_prompt=generation_prompt, template_kwargs=template_kwargs)
    return _padded(tokenizer, _tokenized(tokenizer, form.render(tokenizer, prompts), form), "left")


def encode_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[str],
    *,
    chat: bool = False,
    template_tokens: bool = True,
    generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
    padding_side: str | None = None,
) -> tuple[Inputs, Tensor]:
    """Inputs of one forward pass, on the model's device, and the tokens of them that count.

    Args:
        model: What the inputs are for.
        tokenizer: Its tokenizer; it is left as it is.
        rows: The texts.
        chat: Put each into the chat template, as a user's turn.
        template_tokens: Whether the tokens that the template adds count, too.
        generation_prompt: End with what the template puts before an answer.
        template_kwargs: For the template, such as ``{"enable_thinking": False}``.
        padding_side: "left" or "right"; the tokenizer's own by default.

    Returns:
        The inputs, and bool ``(texts, positions)``.

    Raises:
        FormatError: A text without a token, or one that is longer than the model's context; a chat
            template that is missing or changes the text; settings of it without ``chat``.
    """
    form = Form(chat, template_tokens, generation_prompt, template_kwargs)
    encoded, counted = _rows(tokenizer, rows, form)
    _check_lengths(model, rows, encoded, counted)
    side = padding_side or tokenizer.padding_side
    inputs = _padded(tokenizer, encoded, side)
    mask = _stacked(counted, side, 0).bool()
    device = input_device(model)
    return {name: tensor.to(device) for name, tensor in inputs.items()}, mask.to(device)


def check_rows(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    form: Form,
    room: int = 0,
) -> None:
    """Refuse texts that `encode_rows` would refuse, before any of them is run.

    Args:
        model: What runs them.
        tokenizer: Its tokenizer.
        texts: Texts by language.
        form: How they are put to the model.
        room: Tokens of the context that have to stay free, for an answer.

    Raises:
        FormatError: Names language and row.
    """
    for language, rows in texts.items():
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            names = [f"{language}, row {start + i}: " for i in range(len(some))]
            _check_lengths(model, some, *_rows(tokenizer, some, form), names, room)


def as_chats(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Each text as a user's turn in the tokenizer's chat template, up to where the answer begins.

    Raises:
        FormatError: The tokenizer has no chat template.
    """
    return Form(chat=True).render(tokenizer, texts)


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go; of an offloaded one, where its embeddings run."""
    entry: Any = model
    hook = getattr(entry.get_input_embeddings(), "_hf_hook", None)
    runs_on = getattr(hook, "execution_device", None)
    if runs_on is not None:
        return torch.device(runs_on)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _rows(tokenizer: Any, rows: Sequence[str], form: Form) -> tuple[Any, list[list[int]]]:
    """Token ids without padding, and 1 for each token that counts."""
    texts = form.render(tokenizer, rows)
    if form.template_tokens:
        encoded = _tokenized(tokenizer, texts, form)
        return encoded, encoded["attention_mask"]
    if not tokenizer.is_fast:
        raise FormatError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens are; count those "
            "of the chat template, too (template_tokens=True), or load a fast tokenizer"
        )
    encoded = _tokenized(tokenizer, texts, form, return_offsets_mapping=True)
    spans = form.spans(tokenizer, rows, texts)
    counted = [
        [int(end > first and start < last) for start, end in offsets]
        for offsets, (first, last) in zip(encoded["offset_mapping"], spans, strict=True)
    ]
    return encoded, counted


def token_ids(tokenizer: Any, texts: Sequence[str], form: Form) -> list[list[int]]:
    """Tokens of each text as it is put to a model, without padding.

    Raises:
        FormatError: A chat template that is missing or refuses a text.
    """
    ids: list[list[int]] = _tokenized(tokenizer, form.render(tokenizer, texts), form)["input_ids"]
    return ids


def _tokenized(tokenizer: Any, texts: Sequence[str], form: Form, **options: Any) -> Any:
    return tokenizer(
        list(texts),
        add_special_tokens=not form.chat,
        return_attention_mask=True,
        return_token_type_ids=False,
        **options,
    )


def _padded(tokenizer: Any, encoded: Any, side: str) -> Inputs:
    """Tensors of equal length; the tokenizer's own padding would need a padding token set in it."""
    blank = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return {
        "input_ids": _stacked(encoded["input_ids"], side, blank),
        "attention_mask": _stacked(encoded["attention_mask"], side, 0),
    }


def _stacked(rows: Sequence[Sequence[int]], side: str, blank: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=blank, padding_side=side
    )


def _check_lengths(
    model: nn.Module,
    rows: Sequence[str],
    encoded: Any,
    counted: Sequence[Sequence[int]],
    names: Sequence[str] = (),
    room: int = 0,
) -> None:
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    names = names or [""] * len(rows)
    for name, row, ids, marks in zip(names, rows, encoded["input_ids"], counted, strict=True):
        if not any(marks):
            raise FormatError(f"{name}{row!r} has no token; leave it out in every language")
        if context is not None and len(ids) + room > context:
            answer = f" and {room} more for the answer" if room else ""
            raise FormatError(
                f"{name}{row!r:.60} has {len(ids)} tokens{answer}, but the model's context is "
                f"{context}; shorten it, or leave it out in every language"
            )
