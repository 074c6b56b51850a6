"""Write the task files of this folder, one for each language.

python examples/lm_eval/write_tasks.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from steered_moe.task_data import mgsm_stops
from steered_moe.task_languages import MGSM_WORDS
from steered_moe.tasks import task


def mgsm(language: str) -> dict[str, Any]:
    """As lm-eval's mgsm_direct of the language, with its template word by word."""
    before, after, _, _ = MGSM_WORDS[language]
    return {
        "include": "_mgsm_direct",
        "task": f"mgsm_direct_local_{language}",
        "dataset_kwargs": {"language": language},
        "doc_to_text": (
            f'{{% if answer is not none %}}{{{{question+"\\n{after}"}}}}'
            f'{{% else %}}{{{{"{before}"+question+"\\n{after}"}}}}{{% endif %}}'
        ),
        "generation_kwargs": {"do_sample": False, "until": list(mgsm_stops(language))},
    }


def embedded(language: str) -> dict[str, Any]:
    """The embedded model's problems in a language."""
    return {
        "include": "_embedded",
        "task": f"embedded_{language}",
        "dataset_kwargs": {"language": language},
    }


def write(folder: Path) -> None:
    """Write all of them."""
    contents = [mgsm(language) for language in MGSM_WORDS]
    contents += [embedded(language) for language in task("embedded").languages]
    for content in contents:
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=1000)
        (folder / f"{content['task']}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
