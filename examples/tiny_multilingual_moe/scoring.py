"""Right or wrong, problem by problem: by greedy answers, or by one pass over the solution."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from grammar import Language
from rows import Problem
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

LAST_NUMBER = re.compile(r"(\d+)\D*$")
LONGEST = 40  # tokens of a solution of three steps
IGNORED = -100


def number_in(answer: str) -> int | None:
    """The last number of an answer, as in lm-eval's flexible extract."""
    match = LAST_NUMBER.search(answer)
    return int(match.group(1)) if match else None


def batches(
    texts: Sequence[str], size: int, answers: Sequence[str] | None = None
) -> list[list[int]]:
    """Indices of texts, those with answers of like length together, then those of like length."""
    ends = texts if answers is None else answers
    order = sorted(range(len(texts)), key=lambda i: (len(ends[i]), len(texts[i].encode())))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    expected: Sequence[str] | None = None,
    batch_size: int = 128,
) -> list[str]:
    """What ``model`` says to each prompt, greedily; ``expected`` only helps to form batches."""
    said = [""] * len(prompts)
    for rows in batches(prompts, batch_size, expected):
        inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True)
        inputs = {k: inputs[k].to(model.device) for k in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(
            rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            said[row] = text
    return said


def right(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    language: Language,
) -> Tensor:
    """bool ``(problems,)``: whether the last number of the greedy answer is the problem's."""
    prompts = [problem.prompt(language) for problem in problems]
    said = answers(model, tokenizer, prompts, [problem.solution for problem in problems])
    return torch.tensor(
        [number_in(text) == p.answer for text, p in zip(said, problems, strict=True)]
    )


@torch.no_grad()
def solved(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    language: Language,
    batch_size: int = 48,
) -> Tensor:
    """bool ``(problems,)``: whether greedy decoding would give the written solution, token by
    token. One forward pass, so it serves the search on the dev split; it misses right answers that
    were reached by other steps.
    """
    prompts = [problem.prompt(language) for problem in problems]
    solutions = [f"{p.solution}{tokenizer.eos_token}" for p in problems]
    result = torch.zeros(len(problems), dtype=torch.bool)
    for rows in batches(prompts, batch_size):
        ids, labels, mask = _teacher_forced(
            tokenizer, [prompts[i] for i in rows], [solutions[i] for i in rows]
        )
        logits = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits
        hit = logits[:, :-1].argmax(dim=-1).cpu() == labels[:, 1:]
        result[rows] = (hit | (labels[:, 1:] == IGNORED)).all(dim=1)
    return result


def _teacher_forced(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], solutions: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, labels of the solutions alone, and the attention mask."""
    first = tokenizer(prompts)["input_ids"]
    second = tokenizer(solutions, add_special_tokens=False)["input_ids"]
    width = max(len(a) + len(b) for a, b in zip(first, second, strict=True))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, (prompt, solution) in enumerate(zip(first, second, strict=True)):
        end = len(prompt) + len(solution)
        ids[row, :end] = torch.tensor(prompt + solution)
        labels[row, len(prompt) : end] = torch.tensor(solution)
        mask[row, :end] = 1
    return ids, labels, mask


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 48,
) -> float:
    """Perplexity per token over whole texts, end of text included."""
    total, count = 0.0, 0
    for rows in batches(texts, batch_size):
        ends = [tokenizer.eos_token] * len(rows)
        ids, _, mask = _teacher_forced(tokenizer, [texts[i] for i in rows], ends)
        logits = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED).to(model.device)
        total += float(
            functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
            )
        )
        count += int(mask[:, 1:].sum())
    return float(torch.tensor(total / count).exp())
