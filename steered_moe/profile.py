"""`RoutingProfile`: what routing did on a corpus, per language, layer and expert."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steered_moe.errors import FormatError

PROFILE_CONFIG = "profile.json"
PROFILE_TENSORS = "profile.safetensors"
_TENSORS = ("counts", "weight_sums", "tokens")
_OPTIONAL = ("sequences", "frequency_sums", "probabilities")


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Selection counts and routing weights, summed over the tokens of each language.

    Args:
        languages: Language codes, as the corpus names them.
        layers: 0-based decoder layers that have a router.
        counts: float64 ``(languages, layers, experts)``: tokens that selected the expert.
        weight_sums: float64, same shape: sum of the expert's routing weight over these tokens.
        tokens: float64 ``(languages, layers)``: tokens seen.
        sequences: float64 ``(languages,)``: texts seen; None where the source has no such number.
        frequency_sums: float64 ``(languages, layers, experts)``: sum over texts of the share of
            their tokens that selected the expert (``a_i / L_i`` of 2510.04694 Eq. 3), or None.
        probabilities: float32 ``(languages, sequences, layers, experts)``: each text's mean
            softmax over all experts (2510.04694 Eq. 1), texts parallel over languages, or None.

    Raises:
        FormatError: Shapes that do not agree, or numbers that no count can be.
    """

    languages: tuple[str, ...]
    layers: tuple[int, ...]
    counts: Tensor
    weight_sums: Tensor
    tokens: Tensor
    sequences: Tensor | None = None
    frequency_sums: Tensor | None = None
    probabilities: Tensor | None = None

    def __post_init__(self) -> None:
        expected = (len(self.languages), len(self.layers))
        shapes = [tuple(getattr(self, name).shape) for name in _TENSORS]
        if shapes[0][:2] != expected or shapes[1] != shapes[0] or shapes[2] != expected:
            raise FormatError(
                f"a profile of {expected[0]} languages and {expected[1]} layers cannot have "
                f"shapes {dict(zip(_TENSORS, shapes, strict=True))}"
            )
        self._check_optional(shapes[0])
        for name in (*_TENSORS, *_OPTIONAL):
            if (tensor := getattr(self, name)) is None:
                continue
            tensor = tensor.to(torch.float32 if name == "probabilities" else torch.float64)
            if not torch.isfinite(tensor).all() or (tensor < 0).any():
                raise FormatError(f"{name} of a profile holds negative or non-finite numbers")
            object.__setattr__(self, name, tensor)

    def _check_optional(self, shape: tuple[int, ...]) -> None:
        languages, layers, experts = shape
        expected = {"sequences": (languages,), "frequency_sums": shape}
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
        if self.frequency_sums is None or self.sequences is None:
            raise FormatError(
                "this profile has sums over tokens only; profile the texts with profile_texts"
            )
        return self.frequency_sums / self.sequences.reshape(-1, 1, 1).clamp_min(1)

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
        tensors = {name: tensor[rows] for name, tensor in self._tensors().items()}
        return RoutingProfile(tuple(languages), self.layers, **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def save(self, folder: str | Path) -> None:
        """Write ``profile.json`` and ``profile.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"format_version": 1, "languages": self.languages, "layers": self.layers}
        (folder / PROFILE_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, folder / PROFILE_TENSORS, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path) -> RoutingProfile:
        """Read what `save` wrote.

        Raises:
            FormatError: A file is missing, damaged or of a newer format.
        """
        config = _read_json(Path(folder) / PROFILE_CONFIG)
        if config.get("format_version") != 1:
            raise FormatError(
                f"{folder}: profile format {config.get('format_version')!r}, this version reads 1"
            )
        try:
            with safe_open(Path(folder) / PROFILE_TENSORS, framework="pt") as file:
                present = [name for name in _OPTIONAL if name in set(file.keys())]
                tensors = {name: file.get_tensor(name) for name in (*_TENSORS, *present)}
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{folder}: {PROFILE_TENSORS} cannot be read: {error}") from error
        languages, layers = config.get("languages"), config.get("layers")
        if not isinstance(languages, list) or not isinstance(layers, list):
            raise FormatError(f"{folder}: {PROFILE_CONFIG} lacks its lists of languages and layers")
        return cls(tuple(languages), tuple(layers), **tensors)

    @classmethod
    def from_recorder(cls, folder: str | Path) -> RoutingProfile:
        """Import the files that the routing recorder of 2601.14050 writes, one per language.

        Each ``<corpus>_<language>.json`` holds ``{layer: {expert: {activation_tokens,
        gate_values_sum}, total_tokens}}``.

        Raises:
            FormatError: No such file, or files that do not agree in layers and experts.
        """
        files = sorted(Path(folder).glob("*_*.json"))
        if not files:
            raise FormatError(f"{folder} holds no <corpus>_<language>.json of a routing recorder")
        languages = tuple(file.stem.partition("_")[2] for file in files)
        tables = [_recorded(file) for file in files]
        layers, counts, sums, tokens = zip(*tables, strict=True)
        if len({(la, c.shape) for la, c in zip(layers, counts, strict=True)}) > 1:
            raise FormatError(f"files in {folder} differ in layers or experts")
        return cls(languages, layers[0], *map(torch.stack, (counts, sums, tokens)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is not a JSON object")
    return content


def _recorded(path: Path) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """Layers, counts ``(layers, experts)``, weight sums and tokens ``(layers,)`` of one file."""
    content = _read_json(path)
    try:
        layers = sorted(content, key=int)
        experts = sorted((e for e in content[layers[0]] if e != "total_tokens"), key=int)
        counts = _table(content, layers, experts, "activation_tokens")
        sums = _table(content, layers, experts, "gate_values_sum")
        tokens = torch.tensor([content[la]["total_tokens"] for la in layers], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FormatError(f"{path} is not a file of the routing recorder: {error!r}") from error
    return tuple(int(layer) for layer in layers), counts, sums, tokens


def _table(
    content: Mapping[str, Any], layers: Sequence[str], experts: Sequence[str], field: str
) -> Tensor:
    rows = [[content[layer][expert][field] for expert in experts] for layer in layers]
    return torch.tensor(rows, dtype=torch.float64)
