"""`pelton serve` as a person runs it: a real model, an engine process that is killed, a signal to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

NUM_STREAMS = 8


@pytest.fixture(scope="module")
def served(smollm2_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # -P: what is installed, which has compiled kernels, and not the folder that the tests run in
    command = [sys.executable, "-P", "-m", "pelton", "serve", str(smollm2_path), "--served-model-name",
               "smollm2", "--port", str(port), "--max-model-len", "1024"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}", 200, 60)
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def wait_for(url: str, wanted: int, seconds: float) -> None:
    """Until /health/ready answers `wanted`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health/ready").status_code == wanted:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"/health/ready did not turn {wanted} within {seconds} s")


async def stream(http: httpx.AsyncClient, index: int, begun: asyncio.Event) -> tuple[list[str], float]:
    """The events of one long stream, and when it ended."""
    ask = {"prompt": f"Story {index}:", "max_tokens": 900, "ignore_eos": True, "stream": True}
    events = []
    async with http.stream("POST", "/v1/completions", json=ask) as answer:
        async for line in answer.aiter_lines():
            begun.set()
            if line:
                events.append(line.removeprefix("data: "))
    return events, time.monotonic()


def test_greedy_text_is_the_same_streamed_or_not(served: Any) -> None:
    _, url = served
    ask: Any = {"model": "smollm2", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 24,
                "temperature": 0}  # fmt: skip
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**ask)
        with client.chat.completions.create(**ask, stream=True) as chunks:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(text) > 20
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24


def test_an_echo_scores_its_prompt(served: Any) -> None:
    _, url = served
    ask = {"prompt": "Grüße aus 北京", "echo": True, "logprobs": 1, "max_tokens": 0}
    choice = httpx.post(f"{url}/v1/completions", json=ask, timeout=60).json()["choices"][0]
    offsets, scores = choice["logprobs"]["text_offset"], choice["logprobs"]["token_logprobs"]
    assert choice["text"] == ask["prompt"]
    assert scores[0] is None
    assert all(score <= 0 for score in scores[1:])
    assert offsets == sorted(offsets)
    assert offsets[-1] == len(choice["text"]) - 1


def test_a_killed_engine_ends_each_stream_once_and_comes_back(served: Any) -> None:
    server, url = served

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
            streams = [asyncio.create_task(stream(http, i, begun[i])) for i in range(NUM_STREAMS)]
            await asyncio.gather(*(event.wait() for event in begun))
            (child,) = psutil.Process(server.pid).children()
            child.kill()
            killed = time.monotonic()
            while (await http.get("/health")).status_code != 503:
                assert time.monotonic() - killed < 1.0
            for events, ended in await asyncio.gather(*streams):
                assert ended - killed < 2.0
                assert events[-1] == "[DONE]"
                assert ["error" in json.loads(event) for event in events[-3:-1]] == [False, True]

    asyncio.run(scenario())
    wait_for(url, 200, 60)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}, timeout=60).status_code == 200


def test_a_signal_drains_and_ends_with_0(served: Any) -> None:
    server, url = served

    async def scenario() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            ask = {"prompt": "Once", "max_tokens": 40, "ignore_eos": True, "stream": True}
            events = []
            async with http.stream("POST", "/v1/completions", json=ask) as answer:
                async for line in answer.aiter_lines():
                    if not events:
                        os.kill(server.pid, signal.SIGTERM)
                    if line:
                        events.append(line.removeprefix("data: "))
            return events

    events = asyncio.run(scenario())
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    shown, _ = server.communicate(timeout=20)
    assert server.returncode == 0
    assert "pelton: ready after" in shown
