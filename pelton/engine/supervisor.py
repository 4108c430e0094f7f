"""The engine in a process of its own, watched: one that dies or stands still is replaced by a new one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from pelton.config import EngineArgs
from pelton.engine.client import EngineClient, State
from pelton.engine.messages import Command, EngineInfo, Failed, Message, Ready, Start
from pelton.engine.process import EXIT_S, how_it_ended, launch
from pelton.engine.wire import FrameParser, encode
from pelton.errors import EngineDeadError, PeltonError
from pelton.types import OnProgress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """When a child is given up."""

    stall_s: float = 120.0  # its loop has reported nothing for so long: more than a step may take
    max_failed_starts: int = 5  # in a row; then the engine stays dead
    retry_s: float = 1.0  # after a failed start, doubled with each


class ChildClient(EngineClient):
    """The engine in a supervised child process, which begins to start (and to import torch) at once.

    If the child dies, every request in flight gets an EngineDeadError and a new child is started; until that one is
    ready submit() raises OverloadedError. A child that was ready is replaced at once, failed starts are repeated
    after 1, 2, 4 ... seconds; the first start is not repeated, because its error is the user's to mend.
    """

    def __init__(self, builder: str, limits: Limits | None = None) -> None:
        """builder: "module:function", the host.Builder that the child calls."""
        super().__init__()
        self._builder = builder
        self._limits = limits or Limits()
        self._child = _Child(builder)
        self._started: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._failure: PeltonError | None = None  # why the newest child did not start, or did not go on
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Process id of the newest child."""
        return self._child.process.pid

    async def start(self, args: EngineArgs, on_progress: OnProgress | None = None) -> None:
        self._on_progress = on_progress
        self._supervisor = asyncio.create_task(self._supervise(args))
        await self._started

    async def _supervise(self, args: EngineArgs) -> None:
        try:
            await self._run_children(args)
        except Exception as error:  # no process could be started, or a bug here: nobody would watch the engine
            logger.exception("the engine is no longer supervised")
            self._give_up(EngineDeadError(f"the engine could not be supervised: {error}"))

    async def _run_children(self, args: EngineArgs) -> None:
        """Run one child after the other, until there is a reason not to."""
        num_failed = 0
        while True:
            why = await self._attend(self._child, args)
            if self.state is State.CLOSED:
                return
            num_failed = 0 if self.state is State.READY else num_failed + 1
            self.state = State.RESTARTING
            self._fail_all(EngineDeadError(f"{why} and is started again; this request is lost, send it once more"))
            why = await self._child.end() if self._child.gone.done() else await self._child.kill()
            error = self._failure or EngineDeadError(f"the engine's process {why}")
            if not self._started.done() or num_failed >= self._limits.max_failed_starts:
                self._give_up(error)
                return
            logger.error("%s; it is started again", error)
            if num_failed:
                await asyncio.sleep(self._limits.retry_s * 2 ** (num_failed - 1))
            self._child = _Child(self._builder)

    async def _attend(self, child: _Child, args: EngineArgs) -> str:
        """Stay with a child until it dies or stands still; returns which, as the beginning of a sentence."""
        self._failure, self._last_beat = None, time.monotonic()
        await child.connect(self._on_message)
        child.send(Start(args))
        while not child.gone.done():
            await asyncio.wait([child.gone], timeout=self._limits.stall_s / 4)
            if self.state is State.READY and self.heartbeat_age > self._limits.stall_s:
                return f"the engine stood still for {self.heartbeat_age:.0f} s"
        return f"the engine's process died ({self._failure})" if self._failure else "the engine's process died"

    def _give_up(self, error: PeltonError) -> None:
        if self._started.done():
            self._why = f"the engine is dead and could not be started again: {error}"
            logger.error("%s", self._why)
        else:
            self._why = str(error)
            self._started.set_exception(error)
        self.state = State.DEAD
        self._fail_all(EngineDeadError(self._why))

    def _on_start(self, message: Ready | Failed) -> None:
        if isinstance(message, Failed):
            self._failure = message.error
        elif self.state is not State.CLOSED:
            self.info, self.state = message.info, State.READY
            if not self._started.done():
                self._started.set_result(message.info)

    def _send(self, command: Command) -> None:
        self._child.send(command)

    async def _stop(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._started.cancel()
        await self._child.end()


class _Child(asyncio.Protocol):
    """One process, and the socket to it."""

    def __init__(self, builder: str) -> None:
        self.process, self._socket = launch("pelton.engine.child", builder)
        self._transport: asyncio.Transport | None = None
        self._parser = FrameParser()
        self._on_message: Callable[[Message], None] = lambda message: None
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def connect(self, on_message: Callable[[Message], None]) -> None:
        """Begin to hear from the child."""
        self._on_message = on_message
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: self, sock=self._socket)

    def send(self, command: Command) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(command))

    def data_received(self, data: bytes) -> None:
        for message in self._parser.feed(data):
            self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.gone.done():
            self.gone.set_result(None)

    async def end(self) -> str:
        """Close the socket, see the process out, and say how it ended. May be called twice."""
        self._socket.close() if self._transport is None else self._transport.abort()
        deadline = time.monotonic() + EXIT_S
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self.process.kill()
            await asyncio.sleep(0.01)
        return how_it_ended(self.process.returncode)

    async def kill(self) -> str:
        """end(), for a process that stands still."""
        self.process.kill()
        return await self.end()
