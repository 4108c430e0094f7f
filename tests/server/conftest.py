"""A FakeLLM with AsyncLLM's interface, and the real application around it on a real loopback port."""

from __future__ import annotations

import asyncio
import codecs
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from pelton.engine.scheduler import SchedulerStats
from pelton.errors import EngineDeadError, OverloadedError, PromptTooLongError, RequestError
from pelton.server.app import create_app
from pelton.server.run import bind, url_of, uvicorn_config
from pelton.server.settings import ServerSettings
from pelton.types import CompletionOutput, Logprob, RequestMetrics, RequestOutput, RequestOutputKind, SamplingParams

REPLY = "Grüße, 世界! 🙂 The sky is blue because air scatters blue light more than red light. "
BOS, EOS, TURN = 256, 257, 258
SPECIAL = {"<s>": BOS, "</s>": EOS, "<turn>": TURN}
MAX_MODEL_LEN = 512


class FakeTokenizer:
    """Bytes are tokens."""

    vocab_size = 259
    special_tokens = SPECIAL

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else next(s for s, i in SPECIAL.items() if i == token_id).encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in token_ids if i < 256 or not skip_special_tokens]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")


class FakePrompts:
    def __init__(self, tokenizer: FakeTokenizer) -> None:
        self.tokenizer = tokenizer
        self.generation_defaults: dict[str, Any] = {"temperature": 0.6}
        self.chats: list[dict[str, Any]] = []

    def encode(
        self, prompt: str | list[int], params: SamplingParams | None = None, *, add_special_tokens: bool = True
    ) -> list[int]:
        ids = self.tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        if params is not None and params.truncate_prompt_tokens:
            ids = ids[-abs(params.truncate_prompt_tokens) :]
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> list[int]:
        self.chats.append({"messages": messages, **options})
        ids = []
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise RequestError("messages need a role and text as content", "messages")
            ids += [TURN, *message["content"].encode()]
        return ids


@dataclass
class FakeLLM:
    """Answers every prompt with REPLY, one byte a step. The attributes make things go wrong."""

    model_names: tuple[str, ...] = ("fake", "alias")
    step_s: float = 0.0
    fail_after: int | None = None  # tokens, then `error`
    error: Exception = field(default_factory=lambda: EngineDeadError("the engine process ended"))
    overloaded: bool = False
    is_ready: bool = True
    is_alive: bool = True
    age: float = 0.0

    def __post_init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.prompts = FakePrompts(self.tokenizer)
        self.info = SimpleNamespace(max_model_len=MAX_MODEL_LEN, num_kv_tokens=1024, kernels="none")
        self.aborted: list[str] = []
        self.seen: list[tuple[str | None, SamplingParams, int, str]] = []
        self.num_running = 0
        self.stopped = False

    def heartbeat_age(self) -> float:
        return self.age

    def stats(self) -> SimpleNamespace:
        return SchedulerStats(self.num_running, 0, 0.25, 10, 4, 1, num_tokens=60, step_sizes=(3, 2, *(0,) * 11, 1))

    async def shutdown(self, drain_s: float = 0.0) -> None:
        self.is_ready = self.is_alive = False
        end = time.monotonic() + drain_s
        while self.num_running and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.stopped = True

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str | None = None, *, priority: int = 0,
        cache_salt: str = "", clip: bool = False,
    ) -> AsyncIterator[RequestOutput]:
        ids = prompt["prompt_token_ids"]
        self.seen.append((request_id, params, priority, cache_salt))
        if clip and params.max_tokens is not None:
            params = params.clone(max_tokens=max(1, min(params.max_tokens, MAX_MODEL_LEN - len(ids))))
        self._check(ids, params)
        self.num_running += 1
        finished = False
        try:
            async for output in self._run(ids, params, request_id):
                finished = output.finished
                yield output
        finally:
            self.num_running -= 1
            if not finished:
                self.aborted.append(str(request_id))

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        if self.overloaded:
            raise OverloadedError("the queue is full", retry_after=3)
        if not ids:
            raise RequestError("the prompt is empty", "prompt")
        if max(ids) >= self.tokenizer.vocab_size or min(ids) < 0:
            raise RequestError("the prompt holds a token id outside the vocabulary", "prompt")
        if len(ids) + (params.max_tokens or 1) > MAX_MODEL_LEN:
            raise PromptTooLongError(f"This model's maximum context length is {MAX_MODEL_LEN} tokens.")
        if max(params.logprob_token_ids or [0]) >= self.tokenizer.vocab_size:
            raise RequestError("logprob_token_ids holds an id outside the vocabulary", "logprob_token_ids")
        if params.structured_outputs is not None:
            raise RequestError("structured outputs are not offered", "structured_outputs")

    async def _run(self, ids: list[int], params: SamplingParams, request_id: str | None) -> AsyncIterator[Any]:
        samples = [Sample(index, params) for index in range(params.n)]
        times = RequestMetrics(time.monotonic(), first_scheduled_time=time.monotonic())
        whole = params.output_kind != RequestOutputKind.DELTA
        scores = params.prompt_logprobs
        prompt_logprobs = None if scores is None else [None, *(logprobs_of(i, scores) for i in ids[1:])]
        while any(sample.reason is None for sample in samples):
            await asyncio.sleep(self.step_s)
            if self.stopped or (self.fail_after is not None and len(samples[0].ids) >= self.fail_after):
                raise self.error
            outputs = [sample.step() for sample in samples if sample.reason is None]
            times.first_token_time = times.first_token_time or time.monotonic()
            times.last_token_time = time.monotonic()
            done = all(sample.reason for sample in samples)
            if whole and not done:
                continue
            yield RequestOutput(str(request_id), None, ids, [s.all() for s in samples] if whole else outputs, done,
                                prompt_logprobs=prompt_logprobs, num_cached_tokens=min(2, len(ids)), metrics=times)
            prompt_logprobs = None


