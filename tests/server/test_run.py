"""A server's life: bind, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pelton.config import EngineArgs
from pelton.errors import ConfigError, EngineDeadError, ModelNotFoundError
from pelton.server.run import bind, serve
from pelton.server.settings import ServerSettings

ASK = {"prompt": "x", "max_tokens": 60, "stream": True}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def status(http: httpx.AsyncClient, path: str) -> int:
    return (await http.get(path)).status_code


async def until_status(http: httpx.AsyncClient, path: str, wanted: int) -> None:
    for _ in range(500):
        try:
            if await status(http, path) == wanted:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.01)
    raise AssertionError(f"{path} did not turn {wanted}")


async def stream(http: httpx.AsyncClient, started: asyncio.Event) -> list[str]:
    lines = []
    async with http.stream("POST", "/v1/completions", json=ASK) as answer:
        async for line in answer.aiter_lines():
            started.set()
            if line:
                lines.append(line.removeprefix("data: "))
    return lines


async def drain(llm: Any, drain_s: float, signals: int = 1) -> tuple[list[str], int, float]:
    """(events of a stream that ran when SIGTERM came, status of a new request then, seconds to the end)"""
    settings = ServerSettings(port=free_port(), drain_s=drain_s)

    async def load(args: EngineArgs) -> Any:
        await asyncio.sleep(0.05)
        return llm

    server = asyncio.create_task(serve(EngineArgs("fake"), settings, load))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.port}", timeout=20) as http:
        await until_status(http, "/health/live", 200)
        assert await status(http, "/health/ready") == 503
        assert (await http.post("/v1/completions", json=ASK)).status_code == 503
        await until_status(http, "/health/ready", 200)
        started = asyncio.Event()
        running = asyncio.create_task(stream(http, started))
        await started.wait()
        begun = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        assert await status(http, "/health/ready") == 503
        assert await status(http, "/health/live") == 200
        refused = await http.post("/v1/completions", json=ASK)
        assert int(refused.headers["retry-after"]) > 0
        for _ in range(signals - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        lines = await running
    await asyncio.wait_for(server, 10)
    return lines, refused.status_code, time.monotonic() - begun


def test_a_drain_lets_running_requests_finish(fake_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lines, refused, _ = asyncio.run(drain(fake_llm(step_s=0.01), drain_s=10))
    assert refused == 503
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
    shown = capsys.readouterr().out
    assert "pelton: ready after" in shown
    assert "/v1" in shown
    assert "--host 0.0.0.0 opens it to others" in shown


@pytest.mark.parametrize(("drain_s", "signals"), [(0.1, 1), (30, 2)], ids=["grace over", "second signal"])
def test_a_drain_has_an_end(fake_llm: Any, drain_s: float, signals: int) -> None:
    lines, refused, seconds = asyncio.run(drain(fake_llm(step_s=0.2), drain_s, signals))
    assert refused == 503
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["error"]["code"] == 503
    assert seconds < 5.0


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    async def load(args: EngineArgs) -> Any:
        raise ModelNotFoundError("no such model")

    with pytest.raises(ModelNotFoundError):
        asyncio.run(serve(EngineArgs("nope"), ServerSettings(port=0), load))


def test_a_signal_while_the_model_loads() -> None:
    cancelled = False

    async def load(args: EngineArgs) -> Any:
        nonlocal cancelled
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled = True
            raise

    asyncio.run(asyncio.wait_for(serve(EngineArgs("slow"), ServerSettings(port=0), load), 5))
    assert cancelled


def test_an_engine_that_is_dead_for_good_ends_the_server(fake_llm: Any) -> None:
    llm = fake_llm()

    async def load(args: EngineArgs) -> Any:
        asyncio.get_running_loop().call_later(0.1, setattr, llm, "is_alive", False)
        return llm

    with pytest.raises(EngineDeadError, match="could not be started again"):
        asyncio.run(asyncio.wait_for(serve(EngineArgs("fake"), ServerSettings(port=0), load), 5))


def test_addresses_that_cannot_be_had() -> None:
    with bind(ServerSettings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .* --port"):
            bind(ServerSettings(port=port))
    with pytest.raises(ConfigError, match="cannot listen"):
        bind(ServerSettings(host="host.invalid"))


@pytest.mark.parametrize("wrong", [
    {"port": 65536}, {"api_keys": (" ",)}, {"root_path": "llm"}, {"root_path": "/llm/"}, {"ssl_keyfile": "k"},
    {"drain_s": -1.0},
], ids=str)  # fmt: skip
def test_settings_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(**wrong)


def test_health_follows_the_engine(start: Callable[..., Any], fake_llm: Any) -> None:
    live = start(fake_llm(), live_s=1.0)

    def colours() -> tuple[int, int, int]:
        with live.http() as http:
            health, alive, ready = (http.get(path).status_code for path in ("/health", "/health/live", "/health/ready"))
        return health, alive, ready

    assert colours() == (200, 200, 200)
    live.llm.is_ready = False  # the engine process died and is being started again
    assert colours() == (503, 200, 503)
    assert live.post("/v1/completions", {"prompt": "x"}).status_code == 503
    live.llm.is_alive = False  # it will not come back
    assert colours() == (503, 503, 503)
    live.llm.is_ready = live.llm.is_alive = True
    live.llm.age = 2.0  # its loop hangs
    assert colours() == (503, 503, 503)


def test_the_server_loads_no_torch() -> None:
    code = ("import sys; import pelton.server.run; "
            "sys.exit(any(name in sys.modules for name in ('torch', 'fastapi', 'rich', 'transformers')))")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
