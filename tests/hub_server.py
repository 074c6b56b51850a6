"""A small Hub-compatible HTTP server for tests: model and dataset repositories, kept in memory.

It speaks enough of the Hub's HTTP API for the real ``huggingface_hub`` client to create, fill,
tag, branch, list (models only) and download repositories, and for the real ``datasets`` library
to load them. The id of a dataset repository starts with "datasets/" here, as its address on the
Hub does: ``server.commit("datasets/user/name", files)``. Every commit is an immutable snapshot.
Files are uploaded as regular files only (no LFS, no Xet: set ``HF_HUB_DISABLE_XET=1``). Reading
needs no token unless the repository is private; writing takes any token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

USER = "user"  # the account behind every token
GITATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
CARD_TAGS = {"library_name": "", "pipeline_tag": "", "language": "", "tags": ""}
CARD_TAGS |= {"license": "license:", "datasets": "dataset:", "base_model": "base_model:"}


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class HubError(Exception):
    """An error answer; `code` is what the client turns into an exception class."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        shown = message.encode("ascii", "backslashreplace").decode()
        headers = {"X-Error-Message": shown, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.reply = json_reply({"error": message}, status, headers)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str
    title: str
    message: str
    date: str
    files: Mapping[str, bytes]


class Repo:
    """Commits by hash, and full reference names ("refs/heads/main") pointing at them."""

    def __init__(self, repo_id: str, private: bool = False) -> None:
        self.id, self.private = repo_id, private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}

    def find(self, revision: str) -> Commit:
        """The commit behind a branch, a tag, refs/pr/N or a full commit hash."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        oid = next((self.refs[name] for name in names if name in self.refs), revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add(self, ref: str, parent: str, files: Mapping[str, bytes], *texts: str) -> Commit:
        """Store a snapshot and move `ref` to it; `texts` are a title and a message."""
        seed = [self.id, ref, parent, texts, len(self.commits), tree_entries(files)]
        oid = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        title, message = (*texts, "")[:2]
        self.commits[oid] = Commit(oid, parent, title, message, date, dict(files))
        self.refs[ref] = oid
        return self.commits[oid]

    def named(self, prefix: str) -> list[dict[str, str]]:
        """The references below `prefix`, as the refs endpoint lists them."""
        found = [ref for ref in self.refs if ref.startswith(prefix)]
        name = {ref: ref if prefix == "refs/pr/" else ref.removeprefix(prefix) for ref in found}
        return [{"name": name[r], "ref": r, "targetCommit": self.refs[r]} for r in found]


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    kept = {name: text for name, text in (headers or {}).items() if text}
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **kept})


def blob_oid(data: bytes) -> str:
    """The git object id, which the client compares to skip unchanged files."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def tree_entries(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Every file and folder of a snapshot by path, as the tree endpoint lists them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        parts = path.split("/")
        for folder in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": blob_oid(data), "size": len(data)}
    return entries


def card_data(files: Mapping[str, bytes]) -> dict[str, str | list[str]]:
    """Scalars and block lists of the model card's YAML header (nothing nested, no inline list)."""
    header = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
    pairs = re.findall(r"^(\w+):(?: +(\S.*))?((?:\n *- .*)*)$", header[1] if header else "", re.M)
    return {
        key: scalar.strip("'\"") or [item.strip("'\"") for item in re.findall("- (.+)", items)]
        for key, scalar, items in pairs
        if key in CARD_TAGS or key == "base_model_relation"
    }


def card_tags(card: Mapping[str, str | list[str]]) -> list[str]:
    """The tags the Hub derives from a model card."""
    prefixes = [*CARD_TAGS.items()]
    if "base_model_relation" in card:
        prefixes.append(("base_model", f"base_model:{card['base_model_relation']}:"))
    values = [(prefix, card.get(key, [])) for key, prefix in prefixes]
    return [prefix + v for prefix, vs in values for v in ([vs] if isinstance(vs, str) else vs)]


