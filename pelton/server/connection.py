"""uvicorn's HTTP/1.1 connection with a deadline for the headers: uvicorn itself waits for them for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def with_header_deadline(seconds: float) -> type[H11Protocol]:
    """A connection class that is closed when a request's line and headers take longer than `seconds`."""

    class Connection(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.deadline = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waits_for_headers = self.conn.their_state is h11.IDLE
            if not waits_for_headers and self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None
            elif waits_for_headers and self.deadline is None:  # the next request's headers have begun to arrive
                self.deadline = self.loop.call_later(seconds, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
            super().connection_lost(exc)

    return Connection
