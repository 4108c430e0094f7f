"""AsyncLLM, its engine in a thread and in a child process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from pelton import (
    LLM,
    AsyncLLM,
    EngineArgs,
    EngineDeadError,
    ModelNotFoundError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    RequestOutputKind,
    SamplingParams,
)

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = PARAMS.clone(max_tokens=240, output_kind=DELTA)
BUILDER = "fake_engine:build"


@pytest.fixture(autouse=True)
def _find_fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "engine"))


@asynccontextmanager
async def started(path: Path, *, child: bool) -> AsyncIterator[AsyncLLM]:
    """With a fake engine: the model's files are there for their tokenizer."""
    llm = await AsyncLLM.start(EngineArgs(model=str(path)), child=child, builder=BUILDER)
    try:
        yield llm
    finally:
        await llm.shutdown()


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        await test

    asyncio.run(main())


async def text_of(llm: AsyncLLM, prompt: str, params: SamplingParams = PARAMS) -> str:
    text = ""
    async for output in llm.generate(prompt, params.clone(output_kind=DELTA)):
        text += output.outputs[0].text
    return text


@pytest.mark.parametrize("child", [False, True], ids=["thread", "child"])
def test_each_kind_of_output(tiny_model_path: Path, child: bool) -> None:
    async def test() -> None:
        async with started(tiny_model_path, child=child) as llm:
            assert llm.model_names == [str(tiny_model_path)] and llm.is_ready and llm.is_alive
            deltas = [o async for o in llm.generate("one", PARAMS.clone(output_kind=DELTA), "mine")]
            whole = [o async for o in llm.generate("one", PARAMS.clone(output_kind=CUMULATIVE))]
            (final,) = [o async for o in llm.generate("one", PARAMS.clone(output_kind=FINAL_ONLY))]
            assert "".join(o.outputs[0].text for o in deltas) == whole[-1].outputs[0].text == final.outputs[0].text
            assert len(deltas) == 8 and {o.request_id for o in deltas} == {"mine"}
            assert final.finished and final.outputs[0].finish_reason == "length"
            assert final.metrics is not None and final.metrics.first_scheduled_time is not None
            messages = [{"role": "user", "content": "hi"}]
            (chat,) = [o async for o in llm.chat(messages, PARAMS.clone(output_kind=FINAL_ONLY))]
            assert chat.prompt == "<|user|>hi>"
            assert llm.heartbeat_age() < 5 and llm.stats().num_preemptions == 0

    run(test())


@pytest.mark.parametrize("child", [False, True], ids=["thread", "child"])
def test_closing_or_cancelling_a_stream_aborts_it(tiny_model_path: Path, child: bool) -> None:
    async def test() -> None:
        async with started(tiny_model_path, child=child) as llm:
            async with aclosing(llm.generate("one", LONG)) as stream:
                await anext(stream)
            async with aclosing(llm.chat([{"role": "user", "content": "hi"}], LONG)) as stream:
                await anext(stream)
            task = asyncio.create_task(text_of(llm, "two", LONG))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with asyncio.timeout(5):
                while llm.stats().num_running or llm.stats().kv_usage or llm._client._inboxes:
                    await asyncio.sleep(0.01)
            assert not llm._running

    run(test())


def test_abort_ends_the_stream(tiny_model_path: Path) -> None:
    async def test() -> None:
        async with started(tiny_model_path, child=False) as llm:
            outputs = []
            async for output in llm.generate("one", LONG, "mine"):
                outputs.append(output)
                await llm.abort("mine")
            assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
            await llm.abort("nobody")

    run(test())


def test_a_download_does_not_keep_the_program_from_ending(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = threading.Event()

    def fetch(args: EngineArgs, on_fetch: Callable[[int, int], None]) -> EngineArgs:
        on_fetch(1, 2)
        arrived.wait()
        return args

    async def test() -> None:
        monkeypatch.setattr("pelton.async_llm.fetch", fetch)
        seen = asyncio.Queue[tuple[int, int]]()
        start = asyncio.create_task(AsyncLLM.start(
            EngineArgs(model="x"), child=False, on_fetch=lambda *progress: seen.put_nowait(progress), builder=BUILDER
        ))  # fmt: skip
        assert await seen.get() == (1, 2)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    run(test())  # ends, though the download does not
    arrived.set()


def test_what_cannot_be_done_is_refused(tiny_model_path: Path) -> None:
    async def test() -> None:
        async with started(tiny_model_path, child=True) as llm:
            with pytest.raises(PromptTooLongError, match="maximum context length is 512"):
                await text_of(llm, "x" * 600)
            with pytest.raises(RequestError, match="use LLM"):
                await text_of(llm, "x", PARAMS.clone(logits_processors=[lambda ids, logits: logits]))
            async with aclosing(llm.generate("one", LONG, "mine")) as stream:
                await anext(stream)
                with pytest.raises(RequestError, match="there is a request mine already"):
                    await anext(llm.generate("two", LONG, "mine"))
            full = await asyncio.gather(*[text_of(llm, f"{i}", LONG) for i in range(80)], return_exceptions=True)
            assert any(isinstance(one, OverloadedError) for one in full) and any(isinstance(one, str) for one in full)

    run(test())


def test_streams_in_flight_end_with_the_engine_and_new_ones_work(tiny_model_path: Path) -> None:
    async def test() -> None:
        async with started(tiny_model_path, child=True) as llm:
            before = await text_of(llm, "one")
            tasks = [asyncio.create_task(text_of(llm, f"{i}", LONG)) for i in range(8)]
            while not llm.stats().num_running:
                await asyncio.sleep(0)
            os.kill(llm._client.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            async with asyncio.timeout(2):
                ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(end, EngineDeadError) for end in ends)
            async with asyncio.timeout(10):
                while not llm.is_ready:
                    await asyncio.sleep(0.01)
            assert await text_of(llm, "one") == before

    run(test())


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        asyncio.run(AsyncLLM.start(EngineArgs(model=str(tmp_path / "nowhere")), child=True))  # type: ignore[arg-type]


def test_a_real_engine_in_a_child_answers_as_llm_does(tiny_model_path: Path) -> None:
    args = EngineArgs(model=str(tiny_model_path), load_format="dummy", dtype="float32", num_threads=1)

    async def test() -> str:
        llm = await AsyncLLM.start(args, child=True)
        try:
            return await text_of(llm, "one")
        finally:
            await llm.shutdown()

    assert asyncio.run(test()) == LLM.from_args(args).generate("one", PARAMS)[0].outputs[0].text


def test_the_parent_of_a_child_never_loads_torch(tiny_model_path: Path) -> None:
    script = f"""
import asyncio, sys
from pelton import AsyncLLM, EngineArgs

async def main():
    llm = await AsyncLLM.start(EngineArgs(model={str(tiny_model_path)!r}), child=True, builder={BUILDER!r})
    outputs = [output async for output in llm.generate("one")]
    await llm.shutdown()
    return len(outputs)

assert asyncio.run(main()) > 0
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)
