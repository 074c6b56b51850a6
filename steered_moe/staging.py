"""What a push would send: the files of a steering repo, complete and checked, in a folder."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import eval_result_entries_to_yaml
from transformers import AutoTokenizer

from steered_moe.card_text import dump_yaml
from steered_moe.cards import PICTURES, write_card
from steered_moe.errors import FormatError, SteeredMoEError
from steered_moe.hub import CARD_FILE
from steered_moe.plots import plot_steering
from steered_moe.repo_config import CONFIG_FILE, TENSOR_FILE, is_path
from steered_moe.results import RESULTS_FILE, current, read_results, write_results
from steered_moe.storage import SteeringRepo, joined, read_repo

SCORES = ".eval_results"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_SENT = (CONFIG_FILE, TENSOR_FILE, CARD_FILE, RESULTS_FILE, *TOKENIZER_FILES)

logger = logging.getLogger(__name__)


def stage(
    folders: Sequence[Path],
    target: Path,
    *,
    default: str | None = None,
    base_model: str | None = None,
    tokenizer: bool = True,
) -> SteeringRepo:
    """Copy what belongs to a steering repo, and nothing else, from folders into one.

    Args:
        folders: One steering repo, or several of the same base model, which become one repo.
        target: An empty folder.
        default: Of several, the steering that is loaded when none is named; else the first.
        base_model: Hub id to record as the base.
        tokenizer: Copy tokenizer files that are there.

    Raises:
        FormatError: A folder is not a steering repo, the repos do not go together, or the base
            model is a local folder.
    """
    repo = joined([read_repo(folder) for folder in folders], default)
    if base_model is not None:
        changed = repo.base.get("base_model_name_or_path") not in (None, base_model)
        revision = None if changed else repo.base.get("base_model_revision")
        names = {"base_model_name_or_path": base_model, "base_model_revision": revision}
        repo = repo.of_base(names)
    base = repo.base.get("base_model_name_or_path")
    if base is None or is_path(base):
        found = "not named" if base is None else f"the local folder {base}, which nobody else has"
        raise FormatError(
            f"the base model is {found}; give its Hub id: base_model='user/name' "
            "(--base-model on the command line)"
        )
    for folder in folders:
        _copy(folder, target, alone=len(folders) == 1, tokenizer=tokenizer)
    repo.write(target)
    if results := [result for folder in folders for result in read_results(folder)]:
        write_results(results, target)
    return repo


def _copy(folder: Path, target: Path, *, alone: bool, tokenizer: bool) -> None:
    """The files by name; links are not followed, and what is left out is said."""
    left = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        picture = path.parent == folder / PICTURES and path.suffix in (".png", ".svg")
        wanted = name in _SENT and (tokenizer or name not in TOKENIZER_FILES)
        single = name == CARD_FILE and not alone
        if path.is_symlink() or not path.is_file() or single or not (picture or wanted):
            known = name in (*TOKENIZER_FILES, RESULTS_FILE) or path.is_dir()
            left += [] if known else [name]
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    if left:
        logger.warning("not sent, as no part of a steering repo: %s", ", ".join(left[:20]))


def complete(repo: SteeringRepo, target: Path, repo_id: str) -> None:
    """Write what is made of the other files: config, pictures, card, scores for the Hub.

    Raises:
        FormatError: A card or results that cannot be read.
    """
    repo.write(target)
    _drop_old_results(repo, target)
    for steering in repo.steerings:
        try:
            (target / PICTURES).mkdir(exist_ok=True)
            layers = repo.base.get("num_hidden_layers") or int(steering.layers[-1]) + 1
            plot_steering(steering, layers, target / PICTURES / f"{steering.name}.png")
        except SteeredMoEError as error:
            logger.warning("no picture of %s: %s", steering.name, error)
    write_card(repo, target, repo_id)
    _write_scores(repo, target)


def _drop_old_results(repo: SteeringRepo, target: Path) -> None:
    """Only what was measured with these steerings goes along."""
    results = read_results(target)
    fit = current(results, repo.steerings)
    if results and not fit:
        (target / RESULTS_FILE).unlink()
    elif len(fit) < len(results):
        write_results(fit, target)


def scores_file(dataset: str) -> str:
    """Where the scores on a dataset of the Hub are."""
    return f"{SCORES}/{dataset.replace('/', '--')}.yaml"


def _write_scores(repo: SteeringRepo, target: Path) -> None:
    """``.eval_results/<benchmark>.yaml``, for results on a dataset of the Hub."""
    by_dataset: dict[str, list[Any]] = {}
    for result in read_results(target):
        if result.dataset is not None:
            by_dataset.setdefault(result.dataset, []).append(result.entry())
    for dataset, entries in by_dataset.items():
        path = target / scores_file(dataset)
        path.parent.mkdir(exist_ok=True)
        path.write_text(dump_yaml(eval_result_entries_to_yaml(entries)), encoding="utf-8")


def check_tokenizer(target: Path) -> None:
    """Check that the tokenizer files in a folder load without anything else.

    Raises:
        FormatError: They do not, or need code.
    """
    config = target / "tokenizer_config.json"
    if not any((target / name).exists() for name in TOKENIZER_FILES):
        return
    try:
        needs_code = config.is_file() and "auto_map" in json.loads(config.read_text("utf-8"))
        if not needs_code:
            AutoTokenizer.from_pretrained(target, trust_remote_code=False)
            return
        reason: object = "it needs code of the base model's repo"
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise FormatError(
        f"the tokenizer would not load from the steering repo alone ({reason}); push without it: "
        "tokenizer=False (--no-tokenizer)"
    )
