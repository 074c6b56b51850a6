"""Documents as training rows of equal length, several documents in each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

IGNORED = -100


def pack(documents: list[list[int]], length: int, open_rows: int = 16) -> list[list[list[int]]]:
    """Put whole documents into rows of at most ``length`` tokens; too long ones are left out.

    Each document goes into the fullest of the open rows that has room (best fit).
    """
    done: list[list[list[int]]] = []
    rows: list[tuple[int, list[list[int]]]] = []
    for document in documents:
        if len(document) > length:
            continue
        fitting = [i for i, (used, _) in enumerate(rows) if used + len(document) <= length]
        if fitting:
            best = max(fitting, key=lambda i: rows[i][0])
            used, content = rows[best]
            rows[best] = (used + len(document), [*content, document])
            continue
        if len(rows) == open_rows:
            fullest = max(range(open_rows), key=lambda i: rows[i][0])
            done.append(rows.pop(fullest)[1])
        rows.append((len(document), [document]))
    return done + [content for _, content in rows]


class PackedRows(Dataset):
    """Rows with positions that begin anew at each document, so that documents do not see each
    other (transformers builds the attention mask from the positions).
    """

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        ids = tokenizer(texts)["input_ids"]
        documents = [[*document, tokenizer.eos_token_id] for document in ids]
        self.rows = pack(documents, length)
        self.length = length
        self.pad = tokenizer.pad_token_id
        self.tokens = sum(len(document) for row in self.rows for document in row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels, positions = [], [], []
        for document in self.rows[index]:
            ids += document
            labels += [IGNORED, *document[1:]]
            positions += range(len(document))
        rest = self.length - len(ids)
        return {
            "input_ids": torch.tensor(ids + [self.pad] * rest),
            "labels": torch.tensor(labels + [IGNORED] * rest),
            "position_ids": torch.tensor(positions + list(range(rest))),
        }
