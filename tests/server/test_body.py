"""Strict JSON."""

from __future__ import annotations

import time

import pytest

from pelton.errors import RequestError
from pelton.server.body import parse_json

REFUSED = {
    "not JSON": b"{",
    "empty": b"",
    "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": -Infinity}',
    "overflowing float": b'{"temperature": 1e400}',
    "long integer": b'{"seed": ' + b"9" * 10_000 + b"}",
    "integer beyond 64 bits": b'{"seed": 18446744073709551616}',
    "same key twice": b'{"a": 1, "a": 2}',
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "invalid UTF-8": b'{"a": "\xff"}',
    "surrogate in UTF-8": b'{"a": "\xed\xa0\xbd"}',
    "lone surrogate": rb'{"a": "\ud83d"}',
    "lone surrogate as a key": rb'{"\udc00": 1}',
    "control character": b'{"a": "\x00"}',
    "65 levels": b"[" * 65 + b"]" * 65,
    "100000 levels": b"[" * 100_000,
    "100000 closed levels": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_refuses(body: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises(RequestError):
        parse_json(body, 64)
    assert time.perf_counter() - started < 1.0


def test_accepts_what_is_plain() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, 64)
    assert parse_json(rb'{"a": "\ud83d\ude42", "b": "\u0000"}', 64) == {"a": "\U0001f642", "b": "\0"}
    assert parse_json(b'{"seed": 18446744073709551615, "t": 1e-320}', 64) == {"seed": (1 << 64) - 1, "t": 1e-320}


def test_messages_do_not_repeat_the_body() -> None:
    with pytest.raises(RequestError) as caught:
        parse_json(b'{"secret": "' + b"x" * 1000, 64)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 120
