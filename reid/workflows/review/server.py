"""Serves the page and its requests on this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reid.files import OutputError
from reid.registry import ConfigError
from reid.workflows.review.guard import App, Guard
from reid.workflows.review.question import AnswerError
from reid.workflows.review.session import ReviewSession, StaleQuestion
from reid.workflows.review.views import View

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "review.css": ("review.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
    "draw.js": ("draw.js", "text/javascript; charset=utf-8"),
    "review.js": ("review.js", "text/javascript; charset=utf-8"),
}
"""Path behind the token -> file and its type: all files there are."""
_TOKEN_BYTES = 24
_MOST_MARKED = 1000


def build_app(session: ReviewSession, token: str, hosts: frozenset[str]) -> App:
    """The application, with the guard before it.

    Args:
        session: The review.
        token: The first part of every path.
        hosts: See `Guard`.
    """
    app = Starlette(
        routes=[
            *(Route(f"/{path}", _file_reader(*file)) for path, file in FILES.items()),
            Route("/image/{number:int}", _image_reader(session)),
            Route("/api/question", _question_reader(session)),
            Route("/api/figures", _caller(lambda _: session.figures()), methods=["GET"]),
            Route("/api/answer", _caller(lambda body: _answer(session, body)), methods=["POST"]),
            Route(
                "/api/undo", _caller(lambda body: session.undo(_view(body.get("view")))),
                methods=["POST"],
            ),
            Route("/api/write", _caller(lambda _: session.write()), methods=["POST"]),
        ]
    )  # fmt: skip
    app.router.redirect_slashes = False
    return Guard(cast(App, app), token, hosts)


def serve(session: ReviewSession, address: str, port: int, announce: Callable[[str], None]) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        session: The review.
        address: An IP address of this machine.
        port: 0 takes any that is free.
        announce: Called with the link, once it works.

    Raises:
        ConfigError: The address is none of this machine, or the port is taken.
    """
    listening = _listen(address, port)
    with listening:
        host = f"[{address}]" if ":" in address else address
        number = listening.getsockname()[1]
        names = [host, "localhost"] if ipaddress.ip_address(address).is_loopback else [host]
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        app = build_app(session, token, frozenset(f"{name}:{number}" for name in names))
        config = uvicorn.Config(
            cast(Any, app), log_level="warning", access_log=False, server_header=False,
            proxy_headers=False, lifespan="off", http="h11", ws="none", loop="asyncio",
            limit_concurrency=256, timeout_graceful_shutdown=5,
        )  # fmt: skip
        announce(f"http://{host}:{number}/{token}/")
        # uvicorn raises the signal again once it has ended: SIGTERM is then as good as Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run([listening])
        finally:
            signal.signal(signal.SIGTERM, before)


def _listen(address: str, port: int) -> socket.socket:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        raise ConfigError(f"--address: expected an IP address, got {address!r}") from None
    if ip.is_unspecified or ip.is_multicast:
        raise ConfigError(
            f"--address: {address} is not a single address; give one address of this machine"
        )
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: expected 0 to 65535, got {port}")
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{address}:{port}: cannot be listened to ({error.strerror}); --port 0 takes any free "
            "port"
        ) from error
    return listening


def _file_reader(name: str, kind: str) -> Callable[[Request], Response]:
    content = (STATIC / name).read_bytes()

    def read(request: Request) -> Response:
        return Response(content, media_type=kind)

    return read


def _image_reader(session: ReviewSession) -> Callable[[Request], Response]:
    def read(request: Request) -> Response:
        try:
            return Response(
                session.thumbnails.get(request.path_params["number"]), 200, None, "image/jpeg"
            )
        except IndexError:
            return Response("There is no such image\n", 404, media_type="text/plain")

    return read


def _question_reader(session: ReviewSession) -> Callable[[Request], Response]:
    def read(request: Request) -> Response:
        try:
            return JSONResponse(session.question(_view(request.query_params.get("view"))))
        except AnswerError as error:
            return _told(400, error)

    return read


def _caller(work: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Any]:
    """An endpoint that returns `work` of the JSON body, and our errors as text."""

    async def call(request: Request) -> Response:
        raw = await request.body()
        try:
            body = json.loads(raw) if raw else {}
            if not isinstance(body, dict):
                raise AnswerError("expected a JSON object")
            return JSONResponse(await run_in_threadpool(work, body))
        except (AnswerError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            return _told(400, error)
        except StaleQuestion as error:
            return _told(409, error)
        except OutputError as error:
            logger.error("%s", error)
            return _told(507, error)

    return call


def _answer(session: ReviewSession, body: dict[str, Any]) -> dict[str, Any]:
    key, verdict = body.get("key"), body.get("verdict")
    marked, chosen = body.get("marked", []), body.get("chosen", [])
    if not isinstance(key, str) or not isinstance(verdict, str):
        raise AnswerError("expected key and verdict as text")
    for numbers in (marked, chosen):
        if not isinstance(numbers, list) or len(numbers) > _MOST_MARKED:
            raise AnswerError("expected marked and chosen as lists of numbers")
        if not all(type(number) is int for number in numbers):
            raise AnswerError("expected marked and chosen as lists of numbers")
    return session.answer(key, verdict, marked, chosen, _view(body.get("view")))


def _view(text: object) -> View:
    if text is None:
        return "auto"
    if text not in get_args(View):
        raise AnswerError(f"view: expected one of {', '.join(get_args(View))}")
    return cast(View, text)


def _told(status: int, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status)
