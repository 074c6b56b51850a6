"""`RoutingProfile`: what routing did on a corpus, per language, layer and expert."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import FormatError

REQUIRED = ("counts", "tokens")
_BY_EXPERT = ("weight_sums", "frequency_sums")
_BY_LAYER = ("entropy_sums", "consistency_sums")
OPTIONAL = ("sequences", *_BY_EXPERT, *_BY_LAYER, "probabilities")


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Selection counts and routing weights, summed over the tokens of each language.

    Args:
        languages: Language codes, as the corpus names them.
        layers: 0-based decoder layers that have a router.
        counts: float64 ``(languages, layers, experts)``: tokens that selected the expert.
        tokens: float64 ``(languages, layers)``: tokens seen.
        weight_sums: float64, shape of counts: sum of the expert's routing weight over these tokens,
            or None.
        sequences: float64 ``(languages,)``: texts seen; None where the source has no such number.
        frequency_sums: float64 ``(languages, layers, experts)``: sum over texts of the share of
            their tokens that selected the expert (``a_i / L_i`` of 2510.04694 Eq. 3), or None.
        entropy_sums: float64 ``(languages, layers)``: sum over texts of the entropy, in nats, of
            the text's mean softmax over experts (2510.04694), or None.
        consistency_sums: float64 ``(languages, layers)``: sum over texts of the mean Jaccard
            overlap of two tokens' selected experts (2510.04694 Sec. 4.4), or None.
        probabilities: float32 ``(languages, sequences, layers, experts)``: each text's mean
            softmax over all experts (2510.04694 Eq. 1), texts parallel over languages, or None.
        about: What was profiled, for the record: model, revision, texts; JSON values only.

    Raises:
        FormatError: Shapes that do not agree, or numbers that no count can be.
    """

    languages: tuple[str, ...]
    layers: tuple[int, ...]
    counts: Tensor
    tokens: Tensor
    weight_sums: Tensor | None = None
    sequences: Tensor | None = None
    frequency_sums: Tensor | None = None
    entropy_sums: Tensor | None = None
    consistency_sums: Tensor | None = None
    probabilities: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = (len(self.languages), len(self.layers))
        shapes = [tuple(getattr(self, name).shape) for name in REQUIRED]
        if len(shapes[0]) != 3 or shapes[0][:2] != expected or shapes[1] != expected:
            raise FormatError(
                f"a profile of {expected[0]} languages and {expected[1]} layers cannot have "
                f"shapes {dict(zip(REQUIRED, shapes, strict=True))}"
            )
        self._check_optional(shapes[0])
        for name in (*REQUIRED, *OPTIONAL):
            if (tensor := getattr(self, name)) is None:
                continue
            tensor = tensor.to(torch.float32 if name == "probabilities" else torch.float64)
            if not torch.isfinite(tensor).all() or (tensor < 0).any():
                raise FormatError(f"{name} of a profile holds negative or non-finite numbers")
            object.__setattr__(self, name, tensor)

    def _check_optional(self, shape: tuple[int, ...]) -> None:
        languages, layers, experts = shape
        expected: dict[str, tuple[int, ...]] = {"sequences": (languages,)}
        expected |= dict.fromkeys(_BY_EXPERT, shape) | dict.fromkeys(_BY_LAYER, shape[:2])
        if self.probabilities is not None:
            texts = self.probabilities.shape[1] if self.probabilities.dim() > 1 else 0
            expected["probabilities"] = (languages, texts, layers, experts)
        for name, wanted in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise FormatError(f"{name} of a profile is {tuple(tensor.shape)}, not {wanted}")

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return int(self.counts.shape[2])

    @property
    def top_k(self) -> int:
        """Experts selected per token, from the counts.

        Raises:
            FormatError: Layers or languages differ in it.
        """
        per_token = (self.counts.sum(dim=-1) / self.tokens.clamp_min(1)).round()
        found = sorted(set(per_token.flatten().tolist()))
        if len(found) != 1:
            raise FormatError(f"top-k differs between layers: {found}")
        return int(found[0])

    @property
    def frequency(self) -> Tensor:
        """float64 ``(languages, layers, experts)``: share of tokens that selected the expert.

        A row sums to top-k (2601.14050, `activation_tokens / total_tokens`).
        """
        return self.counts / self.tokens.unsqueeze(-1).clamp_min(1)

    @property
    def mean_frequency(self) -> Tensor:
        """float64 ``(languages, layers, experts)``: mean over texts of the share of their tokens
        that selected the expert; each text weighs the same (2510.04694 Eq. 3).

        Raises:
            FormatError: The profile has no sums over texts.
        """
        return self._mean_over_texts("frequency_sums")

    @property
    def entropy(self) -> Tensor:
        """float64 ``(languages, layers)``: routing entropy in nats, averaged over texts.

        Raises:
            FormatError: The profile has no sums over texts.
        """
        return self._mean_over_texts("entropy_sums")

    @property
    def consistency(self) -> Tensor:
        """float64 ``(languages, layers)`` in [0, 1]: within-text routing consistency, averaged.

        Raises:
            FormatError: The profile has no sums over texts.
        """
        return self._mean_over_texts("consistency_sums")

    def _mean_over_texts(self, name: str) -> Tensor:
        sums: Tensor | None = getattr(self, name)
        if sums is None or self.sequences is None:
            raise FormatError(
                f"this profile has sums over tokens only, no {name}; profile the texts with "
                "profile_texts"
            )
        texts = self.sequences.reshape(-1, *[1] * (sums.dim() - 1))
        return sums / texts.clamp_min(1)

    @property
    def routing_distributions(self) -> Tensor:
        """``(languages, sequences, layers, experts)``: `probabilities` where they were kept, else
        one row per language: its frequency over top-k. Each sums to 1 over experts."""
        if self.probabilities is not None:
            return self.probabilities
        frequency = self.counts / self.counts.sum(dim=-1, keepdim=True).clamp_min(1)
        return frequency.unsqueeze(1)

    def of(self, languages: Sequence[str]) -> RoutingProfile:
        """The profile of some languages, in the order given.

        Raises:
            FormatError: A language that was not profiled.
        """
        missing = [language for language in languages if language not in self.languages]
        if missing:
            raise FormatError(
                f"{', '.join(missing)} not in the profile; it has {', '.join(self.languages)}"
            )
        rows = [self.languages.index(language) for language in languages]
        tensors = {name: tensor[rows] for name, tensor in self.tensors().items()}
        return RoutingProfile(tuple(languages), self.layers, **tensors, about=self.about)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this profile has, by name."""
        named = {name: getattr(self, name) for name in (*REQUIRED, *OPTIONAL)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what was measured: languages, layers and every tensor."""
        digest = hashlib.sha256(json.dumps([self.languages, self.layers]).encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __add__(self, other: RoutingProfile) -> RoutingProfile:
        """Both profiles as if they had been one run; languages of either, those of ``self`` first.

        Raises:
            FormatError: Different models, or one has sums that the other lacks.
        """
        if not isinstance(other, RoutingProfile):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        kinds = [
            (p.about.get("model"), p.layers, p.num_experts, sorted(p.tensors()))
            for p in (self, other)
        ]
        if kinds[0] != kinds[1]:
            raise FormatError(
                "profiles of different models or kinds cannot be added: model, layers, experts "
                f"and sums are {kinds[0]} and {kinds[1]}"
            )
        languages = tuple(dict.fromkeys(self.languages + other.languages))
        if "probabilities" in mine and self.languages != other.languages:
            raise FormatError("profiles that keep sequences add up over the same languages only")
        sums = {
            name: _summed(languages, (self, mine[name]), (other, theirs[name]))
            for name in mine
            if name != "probabilities"
        }
        if "probabilities" in mine:
            sums["probabilities"] = torch.cat([mine["probabilities"], theirs["probabilities"]], 1)
        return RoutingProfile(languages, self.layers, **sums, about=self.about)

    def save(self, folder: str | Path) -> None:
        """Write ``profile.json`` and ``profile.safetensors``."""
        from steered_moe.profile_files import write_profile

        write_profile(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> RoutingProfile:
        """Read what `save` wrote.

        Raises:
            FormatError: A file is missing, damaged or of a newer format.
        """
        from steered_moe.profile_files import read_profile

        return read_profile(Path(folder))

    @classmethod
    def from_recorder(cls, folder: str | Path) -> RoutingProfile:
        """Import the files that the routing recorder of 2601.14050 writes, one per language.

        Each ``<corpus>_<language>.json`` holds ``{layer: {expert: {activation_tokens,
        gate_values_sum}, total_tokens}}``.

        Raises:
            FormatError: No such file, or files that do not agree in layers and experts.
        """
        from steered_moe.recorder import read_recordings

        return read_recordings(folder)

    @classmethod
    def from_table(
        cls,
        file: str | Path,
        *,
        top_k: int,
        language: str = "language",
        count: str = "count",
        where: Mapping[str, str] | None = None,
    ) -> RoutingProfile:
        """Import a table of selection counts: ``.tsv`` or ``.csv``, a header, a row per expert.

        It needs columns ``layer`` and ``expert``, a language and a count. A row that is missing
        counts 0. Tokens are a layer's counts over ``top_k``.

        Args:
            file: The table.
            top_k: Experts per token of the model.
            language: Column of the language, or of whatever takes its place, such as a domain.
            count: Column of the number of tokens that selected the expert.
            where: Column -> value of the rows to read; all by default.

        Raises:
            FormatError: Names the file, and the line or column.
        """
        from steered_moe.recorder import read_table

        return read_table(Path(file), top_k, language, count, where or {})


def _summed(languages: Sequence[str], *parts: tuple[RoutingProfile, Tensor]) -> Tensor:
    """Rows by language, summed over the profiles that have the language."""
    total = torch.zeros(len(languages), *parts[0][1].shape[1:], dtype=torch.float64)
    for profile, tensor in parts:
        total[[languages.index(language) for language in profile.languages]] += tensor
    return total
