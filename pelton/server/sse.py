"""Server-sent events. A stream that has begun ends with [DONE], after its last chunk or after one error event.

`send` waits while the client's buffers are full, and no event is made before the last one is taken: what a slow
reader can pile up here is one event. A reader who takes nothing for `write_s` seconds is cut off.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pelton.server.errors import render

logger = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


class SlowReaderError(Exception):
    """The client does not read what it asked for."""


class EventStream(Response):
    """Sends `first`, then each of `events`. If the task is cancelled, `events` is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, first: Any, events: AsyncGenerator[Any, None], write_s: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.first = first
        self.events = events
        self.write_s = write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        async with aclosing(self.events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self._write_events(send)
                await self._write(send, DONE, more=False)
            except SlowReaderError:
                logger.warning("a client read nothing for %g s; its stream was cut off", self.write_s)

    async def _write_events(self, send: Send) -> None:
        try:
            await self._write(send, encode_event(self.first))
            async for event in self.events:
                await self._write(send, encode_event(event))
        except SlowReaderError:
            raise
        except Exception as error:  # too late for a status: the stream itself says what happened
            await self._write(send, encode_event(render(error).body))

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self.write_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise SlowReaderError from None


def encode_event(value: Any) -> bytes:
    """One event: a line and an empty line."""
    return b"data: " + encode_json(value) + b"\n\n"


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8 without spaces."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
