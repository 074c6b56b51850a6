"""A batch of prompts to answers, and of continuations to log-likelihoods, as lm-eval computes them.

Both follow the Hugging Face backend of lm-eval 0.4.13, so that scores can be compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steered_moe.chat import Form
from steered_moe.encoding import encode, input_device
from steered_moe.errors import FormatError
from steered_moe.sampling import Sampling
from steered_moe.stopping import StopTexts

CHANGE_GREEDY = (
    "repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids",
    "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "guidance_scale",
)  # fmt: skip
"""Settings of a generation config that change greedy answers too."""


def changes_of_greedy(model: PreTrainedModel) -> list[str]:
    """What a model's generation config holds that changes greedy answers, with its values."""
    found = model.generation_config.to_diff_dict()
    return [f"{name} {found[name]}" for name in CHANGE_GREEDY if name in found]


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    stops: Sequence[str] = (),
    max_new_tokens: int,
    chat: bool = False,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """Answer each prompt, in one batch.

    What else the model's generation config says, such as a repetition penalty, holds here too, as
    it does in lm-eval.

    Args:
        model: Steered or not.
        tokenizer: Its tokenizer.
        prompts: The texts.
        stops: Texts that end an answer; they are cut off.
        max_new_tokens: Longest answer.
        chat: Put each prompt into the chat template.
        sampling: Greedy without it.
        seeds: Of sampling, one for each prompt.
        template_kwargs: For the chat template.

    Raises:
        FormatError: A prompt that leaves no room for its answer in the model's context.
    """
    inputs = encode(tokenizer, prompts, chat, template_kwargs=template_kwargs if chat else None)
    length = inputs["input_ids"].shape[1]
    _check_room(model, length, max_new_tokens)
    device = input_device(model)
    early = [StopTexts(tokenizer, stops, length)] if stops else []
    output: Any = model.generate(
        **{name: tensor.to(device) for name, tensor in inputs.items()},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        logits_processor=(sampling or Sampling()).processors(seeds),
        stopping_criteria=early,
    )
    texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return [_cut(text, stops) for text in texts]


def _check_room(model: Any, length: int, new: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length + new > context:
        raise FormatError(
            f"a prompt has {length} tokens and its answer up to {new}, but the model's context is "
            f"{context}; leave it out, or use fewer examples"
        )


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    chat: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> list[float]:
    """Natural log of the probability of each continuation after its context, in one batch.

    Continuations whose contexts and all tokens but the last are equal, such as the letters of a
    multiple choice, share a row of the forward pass.

    Args:
        model: Steered or not.
        tokenizer: Its tokenizer.
        pairs: Context and continuation.
        chat: Put each context into the chat template.
        template_kwargs: For the chat template.

    Raises:
        FormatError: A continuation without a token, a text longer than the model's context, or
            a chat without a template.
    """
    encoded = [_pair(tokenizer, *pair, chat, template_kwargs) for pair in pairs]
    rows: dict[tuple[int, ...], int] = {}
    for ids, _ in encoded:
        rows.setdefault(tuple(ids[:-1]), len(rows))
    _check_room(model, max(map(len, rows)), 0)
    first = min(start for _, start in encoded) - 1
    logits, left = _forward(model, tokenizer, list(rows), first)
    return [_score(logits[rows[tuple(ids[:-1])]], ids, start - left) for ids, start in encoded]


def _pair(
    tokenizer: Any, context: str, continuation: str, chat: bool, template: dict[str, Any] | None
) -> tuple[list[int], int]:
    """Token ids of both, and where the continuation begins.

    Blanks at the end of the context go to the continuation, as tokenizers join them to the word
    that follows. A plain text begins as the tokenizer begins one; a chat template does so itself.
    Where a token would span both, the context keeps the tokens it has alone: lm-eval's rule.
    """
    if chat:
        context = Form(chat=True, template_kwargs=template).render(tokenizer, [context])[0]
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    if not bare:
        prefix = [_prefix(tokenizer)]
        return prefix + tokenizer.encode(continuation, add_special_tokens=False), 1
    whole = tokenizer.encode(bare + continuation, add_special_tokens=not chat)
    before = tokenizer.encode(bare, add_special_tokens=not chat)
    if len(before) >= len(whole):
        raise FormatError(f"{continuation!r:.60} adds no token to its context; leave it out")
    return before + whole[len(before) :], len(before)


def _prefix(tokenizer: Any) -> int:
    """What stands before a text without a context: the beginning of a sequence, or its end."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = next((token for token in known if token is not None), None)
    if found is None:
        raise FormatError("the tokenizer has neither a token for the beginning nor for the end")
    return int(found)


def _forward(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], first: int
) -> tuple[list[Tensor], int]:
    """Logits of each row from a position on, ``(positions, tokens)``, and that position: ``first``
    where the model can leave the others out, 0 where it cannot."""
    width = max(map(len, rows))
    blank = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), width), blank)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    device = input_device(model)
    less = {"logits_to_keep": width - first}
    if "logits_to_keep" not in signature(model.forward).parameters:
        less, first = {}, 0
    logits = model(ids.to(device), attention_mask=mask.to(device), use_cache=False, **less).logits
    return [logits[i, : len(row) - first] for i, row in enumerate(rows)], first


def _score(logits: Tensor, ids: Sequence[int], start: int) -> float:
    """In float32, and of the continuation's positions alone: vocabularies are large."""
    wanted = logits[start - 1 :].float()
    targets = torch.tensor(ids[-len(wanted) :], device=wanted.device).unsqueeze(-1)
    return float((wanted.gather(-1, targets).squeeze(-1) - wanted.logsumexp(dim=-1)).sum())
