"""One accepted request, from the engine's outputs to the answer: the path that chat and completions share."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.responses import Response

from pelton.errors import OverloadedError, RequestError, RequestFailedError
from pelton.server.replies import EncodedPrompt, Reply
from pelton.server.service import Service
from pelton.server.sse import EventStream, encode_json
from pelton.types import RequestOutput, SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Usage:
    """Tokens of a request. Prompts are counted when their first output comes."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    counted: set[int] = field(default_factory=set)

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Count an output that holds only what is new."""
        if prompt_index not in self.counted:
            self.counted.add(prompt_index)
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_tokens += output.num_cached_tokens
        self.completion_tokens += sum(len(one.token_ids) for one in output.outputs)

    def as_json(self, with_details: bool) -> dict[str, Any]:
        """The `usage` of an answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens} if with_details else None,
        }


@dataclass
class Generation:
    """One request to generate, checked and encoded."""

    id: str
    model: str
    prompts: Sequence[EncodedPrompt]
    params: SamplingParams
    reply: Reply
    priority: int = 0
    cache_salt: str = ""
    clip: bool = False  # shorten completions that do not fit the context
    include_usage: bool = False  # of a stream: in a chunk of its own, at the end
    continuous_usage: bool = False  # of a stream: in every chunk
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, object_name: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What every object of one answer shares."""
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model,
                "choices": choices}


def new_id(prefix: str) -> str:
    """A fresh id, "chatcmpl-<32 hex>"."""
    return f"{prefix}-{uuid.uuid4().hex}"


async def respond(service: Service, generation: Generation, stream: bool) -> Response:
    """The answer. A stream begins with its first chunk, so that a refusal still has a status of its own."""
    if not stream:
        return Response(encode_json(await whole(service, generation)), media_type="application/json")
    events = chunks(service, generation)
    first = await anext(events)
    return EventStream(first, events, service.settings.limits.write_s)


async def whole(service: Service, generation: Generation) -> dict[str, Any]:
    """One object with everything."""
    usage, ended = Usage(), {}
    async with aclosing(outputs(service, generation)) as stream:
        async for index, output in stream:
            usage.add(index, output)
            ended[index] = output
    reply = generation.reply
    in_order = [ended[index] for index in sorted(ended)]
    choices = [choice for index, output in enumerate(in_order) for choice in reply.choices(index, output)]
    with_details = service.settings.enable_prompt_tokens_details
    return {
        **generation.envelope(reply.object_name, choices),
        "usage": usage.as_json(with_details),
        **reply.extras(in_order),
    }


async def chunks(service: Service, generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
    """One object for each piece of text, and the usage at the end if it was asked for."""
    usage, reply = Usage(), generation.reply
    with_details = service.settings.enable_prompt_tokens_details
    async with aclosing(outputs(service, generation)) as stream:
        async for index, output in stream:
            usage.add(index, output)
            for choice in reply.deltas(index, output):
                chunk = generation.envelope(reply.chunk_name, [choice])
                if generation.continuous_usage:
                    chunk["usage"] = usage.as_json(with_details)
                yield chunk
    if generation.include_usage:
        yield {**generation.envelope(reply.chunk_name, []), "usage": usage.as_json(with_details)}


async def outputs(service: Service, generation: Generation) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """(index of the prompt, output) as they come from the engine, counted and logged.

    Raises RequestFailedError if the engine ended a prompt with an error, TimeoutError after the time allowed.
    """
    started, ending, num_tokens = time.monotonic(), "given up", 0
    try:
        with service.active():
            async with asyncio.timeout(service.settings.limits.request_s), aclosing(
                merge([_one_prompt(service, generation, index) for index in range(len(generation.prompts))])
            ) as stream:
                async for index, output in stream:
                    num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
                    yield index, output
        ending = "finished"
    except Exception as error:
        ending = f"failed: {error}"
        raise
    finally:
        if service.settings.log_requests:
            num_prompt = sum(len(prompt.token_ids) for prompt in generation.prompts)
            logger.info("%s: %d prompt tokens, %d generated, %s after %.2f s", generation.id, num_prompt, num_tokens,
                        ending, time.monotonic() - started)


async def _one_prompt(
    service: Service, generation: Generation, index: int
) -> AsyncGenerator[RequestOutput, None]:
    prompt = generation.prompts[index]
    record = service.metrics.record(generation.params)
    stream = service.backend().generate(
        {"prompt_token_ids": prompt.token_ids},
        generation.params.clone(),
        f"{generation.id}-{index}",
        priority=generation.priority,
        cache_salt=generation.cache_salt,
        clip=generation.clip,
    )
    try:
        async for output in stream:
            record.push(output)
            if output.error is not None or any(one.finish_reason == "error" for one in output.outputs):
                raise RequestFailedError(output.error or "the engine ended this request with an error")
            yield output
    except (RequestError, OverloadedError):
        record.close(None)
        raise
    except Exception:
        record.close("error")
        raise
    finally:
        record.close("abort")  # what has not ended by now was given up by its client
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(index of the stream, item) in the order in which items come. The first error ends all streams."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for only in stream:
                yield 0, only
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((index, item))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
