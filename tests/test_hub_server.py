"""The Hub server for tests, checked through the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx2 import ConnectError, RemoteProtocolError
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # its own

REPO = "user/steering"
WEIGHTS = "weights.safetensors"
DATA = random.Random(0).randbytes(300_001)
CARD = """---
base_model: user/base
base_model_relation: adapter
library_name: steered-moe
license: apache-2.0
tags:
- moe
- 'steering'
language:
  - fr
---
# A card
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    server = HubServer.start()
    yield server
    server.stop()


@pytest.fixture
def api(server: HubServer) -> HfApi:
    return HfApi(endpoint=server.url, token="hf_test")


@pytest.fixture
def other(server: HubServer) -> HfApi:
    """The second account."""
    return HfApi(endpoint=server.url, token="hf_other")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's waits before it tries again, which are not waited here."""
    waits: list[float] = []
    sleep = time.sleep

    def wait(seconds: float) -> None:
        waits.append(seconds)
        sleep(0.01)

    monkeypatch.setattr(time, "sleep", wait)
    return waits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "tables").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "tables" / "bias.bin").write_bytes(bytes(range(256)) * 1000)
    return folder


def fetch(api: HfApi, cache: Path, revision: str | None = None, name: str = "a.txt") -> str:
    path = api.hf_hub_download(REPO, name, revision=revision, cache_dir=cache)
    return Path(path).read_text()


def upload(api: HfApi, data: bytes, name: str = WEIGHTS, repo_id: str = REPO, **more: Any) -> Any:
    change = [CommitOperationAdd(name, data)]
    return api.create_commit(repo_id, change, commit_message=f"Add {name}", **more)


def download(api: HfApi, cache: Path, name: str = WEIGHTS) -> bytes:
    return Path(api.hf_hub_download(REPO, name, cache_dir=cache)).read_bytes()


def counted(server: HubServer, word: str) -> int:
    """How many requests so far contain a word."""
    return sum(word in line for line in server.requests)


def test_account(api: HfApi, other: HfApi) -> None:
    assert api.whoami()["name"] == "user"
    assert other.whoami()["name"] == "other"


