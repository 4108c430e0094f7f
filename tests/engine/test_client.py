"""Both clients: each request gets its updates and exactly one end, whatever happens to the engine."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pelton.config import EngineArgs
from pelton.engine.client import EngineClient, State, ThreadClient
from pelton.engine.step import EngineRequest, Update
from pelton.engine.supervisor import ChildClient, Limits
from pelton.errors import EngineDeadError, ModelFormatError, OverloadedError, PeltonError, PromptTooLongError
from pelton.types import SamplingParams

BUILDER = "fake_engine:build"
HANG, CRASH, FAIL, LOST = 101, 102, 103, 104
LIMITS = Limits(stall_s=1.0, max_failed_starts=2, retry_s=0.05)


@pytest.fixture(autouse=True)
def _find_fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@asynccontextmanager
async def started(kind: str, model: str = "fake") -> AsyncIterator[EngineClient]:
    client = ChildClient(BUILDER, LIMITS) if kind == "child" else ThreadClient(BUILDER)
    try:
        await client.start(EngineArgs(model=model))
        yield client
    finally:
        await client.close()


class Stream:
    """What one request was told."""

    def __init__(self, client: EngineClient, request_id: int, prompt: list[int] | None = None, max_tokens: int = 5):
        self.items: list[Update | PeltonError] = []
        self.ends: list[str | PeltonError] = []
        self.ended_at = 0.0
        self.end = asyncio.Event()
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        client.submit(EngineRequest(request_id, prompt or [1, 2, 3], params), self.take)

    def take(self, item: Update | PeltonError) -> None:
        self.items.append(item)
        end = item if isinstance(item, PeltonError) else item.finish_reason
        if end is not None:
            self.ends.append(end)
            self.ended_at = time.monotonic()
            self.end.set()

    @property
    def num_tokens(self) -> int:
        return sum(len(item.token_ids) for item in self.items if isinstance(item, Update))

    async def wait(self) -> str | PeltonError:
        await asyncio.wait_for(self.end.wait(), 10)
        assert len(self.ends) == 1
        return self.ends[0]


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        await test

    asyncio.run(main())


both = pytest.mark.parametrize("kind", ["thread", "child"])


@both
def test_requests_run_and_end(kind: str) -> None:
    async def test() -> None:
        progress: list[tuple[int, int]] = []
        client = ChildClient(BUILDER) if kind == "child" else ThreadClient(BUILDER)
        with pytest.raises(OverloadedError, match="starting"):
            Stream(client, 1)
        await client.start(EngineArgs(model="fake"), lambda *report: progress.append(report))
        assert progress == [(1, 2), (2, 2)]
        assert client.is_ready and client.is_alive and client.info.notes == ("a note",)
        streams = [Stream(client, i, max_tokens=3 + i) for i in range(8)]
        assert [await stream.wait() for stream in streams] == ["length"] * 8
        assert [stream.num_tokens for stream in streams] == [3 + i for i in range(8)]
        await asyncio.sleep(0.6)  # idle, and its heart still beats
        assert client.heartbeat_age < 0.6 and client.stats.num_running == 0
        await client.close()
        await client.close()
        assert not client.is_alive
        with pytest.raises(OverloadedError, match="shutting down"):
            Stream(client, 100)

    run(test())


@both
def test_abort_frees_the_request(kind: str) -> None:
    async def test() -> None:
        async with started(kind, "slow") as client:
            stream, other = Stream(client, 1, max_tokens=400), Stream(client, 2, max_tokens=20)
            await until(lambda: stream.num_tokens > 2)
            client.abort(1)
            client.abort(1)
            client.abort(99)
            assert await stream.wait() == "abort" and stream.num_tokens < 20
            assert await other.wait() == "length"
            await until(lambda: client.stats.num_running == 0 and client.stats.kv_usage == 0.0)

    run(test())


@both
def test_refusals_keep_their_class(kind: str) -> None:
    async def test() -> None:
        async with started(kind) as client:
            error = await Stream(client, 1, [1] * 600).wait()
            assert isinstance(error, PromptTooLongError) and error.param == "prompt"
            streams = [Stream(client, i, [1] * 400, max_tokens=100) for i in range(2, 100)]
            ends = [await stream.wait() for stream in streams]
            assert any(isinstance(end, OverloadedError) for end in ends) and "length" in ends

    run(test())


@both
def test_a_request_that_fails_fails_alone(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with started(kind) as client:
            good = [Stream(client, i, [1, 2, i]) for i in range(4)]
            bad = Stream(client, 4, [FAIL])
            assert await bad.wait() == "error"
            assert [await stream.wait() for stream in good] == ["length"] * 4
            last = bad.items[-1]
            assert isinstance(last, Update) and "injected failure" in (last.error or "")

    run(test())


@both
@pytest.mark.parametrize("model", ["broken", "buggy"])
def test_what_keeps_the_engine_from_starting_reaches_the_door(kind: str, model: str) -> None:
    async def test() -> None:
        client = ChildClient(BUILDER, LIMITS) if kind == "child" else ThreadClient(BUILDER)
        try:
            with pytest.raises(ModelFormatError if model == "broken" else EngineDeadError) as caught:
                await client.start(EngineArgs(model=model))
            assert "tensor x is missing" in str(caught.value) or "KeyError" in str(caught.value)
            assert not client.is_alive
        finally:
            await client.close()

    logging.disable(logging.CRITICAL)
    try:
        run(test())
    finally:
        logging.disable(logging.NOTSET)


@both
def test_close_drains(kind: str) -> None:
    async def test() -> None:
        async with started(kind, "slow") as client:
            short, long = Stream(client, 1, max_tokens=5), Stream(client, 2, max_tokens=500)
            await until(lambda: short.num_tokens > 0)
            await client.close(drain_s=0.4)
            assert await short.wait() == "length"
            assert isinstance(await long.wait(), EngineDeadError) and long.num_tokens > 5

    run(test())


def test_a_thread_that_fails_is_dead_for_good() -> None:
    async def test() -> None:
        async with started("thread") as client:
            stream = Stream(client, 1, [CRASH])
            assert isinstance(await stream.wait(), EngineDeadError)
            assert client.state is State.DEAD
            with pytest.raises(EngineDeadError, match="failed"):
                Stream(client, 2)

    run(test())
    assert not [thread for thread in threading.enumerate() if thread.name == "pelton-engine"]


# --- a child that dies or stands still ------------------------------------------------------------------------------


@pytest.mark.parametrize("death", ["killed", "failed", "stalled"])
def test_a_child_that_is_lost_is_replaced(death: str) -> None:
    async def test() -> None:
        async with started("child", "slow") as client:
            assert isinstance(client, ChildClient)
            streams, pid = [Stream(client, i, max_tokens=400) for i in range(8)], client.pid
            await until(lambda: all(stream.num_tokens for stream in streams))
            begun = time.monotonic()
            if death == "killed":
                os.kill(pid, signal.SIGKILL)
            else:
                streams.append(Stream(client, 8, [CRASH if death == "failed" else HANG]))
            ends = [await stream.wait() for stream in streams]
            assert all(isinstance(end, EngineDeadError) for end in ends)
            assert max(stream.ended_at for stream in streams) - begun < 2.0
            assert not client.is_ready and client.is_alive
            with pytest.raises(OverloadedError, match="restarting"):
                Stream(client, 50)
            await until(lambda: client.is_ready)
            assert client.pid != pid and not Path(f"/proc/{pid}").exists()
            assert await Stream(client, 51).wait() == "length"
            assert all(len(stream.ends) == 1 for stream in streams)

    run(test())


@both
def test_a_lost_device_ends_all_requests_with_one_error(kind: str) -> None:
    async def test() -> None:
        async with started(kind, "slow") as client:
            streams = [Stream(client, i, max_tokens=400) for i in range(4)]
            await until(lambda: all(stream.num_tokens for stream in streams))
            streams.append(Stream(client, 4, [LOST]))
            ends = [await stream.wait() for stream in streams]
            assert all(isinstance(end, EngineDeadError) for end in ends)
            assert len({str(end) for end in ends}) == 1 and "the GPU failed and does not answer" in str(ends[0])
            if kind == "child":
                await until(lambda: client.is_ready)
                assert await Stream(client, 5).wait() == "length"

    run(test())


def test_a_child_that_cannot_start_again_is_given_up(tmp_path: Path) -> None:
    async def test() -> None:
        async with started("child", f"once:{tmp_path / 'built'}") as client:
            assert isinstance(client, ChildClient)
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: not client.is_alive)
            with pytest.raises(EngineDeadError, match="the file is gone"):
                Stream(client, 1)

    run(test())


def test_nothing_is_left_of_a_child(recwarn: pytest.WarningsRecorder) -> None:
    async def test() -> None:
        num_files = len(os.listdir("/proc/self/fd"))
        for model in ("fake", "slow"):
            async with started("child", model) as client:
                assert isinstance(client, ChildClient)
                pid = client.pid
                Stream(client, 1, max_tokens=400)
            assert not Path(f"/proc/{pid}").exists()
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) == num_files

    run(test())


SCRIPT = f"""
import asyncio, sys
from pelton.config import EngineArgs
from pelton.engine.supervisor import ChildClient

async def main():
    client = ChildClient("{BUILDER}")
    await client.start(EngineArgs(model="fake"))
    print(client.pid, "torch" in sys.modules, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_child_goes_with_its_parent(tmp_path: Path) -> None:
    """And a script needs no `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid, has_torch = parent.stdout.readline().split()
        assert has_torch == "False" and Path(f"/proc/{pid}").exists()
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 5
        while _is_running(int(pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _is_running(int(pid))


def _is_running(pid: int) -> bool:
    """Not gone, and not a zombie that waits for somebody to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
