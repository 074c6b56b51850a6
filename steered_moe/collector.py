"""Sums over the routing of one language, on the device, during ordinary forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steered_moe.consistency import consistency_of, token_pairs
from steered_moe.divergence import entropy
from steered_moe.encoding import input_device
from steered_moe.errors import FormatError
from steered_moe.profile import RoutingProfile
from steered_moe.recording import Routing, watch_routing
from steered_moe.routers import Router, find_routers, other_stages
from steered_moe.stages import across_stages


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
        self._elsewhere = other_stages(model, routers)
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
    def batch(self, mask: Tensor, *, empty: bool = False) -> Iterator[None]:
        """Count what the routers do in one forward pass inside.

        Args:
            mask: bool or int ``(sequences, positions)`` of the tokens that count.
            empty: Leave sequences without a token that counts out, instead of refusing them.

        Raises:
            FormatError: A sequence without a token that counts.
        """
        lengths = mask.sum(dim=1)
        if not empty and not lengths.all():
            raise FormatError(f"sequence {int(lengths.argmin())} of the batch has no token")
        device = self._counts.device
        self._mask = mask.to(device, torch.float32)
        self._there = self._mask.any(dim=1)
        self._lengths = self._mask.sum(dim=1, keepdim=True).clamp_min(1)
        self._pairs = token_pairs(mask).to(device)
        self._means = torch.zeros(len(mask), *self._counts.shape, device=device)
        with watch_routing(self._model, self._see):
            yield
        self.sequences += int((lengths > 0).sum())
        self.tokens += int(lengths.sum())
        self._entropy_sums += entropy(self._means).sum(dim=0)
        if self.keep_sequences:
            self._kept.append(self._means if lengths.all() else self._means[self._there])

    def profile(self, language: str) -> RoutingProfile:
        """What was counted so far, as the profile of one language; of a model in a pipeline, that
        of all stages, each of which has to ask for it."""
        tokens = torch.full((1, len(self.layers)), float(self.tokens), dtype=torch.float64)
        found = RoutingProfile(
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
        return across_stages(found, self._elsewhere, self._counts.device)

    def _see(self, router: Router, routing: Routing) -> None:
        row, device = self._rows[router.layer], self._counts.device
        selected = routing.selected.to(device).reshape(*self._mask.shape, -1)
        weights = routing.weights.to(device)
        counts = self._by_sequence(selected, torch.ones_like(weights))
        self._counts[row] += counts.sum(dim=0)
        self._frequency_sums[row] += (counts / self._lengths).sum(dim=0)
        self._weight_sums[row] += self._by_sequence(selected, weights).sum(dim=0)
        overlaps = consistency_of(selected, self._pairs)
        self._consistency_sums[row] += (overlaps * self._there).sum()
        probabilities = routing.probabilities.to(device).reshape(*self._mask.shape, -1)
        self._means[:, row] = torch.einsum("bt,bte->be", self._mask, probabilities) / self._lengths

    def _by_sequence(self, selected: Tensor, values: Tensor) -> Tensor:
        """``values`` of the tokens that count, summed by expert: ``(sequences, experts)``."""
        sequences = len(self._mask)
        values = values.reshape(*self._mask.shape, -1) * self._mask.unsqueeze(-1)
        sums = torch.zeros(sequences, self._counts.shape[1], device=values.device)
        return sums.scatter_add_(1, selected.reshape(sequences, -1), values.flatten(1))
