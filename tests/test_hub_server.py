"""The Hub server for tests, checked through the real huggingface_hub client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "user/steering"
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


def test_account(api: HfApi) -> None:
    assert api.whoami()["name"] == "user"


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
    fetched = {line.rpartition("/")[2] for line in server.requests if line.startswith("GET /user/")}
    assert fetched == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    probed = {line.rpartition("/")[2] for line in server.requests if line.startswith("HEAD ")}
    assert probed > fetched  # optional files, which are not there
