"""One language of the corpus: its words with their forms, its templates, and how to fill them.

A template holds fields in braces. ``{n}`` is a number, ``{a}`` the text of a word,
``{obj.many}`` one form of a word, ``{obj:n}`` the form that goes with the number n,
``{obj.acc:n}`` the same among the forms whose names begin with "acc_", ``{color@obj}`` the form
that agrees with the gender of another word, and ``{a|f=she|m=he}`` a text chosen by gender. A field
that is no slot of the row names a word of the language itself, such as ``{coin:n}``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FOLDER = Path(__file__).parent / "languages"
FIELD = re.compile(r"\{(\w+)(?:\.(\w+))?(?:@(\w+))?(?::(\w+))?((?:\|\w+=[^|{}]*)*)\}")
Slots = dict[str, int | str]


def plural_category(rule: str, number: int) -> str:
    """The name of the word form that goes with ``number``: "one", "few" or "many"."""
    if rule == "one_many":
        return "one" if number == 1 else "many"
    if rule == "east_slavic":
        tens, ones = number % 100 // 10, number % 10
        if tens == 1 or ones == 0 or ones >= 5:
            return "many"
        return "one" if ones == 1 else "few"
    if rule == "none":
        return "text"
    raise ValueError(f"plural rule {rule!r} is none of one_many, east_slavic, none")


@dataclass(frozen=True)
class Language:
    """The file ``languages/<code>.json``."""

    code: str

    @cached_property
    def data(self) -> dict:
        return json.loads((FOLDER / f"{self.code}.json").read_text(encoding="utf-8"))

    def word(self, name: str) -> dict[str, str]:
        """The forms of a word; a word with one form has it as "text"."""
        forms = self.data["words"][name]
        return {"text": forms} if isinstance(forms, str) else forms

    def fill(self, template: str, slots: Slots) -> str:
        """``template`` with every field replaced; KeyError names a missing word or form."""
        return FIELD.sub(lambda match: self._field(match, slots), template)

    def _field(self, match: re.Match[str], slots: Slots) -> str:
        name, form, agrees_with, number, choices = match.groups()
        value = slots.get(name, name)
        if isinstance(value, int):
            return str(value)
        forms = self.word(value)
        if choices:
            return dict(choice.split("=", 1) for choice in choices[1:].split("|"))[forms["gender"]]
        if agrees_with:
            gender = self.word(str(slots.get(agrees_with, agrees_with)))["gender"]
            form = f"{form}_{gender}" if form else gender
            return forms.get(form, forms["text"]) if "text" in forms else forms[form]
        if number:
            category = plural_category(self.data["plural"], int(slots[number]))
            form = f"{form}_{category}" if form else category
        return forms[form or "text"]

    def task(self, parts: list[str], slots: list[Slots]) -> str:
        """The question of a word problem: its sentences, joined as the language joins them."""
        templates = self.data["task"]
        return self.data.get("join", " ").join(
            self.fill(templates[part], slot) for part, slot in zip(parts, slots, strict=True)
        )


def codes() -> list[str]:
    """The languages of the corpus, English first."""
    return sorted(
        (path.stem for path in FOLDER.glob("*.json")), key=lambda code: (code != "en", code)
    )
