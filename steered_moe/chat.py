"""How a text is put to a model: as it is, or as a user's turn in a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from steered_moe.errors import FormatError

_SENTINEL = "Zq7vXw3kTurnText9mJy"
"""Stands for a text, to learn what a template puts around it; no template holds it."""
_OURS = ("conversation", "tokenize", "add_generation_prompt", "return_dict", "return_tensors")


@dataclass(frozen=True)
class Form:
    """How texts are put to a model, and which of their tokens count.

    Args:
        chat: Put each text into the tokenizer's chat template, as a user's turn.
        template_tokens: Count the tokens that the template adds, too.
        generation_prompt: End with what the template puts before an answer. 2510.04694 leaves it
            out.
        template_kwargs: For the template, such as ``{"enable_thinking": False}``.

    Raises:
        FormatError: Settings of the template without ``chat``, or ones that no template takes.
    """

    chat: bool = False
    template_tokens: bool = True
    generation_prompt: bool = True
    template_kwargs: Mapping[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.chat and self.about:
            raise FormatError(
                f"{', '.join(self.about)} say how the chat template is used, but there is none "
                "without chat; set chat=True (--chat), or leave them out"
            )
        kwargs = dict(self.template_kwargs or {})
        if ours := [name for name in _OURS if name in kwargs]:
            raise FormatError(f"template_kwargs cannot set {', '.join(ours)}; leave it out")
        try:
            json.dumps(kwargs)
        except (TypeError, ValueError) as error:
            raise FormatError(f"template_kwargs are not JSON values: {error}") from error

    @property
    def about(self) -> dict[str, Any]:
        """The settings that are not the default, for the record of a profile."""
        defaults = {"chat": False, "template_tokens": True, "generation_prompt": True}
        values = {name: getattr(self, name) for name in defaults}
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        kwargs = dict(self.template_kwargs or {})
        return changed | ({"template_kwargs": kwargs} if kwargs else {})

    def render(self, tokenizer: Any, texts: Sequence[str]) -> list[str]:
        """The texts as they are tokenized.

        Raises:
            FormatError: A chat that the tokenizer has no template for, or one that fails.
        """
        if not self.chat:
            return list(texts)
        if tokenizer.chat_template is None:
            name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
            raise FormatError(f"{name} has no chat template; give texts as they are, without chat")
        return [self._turn(tokenizer, text) for text in texts]

    def spans(
        self, tokenizer: Any, rows: Sequence[str], texts: Sequence[str]
    ) -> list[tuple[int, int]]:
        """Where each row itself is in the text that `render` made of it.

        Raises:
            FormatError: A template that does not put the row, bare of outer blanks, between the
                same two texts each time.
        """
        around = self._turn(tokenizer, _SENTINEL).split(_SENTINEL)
        found = []
        for row, text in zip(rows, texts, strict=True):
            before, after = around if len(around) == 2 else ("", "")
            inner = text[len(before) : len(text) - len(after)]
            bare = row.strip()  # templates may strip, nothing else
            same = text == before + inner + after and inner.strip() == bare
            if len(around) != 2 or not same:
                raise FormatError(f"the chat template changes {row!r:.60}; count its tokens, too")
            start = len(before) + inner.find(bare)
            found.append((start, start + len(bare)))
        return found

    def _turn(self, tokenizer: Any, text: str) -> str:
        try:
            turn: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=self.generation_prompt,
                **(self.template_kwargs or {}),
            )
        except TemplateError as error:
            raise FormatError(f"the chat template refuses {text!r:.60}: {error}") from error
        return turn
