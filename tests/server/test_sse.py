"""Streams end once, whatever happens, and a client that goes away ends its request."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from pelton.errors import EngineDeadError, RequestFailedError
from pelton.server.settings import Limits
from pelton.server.sse import EventStream

HI = [{"role": "user", "content": "hi"}]
ASKS = {"/v1/chat/completions": {"messages": HI}, "/v1/completions": {"prompt": ["a", "b"], "n": 2}}


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize(("error", "status"), [
    (EngineDeadError("the engine process ended"), 503),
    (RequestFailedError("failed at <object object at 0x7f00deadbeef> in /usr/lib/python3/x.py"), 500),
    (ValueError("a bug: secret"), 500),
])  # fmt: skip
def test_a_failure_amid_a_stream(start: Callable[..., Any], fake_llm: Any, path: str, error: Exception,
                                 status: int) -> None:  # fmt: skip
    live = start(fake_llm(fail_after=5, error=error))
    events = live.events(path, {**ASKS[path], "stream": True, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events.count("[DONE]") == 1
    failed = json.loads(events[-2])
    assert (failed["error"]["code"], failed["error"]["message"]) == (status, failed["message"])
    assert not any(secret in events[-2] for secret in ("0x7f", "object at", "/usr", "secret"))
    chunks = [json.loads(event) for event in events[:-2]]
    assert chunks
    assert all("error" not in chunk and chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    whole = live.post(path, ASKS[path])
    assert whole.status_code == status
    assert not any(secret in whole.text for secret in ("0x7f", "object at", "/usr", "secret"))
    until(lambda: live.llm.num_running == 0)


def test_the_official_client_sees_a_failure(start: Callable[..., Any], fake_llm: Any) -> None:
    live = start(fake_llm(fail_after=5))
    with live.client() as client:
        stream = client.completions.create(model="fake", prompt="x", max_tokens=20, stream=True)
        with pytest.raises(openai.APIError, match="the engine process ended"):
            list(stream)


@pytest.mark.parametrize("path", ASKS)
def test_a_refusal_before_a_stream_is_plain_json(start: Callable[..., Any], fake_llm: Any, path: str) -> None:
    live = start(fake_llm(overloaded=True))
    for stream in (False, True):
        answer = live.post(path, {**ASKS[path], "stream": stream})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
        assert answer.json()["error"]["type"] == "ServiceUnavailableError"


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(start: Callable[..., Any], fake_llm: Any, path: str,
                                                  stream: bool) -> None:  # fmt: skip
    live = start(fake_llm(step_s=0.01))
    body = json.dumps({**ASKS[path], "stream": stream, "max_tokens": 400}).encode()
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
    prompts = 1 if "chat" in path else 2
    until(lambda: live.llm.num_running == prompts)
    if stream:
        assert connection.recv(100)
    gone = time.monotonic()
    connection.close()
    until(lambda: len(live.llm.aborted) == prompts)
    assert time.monotonic() - gone < 2.0
    until(lambda: live.app.state.service.num_active == 0)


def test_a_request_has_a_deadline(start: Callable[..., Any], fake_llm: Any) -> None:
    live = start(fake_llm(step_s=0.02), limits=Limits(request_s=0.1))
    assert live.post("/v1/completions", {"prompt": "x", "max_tokens": 400}).status_code == 504
    events = live.events("/v1/completions", {"prompt": "x", "max_tokens": 400, "stream": True})
    assert json.loads(events[-2])["error"]["code"] == 504
    assert events[-1] == "[DONE]"
    assert len(live.llm.aborted) == 2


def test_a_slow_reader_is_cut_off_and_piles_up_nothing() -> None:
    made = 0

    async def endless() -> Any:
        nonlocal made
        while True:
            made += 1
            yield {"n": made}

    async def scenario() -> None:
        sent = 0

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > 3:
                await asyncio.Event().wait()  # the buffers are full

        events = endless()
        await asyncio.wait_for(EventStream({"n": 0}, events, write_s=0.05)({"type": "http"}, send, send), 5)
        assert made == 2
        assert events.ag_frame is None  # closed

    asyncio.run(scenario())
