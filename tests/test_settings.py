"""Settings of the methods, as people write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest

from steered_moe.settings import in_words, parsed


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (float, ".1", 0.1),
        (float, "-.5e1", -5.0),
        (float, "3.", 3.0),
        (float, "1", 1),
        (float, "abc", "abc"),
        (int, "2.5", 2.5),
        (str, "5", "5"),
        (str, "no", "no"),
        (str, "null", "null"),
        (str, '"de"', "de"),
        (str, "a,b", "a,b"),
        (str | None, "null", None),
        (str | None, "5", "5"),
        (Sequence[str], "en", ["en"]),
        (Sequence[str], "en, zh", ["en", "zh"]),
        (Sequence[str], '["en", "zh"]', ["en", "zh"]),
        (str | Sequence[str], "en", "en"),
        (str | Sequence[str], "5", "5"),
        (str | Sequence[str], "en,zh", ["en", "zh"]),
        (Literal["soft", "hard"], "hard", "hard"),
        (None, "[1, 2]", [1, 2]),
        (None, "[" * 100_000, "[" * 100_000),
    ],
)
def test_settings_are_read_as_their_type_says(kind: Any, text: str, value: Any):
    found = parsed(text, kind)
    assert found == value
    assert type(found) is type(value)


def test_layers_in_words():
    assert in_words((0, 1, 2, 7, 9, 10)) == "0-2, 7, 9-10"
