"""Push a steering repo to the Hub: planned and checked as a whole, then sent in one commit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from steered_moe.base_model import repo_for
from steered_moe.errors import FormatError
from steered_moe.hub import hub_errors, split
from steered_moe.planning import Plan, plan_push
from steered_moe.steering import RouterSteering

MESSAGE = "Upload router steering"

logger = logging.getLogger(__name__)


def push(
    folder: str | Path | Sequence[str | Path],
    repo_id: str,
    *,
    commit_message: str = MESSAGE,
    token: str | bool | None = None,
    **options: Any,
) -> CommitInfo:
    """Push one or several steering repos as one repo, in one commit.

    Args:
        folder: A steering repo, or several of one base model.
        repo_id: Hub id.
        commit_message: Title of the commit.
        token: As huggingface_hub takes it.
        options: As `steered_moe.planning.plan_push` takes them: ``private``, ``revision``,
            ``tag``, ``create_pr``, ``tokenizer``, ``base_model``, ``default``, ``replace_card``.

    Raises:
        FormatError: What cannot be pushed; nothing was sent.
        HubError: A connection that broke off; the remote is as it was.
        huggingface_hub.errors.HfHubHTTPError: The Hub's own errors, such as 412 when somebody
            else has pushed in the meantime; the remote is as it was.
    """
    plan = plan_push(folder, repo_id, token=token, **options)
    return send(plan, commit_message=commit_message, token=token)


def push_steering(
    steering: RouterSteering, repo_id: str, base_model: str, strength: float, **options: Any
) -> CommitInfo:
    """`RouterSteering.push_to_hub`."""
    with TemporaryDirectory() as folder:
        base, revision = split(base_model)
        token = options.get("token")
        repo_for(steering, strength, base, revision, Path(folder), token).write(folder)
        return push(folder, repo_id, **options)


def send(
    plan: Plan, *, commit_message: str = MESSAGE, token: str | bool | None = None
) -> CommitInfo:
    """Send what was planned, on top of the commit that the plan has seen and no other.

    Args:
        plan: From `steered_moe.planning.plan_push`.
        commit_message: Title of the commit.
        token: As huggingface_hub takes it.

    Raises:
        HubError: See `push`.
        huggingface_hub.errors.HfHubHTTPError: See `push`.
    """
    if not commit_message.strip():
        raise FormatError("the commit message is empty; say what is new")
    api = HfApi(token=token)
    with _undone(plan, api) as parent, hub_errors(f"pushing to {plan.repo_id}"):
        commit = api.create_commit(
            plan.repo_id,
            _operations(plan),
            commit_message=commit_message,
            revision=plan.revision,
            create_pr=plan.create_pr,
            parent_commit=parent,
        )
    if plan.tag:
        with hub_errors(f"commit {commit.oid} is pushed, but not tagged {plan.tag}"):
            api.create_tag(plan.repo_id, tag=plan.tag, revision=commit.oid)
    return commit


def _operations(plan: Plan) -> list[CommitOperationAdd | CommitOperationDelete]:
    adds = [CommitOperationAdd(path, data) for path, data in plan.files.items()]
    return [*adds, *(CommitOperationDelete(path) for path in plan.deleted)]


@contextmanager
def _undone(plan: Plan, api: HfApi) -> Iterator[str | None]:
    """Create the repo or branch that is missing, and take it back if the commit fails.

    Yields the commit that the new one follows.
    """
    undo: Callable[[], None] | None = None
    parent = plan.parent
    try:
        with hub_errors(f"creating {plan.repo_id}"):
            if not plan.exists:
                api.create_repo(plan.repo_id, private=plan.private)
                undo = partial(api.delete_repo, plan.repo_id)
                parent = api.model_info(plan.repo_id).sha
            if plan.parent is None and plan.revision:
                api.create_branch(plan.repo_id, branch=plan.revision)
                undo = undo or partial(api.delete_branch, plan.repo_id, branch=plan.revision)
            if parent is None:
                parent = api.model_info(plan.repo_id, revision=plan.revision).sha
        yield parent
    except BaseException:  # an interruption too
        if undo is not None:
            _undo(undo, plan, api, parent)
        raise


def _undo(undo: Callable[[], None], plan: Plan, api: HfApi, parent: str | None) -> None:
    """Take back what was created, unless somebody has put something there."""
    try:
        with hub_errors(f"taking back {plan.repo_id}"):
            revision = plan.revision if plan.exists else None
            if api.model_info(plan.repo_id, revision=revision).sha == parent:
                undo()
    except OSError as error:
        logger.warning("%s was created and is empty: %s. Push again", plan.repo_id, error)
