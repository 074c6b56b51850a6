"""``steered-moe push``, ``pull`` and ``list``: share a steering, fetch one, find one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from steered_moe import hub
from steered_moe.finding import find_steerings
from steered_moe.planning import Plan, plan_push
from steered_moe.publishing import MESSAGE, send
from steered_moe.terminal import console, errors

RepoId = Annotated[str, typer.Argument(help="Hub id, user/name.")]
Folders = Annotated[
    list[Path], typer.Argument(help="A steering repo, or several of one base model.")
]
Private = Annotated[bool | None, typer.Option(help="Of a repo that is created.")]
Branch = Annotated[str | None, typer.Option(help="Branch; created if it does not exist.")]
Tag = Annotated[str | None, typer.Option(help="A tag for the commit, such as v1.0.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")]
Message = Annotated[str, typer.Option(help="Title of the commit.")]
Tokenizer = Annotated[bool, typer.Option(help="Send the base's tokenizer files too.")]
BaseModel = Annotated[str | None, typer.Option(help="Hub id to record as the base model.")]
Default = Annotated[str | None, typer.Option(help="Of several, the one meant if none is named.")]
ReplaceCard = Annotated[
    bool, typer.Option("--replace-card", help="Give up hand-written text in the card on the Hub.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would be sent; send nothing.")]


def push(
    repo_id: RepoId,
    folders: Folders,
    private: Private = None,
    revision: Branch = None,
    tag: Tag = None,
    create_pr: CreatePr = False,
    message: Message = MESSAGE,
    tokenizer: Tokenizer = True,
    base_model: BaseModel = None,
    default: Default = None,
    replace_card: ReplaceCard = False,
    dry_run: DryRun = False,
) -> None:
    """Push steering repos to the Hub in one commit: config, tensors, card, picture, scores."""
    with errors():
        plan = plan_push(
            folders,
            repo_id,
            private=private,
            revision=revision,
            tag=tag,
            create_pr=create_pr,
            tokenizer=tokenizer,
            base_model=base_model,
            default=default,
            replace_card=replace_card,
        )
        console.print(_contents(plan))
        if not dry_run:
            commit = send(plan, commit_message=message)
            console.print(str(commit.pr_url or commit.commit_url), markup=False, soft_wrap=True)


def pull(
    repo: Annotated[str, typer.Argument(help="Hub id, id@revision, or hf://id@revision.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag, commit or refs/pr/1.")] = None,
) -> None:
    """Copy a steering repo from the Hub into a folder, checked; never the base model."""
    with errors():
        folder = hub.pull(repo, out, revision)
    console.print(str(folder), markup=False, soft_wrap=True)


def list_command(
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model to steer.")] = None,
    author: Annotated[str | None, typer.Option(help="User or organisation.")] = None,
    search: Annotated[str | None, typer.Option(help="A part of the id.")] = None,
    collection: Annotated[str | None, typer.Option(help="Slug of a collection.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
) -> None:
    """List steering repos on the Hub."""
    with errors():
        found = find_steerings(
            base_model, author=author, search=search, collection=collection, limit=limit
        )
    table = Table("steering repo", "base model", "languages", "downloads")
    for one in found:
        row = (one.repo_id, one.base_model or "", ", ".join(one.languages), str(one.downloads))
        table.add_row(*map(escape, row))
    console.print(table if found else "no steering repo found")


def _contents(plan: Plan) -> Table:
    where = f"{plan.repo_id} ({'exists' if plan.exists else 'new'})"
    table = Table("file", "bytes", title=escape(where), title_justify="left")
    for path, data in plan.files.items():
        table.add_row(escape(path), str(len(data)))
    for path in plan.deleted:
        table.add_row(escape(path), "deleted")
    return table
