"""Keys, limits and deadlines, on every route of the application."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from pelton.server.app import ROUTES
from pelton.server.settings import Limits

KEY = "sk-1"
OPEN = {"/health", "/ping", "/health/live", "/health/ready"}
PAIRS = sorted((route.path, method) for route in ROUTES for method in route.methods or ())
WITHOUT_KEY: dict[str, dict[str, str]] = {
    "no key": {},
    "wrong key": {"authorization": "Bearer sk-wrong"},
    "prefix of the key": {"authorization": f"Bearer {KEY[:-1]}"},
    "longer key": {"authorization": f"Bearer {KEY}x"},
    "empty key": {"authorization": "Bearer"},
    "other scheme": {"authorization": f"Basic {KEY}"},
    "no scheme": {"authorization": KEY},
    "odd host": {"host": "a/?x="},
    "forwarded": {"x-forwarded-for": "127.0.0.1", "x-original-url": "/health"},
    "key elsewhere": {"cookie": f"key={KEY}", "x-auth": KEY},
}


@pytest.fixture
def locked(locked_server: Any) -> Any:
    """A server that wants KEY, or a second key."""
    locked_server.llm.seen.clear()
    return locked_server


def raw(url: str, data: bytes, wait_s: float = 5.0) -> bytes:
    """What the server says to these very bytes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "method"), PAIRS)
def test_every_route_needs_a_key(locked: Any, path: str, method: str) -> None:
    with locked.http() as http:
        for name, headers in WITHOUT_KEY.items():
            answer = http.request(method, path, headers=headers)
            assert (answer.status_code == 401) == (path not in OPEN), name
            if answer.status_code == 401 and method != "HEAD":
                assert answer.json() == {"error": "Unauthorized"}
                assert answer.headers["www-authenticate"] == "Bearer"
        for key in (KEY, "sk-2"):
            assert http.request(method, path, headers={"authorization": f"Bearer {key}"}).status_code != 401
    assert locked.llm.seen == []


@pytest.mark.parametrize("target", [
    "//v1/models", "/v1/../v1/models", "/health/../v1/models", "/health/live/../../v1/models", "/%76%31/models",
    "/V1/models", "/v1/models/", "/v1/models.", "/v1/models;/health", "/health%2f..%2fv1/models",
    "http://host/v1/models", "/v1/models?x=/health", "/v1/models#/health", "/health/live%00/../v1/models",
])  # fmt: skip
def test_no_spelling_of_a_path_avoids_the_key(locked: Any, target: str) -> None:
    answer = raw(locked.url, f"GET {target} HTTP/1.1\r\nHost: /health\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in (b"401", b"404", b"400")
    assert b"max_model_len" not in answer


def test_options_does_no_work(locked: Any) -> None:
    with locked.http() as http:
        assert http.options("/v1/models").status_code == 405


def test_callers_with_different_keys_share_no_prefixes(locked: Any) -> None:
    for key in (KEY, "sk-2"):
        locked.post("/v1/completions", {"prompt": "x", "cache_salt": "s"}, headers={"authorization": f"Bearer {key}"})
    salts = [salt for _, _, _, salt in locked.llm.seen]
    assert len(set(salts)) == 2
    assert not any(KEY in salt for salt in salts)


# --- bodies and headers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"{", b"[1]", b'"x"', b"null", b'{"prompt": NaN}', rb'{"prompt": "\ud83d"}',
                                  b'{"prompt": "\xff"}', b"[" * 5000, b'{"prompt": "x", "prompt": "y"}'])  # fmt: skip
def test_bad_bodies(live: Any, body: bytes) -> None:
    with live.http() as http:
        answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "BadRequestError"


def test_content_types(live: Any) -> None:
    def status(kind: str | None) -> int:
        headers = {} if kind is None else {"content-type": kind}
        with live.http() as http:
            return http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers).status_code

    assert status("application/json") == status("Application/JSON; charset=utf-8") == 200
    assert status("text/plain") == status("application/x-www-form-urlencoded") == status(None) == 400


def test_a_large_body_is_refused_before_it_is_read(start: Callable[..., Any]) -> None:
    live = start(limits=Limits(body_bytes=1000))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    announced = raw(live.url, f"{head}Content-Length: {1 << 40}\r\n\r\n".encode())
    assert announced.startswith(b"HTTP/1.1 413")
    chunked = raw(live.url, f"{head}Transfer-Encoding: chunked\r\n\r\n7d0\r\n{'x' * 2000}\r\n".encode())
    assert chunked.startswith(b"HTTP/1.1 413")
    body = json.loads(chunked.partition(b"\r\n\r\n")[2])
    assert body["error"]["message"] == "the body exceeds 1000 bytes"


def test_header_limits(live: Any) -> None:
    with live.http() as http:
        assert http.get("/version", headers={f"x-{i}": "y" for i in range(101)}).status_code == 431
        assert http.get("/health", headers={"x": "y" * (33 << 10)}).status_code == 431
        assert http.get("/health?" + "x" * 9000).status_code == 414


def test_deadlines(start: Callable[..., Any]) -> None:
    live = start(limits=Limits(header_s=0.2, receive_s=0.2))
    started = time.monotonic()
    assert raw(live.url, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""
    assert raw(live.url, b"") == b""
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=2) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")  # the second request never comes whole
        assert connection.recv(1000) == b""
    answer = raw(live.url, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started < 3.0


ODD_BYTES = [
    b"\r\n\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n",
    b"\x16\x03\x01\x02\x00", b"GET /health HTTP/1.0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
]  # fmt: skip


def test_odd_bytes_on_the_wire(start: Callable[..., Any]) -> None:
    live = start(limits=Limits(header_s=0.1, receive_s=0.1))
    for data in ODD_BYTES:
        assert b" 500 " not in raw(live.url, data), data
    with live.http() as http:
        assert http.get("/health").status_code == 200


# --- the rest -----------------------------------------------------------------------------------------------------


def test_request_ids_are_labels(live: Any) -> None:
    with live.http() as http:
        assert http.get("/version", headers={"x-request-id": "mine.1"}).headers["x-request-id"] == "mine.1"
        for odd in ("a b", "x" * 129, "../a"):
            assert http.get("/version", headers={"x-request-id": odd}).headers["x-request-id"] != odd
    for _ in range(2):
        live.post("/v1/completions", {"prompt": "x", "request_id": "a"}, headers={"x-request-id": "a"})
    assert len({request_id for request_id, *_ in live.llm.seen}) == 2


def test_cors_is_off_unless_asked_for(live: Any, start: Callable[..., Any]) -> None:
    origin = {"origin": "https://a.example"}
    with live.http() as http:
        assert "access-control-allow-origin" not in http.get("/version", headers=origin).headers
    with start(allowed_origins=("https://a.example",), api_keys=(KEY,)).http() as http:
        asked = http.options("/v1/models", headers={**origin, "access-control-request-method": "GET"})
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        refused = http.get("/v1/models", headers=origin)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")


def test_root_path(start: Callable[..., Any]) -> None:
    with start(root_path="/llm", api_keys=(KEY,)).http() as http:
        assert http.get("/llm/health/live").status_code == http.get("/health/live").status_code == 200
        assert http.get("/llm/v1/models").status_code == 401
        assert http.get("/llm/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_unknown_routes_and_methods(live: Any) -> None:
    with live.http() as http:
        assert http.get("/nope").json()["error"]["type"] == "NotFoundError"
        assert http.get("/v1/completions").status_code == http.delete("/v1/models").status_code == 405
        assert http.request("FOO1", "/tokenize").status_code == 405
