"""Requests that mean harm get nothing and change nothing."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from reid.registry import ConfigError
from reid.workflows.review.guard import HEADERS, MOST_BODY
from reid.workflows.review.server import FILES, STATIC, serve


def raw(port: int, text: bytes) -> bytes:
    """The answer to bytes as they stand, which no client would send."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(text)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_the_page_and_its_files(served: Any) -> None:
    for path, (name, kind) in FILES.items():
        status, headers, content = served.ask(f"/{served.token}/{path}")
        assert (status, headers["content-type"]) == (200, kind)
        assert content == (STATIC / name).read_bytes()
        assert served.token.encode() not in content
        for header, value in HEADERS.items():
            assert headers[header] == value
        assert "server" not in headers
    status, headers, content = served.ask(f"/{served.token}/image/0")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert content.startswith(b"\xff\xd8")
    assert served.ask(f"/{served.token}/", method="HEAD")[0] == 200


def test_there_is_a_file_for_each_that_is_installed() -> None:
    assert sorted(name for name, _ in FILES.values()) == sorted(p.name for p in STATIC.iterdir())
    assert all("//" not in (STATIC / name).read_text().replace("http://www.w3.org/2000/svg", "")
               .replace("\n//", "") for name in ("index.html", "review.css"))  # fmt: skip


PATHS = (
    "/", "/{t}", "//{t}/", "/{t}x/", "/x{t}/", "/{u}/", "/{t}/../", "/{t}/x", "/{t}//",
    "/{t}/image/", "/{t}/image/-1", "/{t}/image/72", "/{t}/image/99999999999999999999",
    "/{t}/image/1.5", "/{t}/image/0x1", "/{t}/image/../../../etc/passwd", "/{t}/image/0/",
    "/{t}/image/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/{t}/image//etc/passwd", "/{t}/etc/passwd",
    "/{t}/static/review.js", "/{t}/../static/review.js", "/{t}/review.js/..",
    "/{t}/image/0%00.png", "/{t}/..%5c..%5cwindows", "/{t}/%2e%2e/%2e%2e/etc/passwd",
    "/{t}/answers.jsonl", "/{t}/api", "/{t}/api/", "/{t}/api/write/", "/%00/", "/é/",
    "/{t}/image/%D9%A1", "/{t}/image/" + "9" * 5000, "/" + "a" * 5000,
)  # fmt: skip
HOSTS = (
    "evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:{p}", "127.0.0.1:{p}.evil.example",
    "127.0.0.1:{p}@evil.example", "0.0.0.0:{p}", "[::1]:{p}", "2130706433:{p}", "", " ",
    "127.0.0.1:{p}, evil.example", "LOCALHOST.:{p}",
)  # fmt: skip
ORIGINS = (
    ("Origin", "http://evil.example"), ("Origin", "null"), ("Origin", "http://127.0.0.1"),
    ("Origin", "https://127.0.0.1:{p}"), ("Origin", "http://127.0.0.1:{p}.evil.example"),
    ("Origin", "http://localhost:{p}"), ("Origin", "file://"),
    ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Site", "same-site"),
)  # fmt: skip
METHODS = ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "X")
BODIES = (
    b"", b"nonsense", b"[]", b"null", b"\xff\xfe", b"[" * 60000, b'{"key": 1}',
    b'{"key": "x", "verdict": 1}', b'{"key": "x", "verdict": "same", "marked": 1}',
    b'{"key": "x", "verdict": "same", "marked": [1.5]}',
    b'{"key": "x", "verdict": "same", "marked": [true]}',
    b'{"key": "x", "verdict": "same", "view": "/etc/passwd"}',
    b'{"key": "x", "verdict": "same", "view": ["auto"]}',
    b'{"key": "x", "verdict": "same", "chosen": {"a": 1}}',
)  # fmt: skip


def test_hostile_paths(served: Any) -> None:
    for path in PATHS:
        asked = path.format(t=served.token, u=served.token.swapcase())
        line = b"GET " + asked.encode() + b" HTTP/1.1\r\n"
        host = f"Host: 127.0.0.1:{served.port}\r\nConnection: close\r\n\r\n".encode()
        answer = raw(served.port, line + host)
        assert status_of(answer) in (400, 404, 405, 414), (path, answer)
        body = answer.partition(b"\r\n\r\n")[2]
        assert b"root:" not in body, path
        assert b"review_answers" not in body, path
        if b"no-store" not in answer:  # uvicorn itself refuses what is no HTTP
            assert status_of(answer) == 400, path


def test_hostile_hosts(served: Any) -> None:
    for host in HOSTS:
        lines = f"GET /{served.token}/ HTTP/1.1\r\nHost: {host.format(p=served.port)}\r\n"
        answer = raw(served.port, f"{lines}Connection: close\r\n\r\n".encode())
        assert status_of(answer) in (400, 421), (host, answer)
        assert b"<html" not in answer


def test_two_hosts_or_none(served: Any) -> None:
    good = f"Host: 127.0.0.1:{served.port}\r\n"
    for hosts in (good + "Host: evil.example\r\n", good + good, ""):
        text = f"GET /{served.token}/ HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n"
        assert status_of(raw(served.port, text.encode())) in (400, 421)
    text = f"GET http://evil.example/{served.token}/ HTTP/1.1\r\n{good}Connection: close\r\n\r\n"
    assert b"<html" not in raw(served.port, text.encode())