def test_create_and_delete_a_repository(api: HfApi) -> None:
    url = api.create_repo(REPO, private=True)
    assert url.repo_id == REPO
    assert api.create_repo("steering", exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.list_repo_files(REPO) == [".gitattributes"]
    assert api.model_info(REPO).private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO, token=False)
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_writing_needs_a_token(api: HfApi, server: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="401"):
        api.create_repo(REPO, token=False)
    server.commit(REPO, {"a.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="401"):
        api.create_tag(REPO, tag="v1", token=False)


def test_upload_folder_is_one_commit(
    api: HfApi, server: HubServer, folder: Path, tmp_path: Path
) -> None:
    api.create_repo(REPO)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Publish")
    assert [line for line in server.requests if "/commit/" in line] == [
        f"POST /api/models/{REPO}/commit/main"
    ]
    assert [entry.title for entry in api.list_repo_commits(REPO)] == ["Publish", "initial commit"]
    assert api.model_info(REPO).sha == commit.oid
    uploaded = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *uploaded}
    path = api.hf_hub_download(REPO, "tables/bias.bin", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (folder / "tables" / "bias.bin").read_bytes()
    again = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert again.oid == commit.oid  # unchanged files make no commit


def test_commit_deletes_files_and_folders(api: HfApi, server: HubServer) -> None:
    server.commit(REPO, {"a.txt": b"a", "ab.txt": b"b", "dir/c.txt": b"c"})
    api.delete_file("a.txt", REPO)
    api.create_commit(REPO, [CommitOperationDelete("dir/")], commit_message="Clean")
    assert api.list_repo_files(REPO) == ["ab.txt"]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("a.txt", REPO)


def test_download_by_branch_tag_and_commit(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    first = server.commit(REPO, {"a.txt": b"one"})
    api.create_tag(REPO, tag="v1.0")
    api.create_branch(REPO, branch="next/try")
    second = server.commit(REPO, {"a.txt": b"two"})
    server.commit(REPO, {"a.txt": b"three"}, revision="next/try")
    expected = {None: "two", "main": "two", "v1.0": "one", first: "one", second: "two"}
    expected["next/try"] = "three"
    assert {rev: fetch(api, tmp_path, rev) for rev in expected} == expected
    snapshots = next(tmp_path.glob("models--*")) / "snapshots"
    assert len(list(snapshots.iterdir())) == 3
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1.0")
    api.create_tag(REPO, tag="v1.0", exist_ok=True)


def test_old_commits_keep_their_bytes(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    commits = [server.commit(REPO, {"a.txt": str(n).encode()}) for n in range(3)]
    assert len(set(commits)) == 3
    api.delete_file("a.txt", REPO)
    assert [fetch(api, tmp_path, commit) for commit in commits] == ["0", "1", "2"]
    history = [entry.commit_id for entry in api.list_repo_commits(REPO)]
    assert history[1:] == commits[::-1]


def test_references(api: HfApi, server: HubServer) -> None:
    first = server.commit(REPO, {"a.txt": b"one"})
    second = server.commit(REPO, {"a.txt": b"two"})
    api.create_branch(REPO, branch="old", revision=first)
    api.create_tag(REPO, tag="v1", revision="old")
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "old": first}
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [
        ("v1", "refs/tags/v1", first)
    ]
    api.delete_branch(REPO, branch="old")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")


def test_pull_request_leaves_main_alone(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    first = server.commit(REPO, {"a.txt": b"one"})
    change = [CommitOperationAdd("a.txt", b"proposed")]
    commit = api.create_commit(REPO, change, commit_message="Propose", create_pr=True)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert fetch(api, tmp_path) == "one"
    assert fetch(api, tmp_path, "refs/pr/1") == "proposed"
    assert api.model_info(REPO).sha == first
    more = [CommitOperationAdd("b.txt", b"more")]
    api.create_commit(REPO, more, commit_message="Also", revision="refs/pr/1")
    assert fetch(api, tmp_path, "refs/pr/1", "b.txt") == "more"
    pulls = api.list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert [ref.ref for ref in pulls or []] == ["refs/pr/1"]


def test_large_files_go_through_lfs(
    api: HfApi, server: HubServer, folder: Path, tmp_path: Path
) -> None:
    api.create_repo(REPO)
    large = {WEIGHTS: DATA, "plots/a b.png": DATA[::-1], "tokenizer.json": DATA[:-1]}
    for name, data in large.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    words = ("objects/batch", "PUT /lfs/", "objects/verify", "/commit/")
    assert [counted(server, word) for word in words] == [1, 3, 3, 1]
    snapshot = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    for path in filter(Path.is_file, folder.rglob("*")):
        assert (snapshot / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert counted(server, "GET /cdn/") == 3
    blobs = {path.name for path in (tmp_path / "cache").rglob("blobs/*")}
    assert blobs > {hashlib.sha256(data).hexdigest() for data in large.values()}
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == commit.oid
    server.requests.clear()
    upload(api, DATA, "copy.safetensors")  # stored already: nothing is sent
    assert [counted(server, word) for word in words] == [1, 0, 0, 1]
    assert download(api, tmp_path, "copy.safetensors") == DATA


def test_the_address_of_an_lfs_file(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    api.create_repo(REPO, private=True)
    commit = upload(api, DATA).oid
    sha256 = hashlib.sha256(DATA).hexdigest()
    url = hf_hub_url(REPO, WEIGHTS, endpoint=server.url)
    found = get_hf_file_metadata(url, token="hf_test")
    assert (found.commit_hash, found.etag, found.size) == (commit, sha256, len(DATA))
    port = server.url.rpartition(":")[2]
    assert found.location.startswith(f"http://localhost:{port}/cdn/{REPO}/resolve/{sha256}/")
    assert get_session().get(found.location).content == DATA  # needs no token, as on the Hub
    assert get_session().get(found.location.partition("?")[0]).status_code == 403
    assert get_session().get(url).status_code == 401
    assert download(api, tmp_path) == DATA
    server.commit(REPO, {"a.txt": DATA})
    files = HfFileSystem(endpoint=server.url, token="hf_test", skip_instance_cache=True)
    for name in (WEIGHTS, "a.txt"):
        assert files.cat_file(f"{REPO}/{name}", start=1000, end=1010) == DATA[1000:1010]


def test_which_files_are_lfs(api: HfApi, server: HubServer) -> None:
    api.create_repo(REPO)
    rules = b"*.bin filter=lfs diff=lfs merge=lfs -text\ndata/*.txt filter=lfs\n*.md text\n"
    upload(api, rules, ".gitattributes")
    files = ("a.bin", "data/a.txt", "a.txt", "notes.md", WEIGHTS)
    changes = [CommitOperationAdd(name, b"1") for name in files]
    changes.append(CommitOperationAdd("large.txt", bytes(10_000_001)))
    changes.append(CommitOperationAdd("empty.bin", b""))
    api.create_commit(REPO, changes, commit_message="Many")
    infos = api.get_paths_info(REPO, [change.path_in_repo for change in changes])
    assert len(infos) == len(changes)
    stored = {one.path for one in infos if one.lfs}
    assert stored == {"a.bin", "data/a.txt", "large.txt"}


def test_metadata_of_lfs_files(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    server.commit(REPO, {WEIGHTS: DATA, "a.txt": b"one"})  # without any request, as LFS, too
    lfs = {"size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest(), "pointer_size": 131}
    tree = {one.path: one.lfs for one in api.list_repo_tree(REPO)}
    paths = {one.path: one.lfs for one in api.get_paths_info(REPO, ["a.txt", WEIGHTS])}
    siblings = api.model_info(REPO, files_metadata=True).siblings or []
    assert tree == paths == {one.rfilename: one.lfs for one in siblings}
    assert tree == {"a.txt": None, WEIGHTS: lfs}
    assert {one.rfilename: one.size for one in siblings} == {"a.txt": 3, WEIGHTS: len(DATA)}
    plain = api.model_info(REPO).siblings or []
    assert [(one.rfilename, one.size) for one in plain] == [("a.txt", None), (WEIGHTS, None)]
    assert download(api, tmp_path) == DATA


def test_lfs_files_of_a_dataset(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    kind: dict[str, Any] = {"repo_id": REPO, "repo_type": "dataset"}
    api.create_repo(**kind)
    upload(api, DATA, **kind)
    path = api.hf_hub_download(filename=WEIGHTS, cache_dir=tmp_path, **kind)
    assert Path(path).read_bytes() == DATA
    assert counted(server, f"POST /datasets/{REPO}.git/info/lfs/objects/batch") == 1


def test_lfs_uploads_are_checked(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    api.create_repo(REPO)
    (tmp_path / "file").write_bytes(DATA)
    change = CommitOperationAdd(WEIGHTS, tmp_path / "file")
    assert change.upload_info.sha256
    (tmp_path / "file").write_bytes(DATA[::-1])  # after the client has hashed it
    with pytest.raises(RuntimeError, match=WEIGHTS) as caught:
        api.create_commit(REPO, [change], commit_message="Late")
    assert isinstance(caught.value.__cause__, BadRequestError)
    missing = CommitOperationAdd(WEIGHTS, DATA)
    missing._upload_mode, missing._is_uploaded = "lfs", True  # it never was
    with pytest.raises(HfHubHTTPError, match="was never uploaded"):
        api.create_commit(REPO, [missing], commit_message="Nothing")
    verify = f"{server.url}/{REPO}.git/info/lfs/objects/verify"
    upload(api, DATA)
    sizes = {len(DATA): 200, 5: 422}
    for size, status in sizes.items():
        asked = {"oid": hashlib.sha256(DATA).hexdigest(), "size": size}
        headers = {"Authorization": "Bearer hf_test"}
        assert get_session().post(verify, json=asked, headers=headers).status_code == status
    assert len(api.list_repo_commits(REPO)) == 2


def test_a_pull_request_is_opened_filled_and_merged(
    api: HfApi, server: HubServer, tmp_path: Path
) -> None:
    first = server.commit(REPO, {"a.txt": b"one", "old.txt": b"old"})
    pull = api.create_pull_request(REPO, "Change it", description="Because")
    assert (pull.num, pull.status, pull.git_reference) == (1, "draft", "refs/pr/1")
    change = [CommitOperationAdd("a.txt", b"two"), CommitOperationDelete("old.txt")]
    change.append(CommitOperationAdd(WEIGHTS, DATA))
    oid = api.create_commit(REPO, change, commit_message="Two", revision="refs/pr/1").oid
    server.commit(REPO, {"new.txt": b"new"})
    with pytest.raises(BadRequestError, match="not a draft one"):
        api.merge_pull_request(REPO, 1)
    assert api.change_discussion_status(REPO, 1, "open").new_status == "open"
    details = api.get_discussion_details(REPO, 1)
    assert [event.type for event in details.events] == ["comment", "commit", "status-change"]
    assert (details.events[0].content, details.events[1].oid) == ("Because", oid)
    assert (details.target_branch, details.conflicting_files) == ("refs/heads/main", [])
    assert fetch(api, tmp_path) == "one"
    api.merge_pull_request(REPO, 1)
    merged = api.get_discussion_details(REPO, 1)
    assert (merged.status, merged.merge_commit_oid) == ("merged", api.model_info(REPO).sha)
    assert fetch(api, tmp_path) == "two"
    assert set(api.list_repo_files(REPO)) == {"a.txt", "new.txt", WEIGHTS}
    assert download(api, tmp_path) == DATA
    assert fetch(api, tmp_path, first) == "one"
    with pytest.raises(BadRequestError, match="not a merged one"):
        api.merge_pull_request(REPO, 1)


def test_pull_requests_of_both_accounts(api: HfApi, other: HfApi, server: HubServer) -> None:
    server.commit(REPO, {"a.txt": b"one"})
    commit = upload(other, DATA, create_pr=True)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    upload(other, DATA[1:], revision="refs/pr/1")
    mine = upload(api, b"two", "a.txt", create_pr=True)
    for revision in ("main", mine.pr_revision):
        with pytest.raises(HfHubHTTPError, match="403"):
            upload(other, DATA[2:], revision=revision)
    with pytest.raises(HfHubHTTPError, match="403"):
        other.merge_pull_request(REPO, 1)
    found = list(api.get_repo_discussions(REPO))
    assert [(one.num, one.author, one.status) for one in found] == [
        (2, "user", "open"),
        (1, "other", "open"),
    ]
    assert found[0].repo_type == "model"
    assert found[0].repo_id == REPO
    assert [one.num for one in api.get_repo_discussions(REPO, author="other")] == [1]
    assert api.create_discussion(REPO, "A question").status == "open"
    kinds = {"pull_request": [2, 1], "discussion": [3], None: [3, 2, 1]}
    for kind, numbers in kinds.items():
        found = list(api.get_repo_discussions(REPO, discussion_type=kind))
        assert [one.num for one in found] == numbers
    upload(api, b"three", "a.txt")
    assert api.get_discussion_details(REPO, 2).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.merge_pull_request(REPO, 2)
    api.merge_pull_request(REPO, 1)
    closed = list(api.get_repo_discussions(REPO, discussion_status="closed"))
    assert [(one.num, one.status) for one in closed] == [(1, "merged")]
    with pytest.raises(HfHubHTTPError, match="404"):
        api.get_discussion_details(REPO, 9)


def test_many_discussions_come_in_pages(api: HfApi, server: HubServer) -> None:
    server.commit(f"datasets/{REPO}", {"a.txt": b"one"})
    for number in range(23):
        api.create_pull_request(REPO, f"Number {number}", repo_type="dataset")
    found = list(api.get_repo_discussions(REPO, repo_type="dataset"))
    assert [one.num for one in found] == list(range(23, 0, -1))
    assert counted(server, f"GET /api/datasets/{REPO}/discussions") == 23 + 3


def test_collections(api: HfApi, other: HfApi, server: HubServer) -> None:
    server.commit("user/shown", {"a.txt": b"one"})
    server.commit("datasets/user/shown", {"a.txt": b"one"})
    api.create_repo("user/hidden", private=True)
    made = api.create_collection("Steerings, all", description="Ours")
    assert (made.title, made.description, made.items) == ("Steerings, all", "Ours", [])
    slug = made.slug
    assert slug.startswith("user/steerings-all-")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_collection("Steerings, all")
    assert api.create_collection("Steerings, all", exists_ok=True).slug == slug
    api.add_collection_item(slug, "user/shown", "model", note="First")
    api.add_collection_item(slug, "user/shown", "dataset")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.add_collection_item(slug, "user/shown", "model")
    with pytest.raises(HfHubHTTPError, match="404"):
        api.add_collection_item(slug, "user/missing", "model")
    with pytest.raises(HfHubHTTPError, match="403"):
        other.add_collection_item(slug, "user/shown", "model")
    with pytest.raises(HfHubHTTPError, match="403"):
        other.create_collection("Mine", namespace="user")
    items = api.add_collection_item(slug, "user/hidden", "model").items
    assert [(one.item_id, one.item_type, one.note) for one in items] == [
        ("user/shown", "model", "First"),
        ("user/shown", "dataset", None),
        ("user/hidden", "model", None),
    ]
    assert len(other.get_collection(slug).items) == 2
    secret = api.create_collection("Secret", private=True).slug
    assert [one.slug for one in api.list_collections(owner="user")] == [slug, secret]
    assert [one.slug for one in api.list_collections(owner="user", token=False)] == [slug]
    assert [one.slug for one in api.list_collections(item="datasets/user/shown")] == [slug]
    assert not list(api.list_collections(owner="other"))
    with pytest.raises(HfHubHTTPError, match="404"):
        other.get_collection(secret)
    with pytest.raises(HfHubHTTPError, match="401"):
        api.get_collection(secret, token=False)


def test_another_account_reads_what_is_public_and_writes_its_own(
    api: HfApi, other: HfApi, server: HubServer, tmp_path: Path
) -> None:
    api.create_repo(REPO, private=True)
    upload(api, DATA)
    pull = api.create_pull_request(REPO, "Change it")
    url = f"{server.url}/{REPO}.git/info/lfs/objects/batch"
    calls: list[Callable[[HfApi], Any]] = [
        lambda one: one.model_info(REPO),
        lambda one: download(one, tmp_path / "cache"),
        lambda one: list(one.get_repo_discussions(REPO)),
        lambda one: one.get_discussion_details(REPO, pull.num),
        lambda one: one.create_pull_request(REPO, "Me, too"),
        lambda one: upload(one, DATA, create_pr=True),
    ]
    for call in calls:
        with pytest.raises(RepositoryNotFoundError, match="404"):
            call(other)
    none = HfApi(endpoint=server.url, token=False)
    for call in calls[:4]:
        with pytest.raises(RepositoryNotFoundError, match="401"):
            call(none)
    for call in calls[4:]:
        with pytest.raises(HfHubHTTPError, match="401"):
            call(none)
    assert get_session().post(url, json={}).status_code == 401
    assert not list(other.list_models())
    server.repos[REPO].private = False
    assert download(other, tmp_path) == DATA
    writes: list[Callable[[], Any]] = [
        lambda: upload(other, DATA[1:]),
        lambda: other.create_tag(REPO, tag="v1"),
        lambda: other.delete_repo(REPO),
        lambda: other.create_repo("user/new"),
        lambda: other.delete_branch(REPO, branch="main"),
        lambda: other.change_discussion_status(REPO, pull.num, "closed"),
        lambda: api.create_repo("other/new"),
    ]
    for write in writes:
        with pytest.raises(HfHubHTTPError, match="403"):
            write()
    assert other.create_repo("mine").repo_id == "other/mine"
    upload(other, DATA, repo_id="other/mine")
    assert [one.author for one in api.list_models()] == ["user", "other"]


def test_commit_refuses_a_stale_parent_and_a_tag(api: HfApi, server: HubServer) -> None:
    first = server.commit(REPO, {"a.txt": b"one"})
    server.commit(REPO, {"a.txt": b"two"})
    api.create_tag(REPO, tag="v1")
    change = [CommitOperationAdd("a.txt", b"three")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, change, commit_message="Late", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="v1 is not a branch"):
        api.create_commit(REPO, list(change), commit_message="Frozen", revision="v1")


def test_snapshot_download(server: HubServer, tmp_path: Path) -> None:
    files = {"a.txt": b"a", "dir/b.txt": b"b", "dir/deep/c é.txt": b"c", "empty.txt": b""}
    files |= {f"many/{n}.txt": b"x" for n in range(20)}
    commit = server.commit(REPO, files)
    path = snapshot_download(REPO, endpoint=server.url, cache_dir=tmp_path, token="hf_test")
    found = Path(path)
    assert found.name == commit
    assert files == {
        one.relative_to(found).as_posix(): one.read_bytes()
        for one in found.rglob("*")
        if one.is_file()
    }


def test_paths_and_tree(api: HfApi, server: HubServer) -> None:
    server.commit(REPO, {"a.txt": b"abc", "dir/b.txt": b"b", "dir/deep/c.txt": b"c"})
    assert [one.path for one in api.list_repo_tree(REPO)] == ["a.txt", "dir"]
    below = api.list_repo_tree(REPO, "dir", recursive=True)
    assert [one.path for one in below] == ["dir/b.txt", "dir/deep", "dir/deep/c.txt"]
    info = api.get_paths_info(REPO, ["a.txt", "dir", "missing"], token=False)
    assert [(one.path, getattr(one, "size", None)) for one in info] == [("a.txt", 3), ("dir", None)]
    assert api.file_exists(REPO, "dir/b.txt")
    assert not api.file_exists(REPO, "dir")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))


def test_missing_things(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    commit = server.commit(REPO, {"a.txt": b"one"})
    for repo_id in ("user/missing", "missing"):
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo_id)
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(REPO)
    for call in (api.model_info, api.list_repo_files, api.list_repo_commits):
        with pytest.raises(RevisionNotFoundError):
            call(REPO, revision="missing")
    with pytest.raises(RevisionNotFoundError):
        fetch(api, tmp_path, "missing")
    with pytest.raises(EntryNotFoundError):
        fetch(api, tmp_path, name="missing.txt")
    assert list(tmp_path.glob(f"*/.no_exist/{commit}/missing.txt"))


def test_gated_repository(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    server.commit(REPO, {"a.txt": b"one"})
    server.gated.add(REPO)
    with pytest.raises(GatedRepoError):
        fetch(api, tmp_path)
    with pytest.raises(GatedRepoError):
        api.model_info(REPO)
    with pytest.raises(GatedRepoError):
        api.snapshot_download(REPO, cache_dir=tmp_path)
    server.gated.discard(REPO)
    assert fetch(api, tmp_path) == "one"


def test_dataset_repository(api: HfApi, server: HubServer, folder: Path, tmp_path: Path) -> None:
    kind: dict[str, Any] = {"repo_id": REPO, "repo_type": "dataset"}
    assert api.create_repo(**kind).repo_type == "dataset"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(**kind)
    first = api.upload_folder(folder_path=folder, commit_message="Publish", **kind).oid
    api.create_tag(tag="v1", **kind)
    change = [CommitOperationAdd("a.txt", b"new"), CommitOperationDelete("config.json")]
    second = api.create_commit(operations=change, commit_message="Change", **kind)
    assert second.commit_url.endswith(f"/datasets/{REPO}/commit/{second.oid}")
    info = api.dataset_info(REPO)
    assert (info.id, info.author, info.sha) == (REPO, "user", second.oid)
    assert api.dataset_info(REPO, revision="v1").sha == first
    files = [".gitattributes", "README.md", "a.txt", "tables/bias.bin"]
    assert api.list_repo_files(**kind) == files
    assert [one.path for one in api.list_repo_tree(path_in_repo="tables", **kind)] == files[3:]
    path = api.hf_hub_download(filename="config.json", revision="v1", cache_dir=tmp_path, **kind)
    assert Path(path).read_text() == "{}"
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(filename="config.json", cache_dir=tmp_path, **kind)
    api.delete_repo(**kind)
    assert not api.repo_exists(**kind)


def test_a_dataset_is_not_the_model_of_its_name(
    api: HfApi, server: HubServer, tmp_path: Path
) -> None:
    model = server.commit(REPO, {"a.txt": b"model"})
    data = server.commit(f"datasets/{REPO}", {"a.txt": b"data"})
    assert (api.model_info(REPO).sha, api.dataset_info(REPO).sha) == (model, data)
    assert [one.id for one in api.list_models()] == [REPO]
    assert fetch(api, tmp_path) == "model"
    path = api.hf_hub_download(REPO, "a.txt", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_text() == "data"
    with pytest.raises(HfHubHTTPError, match="Only model and dataset"):
        api.create_repo(REPO, repo_type="space", space_sdk="static")


def test_gated_and_private_datasets(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    kind: dict[str, Any] = {"repo_id": REPO, "repo_type": "dataset"}
    api.create_repo(private=True, **kind)
    card = b"---\nlicense: mit\n---"
    for name, data in {"a.txt": b"one", "README.md": card}.items():
        api.upload_file(path_or_fileobj=data, path_in_repo=name, **kind)
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(REPO, token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.auth_check(token=False, **kind)
    api.auth_check(**kind)
    server.gated.add(f"datasets/{REPO}")
    assert api.dataset_info(REPO).gated == "manual"  # as on the Hub: known, but not its files
    with pytest.raises(GatedRepoError):
        api.hf_hub_download(filename="a.txt", cache_dir=tmp_path, **kind)
    with pytest.raises(GatedRepoError):
        api.auth_check(**kind)
    assert api.hf_hub_download(filename="README.md", cache_dir=tmp_path, **kind)
    server.gated.clear()
    assert api.hf_hub_download(filename="a.txt", cache_dir=tmp_path, **kind)


def test_list_models(api: HfApi, server: HubServer) -> None:
    server.commit(REPO, {"README.md": CARD.encode()})
    server.commit("other/plain", {"a.txt": b"one"})
    assert [one.id for one in api.list_models()] == [REPO, "other/plain"]
    assert [one.id for one in api.list_models(author="other")] == ["other/plain"]
    assert [one.id for one in api.list_models(search="STEER")] == [REPO]
    for tags in ("steered-moe", ["base_model:adapter:user/base", "fr"], ["moe", "steering"]):
        assert [one.id for one in api.list_models(filter=tags)] == [REPO]
    assert not list(api.list_models(filter=["moe", "de"]))
    assert len(list(api.list_models(limit=1))) == 1


def test_model_info_reads_the_card(api: HfApi, server: HubServer) -> None:
    server.commit(REPO, {"README.md": CARD.encode()})
    info = api.model_info(REPO, files_metadata=True)
    assert info.library_name == "steered-moe"
    assert info.card_data is not None
    assert info.card_data.base_model == "user/base"
    assert info.card_data.tags == ["moe", "steering"]
    assert [(one.rfilename, one.size) for one in info.siblings or []] == [("README.md", len(CARD))]


BROKEN = {
    "tags: [a\n": "Invalid YAML",
    "license: 3\n": '"license" must be a string',
    "language: [fr, no]\n": r'"language\[1\]" must be a string',
    "base_model: {a: b}\n": '"base_model" must be a string',
    "library_name: [a]\n": '"library_name" must be a string',
    "- a\n": "must be a mapping",
}


@pytest.mark.parametrize("header", BROKEN)
def test_a_broken_card_is_refused(api: HfApi, server: HubServer, header: str) -> None:
    api.create_repo(REPO)
    card = f"---\n{header}---\n# A card\n"
    with pytest.raises(ValueError, match=BROKEN[header]):
        upload(api, card.encode(), "README.md")
    assert not counted(server, "/commit/")
    server.commit(REPO, {"README.md": card.encode()})
    assert api.model_info(REPO).id == REPO  # a card that is there already breaks nothing
    assert [one.id for one in api.list_models()] == [REPO]


def test_card_validation_reads_yaml(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # it takes no endpoint
    ModelCard(CARD).validate()
    with pytest.raises(ValueError, match=r"license\W+ must be a string"):
        ModelCard("---\nlicense: 3\n---\n").validate()


def test_lists_in_a_card_become_tags(api: HfApi, server: HubServer) -> None:
    header = """---
base_model: [user/base, user/second]
base_model_relation: adapter
language: [fr, "no"]
datasets:
- user/data
tags: &tags [steered-moe]
model-index:
- name: a
  results: []
released: 2026-01-02
---
"""
    server.commit(REPO, {"README.md": header.encode()})
    server.commit("user/base", {"README.md": b"# No header"})
    names = ("user/base", "user/second")
    tags = [f"base_model:{name}" for name in names]
    tags += [f"base_model:adapter:{name}" for name in names]
    assert api.model_info(REPO).tags == ["fr", "no", "steered-moe", "dataset:user/data", *tags]
    for tag in (*tags, "steered-moe", "no", ["dataset:user/data", "fr"]):
        assert [one.id for one in api.list_models(filter=tag)] == [REPO]
    card = api.model_info(REPO).card_data
    assert card is not None
    assert (card.base_model, card["released"]) == (list(names), "2026-01-02")


def test_card_without_metadata_gets_a_warning(api: HfApi) -> None:
    api.create_repo(REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Hi", path_in_repo="README.md", repo_id=REPO)


def test_requests_are_logged_in_order(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    server.commit(REPO, {"a.txt": b"one"})
    api.create_branch(REPO, branch="x/y")
    fetch(api, tmp_path, "x/y")
    assert server.requests == [
        f"POST /api/models/{REPO}/branch/x/y",
        f"HEAD /{REPO}/resolve/x/y/a.txt",
        f"GET /{REPO}/resolve/x/y/a.txt",
    ]
    server.requests.clear()
    fetch(api, tmp_path, "x/y")
    assert server.requests == [f"HEAD /{REPO}/resolve/x/y/a.txt"]


def test_injected_failure_happens_once(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    server.commit(REPO, {"a.txt": b"one"})
    server.fail_next("GET /user/steering/resolve/main/a.txt")
    with pytest.raises(HfHubHTTPError, match="501"):
        fetch(api, tmp_path)
    assert fetch(api, tmp_path) == "one"
    server.fail_next("preupload")  # the client repeats this request after a 500
    change = [CommitOperationAdd("a.txt", b"two")]
    with pytest.raises(HfHubHTTPError, match="Injected failure"):
        api.create_commit(REPO, change, commit_message="Two")
    assert sum("preupload" in line for line in server.requests) == 1
    server.fail_next(f"POST /api/models/{REPO}/commit", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_commit(REPO, list(change), commit_message="Two")
    assert fetch(api, tmp_path) == "one"


def test_injected_failure_on_metadata(api: HfApi, server: HubServer, tmp_path: Path) -> None:
    server.commit(REPO, {"a.txt": b"one"})
    server.fail_next("HEAD ")
    with pytest.raises(LocalEntryNotFoundError):
        fetch(api, tmp_path)
    assert len(server.requests) == 1
    assert fetch(api, tmp_path) == "one"
    server.fail_next("HEAD ")
    assert fetch(api, tmp_path) == "one"  # from the cache


def test_failures_happen_as_often_as_asked(
    api: HfApi, server: HubServer, waits: list[float]
) -> None:
    api.create_repo(REPO)
    server.fail_next("PUT /lfs/", status=500, times=2)
    upload(api, DATA)
    assert (counted(server, "PUT"), waits) == (3, [1, 2])
    server.fail_next("PUT /lfs/", status=503, times=6)  # one more than the client tries again
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        upload(api, DATA[1:])
    assert "503" in str(caught.value.__cause__)
    assert upload(api, DATA[1:]).oid == api.model_info(REPO).sha


@pytest.mark.parametrize("name", [WEIGHTS, "a.txt"])
def test_a_cut_download_is_tried_again(
    api: HfApi, server: HubServer, tmp_path: Path, waits: list[float], name: str
) -> None:
    server.commit(REPO, {name: DATA})
    server.cut_next(name)  # the request by HEAD before it is passed over
    assert download(api, tmp_path, name) == DATA  # the client fetched it once more, from its start
    assert (counted(server, "GET"), waits) == (2, [1])
    server.commit(REPO, {name: DATA[1:]})
    for _ in range(6):
        server.cut_next(name)
    with pytest.raises(RemoteProtocolError, match="received 150000 bytes, expected 300000"):
        download(api, tmp_path, name)
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name]
    assert download(api, tmp_path, name) == DATA[1:]


def test_a_cut_download_goes_on_where_it_was_cut(
    api: HfApi, server: HubServer, tmp_path: Path, waits: list[float], monkeypatch
) -> None:
    """The client keeps whole chunks (of 10 MB, here of 1 KB) of what came before the cut."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.commit(REPO, {WEIGHTS: DATA})
    server.cut_next("GET /cdn/")
    server.alter_next("GET /cdn/")  # in the middle of the part that is asked for then
    expected = bytearray(DATA)
    expected[(150_000 + len(DATA)) // 2] ^= 0xFF
    assert download(api, tmp_path) == expected


def test_cut_answers_of_the_api(api: HfApi, server: HubServer, waits: list[float]) -> None:
    api.create_repo(REPO)
    server.cut_next("GET /api/models/")
    with pytest.raises(RemoteProtocolError, match="without sending complete message body"):
        api.model_info(REPO)
    server.cut_next("/preupload/")
    upload(api, DATA)
    assert (counted(server, "/preupload/"), waits) == (2, [1])
    server.cut_next("/commit/")
    with pytest.raises(RemoteProtocolError, match="without sending complete message body"):
        upload(api, DATA[1:])
    assert len(api.list_repo_commits(REPO)) == 3  # made, although the client does not know it


@pytest.mark.parametrize("name", [WEIGHTS, "a.txt"])
def test_an_altered_download_is_not_noticed(
    api: HfApi, server: HubServer, tmp_path: Path, name: str
) -> None:
    """The client compares sizes only, even where the name of the file is its SHA-256."""
    server.commit(REPO, {name: DATA})
    server.alter_next(name)
    data = download(api, tmp_path, name)
    assert [place for place in range(len(DATA)) if data[place] != DATA[place]] == [150_000]
    assert download(api, tmp_path, name) == data  # from now on from its cache
    path = api.hf_hub_download(REPO, name, cache_dir=tmp_path, force_download=True)
    assert Path(path).read_bytes() == DATA


def test_an_altered_answer_of_the_api(api: HfApi, server: HubServer) -> None:
    server.commit(REPO, {"a.txt": b"one"})
    server.alter_next("GET /api/models/")
    with pytest.raises(UnicodeDecodeError):
        api.model_info(REPO)
    assert api.model_info(REPO).id == REPO


def test_a_connection_that_is_hung_up(
    api: HfApi, server: HubServer, tmp_path: Path, waits: list[float]
) -> None:
    api.create_repo(REPO)
    for request in ("/preupload/", "objects/batch", "PUT /lfs/", "objects/verify"):
        server.hang_up_next(request)  # the client repeats all of these
    upload(api, DATA)
    assert waits == [1, 1, 1, 1]
    server.hang_up_next("/commit/")
    with pytest.raises(RemoteProtocolError, match="Server disconnected"):
        upload(api, DATA[1:])
    assert len(api.list_repo_commits(REPO)) == 2
    server.hang_up_next("HEAD")
    with pytest.raises(RemoteProtocolError, match="Server disconnected"):
        download(api, tmp_path)
    server.hang_up_next("GET /cdn/")
    assert download(api, tmp_path) == DATA
    assert len(waits) == 5
    server.hang_up_next("GET /api/models/")
    with pytest.raises(RemoteProtocolError, match="Server disconnected"):
        api.model_info(REPO)


def test_a_connection_hung_up_in_the_middle_of_an_upload(
    api: HfApi, server: HubServer, waits: list[float]
) -> None:
    """More bytes than the buffers between the two hold, of which the server reads none."""
    api.create_repo(REPO)
    data = DATA * 70
    server.hang_up_next("PUT")
    upload(api, data)
    assert (counted(server, "PUT"), waits) == (2, [1])
    assert [len(blob.data) for blob in server.repos[REPO].objects.values()] == [len(data)]


def test_the_server_stops_during_an_upload(
    api: HfApi, server: HubServer, tmp_path: Path, waits: list[float]
) -> None:
    api.create_repo(REPO)
    server.stop_at("PUT")
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        upload(api, DATA)
    assert isinstance(caught.value.__cause__, ConnectError)
    assert waits == [1, 2, 4, 8, 8]
    with pytest.raises(ConnectError, match="refused"):
        api.model_info(REPO)
    server.restart()
    assert api.list_repo_files(REPO) == [".gitattributes"]
    upload(api, DATA)
    assert download(api, tmp_path) == DATA
    server.stop_at("/commit/")
    with pytest.raises(RemoteProtocolError, match="Server disconnected"):
        upload(api, DATA[1:])
    server.restart()
    server.requests.clear()
    upload(api, DATA[1:])
    assert not counted(server, "PUT")  # the bytes are there since the first try


def test_the_server_stops_during_a_download(
    api: HfApi, server: HubServer, tmp_path: Path, waits: list[float]
) -> None:
    server.commit(REPO, {WEIGHTS: DATA})
    server.stop_at("GET /cdn/")
    with pytest.raises(ConnectError, match="refused"):
        download(api, tmp_path)
    assert waits == [1, 1, 1, 1, 1]
    with pytest.raises(LocalEntryNotFoundError):
        download(api, tmp_path)
    server.restart()
    assert download(api, tmp_path) == DATA
    server.stop_at("HEAD")
    with pytest.raises(RemoteProtocolError, match="Server disconnected"):
        download(api, tmp_path)  # although the file is in the cache
    assert download(api, tmp_path) == DATA  # from the cache, as the connection is refused
    server.restart()
    assert server.requests[-1].startswith("HEAD")


def test_a_server_that_comes_back_in_time_is_not_missed(
    api: HfApi, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.create_repo(REPO)
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if seconds == 2:  # before the second repetition: the server was found gone
            server.restart()

    monkeypatch.setattr(time, "sleep", wait)
    server.stop_at("PUT")
    upload(api, DATA)
    assert waits == [1, 2]
    assert download(api, tmp_path) == DATA


def test_stopped_server_leaves_only_the_cache(
    api: HfApi, server: HubServer, tmp_path: Path
) -> None:
    other = HubServer.start()
    other.commit(REPO, {"a.txt": b"one"})
    far = HfApi(endpoint=other.url, token="hf_test")
    assert fetch(far, tmp_path) == "one"
    other.stop()
    assert fetch(far, tmp_path) == "one"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(other.url.rpartition(":")[2])), timeout=5)
    assert api.whoami()["name"] == "user"  # a server of its own


LOAD = """
import sys
from transformers import AutoConfig, AutoTokenizer

for revision in ("v1", "main", sys.argv[1]):
    print(AutoConfig.from_pretrained("user/model", revision=revision).hidden_size)
print(AutoTokenizer.from_pretrained("user/model")("hello").input_ids)
try:
    AutoConfig.from_pretrained("user/model", revision="missing")
except OSError as error:
    print("missing is not a valid git identifier" in str(error))
"""
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "hello": 1}, "unk_token": "[UNK]"},
}


def test_transformers_loads_through_the_endpoint(server: HubServer, tmp_path: Path) -> None:
    def files(hidden_size: int) -> dict[str, bytes]:
        config = {"model_type": "mixtral", "hidden_size": hidden_size}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
        contents = {"config": config, "tokenizer": TOKENIZER, "tokenizer_config": settings}
        return {f"{name}.json": json.dumps(value).encode() for name, value in contents.items()}

    first = server.commit("user/model", files(8))
    HfApi(endpoint=server.url, token="hf_test").create_tag("user/model", tag="v1")
    server.commit("user/model", files(16))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", LOAD, first]
    done = subprocess.run(
        command, env={**outside, **settings}, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["8", "16", "8", "[1]", "True"], done.stderr
    gets = [line for line in server.requests if line.startswith(("GET /user/", "GET /cdn/user/"))]
    fetched = {line.rpartition("/")[2] for line in gets}
    assert fetched == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    probed = {line.rpartition("/")[2] for line in server.requests if line.startswith("HEAD ")}
    assert probed > fetched  # optional files, which are not there
