"""Steering repos by name: a local folder, or a repo on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from steered_moe.errors import FormatError
from steered_moe.steering import RouterSteering
from steered_moe.storage import CONFIG_FILE, TENSOR_FILE, pick, read_repo

KWARGS = ("token", "cache_dir", "local_files_only", "force_download")
"""Keyword arguments of ``from_pretrained`` that say how to talk to the Hub."""


def fetch(repo: str | Path, revision: str | None = None, **hub_kwargs: Any) -> Path:
    """Local folder with the two small files of a steering repo.

    Args:
        repo: A local folder, a Hub id, or ``id@revision``.
        revision: Branch, tag or commit on the Hub.
        hub_kwargs: ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        FormatError: A revision for a local folder.
        huggingface_hub.errors.HfHubHTTPError: The Hub's own errors, with its own advice.
    """
    if Path(repo).is_dir():
        if revision is not None:
            raise FormatError(f"{repo} is a local folder and has no revision {revision!r}")
        return Path(repo)
    name, suffix = split(str(repo))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FormatError(f"{repo} is no folder here, and no Hub id (user/name)")
    revision = suffix or revision
    for file in (CONFIG_FILE, TENSOR_FILE):
        path = hf_hub_download(name, file, revision=revision, **hub_kwargs)
    return Path(path).parent


def split(repo: str) -> tuple[str, str | None]:
    """``id@revision`` as id and revision; a local folder is taken as it is."""
    if Path(repo).is_dir():
        return repo, None
    name, _, revision = repo.partition("@")
    return name, revision or None


def load_steering(
    repo: str | Path, name: str | None = None, revision: str | None = None
) -> RouterSteering:
    """`RouterSteering.load`."""
    return pick(read_repo(fetch(repo, revision)).steerings, name)


def commit_of(repo: str, revision: str | None, **hub_kwargs: Any) -> str | None:
    """Commit hash of a Hub repo that is in the cache; None for a local folder."""
    if Path(repo).is_dir():
        return None
    path = try_to_load_from_cache(
        repo, CONFIG_FILE, cache_dir=hub_kwargs.get("cache_dir"), revision=revision
    )
    return Path(path).parent.name if isinstance(path, str) else None


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload router steering",
    token: str | bool | None = None,
) -> str:
    """Upload a steering repo in one commit, after reading it back; returns the commit's URL.

    Raises:
        FormatError: The folder is not a steering repo, or its base model is a local folder;
            nothing was sent.
        huggingface_hub.errors.HfHubHTTPError: The Hub's own errors.
    """
    base = read_repo(folder).base["base_model_name_or_path"]
    if base is not None and (base.startswith(".") or Path(base).is_absolute()):
        raise FormatError(
            f"the base model is the local folder {base}, which nobody else has; give its Hub id: "
            "push_to_hub(..., base_model='user/name')"
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    return str(commit.commit_url)
