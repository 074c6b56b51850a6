"""Texts in, a `RoutingProfile` out: routing summed up during ordinary batched forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.consistency import consistency_of, token_pairs
from steered_moe.divergence import entropy
from steered_moe.encoding import encode_rows, input_device
from steered_moe.errors import FormatError
from steered_moe.profile import RoutingProfile
from steered_moe.recording import Routing, watch_routing
from steered_moe.routers import Router, find_routers

Tick = Callable[[int], Any]


class RoutingCollector:
    """Running sums over the tokens of one language; each batch adds to them on the device.

    Args:
        model: The model whose routers are watched.
        keep_sequences: Keep each sequence's mean softmax vector.

    Raises:
        FormatError: Layers that differ in their number of experts.
        RouterError: The model has no router.
    """

    def __init__(self, model: nn.Module, keep_sequences: bool = False) -> None:
        routers = find_routers(model)
        experts = sorted({router.num_experts for router in routers})
        if len(experts) > 1:
            raise FormatError(f"layers differ in their number of experts: {experts}")
        self.layers = [router.layer for router in routers]
        self.keep_sequences = keep_sequences
        self.sequences = 0
        self.tokens = 0
        self._model = model
        self._rows = {layer: row for row, layer in enumerate(self.layers)}
        self._kept: list[Tensor] = []
        device = input_device(model)
        shape = (len(self.layers), experts[0])
        self._counts = torch.zeros(shape, dtype=torch.float64, device=device)
        self._weight_sums = torch.zeros_like(self._counts)
        self._frequency_sums = torch.zeros_like(self._counts)
        self._entropy_sums = torch.zeros_like(self._counts[:, 0])
        self._consistency_sums = torch.zeros_like(self._counts[:, 0])

    @contextmanager
    def batch(self, mask: Tensor) -> Iterator[None]:
        """Count what the routers do in one forward pass inside.

        Args:
            mask: bool or int ``(sequences, positions)`` of the tokens that count.

        Raises:
            FormatError: A sequence without a token that counts.
        """
        lengths = mask.sum(dim=1)
        if not lengths.all():
            raise FormatError(f"sequence {int(lengths.argmin())} of the batch has no token")
        device = self._counts.device
        self._mask = mask.to(device, torch.float32)
        self._lengths = self._mask.sum(dim=1, keepdim=True)
        self._pairs = token_pairs(mask).to(device)
        self._means = torch.zeros(len(mask), *self._counts.shape, device=device)
        with watch_routing(self._model, self._see):
            yield
        self.sequences += len(mask)
        self.tokens += int(lengths.sum())
        self._entropy_sums += entropy(self._means).sum(dim=0)
        if self.keep_sequences:
            self._kept.append(self._means)

    def profile(self, language: str) -> RoutingProfile:
        """What was counted so far, as the profile of one language."""
        tokens = torch.full((1, len(self.layers)), float(self.tokens), dtype=torch.float64)
        return RoutingProfile(
            (language,),
            tuple(self.layers),
            self._counts[None].cpu(),
            tokens,
            weight_sums=self._weight_sums[None].cpu(),
            sequences=torch.tensor([float(self.sequences)]),
            frequency_sums=self._frequency_sums[None].cpu(),
            entropy_sums=self._entropy_sums[None].cpu(),
            consistency_sums=self._consistency_sums[None].cpu(),
            probabilities=torch.cat(self._kept)[None].cpu() if self.keep_sequences else None,
        )

    def _see(self, router: Router, routing: Routing) -> None:
        row, device = self._rows[router.layer], self._counts.device
        selected = routing.selected.to(device).reshape(*self._mask.shape, -1)
        weights = routing.weights.to(device)
        counts = self._by_sequence(selected, torch.ones_like(weights))
        self._counts[row] += counts.sum(dim=0)
        self._frequency_sums[row] += (counts / self._lengths).sum(dim=0)
        self._weight_sums[row] += self._by_sequence(selected, weights).sum(dim=0)
        self._consistency_sums[row] += consistency_of(selected, self._pairs).sum()
        probabilities = routing.probabilities.to(device).reshape(*self._mask.shape, -1)
        self._means[:, row] = torch.einsum("bt,bte->be", self._mask, probabilities) / self._lengths

    def _by_sequence(self, selected: Tensor, values: Tensor) -> Tensor:
        """``values`` of the tokens that count, summed by expert: ``(sequences, experts)``."""
        sequences = len(self._mask)
        values = values.reshape(*self._mask.shape, -1) * self._mask.unsqueeze(-1)
        sums = torch.zeros(sequences, self._counts.shape[1], device=values.device)
        return sums.scatter_add_(1, selected.reshape(sequences, -1), values.flatten(1))


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
    tick: Tick = lambda rows: None,
) -> RoutingProfile:
    """Run ``texts`` through ``model`` and sum up what its routers did.

    Args:
        model: Any MoE of transformers; if it is steered, the routing is the steered one.
        tokenizer: Its tokenizer; padding does not count.
        texts: Texts by language; row i should say the same in each if ``keep_sequences`` is set.
        batch_size: Texts per forward pass; it changes no number beyond rounding.
        keep_sequences: Keep each sequence's mean softmax vector too (2510.04694 Eq. 1), which its
            divergence needs: 4 bytes per sequence, layer and expert.
        chat: Put each text into the tokenizer's chat template, as a user's turn.
        template_tokens: Count the tokens that the chat template adds, too.
        tick: Called with the number of rows done after each batch.

    Raises:
        FormatError: No texts, an empty language, an empty text, one that is longer than the
            model's context, languages of different length where sequences are kept, or a chat
            template that is missing or changes the text.
        RouterError: The model has no router.
    """
    check_texts(texts, keep_sequences)
    parts = []
    for language, rows in texts.items():
        collector = RoutingCollector(model, keep_sequences)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            inputs, mask = encode_rows(
                model, tokenizer, batch, chat=chat, template_tokens=template_tokens
            )
            with collector.batch(mask):
                model(**inputs, use_cache=False)
            tick(len(batch))
        parts.append(collector.profile(language))
    return stack(parts)


@torch.no_grad()
def profile_generation(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 16,
    chat: bool = False,
    tick: Tick = lambda rows: None,
    **generate_kwargs: Any,
) -> tuple[RoutingProfile, RoutingProfile]:
    """Let ``model`` answer ``prompts``; routing of the prompts' tokens and of the answers' tokens.

    The answers are made by ``generate`` and then run once more together with their prompts, where
    the routing is read: the tokens, and so the routing, are those of the generation. A prompt that
    is answered with nothing but the end of the text counts that end.

    Args:
        model: Any MoE of transformers that generates.
        tokenizer: Its tokenizer.
        prompts: Prompts by language.
        batch_size: Prompts per batch.
        chat: Put each prompt into the tokenizer's chat template, as a user's turn.
        tick: Called with the number of rows done after each batch.
        generate_kwargs: For ``generate``; greedy unless they say otherwise.

    Returns:
        The profile of the prompts and that of the answers.

    Raises:
        FormatError: No prompts, an empty language, or an empty prompt.
        RouterError: The model has no router.
    """
    check_texts(prompts, parallel=False)
    parts: tuple[list[RoutingProfile], list[RoutingProfile]] = ([], [])
    for language, rows in prompts.items():
        collectors = RoutingCollector(model), RoutingCollector(model)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            inputs, _ = encode_rows(model, tokenizer, batch, chat=chat, padding_side="left")
            output = model.generate(**inputs, **{"do_sample": False, **generate_kwargs})
            prompt, answer = _apart(inputs["attention_mask"], output, model.generation_config)
            with collectors[0].batch(prompt), collectors[1].batch(answer):
                model(output, attention_mask=prompt | answer, use_cache=False)
            tick(len(batch))
        for collector, part in zip(collectors, parts, strict=True):
            part.append(collector.profile(language))
    return stack(parts[0]), stack(parts[1])


def stack(profiles: Sequence[RoutingProfile]) -> RoutingProfile:
    """One profile of the languages of several, which have no language in common.

    Raises:
        FormatError: No profile, or profiles of different models.
    """
    if not profiles or len({(p.layers, p.num_experts) for p in profiles}) > 1:
        raise FormatError("profiles of one model are needed, at least one")
    tensors = [profile.tensors() for profile in profiles]
    joined: dict[str, Any] = {
        name: torch.cat([part[name] for part in tensors]) for name in tensors[0]
    }
    languages = tuple(language for profile in profiles for language in profile.languages)
    return RoutingProfile(languages, profiles[0].layers, **joined, about=profiles[0].about)


def check_texts(texts: Mapping[str, Sequence[str]], parallel: bool) -> None:
    """Refuse texts that cannot be profiled.

    Raises:
        FormatError: Names the languages.
    """
    if not texts:
        raise FormatError("no texts; give texts by language, such as {'en': [...]}")
    lengths = {language: len(rows) for language, rows in texts.items()}
    if empty := [language for language, length in lengths.items() if length == 0]:
        raise FormatError(f"no texts in {', '.join(empty)}; leave the language out")
    if parallel and len(set(lengths.values())) > 1:
        raise FormatError(f"parallel texts need as many rows in each language, not {lengths}")


def _apart(prompt: Tensor, output: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Masks over ``output`` of the prompt's tokens and of the answer's, its end included."""
    ends = config.eos_token_id
    stops = torch.tensor(ends if isinstance(ends, list) else [ends], device=output.device)
    width = prompt.shape[1]
    ended = torch.isin(output[:, width:], stops).int()
    answer = (ended.cumsum(dim=1) - ended) == 0
    blank = torch.zeros_like(answer)
    return (
        torch.cat([prompt.bool(), blank], dim=1),
        torch.cat([torch.zeros_like(prompt.bool()), answer], dim=1),
    )
