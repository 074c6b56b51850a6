"""What a push would change on the Hub: read, merged and checked before anything is sent."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from steered_moe.card_text import own_text, with_metadata_of
from steered_moe.cards import PICTURES
from steered_moe.errors import FormatError
from steered_moe.hub import CARD_FILE, hub_errors
from steered_moe.repo_config import CONFIG_FILE, LARGEST_CONFIG, MODEL_TYPE, read_json, short_list
from steered_moe.results import RESULTS_FILE, read_results
from steered_moe.staging import TOKENIZER_FILES, check_tokenizer, complete, scores_file, stage
from steered_moe.storage import SteeringRepo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """One commit that is ready to be sent.

    Args:
        repo_id: Where to.
        files: Content by path in the repo.
        deleted: Paths that the commit removes: pictures and scores that are there no more.
        parent: The commit that it follows; None when the repo, or the branch, must be created.
        exists: Whether the repo exists.
        revision: Branch, or None for main.
        tag: Put on the commit.
        create_pr: Propose the commit as a pull request instead.
        private: Of a repo that is created.
    """

    repo_id: str
    files: Mapping[str, bytes]
    deleted: Sequence[str]
    parent: str | None
    exists: bool
    revision: str | None
    tag: str | None
    create_pr: bool
    private: bool | None


def plan_push(
    folder: str | Path | Sequence[str | Path],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    tokenizer: bool = True,
    base_model: str | None = None,
    default: str | None = None,
    replace_card: bool = False,
) -> Plan:
    """What a push would send; the files are checked before the Hub is read, and it is only read.

    Args:
        folder: A steering repo, or several of one base model, which become one repo.
        repo_id: Hub id.
        private: Of a repo that is created.
        revision: Branch; created if it does not exist.
        tag: For the commit; refused if it exists.
        create_pr: Propose the commit as a pull request instead.
        token: As huggingface_hub takes it.
        tokenizer: Send the base's tokenizer files too, so that pipelines work on the repo alone.
        base_model: Hub id to record as the base, for one that was loaded from a folder.
        default: Of several steerings, the one that is loaded when none is named; else the first.
        replace_card: Give up what is written by hand into the card on the Hub.

    Raises:
        FormatError: What cannot be pushed, with value and fix.
        HubError: The Hub cannot be reached.
        huggingface_hub.errors.HfHubHTTPError: The Hub's own errors, such as an unknown base.
    """
    revision = None if revision == "main" else revision
    if tag and create_pr:
        raise FormatError(f"tag {tag!r} cannot be put on a pull request; tag it once it is merged")
    folders = [Path(folder)] if isinstance(folder, (str, Path)) else [Path(one) for one in folder]
    api = HfApi(token=token)
    with TemporaryDirectory() as scratch:
        target = Path(scratch)
        repo = stage(folders, target, default=default, base_model=base_model, tokenizer=tokenizer)
        complete(repo, target, repo_id)
        check_tokenizer(target)
        with hub_errors(f"reading {repo_id}"):
            repo_id = _full_name(api, repo_id)
            remote = _Remote.read(api, repo_id, revision, tag)
            repo = _pinned(api, repo, target, tokenizer, remote.will_be_private(private))
            made = remote.made(api, repo)
            remote.keep_texts(api, target, replace_card)
        complete(repo, target, repo_id)
        check_tokenizer(target)
        paths = sorted(path for path in target.rglob("*") if path.is_file())
        files = {path.relative_to(target).as_posix(): path.read_bytes() for path in paths}
    gone = [path for path in remote.files if path in made and path not in files]
    state = remote.head, remote.exists
    return Plan(repo_id, files, gone, *state, revision, tag, create_pr, private)


def _full_name(api: HfApi, repo_id: str) -> str:
    """``name`` alone means one's own, as everywhere on the Hub."""
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def _pinned(
    api: HfApi, repo: SteeringRepo, target: Path, tokenizer: bool, private: bool
) -> SteeringRepo:
    """The base at a commit; its tokenizer files are added unless there are some already."""
    base, revision = (repo.base[f"base_model_{part}"] for part in ("name_or_path", "revision"))
    info = api.model_info(base, revision=revision)
    names = [file.rfilename for file in info.siblings or []]
    wanted = [name for name in names if name in TOKENIZER_FILES]
    closed = bool(info.gated) or (bool(info.private) and not private)
    if tokenizer and closed:
        logger.warning("%s is gated or private, so its tokenizer files are not sent", base)
        for name in TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)
    elif tokenizer and not any((target / name).exists() for name in TOKENIZER_FILES):
        for name in wanted:
            api.hf_hub_download(base, name, revision=info.sha, local_dir=target)
        shutil.rmtree(target / ".cache", ignore_errors=True)  # notes of the download
    return repo.of_base({"base_model_revision": info.sha})