class Sample:
    """One continuation."""

    def __init__(self, index: int, params: SamplingParams) -> None:
        self.index = index
        self.params = params
        self.reply = REPLY.encode()
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.ids: list[int] = []
        self.text = ""
        self.reason: str | None = None
        self.stop: int | str | None = None

    def step(self) -> CompletionOutput:
        if self.params.max_tokens == 0:
            self.reason = "length"
            return self._output("", [])
        token = self.reply[len(self.ids) % len(self.reply)]
        self.ids.append(token)
        new = self.decoder.decode(bytes([token]))
        self.text += new
        if len(self.ids) == (self.params.max_tokens or 60):
            self.reason = "length"
        if any(stop in self.text for stop in self.params.stop_strings):
            self.reason, self.stop = "stop", next(s for s in self.params.stop_strings if s in self.text)
        return self._output(new, [token])

    def all(self) -> CompletionOutput:
        return self._output(self.text, self.ids)

    def _output(self, text: str, ids: list[int]) -> CompletionOutput:
        count, wanted = self.params.logprobs or 0, self.params.logprob_token_ids
        logprobs = [logprobs_of(i, count, wanted) for i in ids] if self.params.wants_logprobs else None
        return CompletionOutput(self.index, text, list(ids), None, logprobs, self.reason, self.stop)


def logprobs_of(token: int, count: int, wanted: list[int] | None = None) -> dict[int, Logprob]:
    """The chosen token is the second most likely one; the least likely one has -inf, those `wanted` have -3."""
    tokenizer = FakeTokenizer()
    entries = {token: Logprob(-1.0, 2, tokenizer.token_text(token))}
    if wanted is not None:
        return entries | {other: Logprob(-3.0, 9, tokenizer.token_text(other)) for other in wanted if other != token}
    for rank in range(1, count + 1):
        other = token if rank == 2 else (token + rank) % 128
        value = -1.0 if rank == 2 else -0.5 if rank == 1 else float("-inf")
        entries.setdefault(other, Logprob(value, rank, tokenizer.token_text(other)))
    return entries


@dataclass
class Live:
    """A server on a loopback port."""

    url: str
    llm: FakeLLM
    app: Any

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 20.0, **options})

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.http() as http:
            return http.post(path, json=body, **options)

    def events(self, path: str, body: Any) -> list[str]:
        """The data of each event of a stream."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = response.text.split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        return [line.removeprefix("data: ") for line in lines]


@contextmanager
def live_server(settings: ServerSettings, llm: FakeLLM | None) -> Iterator[Live]:
    """Run the application in a thread of its own."""
    app = create_app(llm, settings)
    listener = bind(settings)
    url = url_of(settings, listener)
    server = uvicorn.Server(uvicorn_config(app, settings))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield Live(url, llm or FakeLLM(), app)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def start() -> Iterator[Callable[..., Live]]:
    """Starts servers of a test's own: start(llm=..., **settings)."""
    with ExitStack() as stack:

        def start_one(llm: FakeLLM | None = None, loading: bool = False, **options: Any) -> Live:
            settings = ServerSettings(port=0, **options)
            return stack.enter_context(live_server(settings, None if loading else llm or FakeLLM()))

        yield start_one


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Live]:
    with live_server(ServerSettings(port=0), FakeLLM()) as live:
        yield live


@pytest.fixture(scope="session")
def locked_server() -> Iterator[Live]:
    with live_server(ServerSettings(port=0, api_keys=("sk-1", "sk-2")), FakeLLM()) as locked:
        yield locked


@pytest.fixture
def live(shared_server: Live) -> Live:
    """The server most tests share; its FakeLLM's records start empty."""
    shared_server.llm.seen.clear()
    shared_server.llm.aborted.clear()
    shared_server.llm.prompts.chats.clear()
    return shared_server


@pytest.fixture
def fake_llm() -> type[FakeLLM]:
    return FakeLLM


@pytest.fixture
def reply() -> str:
    """What the FakeLLM says, without end."""
    return REPLY
