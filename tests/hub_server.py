"""A small Hub-compatible HTTP server for tests: model and dataset repositories, kept in memory.

It speaks enough of the Hub's HTTP API for the real ``huggingface_hub`` client to create, fill,
tag, branch, list (models only) and download repositories, to open and merge pull requests, to
make collections, and for the real ``datasets`` library to load a dataset. The id of a dataset
repository starts with "datasets/" here, as its address on the Hub does:
``server.commit("datasets/user/name", files)``. Every commit is an immutable snapshot.

Files are regular ones or LFS ones (basic transfer; no Xet: set ``HF_HUB_DISABLE_XET=1``), as the
.gitattributes of their repository say. An LFS file is downloaded as from the Hub: its address
redirects to another host (the same server under the name "localhost"), which wants no token.

The token "hf_other" is the account "other", every other token is "user". Reading needs no token
unless the repository is private; writing takes the token of its owner, and a pull request any
token. Namespaces of neither account are an organization's, of which both are members.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from hub_http import (
    ACCOUNTS,
    USER,
    Fault,
    HttpServer,
    Reply,
    Request,
    error_reply,
    json_reply,
    part_reply,
    spoiled_reply,
)
from hub_storage import (
    GITATTRIBUTES,
    Blob,
    Collection,
    Commit,
    Discussion,
    HubError,
    Repo,
    card_data,
    card_errors,
    card_tags,
    front_matter,
    is_lfs,
    now,
    tree_entries,
)

PAGE = 10  # discussions in one answer


def may_write(name: str, owner: str) -> bool:
    """Whether an account ("" without a token) may write to what a namespace owns."""
    return name != "" and (name == owner or owner not in (USER, *ACCOUNTS.values()))


def may_read(name: str, repo: Repo) -> bool:
    return not repo.private or may_write(name, repo.owner)


def full_id(asked: Mapping[str, str], name: str) -> str:
    """The id of the repository that a request to create or delete one names."""
    prefix = {"model": "", "dataset": "datasets/"}.get(asked.get("type") or "model")
    if prefix is None:
        raise HubError(400, "Only model and dataset repositories are served here")
    return f"{prefix}{asked.get('organization') or name}/{asked['name']}"


def discussion_json(repo: Repo, found: Discussion) -> dict[str, Any]:
    kind = "model" if repo.name == repo.id else "dataset"
    head = {"num": found.num, "title": found.title, "status": found.status}
    more = {"createdAt": found.date, "isPullRequest": bool(found.base)}
    repository = {"name": repo.name, "type": kind}
    return {**head, **more, "author": {"name": found.author}, "repo": repository}


class HubServer:
    """The server: `start()`, `url`, `requests`, `commit`, `gated`, faults, `stop()`, `restart()`.

    A fault befalls one request, the next one whose "METHOD path" (a line of `requests`) contains
    a substring: `fail_next`, `cut_next`, `alter_next`, `hang_up_next`, `stop_at`. Of several
    faults that match, the first one set comes first; `faults.clear()` forgets those to come.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, Collection] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self._secret = secrets.token_hex(8)
        self._lock = threading.RLock()  # over the answers
        self._switch = threading.RLock()  # over stop and restart
        self._down = False
        self._listen(0)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._cdn = f"http://localhost:{self._http.server_port}"

    @classmethod
    def start(cls) -> HubServer:
        """A running server on a free local port."""
        return cls()

    def _listen(self, port: int) -> None:
        handler = type("Handler", (Request,), {"hub": self})
        self._http = HttpServer(("127.0.0.1", port), handler)
        self._down = False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; later requests are refused."""
        with self._switch:
            self._down = True
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def restart(self) -> None:
        """Listen again on the same port, with the same repositories, after a stop or without."""
        with self._switch:
            self.stop()
            self._listen(self._http.server_port)

    def commit(self, repo_id: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Add files on top of a branch without any request; return the commit hash.

        A missing repository is created with these files only (the client's create_repo adds a
        .gitattributes, as on the Hub; without one its rules hold, too); a missing branch starts
        from main.
        """
        with self._lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id))
            ref = f"refs/heads/{revision}"
            parent = repo.refs.get(ref) or repo.refs.get("refs/heads/main", "")
            return repo.seed(ref, parent, files, USER).oid

    def fail_next(self, substring: str, status: int = 501, times: int = 1) -> None:
        """Answer the next matching request, or so many of them, with an error.

        The client repeats some requests after 408, 429, 500, 502, 503 and 504 (and then succeeds);
        the default is a status which it never repeats.
        """
        self.faults += [Fault("fail", substring, status)] * times

    def cut_next(self, substring: str) -> None:
        """Send only half of the next matching answer, which still tells its full length.

        Answers without a body (to HEAD, redirects) are passed over.
        """
        self.faults.append(Fault("cut", substring))

    def alter_next(self, substring: str) -> None:
        """Flip the byte in the middle of the next matching answer that has a body."""
        self.faults.append(Fault("alter", substring))

    def hang_up_next(self, substring: str) -> None:
        """Close the connection of the next matching request; its body is not read, nor answered."""
        self.faults.append(Fault("hang up", substring))

    def stop_at(self, substring: str) -> None:
        """Stop at the next matching request, as `hang_up_next` and `stop` do; see `restart`."""
        self.faults.append(Fault("stop", substring))

    def admit(self, request: Request) -> bool:
        """Log a request whose body is still unread; whether it is to be answered."""
        with self._lock:
            if self._down:
                return False
            line = f"{request.command} {unquote(request.url.path)}"
            if line == "GET /api/agent-harnesses":  # once per HF_HOME, at any time: not logged
                return True
            self.requests.append(line)
            none = ("cut", "alter") if request.command == "HEAD" else ()
            matching = [one for one in self.faults if one.substring in line]
            request.fault = next((one for one in matching if one.kind not in none), None)
            if request.fault:
                self.faults.remove(request.fault)
        if request.fault and request.fault.kind == "stop":
            self.stop()
        return request.fault is None or request.fault.kind not in ("hang up", "stop")

    def handle(self, request: Request) -> Reply:
        """Answer one request."""
        with self._lock:
            fault = request.fault or Fault("", "")
            try:
                if fault.kind == "fail":
                    raise HubError(fault.status, "Injected failure")
                reply = part_reply(self._route(request), request.headers.get("Range", ""))
            except HubError as error:
                reply = error_reply(error)
            except (KeyError, TypeError, ValueError) as error:
                reply = error_reply(HubError(400, f"Bad request: {error!r}"))
            if fault.kind not in ("cut", "alter"):
                return reply
            if reply.body:
                return spoiled_reply(reply, fault.kind)
            self.faults.insert(0, fault)
            return reply

    def _route(self, request: Request) -> Reply:
        path, verb = request.url.path, request.command.replace("HEAD", "GET")
        if path == "/api/agent-harnesses":
            return json_reply({"standardEnvVars": [], "harnesses": {}})
        for method, pattern, answer, needs in ROUTES:
            if method == verb and (match := re.fullmatch(pattern, path)):
                if needs:
                    request.check_token()
                values = [value and unquote(value) for value in match.groups()]
                if "repo" not in match.groupdict():
                    return answer(self, request, *values)
                repo = self._repo(request, values[0].removeprefix("models/"))
                self._check_gate(repo, path)
                if needs == "write":
                    self._check_owner(request, repo.owner)
                return answer(self, request, repo, *values[1:])
        if re.match(r"/api/(models|datasets|spaces)/|.*/resolve/", path):
            raise HubError(404, "Repository not found", "RepoNotFound")
        raise HubError(404, f"No such endpoint: {request.command} {path}")

    def _repo(self, request: Request, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or not may_read(request.account, repo):
            status = 404 if request.account else 401
            raise HubError(status, "Repository not found", "RepoNotFound")
        return repo

    def _check_gate(self, repo: Repo, path: str) -> None:
        """What a gated dataset is can be read by everybody, its card too; of a model, nothing."""
        rows = "/resolve/" in path and not path.endswith("/README.md")
        hidden = rows or path.endswith("/auth-check") or not repo.id.startswith("datasets/")
        if hidden and repo.id in self.gated:
            raise HubError(403, f"Access to {repo.id} is restricted", "GatedRepo")

    def _check_owner(self, request: Request, owner: str) -> None:
        if not may_write(request.account, owner):
            raise HubError(403, f"{request.account} may not write to what {owner} owns")

    def _check_change(self, request: Request, repo: Repo, revision: str) -> None:
        """Files are changed by the owner, on a pull request by who opened it, on a new one by all.

        What is only uploaded for a new pull request comes without a revision.
        """
        pulls = [one for one in repo.discussions.values() if one.ref == revision]
        own = pulls and pulls[0].author == request.account
        if revision and not own and "create_pr" not in request.query:
            self._check_owner(request, repo.owner)

    def _signed(self, path: str) -> str:
        """An address that needs no token."""
        return f"{quote(path)}?signature={self._signature(path)}"

    def _signature(self, path: str) -> str:
        return hashlib.sha1(f"{self._secret} {path}".encode()).hexdigest()

    def _check_signature(self, request: Request) -> None:
        expected = self._signature(unquote(request.url.path))
        if request.query.get("signature") != [expected]:
            raise HubError(403, "This address is not signed")

    def _whoami(self, request: Request) -> Reply:
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return json_reply({"type": "user", "name": request.account, "orgs": [], "auth": auth})

    def _validate_yaml(self, request: Request) -> Reply:
        text = request.json()["content"]
        errors = [{"message": message} for message in card_errors(text)]
        empty = not errors and not front_matter(text)
        warning = {"message": "empty or missing yaml metadata in repo card"}
        answer = {"errors": errors, "warnings": [warning] if empty else []}
        return json_reply(answer, 400 if errors else 200)

    def _create_repo(self, request: Request) -> Reply:
        asked = request.json()
        repo_id = full_id(asked, request.account)
        repo = Repo(repo_id, asked.get("visibility") == "private")
        self._check_owner(request, repo.owner)
        answer = {"url": f"{self.url}/{repo_id}", "name": repo.name}
        if repo_id in self.repos:
            return json_reply({**answer, "error": "You already created this repo"}, 409)
        files = {".gitattributes": Blob(GITATTRIBUTES.encode())}
        repo.add("refs/heads/main", "", files, "initial commit", author=request.account)
        self.repos[repo_id] = repo
        return json_reply(answer)

    def _delete_repo(self, request: Request) -> Reply:
        repo = self._repo(request, full_id(request.json(), request.account))
        self._check_owner(request, repo.owner)
        del self.repos[repo.id]
        return json_reply({})

    def _list_models(self, request: Request) -> Reply:
        query = request.query
        wanted = {*query.get("filter", []), *query.get("pipeline_tag", [])}
        search, author = query.get("search", [""])[0].lower(), query.get("author", [""])[0]
        infos = [
            self._describe(repo, repo.find("main"))
            for repo in self.repos.values()
            if may_read(request.account, repo) and not repo.id.startswith("datasets/")
        ]
        found = [
            info
            for info in infos
            if wanted <= set(info["tags"]) and search in info["id"].lower()
            if author in ("", info["author"])
        ]
        return json_reply(found[: int(query.get("limit", ["1000"])[0])])

    def _describe(self, repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
        card = card_data(commit.files)
        siblings = [
            {
                "rfilename": path,
                **({"blobId": blob.oid, **blob.described("sha256")} if blobs else {}),
            }
            for path, blob in sorted(commit.files.items())
        ]
        info = {"id": repo.name, "author": repo.owner, "private": repo.private}
        info |= {"sha": commit.oid, "lastModified": commit.date, "siblings": siblings}
        info |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        gated = "manual" if repo.id in self.gated else False
        return {**info, "gated": gated, "tags": card_tags(card), "cardData": card}

    def _info(self, request: Request, repo: Repo, revision: str | None) -> Reply:
        commit = repo.find(revision or "main")
        return json_reply(self._describe(repo, commit, "blobs" in request.query))

    def _auth_check(self, request: Request, repo: Repo) -> Reply:
        return json_reply({})

    def _refs(self, request: Request, repo: Repo) -> Reply:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        refs = {kind: repo.named(prefix) for kind, prefix in kinds.items()}
        return json_reply({**refs, "converts": []})

    def _commits(self, request: Request, repo: Repo, revision: str) -> Reply:
        history = [repo.find(revision)]
        while history[-1].parent:
            history.append(repo.commits[history[-1].parent])
        entries = [{"id": c.oid, "title": c.title, "message": c.message} for c in history]
        more = [{"date": c.date, "authors": [{"user": c.author}]} for c in history]
        return json_reply([entry | rest for entry, rest in zip(entries, more, strict=True)])

    def _tree(self, request: Request, repo: Repo, revision: str, folder: str | None) -> Reply:
        commit = repo.find(revision)
        entries = tree_entries(commit.files)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        below = [path for path in entries if path.startswith(prefix)]
        if prefix and not below:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", commit.oid)
        if request.query.get("recursive", ["false"])[0].lower() == "false":
            below = [path for path in below if "/" not in path.removeprefix(prefix)]
        return json_reply([entries[path] for path in below])

    def _paths_info(self, request: Request, repo: Repo, revision: str) -> Reply:
        entries = tree_entries(repo.find(revision).files)
        paths = parse_qs(request.body.decode()).get("paths", [])
        return json_reply([entries[path] for path in paths if path in entries])

    def _preupload(self, request: Request, repo: Repo, revision: str) -> Reply:
        self._check_change(request, repo, revision)
        files = repo.find(revision).files
        answers = []
        for asked in request.json()["files"]:
            path = asked["path"]
            mode = "lfs" if is_lfs(path, asked["size"], files) else "regular"
            oid = files[path].known_by if path in files else None
            answers.append({"path": path, "oid": oid, "uploadMode": mode, "shouldIgnore": False})
        return json_reply({"files": answers})

    def _lfs_batch(self, request: Request, repo: Repo) -> Reply:
        asked = request.json()
        self._check_change(request, repo, asked.get("ref", {}).get("name", ""))
        if asked["operation"] != "upload" or "basic" not in asked["transfers"]:
            raise HubError(422, "Only basic uploads are served here")
        objects = [{"oid": one["oid"], "size": one["size"]} for one in asked["objects"]]
        for one in objects:
            href = self.url + self._signed(f"/lfs/{repo.id}/{one['oid']}")
            verify = f"{self.url}/{repo.id}.git/info/lfs/objects/verify"
            if one["oid"] not in repo.objects:
                one["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
        return json_reply({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, request: Request, repo_id: str, oid: str) -> Reply:
        self._check_signature(request)
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, f"The bytes sent are not those of {oid}")
        self.repos[repo_id].store(request.body)
        return Reply(200, b"", {})

    def _lfs_verify(self, request: Request, repo: Repo) -> Reply:
        asked = request.json()
        repo.stored(asked["oid"], asked["size"])
        return json_reply({})

    def _create_branch(self, request: Request, repo: Repo, branch: str) -> Reply:
        start = request.json().get("startingPoint") or "main"
        return self._create_ref(repo, f"refs/heads/{branch}", start)

    def _create_tag(self, request: Request, repo: Repo, revision: str) -> Reply:
        return self._create_ref(repo, f"refs/tags/{request.json()['tag']}", revision)

    def _create_ref(self, repo: Repo, ref: str, revision: str) -> Reply:
        if ref in repo.refs:
            raise HubError(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.find(revision).oid
        return json_reply({})

    def _delete_ref(self, request: Request, repo: Repo, kind: str, name: str) -> Reply:
        if repo.refs.pop(f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}", None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return json_reply({})

    def _commit(self, request: Request, repo: Repo, revision: str) -> Reply:
        self._check_change(request, repo, revision)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        expected = header["value"].get("parentCommit")
        texts = (header["value"]["summary"], header["value"].get("description", ""))
        base, new = repo.find(revision), "create_pr" in request.query
        ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        if new:
            base = repo.find(expected or revision)
        elif ref not in repo.refs:
            raise HubError(400, f"{revision} is not a branch")
        elif expected not in (None, base.oid):
            raise HubError(412, f"{revision} is not at {expected} any more")
        files = dict(base.files)
        for operation in operations:
            repo.apply(files, operation["key"], operation["value"])
        answer = {}
        if new:
            ref = repo.discuss(texts[0], request.account, texts[1], base.oid).ref
            number = ref.rpartition("/")[2]
            answer["pullRequestUrl"] = f"{self.url}/{repo.id}/discussions/{number}"
        oid = repo.add(ref, base.oid, files, *texts, author=request.account).oid
        for pull in [one for one in repo.discussions.values() if one.ref == ref]:
            pull.log("commit", request.account, subject=texts[0], oid=oid)
        answer["commitUrl"] = f"{self.url}/{repo.id}/commit/{oid}"
        return json_reply({**answer, "success": True, "commitOid": oid})

    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        commit = repo.find(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.oid)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return Reply(200, blob.data, headers)
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        address = self._signed(f"/cdn/{repo.id}/resolve/{blob.sha256}/{path}")
        return Reply(302, b"", {**headers, "Location": self._cdn + address})

    def _download(self, request: Request, repo_id: str, oid: str, path: str) -> Reply:
        self._check_signature(request)
        data = self.repos[repo_id].stored(oid).data
        return Reply(200, data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _list_discussions(self, request: Request, repo: Repo) -> Reply:
        query = {key: values[0] for key, values in request.query.items()}
        kinds = {"pull_request": [True], "discussion": [False]}
        states = {"open": ["open", "draft"], "closed": ["closed", "merged"]}
        found = [
            discussion_json(repo, one)
            for one in reversed(repo.discussions.values())
            if bool(one.base) in kinds.get(query.get("type", ""), [True, False])
            if one.status in states.get(query.get("status", ""), [one.status])
            if one.author == query.get("author", one.author)
        ]
        start = PAGE * int(query.get("p", 0))
        page = found[start : start + PAGE]
        return json_reply({"discussions": page, "count": len(found), "start": start})

    def _create_discussion(self, request: Request, repo: Repo) -> Reply:
        asked = request.json()
        base = repo.find("main").oid if asked["pullRequest"] else ""
        texts = (asked["title"], request.account, asked["description"])
        found = repo.discuss(*texts, base, status="draft" if base else "open")
        return json_reply(discussion_json(repo, found))

    def _discussion(self, repo: Repo, number: str) -> Discussion:
        if int(number) not in repo.discussions:
            raise HubError(404, f"There is no discussion {number}")
        return repo.discussions[int(number)]

    def _show_discussion(self, request: Request, repo: Repo, number: str) -> Reply:
        found = self._discussion(repo, number)
        answer = {**discussion_json(repo, found), "events": found.events}
        if found.base:
            merged = {"mergeCommitId": found.merged} if found.merged else {}
            answer["changes"] = {"base": "refs/heads/main", **merged}
            answer["filesWithConflicts"] = repo.conflicts(found)
            answer["diff"] = "".join(f"diff --git a/{p} b/{p}\n" for p in repo.changes(found))
        return json_reply(answer)

    def _change_status(self, request: Request, repo: Repo, number: str) -> Reply:
        found = self._discussion(repo, number)
        if found.author != request.account:
            self._check_owner(request, repo.owner)
        found.status = request.json()["status"]
        event = found.log("status-change", request.account, status=found.status)
        return json_reply({"newStatus": event})

    def _merge(self, request: Request, repo: Repo, number: str) -> Reply:
        repo.merge(self._discussion(repo, number), request.account)
        return json_reply({})

    def _collection(self, request: Request, slug: str) -> Collection:
        found = self.collections.get(slug)
        if found is None or (found.private and not may_write(request.account, found.owner)):
            raise HubError(404 if request.account else 401, f"There is no collection {slug}")
        return found

    def _show_collection(self, request: Request, slug: str) -> Reply:
        return json_reply(self._collection_json(request, self._collection(request, slug)))

    def _collection_json(self, request: Request, found: Collection) -> dict[str, Any]:
        """A collection without the repositories that the account may not read, or are gone."""
        items = [one for one in found.items if self._known(request, one["type"], one["id"])]
        head = {"slug": found.slug, "title": found.title, "owner": {"name": found.owner}}
        more = {"description": found.description, "private": found.private, "theme": "green"}
        rest = {"lastUpdated": found.updated, "position": 0, "upvotes": 0, "items": items}
        return {**head, **more, **rest}

    def _known(self, request: Request, kind: str, item: str) -> bool:
        """Whether a collection may hold an item, as the account sees it."""
        repo = self.repos.get(f"datasets/{item}" if kind == "dataset" else item)
        return kind in ("model", "dataset") and repo is not None and may_read(request.account, repo)

    def _list_collections(self, request: Request) -> Reply:
        owners, items = request.query.get("owner"), request.query.get("item")
        found = [
            self._collection_json(request, one)
            for one in self.collections.values()
            if not one.private or may_write(request.account, one.owner)
            if not owners or one.owner in owners
            if not items or {f"{item['type']}s/{item['id']}" for item in one.items} & {*items}
        ]
        short = [{**one, "items": one["items"][:4]} for one in found]  # as on the Hub
        for one in short:
            del one["position"]  # the client counts them itself
        return json_reply(short[: int(request.query.get("limit", ["100"])[0])])

    def _create_collection(self, request: Request) -> Reply:
        asked = request.json()
        owner, title = asked["namespace"], asked["title"]
        self._check_owner(request, owner)
        same = [one.slug for one in self.collections.values() if one.title == title]
        name = re.sub(r"\W+", "-", title.lower()).strip("-")
        slug = f"{owner}/{name}-{self._signature(title)[:24]}"
        if slug in same:
            return json_reply({"error": "This collection exists already", "slug": slug}, 409)
        texts = (slug, title, owner, asked.get("description", ""))
        self.collections[slug] = Collection(*texts, asked.get("private", False), now())
        return self._show_collection(request, slug)

    def _add_item(self, request: Request, slug: str) -> Reply:
        found, asked = self._collection(request, slug), request.json()
        self._check_owner(request, found.owner)
        item, note = asked["item"], asked.get("note")
        if not self._known(request, item["type"], item["id"]):
            raise HubError(404, f"There is no {item['type']} {item['id']}")
        if any((one["type"], one["id"]) == (item["type"], item["id"]) for one in found.items):
            raise HubError(409, f"{item['id']} is in this collection already")
        place = {"_id": f"{len(found.items):024x}", "position": len(found.items)}
        found.items.append({**item, **place, **({"note": {"text": note}} if note else {})})
        found.updated = now()
        return self._show_collection(request, slug)


_REPO = "/api/(?P<repo>(?:models|datasets)/[^/]+/[^/]+)"
_NAME = "(?:datasets/)?[^/]+/[^/]+"
_LFS = rf"/(?P<repo>{_NAME})\.git/info/lfs/objects"
_PULL = f"{_REPO}/discussions"
_OID = "([0-9a-f]{64})"
# Last: what a request needs beyond what it may read: any "token", or one that may "write".
ROUTES: list[tuple[str, str, Callable[..., Reply], str]] = [
    ("GET", "/api/whoami-v2", HubServer._whoami, "token"),
    ("POST", "/api/validate-yaml", HubServer._validate_yaml, ""),
    ("POST", "/api/repos/create", HubServer._create_repo, "token"),
    ("DELETE", "/api/repos/delete", HubServer._delete_repo, "token"),
    ("GET", "/api/models", HubServer._list_models, ""),
    ("GET", f"{_REPO}(?:/revision/([^/]+))?", HubServer._info, ""),
    ("GET", f"{_REPO}/auth-check", HubServer._auth_check, ""),
    ("GET", f"{_REPO}/refs", HubServer._refs, ""),
    ("GET", f"{_REPO}/commits/([^/]+)", HubServer._commits, ""),
    ("GET", f"{_REPO}/tree/([^/]+)(?:/(.+))?", HubServer._tree, ""),
    ("POST", f"{_REPO}/paths-info/([^/]+)", HubServer._paths_info, ""),
    ("POST", f"{_REPO}/preupload/([^/]+)", HubServer._preupload, "token"),
    ("POST", f"{_LFS}/batch", HubServer._lfs_batch, "token"),
    ("PUT", f"/lfs/({_NAME})/{_OID}", HubServer._lfs_upload, ""),
    ("POST", f"{_LFS}/verify", HubServer._lfs_verify, "token"),
    ("POST", f"{_REPO}/branch/([^/]+)", HubServer._create_branch, "write"),
    ("POST", f"{_REPO}/tag/([^/]+)", HubServer._create_tag, "write"),
    ("DELETE", f"{_REPO}/(branch|tag)/([^/]+)", HubServer._delete_ref, "write"),
    ("POST", f"{_REPO}/commit/([^/]+)", HubServer._commit, "token"),
    ("GET", f"/(?P<repo>{_NAME})/resolve/([^/]+)/(.+)", HubServer._resolve, ""),
    ("GET", f"/cdn/({_NAME})/resolve/{_OID}/(.+)", HubServer._download, ""),
    ("GET", _PULL, HubServer._list_discussions, ""),
    ("POST", _PULL, HubServer._create_discussion, "token"),
    ("GET", rf"{_PULL}/(\d+)", HubServer._show_discussion, ""),
    ("POST", rf"{_PULL}/(\d+)/status", HubServer._change_status, "token"),
    ("POST", rf"{_PULL}/(\d+)/merge", HubServer._merge, "write"),
    ("GET", "/api/collections", HubServer._list_collections, ""),
    ("POST", "/api/collections", HubServer._create_collection, "token"),
    ("GET", "/api/collections/([^/]+/[^/]+)", HubServer._show_collection, ""),
    ("POST", "/api/collections/([^/]+/[^/]+)/items", HubServer._add_item, "token"),
]
