"""Write texts that the embedded model has not seen, in files that `steered-moe profile` reads.

    python examples/tiny_multilingual_moe/write_texts.py FOLDER [--rows 300]

``FOLDER/general/<language>.jsonl`` holds everyday text in twelve languages, row by row the same;
``FOLDER/task/en.jsonl`` holds word problems in English with their solutions. Both are of the dev
part of the corpus.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from corpus import problems, sentences
from grammar import Language, codes

ENGLISH = "en"


def write(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=300)
    args = parser.parse_args()
    rows = list(sentences("dev", args.rows, seed=3))
    for code in codes():
        texts = [row.text(Language(code)) for row in rows]
        write(args.folder / "general" / f"{code}.jsonl", texts)
    english = Language(ENGLISH)
    solved = [p.prompt(english) + p.solution for p in problems("dev", args.rows, seed=5)]
    write(args.folder / "task" / f"{ENGLISH}.jsonl", solved)


if __name__ == "__main__":
    main()
