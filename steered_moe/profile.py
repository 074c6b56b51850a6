"""`RoutingProfile`: what routing did on a corpus, per language, layer and expert."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from steered_moe.errors import FormatError
from steered_moe.profile_checks import OPTIONAL, REQUIRED, checked


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
        about: What was profiled, for the record; JSON values only. `profile_in_shards` writes
            model, revision, corpus, dtype, the sha256 of model, tokenizer and texts, and those of
            columns, split, data_revision, limit, languages, chat, template_tokens,
            generation_prompt and template_kwargs that are not the default.

    Raises:
        FormatError: Shapes that do not agree, a language or layer that is there twice, or numbers
            that no count can be: negative ones, an expert selected more often than tokens seen.
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
        for name, tensor in checked(self.languages, self.layers, self.tensors()).items():
            object.__setattr__(self, name, tensor)

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return int(self.counts.shape[2])

    @property
    def top_k(self) -> int:
        """Experts selected per token, from the counts.

        Raises:
            FormatError: Layers or languages differ in it, or a language has no tokens.
        """
        per_token = self.frequency.sum(dim=-1).round()
        found = sorted(set(per_token.flatten().tolist()))
        if len(found) != 1:
            raise FormatError(f"top-k differs between layers: {found}")
        return int(found[0])

    @property
    def frequency(self) -> Tensor:
        """float64 ``(languages, layers, experts)``: share of tokens that selected the expert.

        A row sums to top-k (2601.14050, `activation_tokens / total_tokens`).

        Raises:
            FormatError: A language has no tokens; names it.
        """
        self._check_seen(self.tokens, "tokens")
        return self.counts / self.tokens.unsqueeze(-1)

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
        self._check_seen(self.sequences.unsqueeze(1), "texts")
        return sums / self.sequences.reshape(-1, *[1] * (sums.dim() - 1))

    def _check_seen(self, seen: Tensor, what: str) -> None:
        """Refuse languages of which nothing was seen in some layer: nothing is known of them."""
        none = (seen == 0).any(dim=1).tolist()
        if names := [name for name, empty in zip(self.languages, none, strict=True) if empty]:
            raise FormatError(
                f"the profile has no {what} of {', '.join(names)}; choose the others with of()"
            )

    @property
    def routing_distributions(self) -> Tensor:
        """``(languages, sequences, layers, experts)``: `probabilities` where they were kept, else
        one row per language: its frequency over top-k. Each sums to 1 over experts.

        Raises:
            FormatError: A language has no tokens; names it.
        """
        if self.probabilities is not None:
            return self.probabilities
        selected = self.counts.sum(dim=-1, keepdim=True)
        self._check_seen(selected.squeeze(-1), "tokens")
        frequency = self.counts / selected
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
            FormatError: Different models or revisions, texts put to them in different ways
                (chat, template_tokens, dtype ...), or one has sums that the other lacks.
        """
        if not isinstance(other, RoutingProfile):
            return NotImplemented
        from steered_moe.merging import add

        return add(self, other)

    def save(self, folder: str | Path) -> None:
        """Write ``profile.json`` and ``profile.safetensors``."""
        from steered_moe.profile_files import write_profile

        write_profile(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> RoutingProfile:
        """Read what `save` wrote.

        Raises:
            FormatError: A file is missing, damaged or of a newer format, or the two files are not
                of one profile.
        """
        from steered_moe.profile_files import read_profile

        return read_profile(Path(folder))

    @classmethod
    def from_recorder(cls, folder: str | Path) -> RoutingProfile:
        """Import the files that the routing recorder of 2601.14050 writes, one per language.

        Each ``<corpus>_<language>.json`` holds ``{layer: {expert: {activation_tokens,
        gate_values_sum}, total_tokens}}``. The language is the code that the name ends in, with
        its script and region (``global_mmlu_zh`` is zh, ``mgsm_zho_Hans`` zho_Hans), or, where no
        code is, what follows the last underscore.

        Raises:
            FormatError: No such file, two of one language, or files that do not agree in layers
                and experts.
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
        num_experts: int | None = None,
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
            num_experts: Experts per layer; by default up to the last one that is in the table.

        Raises:
            FormatError: Names the file, and the line or column.
        """
        from steered_moe.recorder import read_table

        return read_table(Path(file), top_k, language, count, where or {}, num_experts)
