"""Texts that end an answer, seen while it is generated.

``stop_strings`` of transformers prepares a table over the whole vocabulary; its cache rests on the
order in which the tokenizer lists its tokens, which fast ones do not keep, so that each call of
``generate`` makes the table anew: seconds for a large vocabulary. Decoding the last few tokens of
each row costs microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_MORE = 4
"""Tokens beyond the bytes of a text, should its first token hold other text too."""


class StopTexts(StoppingCriteria):
    """Ends a row once its answer holds one of the texts.

    Args:
        tokenizer: Of the model.
        texts: Any of them ends a row.
        start: Where the answers begin, in tokens.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._texts = list(texts)
        self._start = start
        self._window = max((len(text.encode()) for text in texts), default=0) + _MORE

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows, bool ``(rows,)``."""
        first = max(self._start, input_ids.shape[1] - self._window)
        tails = self._tokenizer.batch_decode(input_ids[:, first:])
        done = [any(text in tail for text in self._texts) for tail in tails]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