def test_hostile_origins(served: Any) -> None:
    for header, value in ORIGINS:
        for path in ("", "image/0", "api/question", "api/answer", "api/undo"):
            body = {} if path in ("api/answer", "api/undo") else None
            headers = {header: value.format(p=served.port)}
            status, got, content = served.ask(f"/{served.token}/{path}", body, headers=headers)
            assert status == 403, (header, value, path)
            assert b"other pages" in content
            assert not any(name.startswith("access-control") for name in got)


def test_hostile_methods(served: Any) -> None:
    for method in METHODS:
        for path in ("", "image/0", "api/answer", "api/write"):
            text = f"{method} /{served.token}/{path} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
            text += "Content-Length: 0\r\nConnection: close\r\n\r\n"
            status = status_of(raw(served.port, text.encode()))
            assert status in (400, 404, 405), (method, path)
    assert served.session.journal.answers == []


def test_methods_are_not_mixed(served: Any) -> None:
    for path in ("api/answer", "api/undo", "api/write"):
        assert served.ask(f"/{served.token}/{path}")[0] == 405
    for path in ("", "review.js", "image/0", "api/question", "api/figures"):
        assert served.ask(f"/{served.token}/{path}", {})[0] == 405
    assert not served.session.labels.path.exists()


def answered(served: Any) -> dict[str, Any]:
    question = served.call("api/question?view=sure")["question"]
    return {"key": question["key"], "verdict": "same", "view": "sure"}


def test_a_post_needs_origin_kind_and_size(served: Any) -> None:
    path, body = f"/{served.token}/api/answer", answered(served)
    for headers, expected in (
        ({"Origin": ""}, 403), ({"Content-Type": ""}, 415), ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ):  # fmt: skip
        assert served.ask(path, body, headers=headers)[0] == expected
    assert served.ask(path, b"[" * (MOST_BODY + 1))[0] == 413
    good = f"Host: 127.0.0.1:{served.port}\r\nOrigin: http://127.0.0.1:{served.port}\r\n"
    good += "Content-Type: application/json\r\nConnection: close\r\n"
    for length in ("99999999999999999999", "-1", "1e3", "+5"):
        text = f"POST {path} HTTP/1.1\r\n{good}Content-Length: {length}\r\n\r\n"
        assert status_of(raw(served.port, text.encode())) in (400, 413)
    # one byte too many without a length, and no end: the answer comes before it
    text = f"POST {path} HTTP/1.1\r\n{good}Transfer-Encoding: chunked\r\n\r\n"
    chunk = f"{MOST_BODY + 1:x}\r\n".encode() + b" " * (MOST_BODY + 1) + b"\r\n"
    assert status_of(raw(served.port, text.encode() + chunk)) == 413
    assert served.session.journal.answers == []
    assert served.call("api/answer", body)["counts"]["answers"] == 1


def test_a_refusal_reaches_a_client_that_is_still_sending(served: Any) -> None:
    good = f"Host: 127.0.0.1:{served.port}\r\nOrigin: http://127.0.0.1:{served.port}\r\n"
    for kind, size, status in (("text/plain", 60_000, 415), ("application/json", 10**6, 413)):
        text = f"POST /{served.token}/api/answer HTTP/1.1\r\n{good}Content-Type: {kind}\r\n"
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
            connection.sendall(f"{text}Content-Length: {size}\r\n\r\n".encode())
            answer = connection.recv(65536)  # before the body
            for _ in range(10):
                connection.sendall(b" " * (size // 10))
            while part := connection.recv(65536):
                answer += part
        assert status_of(answer) == status
        assert b"connection: close" in answer.lower()


def test_hostile_bodies(served: Any) -> None:
    for body in BODIES:
        status, headers, content = served.ask(f"/{served.token}/api/answer", body)
        assert status == 400, body[:80]
        assert headers["content-type"] == "application/json"
        assert json.loads(content)["error"]
    assert served.session.journal.answers == []


def test_an_answer_counts_once(served: Any) -> None:
    path, body = f"/{served.token}/api/answer", answered(served)
    bad = {**body, "marked": [10**6]}
    assert served.ask(path, bad)[0] == 400
    assert served.ask(path, {**body, "key": "0123456789abcdef"})[0] == 409
    assert served.ask(path, body)[0] == 200
    assert served.ask(path, body)[0] == 409
    assert len(served.session.journal.answers) == 1
    assert served.call("api/undo", {})["counts"]["answers"] == 0
    assert served.ask(f"/{served.token}/api/undo", {})[0] == 400


def test_a_full_disk_is_told_and_the_question_stays(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = answered(served)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("reid.workflows.review.journal.os.fsync", full)
        status, _, content = served.ask(f"/{served.token}/api/answer", body)
    assert status == 507
    assert "No space left" in json.loads(content)["error"]
    assert served.call("api/answer", body)["counts"]["answers"] == 1


@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("0.0.0.0", 0, "is not a single address"), ("::", 0, "is not a single"),
        ("localhost", 0, "expected an IP address"), ("127.0.0.1", 70000, "expected 0 to 65535"),
        ("203.0.113.7", 0, "cannot be listened to"),
    ],
)  # fmt: skip
def test_addresses_that_are_refused(address: str, port: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve(None, address, port, print)  # type: ignore[arg-type]
