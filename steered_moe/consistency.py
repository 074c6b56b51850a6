"""Within-text routing consistency: how alike two tokens of one text are routed."""

from __future__ import annotations

import torch
from torch import Tensor

_ALL_PAIRS_UP_TO = 64  # tokens; of longer texts `_SAMPLED` pairs are drawn
_SAMPLED = 1000


def token_pairs(mask: Tensor) -> Tensor:
    """Which two tokens of each text are compared: all pairs of a short text, else a sample.

    The paper samples pairs and does not say how many; the numbers here are ours. The sample
    depends on a text's length alone, so how texts are batched changes nothing.

    Args:
        mask: ``(texts, positions)``, true where a token counts.

    Returns:
        int64 ``(texts, pairs, 2)`` of positions, filled up with -1.
    """
    rows = [_pairs_of(row.nonzero().flatten().cpu()) for row in mask]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _pairs_of(positions: Tensor) -> Tensor:
    length = len(positions)
    if length < 2:
        return positions.new_empty((0, 2))
    if length <= _ALL_PAIRS_UP_TO:
        return positions[torch.combinations(torch.arange(length))]
    generator = torch.Generator().manual_seed(length)
    one = torch.randint(length, (_SAMPLED,), generator=generator)
    step = torch.randint(1, length, (_SAMPLED,), generator=generator)
    return positions[torch.stack([one, (one + step) % length], dim=1)]


def consistency_of(selected: Tensor, pairs: Tensor) -> Tensor:
    """Mean Jaccard overlap of the selected experts over pairs (2510.04694 Sec. 4.4).

    Args:
        selected: int64 ``(texts, positions, top_k)``, different experts per token.
        pairs: int64 ``(texts, pairs, 2)`` from `token_pairs`.

    Returns:
        float64 ``(texts,)`` in [0, 1]; 1 for a text of one token.
    """
    kept = pairs[..., 0] >= 0
    texts = torch.arange(len(selected), device=selected.device).unsqueeze(1)
    one, other = (selected[texts, pairs[..., side].clamp_min(0)] for side in (0, 1))
    both = (one.unsqueeze(-1) == other.unsqueeze(-2)).any(dim=-1).sum(dim=-1)
    overlap = both.double() / (2 * selected.shape[-1] - both)
    total = (overlap * kept).sum(dim=1)
    count = kept.sum(dim=1)
    return torch.where(count > 0, total / count.clamp_min(1), torch.ones_like(total))