def apply_operation(files: dict[str, bytes], key: str, value: Mapping[str, str]) -> None:
    """Apply one line of a commit to `files`."""
    path = value["path"]
    if key == "file":
        files[path] = base64.b64decode(value["content"])
        return
    if key not in ("deletedFile", "deletedFolder"):
        raise HubError(400, f"Unsupported operation: {key}")
    folder = f"{path.rstrip('/')}/"
    gone = [n for n in files if (n == path if key == "deletedFile" else n.startswith(folder))]
    if not gone:
        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
    for name in gone:
        del files[name]


def full_id(asked: Mapping[str, str]) -> str:
    """The id of the repository that a request to create or delete one names."""
    prefix = {"model": "", "dataset": "datasets/"}.get(asked.get("type") or "model")
    if prefix is None:
        raise HubError(400, "Only model and dataset repositories are served here")
    return f"{prefix}{asked.get('organization') or USER}/{asked['name']}"


class HubServer:
    """The server: `start()`, `url`, `requests`, `commit`, `gated`, `fail_next`, `stop()`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self._failures: list[tuple[str, int]] = []
        self._lock = threading.RLock()
        self._http = _HttpServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @classmethod
    def start(cls) -> HubServer:
        """A running server on a free local port."""
        server = cls()
        server._thread.start()
        return server

    def stop(self) -> None:
        """Stop listening; later requests are refused."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def commit(self, repo_id: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Add files on top of a branch without any request; return the commit hash.

        A missing repository is created with these files only (the client's create_repo adds a
        .gitattributes, as on the Hub); a missing branch starts from main.
        """
        with self._lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id))
            ref = f"refs/heads/{revision}"
            parent = repo.refs.get(ref) or repo.refs.get("refs/heads/main", "")
            merged = {**(repo.commits[parent].files if parent else {}), **files}
            return repo.add(ref, parent, merged, "Seed").oid

    def fail_next(self, substring: str, status: int = 501) -> None:
        """Make the next request whose "METHOD path" contains `substring` fail, once.

        The client repeats some requests after 408, 429, 500, 502, 503 and 504 (and then succeeds);
        the default is a status which it never repeats.
        """
        self._failures.append((substring, status))

    def handle(self, request: _Handler) -> Reply:
        """Log and answer one request."""
        with self._lock:
            line = f"{request.command} {unquote(request.url.path)}"
            if line == "GET /api/agent-harnesses":  # once per HF_HOME, at any time: not logged
                return json_reply({"standardEnvVars": [], "harnesses": {}})
            self.requests.append(line)
            try:
                for failure in [one for one in self._failures if one[0] in line][:1]:
                    self._failures.remove(failure)
                    raise HubError(failure[1], "Injected failure")
                return self._route(request)
            except HubError as error:
                return error.reply
            except (KeyError, TypeError, ValueError) as error:
                return HubError(400, f"Bad request: {error!r}").reply

    def _route(self, request: _Handler) -> Reply:
        path, verb = request.url.path, request.command.replace("HEAD", "GET")
        for method, pattern, answer in ROUTES:
            if method == verb and (match := re.fullmatch(pattern, path)):
                if verb != "GET" and not re.search("/paths-info/|/validate-yaml", path):
                    request.check_token()
                values = [value and unquote(value) for value in match.groups()]
                if not values:
                    return answer(self, request)
                repo = self._repo(request, values[0].removeprefix("models/"))
                self._check_gate(repo, path)
                return answer(self, request, repo, *values[1:])
        if re.match(r"/api/(models|datasets|spaces)/|.*/resolve/", path):
            raise HubError(404, "Repository not found", "RepoNotFound")
        raise HubError(404, f"No such endpoint: {request.command} {path}")

    def _repo(self, request: _Handler, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not request.token):
            status = 404 if request.token else 401
            raise HubError(status, "Repository not found", "RepoNotFound")
        return repo

    def _check_gate(self, repo: Repo, path: str) -> None:
        """What a gated dataset is can be read by everybody, its card too; of a model, nothing."""
        rows = "/resolve/" in path and not path.endswith("/README.md")
        hidden = rows or path.endswith("/auth-check") or not repo.id.startswith("datasets/")
        if hidden and repo.id in self.gated:
            raise HubError(403, f"Access to {repo.id} is restricted", "GatedRepo")

    def _whoami(self, request: _Handler) -> Reply:
        request.check_token()
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return json_reply({"type": "user", "name": USER, "orgs": [], "auth": auth})

    def _validate_yaml(self, request: _Handler) -> Reply:
        warning = {"message": "empty or missing yaml metadata in repo card"}
        has_header = request.json()["content"].startswith("---")
        return json_reply({"errors": [], "warnings": [] if has_header else [warning]})

    def _create_repo(self, request: _Handler) -> Reply:
        asked = request.json()
        repo_id = full_id(asked)
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id.removeprefix("datasets/")}
        if repo_id in self.repos:
            return json_reply({**answer, "error": "You already created this repo"}, 409)
        repo = self.repos[repo_id] = Repo(repo_id, asked.get("visibility") == "private")
        repo.add("refs/heads/main", "", GITATTRIBUTES, "initial commit")
        return json_reply(answer)

    def _delete_repo(self, request: _Handler) -> Reply:
        repo = self._repo(request, full_id(request.json()))
        del self.repos[repo.id]
        return json_reply({})

    def _list_models(self, request: _Handler) -> Reply:
        query = request.query
        wanted = {*query.get("filter", []), *query.get("pipeline_tag", [])}
        search, author = query.get("search", [""])[0].lower(), query.get("author", [""])[0]
        infos = [
            self._describe(repo, repo.find("main"))
            for repo in self.repos.values()
            if (request.token or not repo.private) and not repo.id.startswith("datasets/")
        ]
        found = [
            info
            for info in infos
            if wanted <= set(info["tags"]) and search in info["id"].lower()
            if author in ("", info["author"])
        ]
        return json_reply(found[: int(query.get("limit", ["1000"])[0])])

    def _describe(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        card = card_data(commit.files)
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": blob_oid(data)}
            for path, data in sorted(commit.files.items())
        ]
        repo_id = repo.id.removeprefix("datasets/")
        info = {"id": repo_id, "author": repo_id.split("/")[0], "private": repo.private}
        info |= {"sha": commit.oid, "lastModified": commit.date, "siblings": siblings}
        info |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        gated = "manual" if repo.id in self.gated else False
        return {**info, "gated": gated, "tags": card_tags(card), "cardData": card}

    def _info(self, request: _Handler, repo: Repo, revision: str | None) -> Reply:
        return json_reply(self._describe(repo, repo.find(revision or "main")))

    def _auth_check(self, request: _Handler, repo: Repo) -> Reply:
        return json_reply({})

    def _refs(self, request: _Handler, repo: Repo) -> Reply:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        refs = {kind: repo.named(prefix) for kind, prefix in kinds.items()}
        return json_reply({**refs, "converts": []})

    def _commits(self, request: _Handler, repo: Repo, revision: str) -> Reply:
        history = [repo.find(revision)]
        while history[-1].parent:
            history.append(repo.commits[history[-1].parent])
        entries = [{"id": c.oid, "title": c.title, "message": c.message} for c in history]
        more = [{"date": c.date, "authors": [{"user": USER}]} for c in history]
        return json_reply([entry | rest for entry, rest in zip(entries, more, strict=True)])

    def _tree(self, request: _Handler, repo: Repo, revision: str, folder: str | None) -> Reply:
        commit = repo.find(revision)
        entries = tree_entries(commit.files)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        below = [path for path in entries if path.startswith(prefix)]
        if prefix and not below:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", commit.oid)
        if request.query.get("recursive", ["false"])[0].lower() == "false":
            below = [path for path in below if "/" not in path.removeprefix(prefix)]
        return json_reply([entries[path] for path in below])

    def _paths_info(self, request: _Handler, repo: Repo, revision: str) -> Reply:
        entries = tree_entries(repo.find(revision).files)
        paths = parse_qs(request.body.decode()).get("paths", [])
        return json_reply([entries[path] for path in paths if path in entries])

    def _preupload(self, request: _Handler, repo: Repo, revision: str) -> Reply:
        files = repo.find(revision).files
        same = {"uploadMode": "regular", "shouldIgnore": False}
        paths = [file["path"] for file in request.json()["files"]]
        oids = {path: blob_oid(files[path]) if path in files else None for path in paths}
        return json_reply({"files": [{"path": p, "oid": oids[p], **same} for p in paths]})

    def _create_branch(self, request: _Handler, repo: Repo, branch: str) -> Reply:
        start = request.json().get("startingPoint") or "main"
        return self._create_ref(repo, f"refs/heads/{branch}", start)

    def _create_tag(self, request: _Handler, repo: Repo, revision: str) -> Reply:
        return self._create_ref(repo, f"refs/tags/{request.json()['tag']}", revision)

    def _create_ref(self, repo: Repo, ref: str, revision: str) -> Reply:
        if ref in repo.refs:
            raise HubError(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.find(revision).oid
        return json_reply({})

    def _delete_ref(self, request: _Handler, repo: Repo, kind: str, name: str) -> Reply:
        if repo.refs.pop(f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}", None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return json_reply({})

    def _commit(self, request: _Handler, repo: Repo, revision: str) -> Reply:
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        expected = header["value"].get("parentCommit")
        base, answer = repo.find(revision), {}
        ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        if "create_pr" in request.query:
            number = len(repo.named("refs/pr/")) + 1
            base, ref = repo.find(expected or revision), f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.url}/{repo.id}/discussions/{number}"
        elif ref not in repo.refs:
            raise HubError(400, f"{revision} is not a branch")
        elif expected not in (None, base.oid):
            raise HubError(412, f"{revision} is not at {expected} any more")
        files = dict(base.files)
        for operation in operations:
            apply_operation(files, operation["key"], operation["value"])
        texts = (header["value"]["summary"], header["value"].get("description", ""))
        oid = repo.add(ref, base.oid, files, *texts).oid
        answer["commitUrl"] = f"{self.url}/{repo.id}/commit/{oid}"
        return json_reply({**answer, "success": True, "commitOid": oid})

    def _resolve(self, request: _Handler, repo: Repo, revision: str, path: str) -> Reply:
        commit = repo.find(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.oid)
        data = commit.files[path]
        return Reply(200, data, {"X-Repo-Commit": commit.oid, "ETag": f'"{blob_oid(data)}"'})


_REPO = "/api/((?:models|datasets)/[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Reply]]] = [
    ("GET", "/api/whoami-v2", HubServer._whoami),
    ("POST", "/api/validate-yaml", HubServer._validate_yaml),
    ("POST", "/api/repos/create", HubServer._create_repo),
    ("DELETE", "/api/repos/delete", HubServer._delete_repo),
    ("GET", "/api/models", HubServer._list_models),
    ("GET", f"{_REPO}(?:/revision/([^/]+))?", HubServer._info),
    ("GET", f"{_REPO}/auth-check", HubServer._auth_check),
    ("GET", f"{_REPO}/refs", HubServer._refs),
    ("GET", f"{_REPO}/commits/([^/]+)", HubServer._commits),
    ("GET", f"{_REPO}/tree/([^/]+)(?:/(.+))?", HubServer._tree),
    ("POST", f"{_REPO}/paths-info/([^/]+)", HubServer._paths_info),
    ("POST", f"{_REPO}/preupload/([^/]+)", HubServer._preupload),
    ("POST", f"{_REPO}/branch/([^/]+)", HubServer._create_branch),
    ("POST", f"{_REPO}/tag/([^/]+)", HubServer._create_tag),
    ("DELETE", f"{_REPO}/(branch|tag)/([^/]+)", HubServer._delete_ref),
    ("POST", f"{_REPO}/commit/([^/]+)", HubServer._commit),
    ("GET", "/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubServer._resolve),
]


class _HttpServer(ThreadingHTTPServer):
    request_queue_size = 64  # parallel downloads open one connection per request


class _Handler(BaseHTTPRequestHandler):
    """One request: `command`, `url`, `query`, `token` and `body`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def check_token(self) -> None:
        if not self.token:
            raise HubError(401, "Invalid username or password")

    def _answer(self) -> None:
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, body, headers = self.hub.handle(self)
        self.send_response(status)
        headers = {**headers, "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: `HubServer.requests` is the log."""
