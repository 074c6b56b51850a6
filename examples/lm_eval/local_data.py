"""What the task files of this folder ask for: rows of local files, and embedded problems.

lm-eval calls these with all of ``--metadata`` and ``--model_args``; most of it is not for them.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from datasets import Dataset

from steered_moe.tasks import task


def mgsm(language: str, data: str | None = None, **others: Any) -> dict[str, Dataset]:
    """MGSM with the columns it has on the Hub, from ``{data}/mgsm/mgsm_{language}.tsv``."""
    if data is None:
        raise ValueError("say where mgsm/mgsm_en.tsv and the others are: --metadata data=FOLDER")
    with (Path(data) / "mgsm" / f"mgsm_{language}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    docs = [
        {"question": question, "answer": None, "answer_number": number.replace(",", "")}
        for question, number in rows
    ]
    return {"test": Dataset.from_list(docs)}


def embedded(language: str, **others: Any) -> dict[str, Dataset]:
    """The embedded model's own problems, of the test part."""
    items = task("embedded").items(language)
    return {"test": Dataset.from_list([{"prompt": i.prompt, "target": i.target} for i in items])}
