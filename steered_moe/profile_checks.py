"""What the numbers of a routing profile have to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steered_moe.errors import FormatError

REQUIRED = ("counts", "tokens")
BY_EXPERT = ("weight_sums", "frequency_sums")
BY_LAYER = ("entropy_sums", "consistency_sums")
OPTIONAL = ("sequences", *BY_EXPERT, *BY_LAYER, "probabilities")

_SUMMED_IN_BF16 = 1e-3  # counts of the recorder of 2601.14050 are sums in bfloat16


def checked(
    languages: Sequence[str], layers: Sequence[int], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a profile in their dtypes.

    Args:
        languages: One per row.
        layers: One per column.
        tensors: By name, as `RoutingProfile` has them.

    Raises:
        FormatError: Names and shapes that do not agree, or numbers that no count can be.
    """
    for what, names in (("languages", languages), ("layers", layers)):
        if twice := sorted({name for name in names if list(names).count(name) > 1}):
            raise FormatError(f"{what} of a profile name {', '.join(map(str, twice))} twice")
    if any(layer < 0 for layer in layers):
        raise FormatError(f"layers of a profile are {list(layers)}; they count from 0")
    _check_shapes(len(languages), len(layers), tensors)
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.to(torch.float32 if name == "probabilities" else torch.float64)
        if not torch.isfinite(tensor).all() or (tensor < 0).any():
            raise FormatError(f"{name} of a profile holds negative or non-finite numbers")
    _check_counts(languages, layers, found["counts"], found["tokens"])
    return found


def _check_shapes(languages: int, layers: int, tensors: Mapping[str, Tensor]) -> None:
    shapes = [tuple(tensors[name].shape) for name in REQUIRED]
    expected = (languages, layers)
    if len(shapes[0]) != 3 or shapes[0][:2] != expected or shapes[1] != expected:
        raise FormatError(
            f"a profile of {languages} languages and {layers} layers cannot have "
            f"shapes {dict(zip(REQUIRED, shapes, strict=True))}"
        )
    for name, wanted in _optional_shapes(shapes[0], tensors).items():
        if name in tensors and tuple(tensors[name].shape) != wanted:
            raise FormatError(f"{name} of a profile is {tuple(tensors[name].shape)}, not {wanted}")


def _optional_shapes(
    shape: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {"sequences": shape[:1]}
    expected |= dict.fromkeys(BY_EXPERT, shape) | dict.fromkeys(BY_LAYER, shape[:2])
    if (kept := tensors.get("probabilities")) is not None:
        texts = kept.shape[1] if kept.dim() > 1 else 0
        expected["probabilities"] = (shape[0], texts, *shape[1:])
    return expected


def _check_counts(
    languages: Sequence[str], layers: Sequence[int], counts: Tensor, tokens: Tensor
) -> None:
    """A token selects an expert once at most."""
    most = tokens * (1 + _SUMMED_IN_BF16)
    above = (counts > most.unsqueeze(-1)).nonzero()
    if len(above):
        language, layer, expert = above[0].tolist()
        raise FormatError(
            f"expert {expert} of layer {layers[layer]} is counted "
            f"{counts[language, layer, expert]:g} times in {languages[language]}, which has "
            f"{tokens[language, layer]:g} tokens; a token selects an expert once at most"
        )
