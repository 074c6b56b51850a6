"""How the tests' Hub server speaks HTTP: requests, replies, and what can befall them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, urlsplit

from hub_storage import HubError

USER = "user"
ACCOUNTS = {"hf_other": "other"}  # every other token is of USER


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]
    length: int | None = None  # the Content-Length, where it is not that of the body


class Fault(NamedTuple):
    """What befalls the next request whose "METHOD path" contains `substring`."""

    kind: str  # fail, cut, alter, hang up, stop
    substring: str
    status: int = 0


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    kept = {name: text for name, text in (headers or {}).items() if text}
    body = json.dumps(value, default=str).encode()  # a date in a card is sent as text
    return Reply(status, body, {"Content-Type": "application/json", **kept})


def error_reply(error: HubError) -> Reply:
    shown = str(error).encode("ascii", "backslashreplace").decode()
    headers = {"X-Error-Message": shown, "X-Error-Code": error.code, "X-Repo-Commit": error.commit}
    return json_reply({"error": str(error)}, error.status, headers)


def part_reply(reply: Reply, wanted: str) -> Reply:
    """The part of a whole file that a Range header asks for (one range from a first byte)."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if not asked or reply.status != 200 or "Accept-Ranges" not in reply.headers:
        return reply
    size = len(reply.body)
    first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
    if first > last:
        return Reply(416, b"", {"Content-Range": f"bytes */{size}"})
    headers = {**reply.headers, "Content-Range": f"bytes {first}-{last}/{size}"}
    return Reply(206, reply.body[first : last + 1], headers)


def spoiled_reply(reply: Reply, kind: str) -> Reply:
    """A reply that is cut in its middle, or altered there."""
    body, middle = reply.body, len(reply.body) // 2
    if kind == "cut":
        return reply._replace(body=body[:middle], length=len(body))
    return reply._replace(body=body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :])


class Hub(Protocol):
    """What answers the requests."""

    def admit(self, request: Request) -> bool: ...
    def handle(self, request: Request) -> Reply: ...


class HttpServer(ThreadingHTTPServer):
    request_queue_size = 64  # parallel downloads open one connection per request


class Request(BaseHTTPRequestHandler):
    """One request: `command`, `url`, `query`, `account`, `body`, and its `fault`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub
    fault: Fault | None = None

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def check_token(self) -> None:
        if not self.account:
            raise HubError(401, "Invalid username or password")

    def _answer(self) -> None:
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.account = ACCOUNTS.get(token, USER) if token else ""
        self.close_connection = True
        if not self.hub.admit(self):
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, body, headers, length = self.hub.handle(self)
        self.send_response(status)
        length = len(body) if length is None else length
        headers = {**headers, "Content-Length": str(length), "Connection": "close"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: `HubServer.requests` is the log."""
