"""What the tests' Hub server keeps in memory: repositories, pull requests, cards, collections.

`hub_server` answers requests from it. Everything that the Hub refuses is a `HubError` here.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import yaml

LFS_SIZE = 10_000_000  # larger files are stored as LFS under any name
LFS_RULES = ("*.safetensors", "*.png", "tokenizer.json")  # of a new repository
GITATTRIBUTES = "".join(f"{rule} filter=lfs diff=lfs merge=lfs -text\n" for rule in LFS_RULES)
CARD_TAGS = {"library_name": "", "pipeline_tag": "", "language": "", "tags": ""}
CARD_TAGS |= {"license": "license:", "datasets": "dataset:", "base_model": "base_model:"}
CARD_TEXTS = ("library_name", "pipeline_tag", "base_model_relation")
CARD_LISTS = ("license", "base_model", "language", "tags", "datasets")  # or a single text


class HubError(Exception):
    """An error answer; `code` is what the client turns into an exception class."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


@dataclass(frozen=True)
class Blob:
    """The bytes of a file, which git holds itself or (LFS) only points at."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def stored(self) -> bytes:
        """What git holds: the bytes, or the pointer of an LFS file."""
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}")
        pointer = "\n".join((*lines, f"size {len(self.data)}\n"))
        return pointer.encode() if self.lfs else self.data

    @cached_property
    def oid(self) -> str:
        """The git object id."""
        return hashlib.sha1(b"blob %d\0" % len(self.stored) + self.stored).hexdigest()

    @property
    def known_by(self) -> str:
        """The hash by which the client knows an unchanged file."""
        return self.sha256 if self.lfs else self.oid

    def described(self, hash_name: str) -> dict[str, Any]:
        """Size and, of an LFS file, the LFS field; endpoints differ in the name of its hash."""
        size = len(self.data)
        lfs = {hash_name: self.sha256, "size": size, "pointerSize": len(self.stored)}
        return {"size": size, **({"lfs": lfs} if self.lfs else {})}


Files = Mapping[str, Blob]


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str
    title: str
    message: str
    author: str
    date: str
    files: Files


@dataclass
class Discussion:
    """A discussion, or a pull request that started at the commit `base`."""

    num: int
    title: str
    author: str
    date: str
    status: str
    base: str = ""  # of a pull request
    merged: str = ""  # the commit that merged it
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"

    def log(self, kind: str, author: str, **data: Any) -> dict[str, Any]:
        """Add an event (its fields are `data`) and return it."""
        head = {"id": f"{self.num:012x}{len(self.events):012x}", "type": kind}
        event = {**head, "createdAt": now(), "author": {"name": author}, "data": data}
        self.events.append(event)
        return event


@dataclass
class Collection:
    slug: str
    title: str
    owner: str
    description: str
    private: bool
    updated: str
    items: list[dict[str, Any]] = field(default_factory=list)


class Repo:
    """Commits by hash, full reference names ("refs/heads/main") at them, LFS objects by sha256."""

    def __init__(self, repo_id: str, private: bool = False) -> None:
        self.id, self.private = repo_id, private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.objects: dict[str, Blob] = {}
        self.discussions: dict[int, Discussion] = {}

    @property
    def name(self) -> str:
        """The id as the API has it, of a dataset, too."""
        return self.id.removeprefix("datasets/")

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def find(self, revision: str) -> Commit:
        """The commit behind a branch, a tag, refs/pr/N or a full commit hash."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        oid = next((self.refs[name] for name in names if name in self.refs), revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add(self, ref: str, parent: str, files: Files, *texts: str, author: str) -> Commit:
        """Store a snapshot and move `ref` to it; `texts` are a title and a message."""
        seed = [self.id, ref, parent, texts, len(self.commits), tree_entries(files)]
        oid = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        title, message = (*texts, "")[:2]
        self.commits[oid] = Commit(oid, parent, title, message, author, now(), dict(files))
        self.refs[ref] = oid
        return self.commits[oid]

    def named(self, prefix: str) -> list[dict[str, str]]:
        """The references below `prefix`, as the refs endpoint lists them."""
        found = [ref for ref in self.refs if ref.startswith(prefix)]
        name = {ref: ref if prefix == "refs/pr/" else ref.removeprefix(prefix) for ref in found}
        return [{"name": name[r], "ref": r, "targetCommit": self.refs[r]} for r in found]

    def seed(self, ref: str, parent: str, changes: Mapping[str, bytes], author: str) -> Commit:
        """Add files on top of a commit; those that LFS rules name are stored as LFS objects."""
        files = dict(self.commits[parent].files) if parent else {}
        files |= {path: Blob(data) for path, data in changes.items()}
        for path, data in changes.items():
            if is_lfs(path, len(data), files):
                files[path] = self.store(data)
        return self.add(ref, parent, files, "Seed", author=author)

    def store(self, data: bytes) -> Blob:
        """Keep an LFS object."""
        blob = Blob(data, lfs=True)
        return self.objects.setdefault(blob.sha256, blob)

    def stored(self, oid: str, size: int | None = None) -> Blob:
        """An LFS object that was uploaded, of the size that the client names."""
        if oid not in self.objects:
            raise HubError(404, f"LFS object {oid} was never uploaded")
        if size not in (None, len(self.objects[oid].data)):
            raise HubError(422, f"LFS object {oid} is not of size {size}")
        return self.objects[oid]

    def apply(self, files: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
        """Apply one line of a commit to `files`."""
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = self.stored(value["oid"], value.get("size"))
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/"
            below = [name for name in files if name.startswith(folder)]
            gone = below if key == "deletedFolder" else [name for name in files if name == path]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unsupported operation: {key}")

    def discuss(
        self, title: str, author: str, text: str, base: str = "", status: str = "open"
    ) -> Discussion:
        """Open a discussion or, from the commit `base`, a pull request."""
        found = Discussion(len(self.discussions) + 1, title, author, now(), status, base)
        self.discussions[found.num] = found
        latest = {"raw": text, "html": text, "updatedAt": found.date, "author": {"name": author}}
        found.log("comment", author, edited=False, hidden=False, latest=latest, history=[])
        if base:
            self.refs[found.ref] = base
        return found

    def changes(self, pull: Discussion) -> dict[str, Blob | None]:
        """The files that a pull request adds or changes, and None for those it deletes."""
        before, after = self.commits[pull.base].files, self.find(pull.ref).files
        paths = sorted({*before, *after})
        return {path: after.get(path) for path in paths if before.get(path) != after.get(path)}

    def conflicts(self, pull: Discussion) -> list[str]:
        """The files that main, too, has changed since the pull request started."""
        before, main = self.commits[pull.base].files, self.find("main").files
        changed = [path for path in self.changes(pull) if main.get(path) != before.get(path)]
        return [] if pull.merged else changed

    def merge(self, pull: Discussion, author: str) -> None:
        """Put the changes of an open pull request on main as one commit."""
        if not pull.base or pull.status != "open":
            raise HubError(400, f"Only an open pull request can be merged, not a {pull.status} one")
        if conflicts := self.conflicts(pull):
            raise HubError(409, f"Both sides have changed {', '.join(conflicts)}")
        main = self.find("main")
        files = {**main.files, **self.changes(pull)}
        kept = {path: blob for path, blob in files.items() if blob is not None}
        title = f"{pull.title} (#{pull.num})"
        pull.merged = self.add("refs/heads/main", main.oid, kept, title, author=author).oid
        pull.status = "merged"
        pull.log("status-change", author, status="merged")


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def is_lfs(path: str, size: int, files: Files) -> bool:
    """Whether a file belongs into LFS: by the .gitattributes among `files`, or by its size."""
    attributes = files[".gitattributes"].data.decode() if ".gitattributes" in files else None
    lines = [line.split() for line in (attributes or GITATTRIBUTES).splitlines()]
    rules = [words[0] for words in lines if "filter=lfs" in words]
    name = path.rpartition("/")[2]
    named = any(fnmatch.fnmatchcase(path if "/" in rule else name, rule) for rule in rules)
    return size > 0 and (named or size > LFS_SIZE)


def tree_entries(files: Files) -> dict[str, dict[str, Any]]:
    """Every file and folder of a snapshot by path, as the tree endpoint lists them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(files.items()):
        parts = path.split("/")
        for folder in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": blob.oid, **blob.described("oid")}
    return entries


def front_matter(text: str) -> Any:
    """The YAML header of a card, parsed; None when there is none."""
    header = re.match(r"---\s*?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(header[1]) if header else None


def card_data(files: Files) -> dict[str, Any]:
    """The metadata of the model card; none of a card whose header is broken."""
    text = files["README.md"].data.decode(errors="replace") if "README.md" in files else ""
    try:
        found = front_matter(text)
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {}


def card_errors(text: str) -> list[str]:
    """What the Hub refuses in the header of a card: broken YAML, and values of a wrong type."""
    try:
        card = front_matter(text)
    except yaml.YAMLError as error:
        return [f"Invalid YAML in the metadata: {' '.join(str(error).split())}"]
    if not isinstance(card, dict):
        return [] if card is None else ["The metadata must be a mapping"]
    texts = {key: card[key] for key in (*CARD_TEXTS, *CARD_LISTS) if key in card}
    lists = [key for key in CARD_LISTS if isinstance(texts.get(key), list)]
    for key in lists:
        texts |= {f"{key}[{place}]": one for place, one in enumerate(texts.pop(key))}
    return [f'"{key}" must be a string' for key, one in texts.items() if not isinstance(one, str)]


def card_tags(card: Mapping[str, Any]) -> list[str]:
    """The tags the Hub derives from a model card."""
    prefixes = [*CARD_TAGS.items()]
    if "base_model_relation" in card:
        prefixes.append(("base_model", f"base_model:{card['base_model_relation']}:"))
    values = [(prefix, card.get(key)) for key, prefix in prefixes]
    lists = [(prefix, one if isinstance(one, list) else [one]) for prefix, one in values]
    return [prefix + one for prefix, ones in lists for one in ones if isinstance(one, str)]
