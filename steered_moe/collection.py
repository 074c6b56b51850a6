"""Texts in, a `RoutingProfile` out: routing summed up during ordinary batched forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import FormatError
from steered_moe.profile import RoutingProfile
from steered_moe.recording import Routing, watch_routing
from steered_moe.routers import Router, find_routers


class _Sums:
    """Running sums of one language, on the model's device; each batch adds to them."""

    def __init__(self, layers: Sequence[int], experts: int, device: torch.device) -> None:
        self.rows = {layer: row for row, layer in enumerate(layers)}
        shape = (len(layers), experts)
        self.counts = torch.zeros(shape, dtype=torch.float64, device=device)
        self.weight_sums = torch.zeros_like(self.counts)
        self.frequency_sums = torch.zeros_like(self.counts)
        self.tokens = 0
        self.probabilities: list[Tensor] = []
        self.mask = torch.empty(0)
        self.batch: Tensor = torch.empty(0)

    def begin(self, mask: Tensor) -> None:
        """The next batch: a mask ``(sequences, positions)`` of the tokens that count."""
        self.mask = mask.to(self.counts.device, torch.float32)
        self.tokens += int(mask.sum())
        self.batch = torch.zeros(len(mask), *self.counts.shape, device=self.counts.device)
        self.probabilities.append(self.batch)

    def see(self, router: Router, routing: Routing) -> None:
        """Add what a router did with the tokens of the batch."""
        row = self.rows[router.layer]
        lengths = self.mask.sum(dim=1, keepdim=True)
        per_sequence = self._add_up(routing.selected, torch.ones_like(routing.weights))
        self.counts[row] += per_sequence.sum(dim=0)
        self.frequency_sums[row] += (per_sequence / lengths).sum(dim=0)
        self.weight_sums[row] += self._add_up(routing.selected, routing.weights).sum(dim=0)
        tokens = routing.probabilities.reshape(*self.mask.shape, -1)
        self.batch[:, row] = (tokens * self.mask.unsqueeze(-1)).sum(dim=1) / lengths

    def _add_up(self, selected: Tensor, values: Tensor) -> Tensor:
        """``values`` of the unmasked tokens summed by expert: ``(sequences, experts)``."""
        sequences = self.mask.shape[0]
        values = values * self.mask.reshape(-1, 1)
        sums = torch.zeros(sequences, self.counts.shape[1], device=values.device)
        return sums.scatter_add_(1, selected.reshape(sequences, -1), values.reshape(sequences, -1))


@torch.no_grad()
def profile_texts(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 16,
    keep_sequences: bool = False,
    tick: Callable[[int], Any] = lambda rows: None,
) -> RoutingProfile:
    """Run ``texts`` through ``model`` and sum up what its routers did.

    Args:
        model: Any MoE of transformers; if it is steered, the routing is the steered one.
        tokenizer: Its tokenizer; padding does not count.
        texts: Texts by language; row i should say the same in each if ``keep_sequences`` is set.
        batch_size: Texts per forward pass; it changes no number beyond rounding.
        keep_sequences: Keep each sequence's mean softmax vector too (2510.04694 Eq. 1), which its
            divergence needs: 4 bytes per sequence, layer and expert.
        tick: Called with the number of rows done after each batch.

    Raises:
        FormatError: No texts, an empty language, or languages of different length where
            sequences are kept.
        RouterError: The model has no router.
    """
    _check_texts(texts, keep_sequences)
    routers = find_routers(model)
    experts = {router.num_experts for router in routers}
    if len(experts) > 1:
        raise FormatError(f"layers differ in their number of experts: {sorted(experts)}")
    layers = [router.layer for router in routers]
    device = next(model.parameters()).device
    done = {}
    for language, rows in texts.items():
        sums = done[language] = _Sums(layers, experts.copy().pop(), device)
        with watch_routing(model, sums.see):
            for start in range(0, len(rows), batch_size):
                _forward(model, tokenizer, rows[start : start + batch_size], sums)
                if not keep_sequences:
                    sums.probabilities.clear()
                tick(min(batch_size, len(rows) - start))
    return _profile(done, layers, {k: len(v) for k, v in texts.items()}, keep_sequences)


def _forward(model: torch.nn.Module, tokenizer: Any, rows: Sequence[str], sums: _Sums) -> None:
    inputs = tokenizer(list(rows), return_tensors="pt", padding=True, return_token_type_ids=False)
    empty = (inputs["attention_mask"].sum(dim=1) == 0).nonzero()
    if len(empty):
        raise FormatError(f"{rows[int(empty[0])]!r} has no token; leave it out in every language")
    device = next(model.parameters()).device
    sums.begin(inputs["attention_mask"])
    model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)


def _profile(
    done: Mapping[str, _Sums], layers: Sequence[int], rows: Mapping[str, int], keep: bool
) -> RoutingProfile:
    sums = list(done.values())
    tokens = torch.tensor([[s.tokens] * len(layers) for s in sums], dtype=torch.float64)
    return RoutingProfile(
        tuple(done),
        tuple(layers),
        torch.stack([s.counts for s in sums]).cpu(),
        torch.stack([s.weight_sums for s in sums]).cpu(),
        tokens,
        sequences=torch.tensor(list(rows.values()), dtype=torch.float64),
        frequency_sums=torch.stack([s.frequency_sums for s in sums]).cpu(),
        probabilities=torch.stack([torch.cat(s.probabilities) for s in sums]).cpu()
        if keep
        else None,
    )


def _check_texts(texts: Mapping[str, Sequence[str]], parallel: bool) -> None:
    if not texts:
        raise FormatError("no texts; give texts by language, such as {'en': [...]}")
    lengths = {language: len(rows) for language, rows in texts.items()}
    if empty := [language for language, length in lengths.items() if length == 0]:
        raise FormatError(f"no texts in {', '.join(empty)}; leave the language out")
    if parallel and len(set(lengths.values())) > 1:
        raise FormatError(f"parallel texts need as many rows in each language, not {lengths}")
