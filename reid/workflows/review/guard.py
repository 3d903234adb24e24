"""Checks every request: the host, the origin, the method, the token and the size."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BODY = 2**16
"""Bytes of an answer."""
HEADERS: Mapping[str, str] = {
    "cache-control": "no-store",  # the link holds the token
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_MOST_PATH = 256
_MOST_REST, _REST_SECONDS = 2**22, 1.0
"""Bytes of a refused request that are read, and for how long."""
_METHODS = ("GET", "HEAD", "POST")
_OWN_SITE = ("same-origin", "none")


class Guard:
    """Lets only the page itself through; everything else gets a short refusal.

    A request needs the host that the page was started for (so an attacker cannot point a name of
    his own at this machine), no origin or the page's own, and the token as the first part of its
    path. Requests that change something are POSTs with JSON, an origin and at most `MOST_BODY`
    bytes. Every answer, refusals too, has `HEADERS`.

    Args:
        app: What the rest of the path is for.
        token: The secret in the link.
        hosts: Values of the Host header that are ours, such as `127.0.0.1:8765`.
    """

    def __init__(self, app: App, token: str, hosts: frozenset[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on with the path behind the token."""
        if scope["type"] != "http":
            return  # no web sockets here; there is nothing to start or to stop
        headers = _Headers(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(receive, send, *refusal)
            return
        inner = dict(scope)
        inner["path"] = "/" + scope["path"].split("/", 2)[2]
        inner["raw_path"] = inner["path"].encode("utf-8", "surrogateescape")
        body = await _whole_body(receive) if scope["method"] == "POST" else b""
        if body is None:
            await _refuse(receive, send, 413, f"More than {MOST_BODY:,} bytes")
            return
        await self._app(inner, _Once(body, receive), _with_headers(send))

    def _refusal(self, scope: Scope, headers: _Headers) -> tuple[int, str] | None:
        """Status and reason, or None."""
        method, path = scope["method"], scope["path"]
        if headers.all("host") not in [[host] for host in self._hosts]:
            return 421, "This page is not served under that host name"
        origins = headers.all("origin")
        own = [[f"http://{headers.all('host')[0]}"]]
        if origins not in [[], *own]:
            return 403, "Requests from other pages are refused"
        if headers.one("sec-fetch-site") not in (None, *_OWN_SITE):
            return 403, "Requests from other pages are refused"
        if method not in _METHODS:
            return 405, "GET and POST only"
        if len(path) > _MOST_PATH:
            return 414, "No path here is that long"
        parts = path.split("/", 2)
        if len(parts) < 3 or not secrets.compare_digest(
            parts[1].encode("utf-8", "surrogateescape"), self._token
        ):
            return 404, "Not found: open the link that review.py has printed"
        return self._post_refusal(headers, bool(origins)) if method == "POST" else None

    def _post_refusal(self, headers: _Headers, has_origin: bool) -> tuple[int, str] | None:
        if not has_origin:
            return 403, "A POST needs an Origin header"
        kind = (headers.one("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return 415, "Expected application/json"
        length = headers.one("content-length")
        if length is not None and (not length.isascii() or not length.isdigit()):
            return 400, "Content-Length is no number"
        if length is not None and int(length[:10]) > MOST_BODY:
            return 413, f"More than {MOST_BODY:,} bytes"
        return None


class _Headers:
    """The values of headers by their lower-case names."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        self._raw = [(name.decode("latin-1").lower(), text.decode("latin-1")) for name, text in raw]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self._raw if key == name]

    def one(self, name: str) -> str | None:
        """The value; several are joined, so they match nothing that is allowed."""
        values = self.all(name)
        return ", ".join(values) if values else None


class _Once:
    """Gives a body that was read already, then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _whole_body(receive: Receive) -> bytes | None:
    """The body; None: it is too large, and the rest is not read."""
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body += bytes(message.get("body", b""))
        if len(body) > MOST_BODY:
            return None
        if not message.get("more_body"):
            return body


def _raw_headers(kind: str | None = None) -> list[tuple[bytes, bytes]]:
    named = dict(HEADERS) | ({"content-type": kind} if kind else {})
    return [(name.encode(), value.encode()) for name, value in named.items()]


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = {name.encode() for name in HEADERS}
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in ours]
            message = {**message, "headers": kept + _raw_headers()}
        await send(message)

    return sending


async def _refuse(receive: Receive, send: Send, status: int, reason: str) -> None:
    """Answers at once, then reads what the client still sends, and closes the connection.

    A connection that is closed while bytes are under way is reset, and a reset can take the answer
    from the client before it has read it.
    """
    body = f"{reason}\n".encode()
    closing = [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    headers = _raw_headers("text/plain; charset=utf-8") + closing
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_read_rest(receive), _REST_SECONDS)
    await send({"type": "http.response.body", "body": b""})


async def _read_rest(receive: Receive) -> None:
    left, more = _MOST_REST, True
    while more and left > 0:
        message = await receive()
        more = message["type"] == "http.request" and bool(message.get("more_body"))
        left -= len(message.get("body", b""))
