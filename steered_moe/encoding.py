"""Texts to token ids: chat templates, padding, and which tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.errors import FormatError

Inputs = dict[str, Tensor]


def encode(tokenizer: Any, prompts: Sequence[str], chat: bool | None = None) -> Inputs:
    """Left-padded inputs for generate.

    Args:
        tokenizer: A tokenizer of transformers.
        prompts: The texts.
        chat: Put each into the chat template as a user's turn; None means if there is one.
    """
    use_chat = tokenizer.chat_template is not None if chat is None else chat
    texts = as_chats(tokenizer, prompts) if use_chat else list(prompts)
    return _tokenized(tokenizer, texts, padding_side="left", add_special_tokens=not use_chat)


def encode_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[str],
    *,
    chat: bool = False,
    template_tokens: bool = True,
    padding_side: str | None = None,
) -> tuple[Inputs, Tensor]:
    """Inputs of one forward pass, on the model's device, and the tokens of them that count.

    Args:
        model: What the inputs are for.
        tokenizer: Its tokenizer.
        rows: The texts.
        chat: Put each into the chat template, as a user's turn.
        template_tokens: Whether the tokens that the template adds count, too.
        padding_side: "left" or "right"; the tokenizer's own by default.

    Returns:
        The inputs, and bool ``(texts, positions)``.

    Raises:
        FormatError: A text without a token, or one that is longer than the model's context; a chat
            template that is missing or changes the text.
    """
    texts = as_chats(tokenizer, rows) if chat else list(rows)
    own_only = chat and not template_tokens
    inputs = _tokenized(
        tokenizer,
        texts,
        add_special_tokens=not chat,
        return_offsets_mapping=own_only,
        **({} if padding_side is None else {"padding_side": padding_side}),
    )
    mask = inputs["attention_mask"].bool()
    if own_only:
        mask = mask & _inside(inputs.pop("offset_mapping"), rows, texts)
    _check_lengths(model, rows, inputs["attention_mask"], mask)
    device = input_device(model)
    return {name: tensor.to(device) for name, tensor in inputs.items()}, mask.to(device)


def as_chats(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Each text as a user's turn in the tokenizer's chat template, up to where the answer begins.

    Raises:
        FormatError: The tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise FormatError(f"{name} has no chat template; give texts as they are, without chat")
    turns = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        for turn in turns
    ]


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go; of an offloaded one, where its embeddings run."""
    entry: Any = model
    hook = getattr(entry.get_input_embeddings(), "_hf_hook", None)
    runs_on = getattr(hook, "execution_device", None)
    if runs_on is not None:
        return torch.device(runs_on)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _tokenized(tokenizer: Any, texts: Sequence[str], **options: Any) -> Inputs:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return dict(
        tokenizer(
            list(texts), return_tensors="pt", padding=True, return_token_type_ids=False, **options
        )
    )


def _inside(offsets: Tensor, rows: Sequence[str], texts: Sequence[str]) -> Tensor:
    """bool ``(texts, positions)``: tokens that have a character of the row itself."""
    spans = []
    for row, text in zip(rows, texts, strict=True):
        start = text.rfind(row.strip())  # templates may strip, nothing else
        if start < 0:
            raise FormatError(f"the chat template changes {row!r:.60}; count its tokens, too")
        spans.append((start, start + len(row.strip())))
    first, last = torch.tensor(spans).unsqueeze(1).unbind(dim=-1)
    inside: Tensor = (offsets[..., 1] > first) & (offsets[..., 0] < last)
    return inside


def _check_lengths(model: nn.Module, rows: Sequence[str], inputs: Tensor, counted: Tensor) -> None:
    empty = (~counted.any(dim=1)).nonzero()
    if len(empty):
        raise FormatError(f"{rows[int(empty[0])]!r} has no token; leave it out in every language")
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = int(inputs.sum(dim=1).argmax())
    length = int(inputs[longest].sum())
    if context is not None and length > context:
        raise FormatError(
            f"{rows[longest]!r:.60} has {length} tokens, but the model's context is {context}; "
            "shorten the row, or leave it out in every language"
        )
