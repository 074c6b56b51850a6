"""Write the example cards in this folder: what a push of each example would send as its card.

    python hub_cards/build.py [FOLDER]

FOLDER is this folder unless it is given. ``template.md`` is the card of every steering repo.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from steered_moe.staging import complete, stage

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
CARDS = {
    "qwen3-30b-a3b-english-shared": (EXAMPLES / "qwen3-30b-a3b-english-shared", None),
    "tiny-multilingual-moe-task": (
        EXAMPLES / "tiny_multilingual_moe" / "steered",
        "steered-moe/tiny-multilingual-moe",
    ),
}
"""Name of the repo -> steering repo, and the id under which its base would be published."""


def main(folder: Path = HERE) -> None:
    """Write ``<name>/README.md`` and its picture for each of `CARDS`."""
    for name, (source, base_model) in CARDS.items():
        with TemporaryDirectory() as scratch:
            target = Path(scratch)
            repo = stage([source], target, base_model=base_model)
            complete(repo, target, f"steered-moe/{name}")
            for part in ("README.md", "plots"):
                _replace(target / part, folder / name / part)


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