def _names(info: ModelInfo) -> list[str]:
    return [file.rfilename for file in info.siblings or []]


@dataclass(frozen=True)
class _Remote:
    """The repo as it is on the Hub."""

    repo_id: str
    exists: bool
    head: str | None
    files: Sequence[str]
    private: bool = False

    @classmethod
    def read(cls, api: HfApi, repo_id: str, revision: str | None, tag: str | None) -> _Remote:
        try:
            info = api.model_info(repo_id)
            tags = [ref.name for ref in api.list_repo_refs(repo_id).tags] if tag else []
            if tag in tags:
                raise FormatError(f"{repo_id} has a tag {tag!r} already; choose another")
            with suppress(RevisionNotFoundError):
                info = api.model_info(repo_id, revision=revision)
                return cls(repo_id, True, info.sha, _names(info), bool(info.private))
        except RepositoryNotFoundError:
            return cls(repo_id, False, None, [])
        return cls(repo_id, True, None, _names(info), bool(info.private))

    def will_be_private(self, asked: bool | None) -> bool:
        """Whether the repo is private once it is there.

        Raises:
            FormatError: An existing public repo, which a push does not make private.
        """
        if self.exists and asked and not self.private:
            raise FormatError(
                f"{self.repo_id} exists and is public; make it private on the Hub, or push to "
                "another repo"
            )
        return self.private if self.exists else bool(asked)

    def made(self, api: HfApi, repo: SteeringRepo) -> set[str]:
        """Files of the repo that an earlier push made of its steerings and results."""
        if CONFIG_FILE not in self.files:
            self._check_empty()
            return set()
        names = self._names_of_steerings(api)
        if gone := sorted(names - {steering.name for steering in repo.steerings}):
            logger.warning("%s: steerings %s are there no more", self.repo_id, short_list(gone))
        datasets: set[str] = set()
        if RESULTS_FILE in self.files:
            with TemporaryDirectory() as folder:
                (Path(folder) / RESULTS_FILE).write_bytes(self._content(api, RESULTS_FILE))
                datasets = {one.dataset for one in read_results(folder) if one.dataset}
        pictures = {f"{PICTURES}/{name}.png" for name in names}
        return {RESULTS_FILE, *pictures, *(scores_file(dataset) for dataset in datasets)}

    def _check_empty(self) -> None:
        """A repo without a steering may hold a card and a licence, nothing else."""
        plain = (CARD_FILE, ".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt")
        if other := [name for name in self.files if name not in plain]:
            raise FormatError(
                f"{self.repo_id} holds something else ({short_list(other)}); push to a repo of "
                "its own"
            )

    def keep_texts(self, api: HfApi, target: Path, replace_card: bool) -> None:
        """Take over hand-written text and results that are on the Hub only.

        Raises:
            FormatError: The repo holds something else, or both cards have text of their own.
        """
        if RESULTS_FILE in self.files and not (target / RESULTS_FILE).exists():
            (target / RESULTS_FILE).write_bytes(self._content(api, RESULTS_FILE))
        if CARD_FILE not in self.files or replace_card:
            return
        card = target / CARD_FILE
        here = own_text(card.read_text(encoding="utf-8"))
        there = self._content(api, CARD_FILE).decode("utf-8", "replace")
        if here and own_text(there) not in ("", here):
            raise FormatError(
                f"the card here and the card of {self.repo_id} both have text of their own; copy "
                "what you want to keep into the one here and push with replace_card=True "
                "(--replace-card)"
            )
        kept = with_metadata_of(card.read_text(encoding="utf-8"), there) if here else there
        card.write_text(kept, encoding="utf-8")

    def _names_of_steerings(self, api: HfApi) -> set[str]:
        path = api.hf_hub_download(self.repo_id, CONFIG_FILE, revision=self.head)
        config = read_json(Path(path), LARGEST_CONFIG)
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != MODEL_TYPE:
            raise FormatError(
                f"{self.repo_id} holds something else (model_type {kind!r}), which would be "
                "overwritten; push to a repo of its own"
            )
        entries = config.get("steerings")
        rows = entries if isinstance(entries, list) else []
        return {str(row["name"]) for row in rows if isinstance(row, dict) and "name" in row}

    def _content(self, api: HfApi, file: str) -> bytes:
        return Path(api.hf_hub_download(self.repo_id, file, revision=self.head)).read_bytes()
