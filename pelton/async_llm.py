"""AsyncLLM: one model for many concurrent callers. The server's door, and LLM's twin for asyncio programs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

from pelton.config import EngineArgs
from pelton.door import BUILDER, ChatOptions, chat_prompt, fetch, load_text, log_choices, text_of
from pelton.engine.client import EngineClient, ThreadClient
from pelton.engine.messages import EngineInfo
from pelton.engine.scheduler import SchedulerStats
from pelton.engine.step import EngineRequest, Update
from pelton.errors import PeltonError, RequestError
from pelton.text.output import RequestAssembler
from pelton.text.prompt import Prompts
from pelton.text.tokenizer import Tokenizer
from pelton.types import OnProgress, Prompt, RequestOutput, SamplingParams
from pelton.weights.files import open_model

T = TypeVar("T")


class AsyncLLM:
    """One model; made by `await AsyncLLM.start(args, child=...)`, ended by `await llm.shutdown()`."""

    def __init__(self, client: EngineClient, prompts: Prompts, model_names: Sequence[str]) -> None:
        """For parts that exist already; `start` makes them."""
        self.prompts = prompts
        self.model_names = list(model_names)
        self._client = client
        self._next_id = itertools.count(1)  # never used twice, even by an engine that is started anew
        self._running: dict[str, RequestAssembler] = {}

    @classmethod
    async def start(
        cls,
        args: EngineArgs,
        *,
        child: bool = True,
        on_progress: OnProgress | None = None,
        on_fetch: OnProgress | None = None,
        builder: str = BUILDER,
    ) -> AsyncLLM:
        """Load the model.

        child: run the engine in a supervised process of its own, so that this one stays responsive, never loads torch
        and survives the engine; else in a thread of this process. on_progress: called with (bytes done, bytes in
        all) of the weights while they are read; on_fetch: the same while they are fetched. Raises the PeltonError
        that keeps the model from running.
        """
        client = _child(builder) if child else ThreadClient(builder)  # a child imports torch meanwhile
        try:
            args = await _in_daemon(partial(fetch, args, _on_this_loop(on_fetch)))
            load = asyncio.to_thread(lambda: load_text(args, open_model(Path(args.model))))
            make_prompts, _ = await asyncio.gather(load, client.start(args, on_progress))
            log_choices(client.info)
            return cls(client, make_prompts(client.info.max_model_len), args.served_model_name or [args.model])
        except BaseException:
            await client.close()
            raise

    # --- generating ---------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        clip: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one prompt, as `params.output_kind` says. Closing the iterator aborts within one step.

        clip: shorten a completion that does not fit the context, as LLM does, instead of refusing the request.
        Raises RequestError for what cannot be done, OverloadedError if it cannot be done now, EngineDeadError if the
        engine is lost on the way. A request that the engine has to end alone yields an output with `error` set.
        """
        params = params or self.get_default_sampling_params()
        requests = await asyncio.to_thread(self._requests, prompt, params, priority, cache_salt, clip)
        name = request_id or f"request-{requests[0].request_id}"
        if name in self._running:
            raise RequestError(f"there is a request {name} already; use another id", "request_id")
        assembler = RequestAssembler(name, text_of(prompt), params, self.tokenizer, requests)
        inbox: asyncio.Queue[Update | PeltonError] = asyncio.Queue()
        self._running[name] = assembler
        try:
            for request in requests:
                self._client.submit(request, inbox.put_nowait)
            while not assembler.finished:
                update = await inbox.get()
                if isinstance(update, PeltonError):
                    raise update
                output = assembler.push(update)
                for engine_id in assembler.take_aborts():
                    self._client.abort(engine_id)
                if output is not None:
                    yield output
        finally:
            del self._running[name]
            for engine_id in assembler.request_ids:
                self._client.abort(engine_id)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """`generate` for messages; options: see ChatOptions."""
        prompt = await asyncio.to_thread(chat_prompt, self.prompts, messages, options)
        stream = self.generate(prompt, params, request_id, priority=priority, cache_salt=cache_salt)
        async with aclosing(stream):
            async for output in stream:
                yield output

    def _requests(
        self, prompt: Prompt, params: SamplingParams, priority: int, cache_salt: str, clip: bool
    ) -> list[EngineRequest]:
        """Long texts and grammars take their time, so this runs in a thread."""
        token_ids = self.prompts.encode(prompt, params)
        return self.prompts.requests(
            lambda: next(self._next_id), token_ids, params, priority=priority, cache_salt=cache_salt, clip=clip
        )

    async def abort(self, request_id: str) -> None:
        """End a request; its stream ends with an output whose finish_reason is "abort"."""
        if assembler := self._running.get(request_id):
            for engine_id in assembler.request_ids:
                self._client.abort(engine_id)

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._client.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.prompts.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's own sampling defaults."""
        return SamplingParams.from_optional(**self.prompts.generation_defaults)

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken now."""
        return self._client.is_ready

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs, or is being started again."""
        return self._client.is_alive

    def heartbeat_age(self) -> float:
        """Seconds since the engine's loop last turned."""
        return self._client.heartbeat_age

    def stats(self) -> SchedulerStats:
        """Counts of the engine's queues and caches."""
        return self._client.stats

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Let running requests finish for `drain_s` seconds, end the others with an EngineDeadError, and stop."""
        await self._client.close(drain_s)


def _child(builder: str) -> EngineClient:
    from pelton.engine.supervisor import ChildClient  # needs msgpack

    return ChildClient(builder)


def _on_this_loop(on_progress: OnProgress | None) -> OnProgress | None:
    """`on_progress` for calls from other threads."""
    if on_progress is None:
        return None
    loop, function = asyncio.get_running_loop(), on_progress

    def report(done: int, total: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(function, done, total)

    return report


async def _in_daemon(function: Callable[[], T]) -> T:
    """What `function` returns, called in a thread that does not keep the program from ending: a download may last."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()  # whoever awaits may give up, the thread goes on

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # raised again where it is awaited
            result.set_exception(error)

    threading.Thread(target=call, name="pelton-fetch", daemon=True).start()
    return await asyncio.wrap_future(result)
