"""Settings of the methods: read from ``name=value``, and checked before a method works on them."""

from __future__ import annotations

import json
import operator
import re
import sys
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch

from steered_moe.errors import SteeringError
from steered_moe.steering import ranges

_POINT = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def number(name: str, value: Any) -> float:
    """A setting that has to be a finite number.

    Raises:
        SteeringError: It is something else; names setting and value.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not abs(value) <= sys.float_info.max:
        raise SteeringError(f"{name} is {value!r}; it must be a finite number, such as 0.3")
    return float(value)


def whole(name: str, value: Any) -> int:
    """A setting that has to be a whole number.

    Raises:
        SteeringError: It is something else; names setting and value.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SteeringError(f"{name} is {value!r}; it must be a whole number, such as 20")
    return int(value)


def texts(name: str, value: Any) -> list[str]:
    """A setting that has to be one text or several; a single one stands for a list of it.

    Raises:
        SteeringError: It is something else, an empty text or none; names setting and value.
    """
    found = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if not found or not all(isinstance(text, str) and text for text in found):
        shown = value if found == [value] else found
        raise SteeringError(f"{name} is {shown!r}; name at least one, as a text such as 'en'")
    return found


def layers_of(layers: Iterable[int]) -> tuple[int, ...]:
    """The layers asked for, sorted, each once; an iterator is read here and nowhere else.

    Raises:
        SteeringError: No layer, a negative one, or something that is no whole number.
    """
    try:
        found = sorted({operator.index(layer) for layer in layers})
    except TypeError as error:
        raise SteeringError(
            f"layers are {layers!r}; give whole numbers, such as range(10, 40)"
        ) from error
    if not found or found[0] < 0:
        raise SteeringError(f"layers are {found}; give at least one, counted from 0")
    return tuple(found)


def in_words(layers: Sequence[int]) -> str:
    """``(10, 11, 12, 20)`` as ``10-12, 20``."""
    return ranges(torch.tensor(layers))


def parsed(text: str, kind: Any) -> Any:
    """What somebody wrote for a setting, as the setting's type takes it.

    A text stays as it is. Where several may be given, commas stand between them, or it is a JSON
    list. A number may be written ``.3``. All else is JSON, or a text where it is no JSON.

    Args:
        text: As it was written.
        kind: The setting's type, from the method's signature.
    """
    found, kinds = _value(text), _kinds(kind)
    if Sequence in kinds:
        if isinstance(found, list):
            return found
        parts = [part.strip() for part in text.split(",")]
        return parts if len(parts) > 1 or str not in kinds else parts[0]
    if str in kinds and not isinstance(found, str):
        return None if found is None and NoneType in kinds else text
    return found


def _kinds(kind: Any) -> list[Any]:
    """The types of a union, of each what stands before its brackets."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [get_origin(part) or part for part in parts]


def _value(text: str) -> Any:
    try:
        return float(text) if _POINT.fullmatch(text) else json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
