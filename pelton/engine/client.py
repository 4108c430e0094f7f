"""A door's way to an engine, wherever it runs: submit, abort, a look at its health, close.

    EngineCore   in the caller's own thread: LLM submits, steps and aborts by itself
    ThreadClient in a thread of this process
    ChildClient  in a supervised process of its own (supervisor.py)

The two clients belong to one asyncio event loop: their methods are called there, and updates are delivered there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue

from pelton.config import EngineArgs
from pelton.engine.host import host
from pelton.engine.messages import Abort, Close, Command, EngineInfo, Failed, Message, Progress, Ready, Report, Start
from pelton.engine.scheduler import SchedulerStats
from pelton.engine.step import EngineRequest, Update
from pelton.errors import EngineDeadError, OverloadedError, PeltonError
from pelton.types import OnProgress

logger = logging.getLogger(__name__)

Deliver = Callable[[Update | PeltonError], None]
NO_STATS = SchedulerStats(0, 0, 0.0, 0, 0, 0)


class State(Enum):
    """Of an engine, as its door sees it."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    CLOSED = "closed"  # on purpose
    DEAD = "dead"


class EngineClient(ABC):
    """Delivers to each request its updates, and exactly one end: an Update with a finish_reason, or a PeltonError.

    `info` is there once start() has returned.
    """

    info: EngineInfo

    def __init__(self) -> None:
        self.state = State.STARTING
        self._why = ""  # the engine is dead
        self._inboxes: dict[int, Deliver] = {}  # requests that have not ended
        self._stats = NO_STATS
        self._last_beat = time.monotonic()
        self._on_progress: OnProgress | None = None

    @abstractmethod
    async def start(self, args: EngineArgs, on_progress: OnProgress | None = None) -> None:
        """Build the engine; returns when it takes requests. Raises whatever PeltonError kept it from starting."""

    def submit(self, request: EngineRequest, deliver: Deliver) -> None:
        """Hand a request over; `deliver` is called with each of its updates, the last one or a PeltonError included.

        Raises RequestError if it cannot be sent, OverloadedError while the engine restarts or drains, EngineDeadError.
        """
        if self.state in (State.STARTING, State.RESTARTING):
            raise OverloadedError(f"the engine is {self.state.value}; try again in a few seconds", retry_after=5)
        if self.state is State.CLOSED:
            raise OverloadedError("the engine is shutting down; try another one", retry_after=5)
        if self.state is State.DEAD:
            raise EngineDeadError(self._why)
        self._send(request)
        self._inboxes[request.request_id] = deliver

    def abort(self, request_id: int) -> None:
        """End a request within one step, if it has not ended; its last update is still delivered."""
        if request_id in self._inboxes and self.state in (State.READY, State.CLOSED):
            self._send(Abort(request_id))

    async def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those in flight finish for `drain_s` seconds, and stop. May be called twice."""
        if self.state is not State.DEAD:
            self.state = State.CLOSED
        deadline = time.monotonic() + drain_s
        while self._inboxes and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._fail_all(EngineDeadError("the engine was shut down before this request was done"))
        await self._stop()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.state is State.READY

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs, or is on its way."""
        return self.state in (State.STARTING, State.READY, State.RESTARTING)

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine's loop was last heard of."""
        return time.monotonic() - self._last_beat

    @property
    def stats(self) -> SchedulerStats:
        """The counts of the last report."""
        return self._stats

    # --- for implementations ------------------------------------------------------------------------------------

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Bring a command to the engine, without waiting."""

    @abstractmethod
    async def _stop(self) -> None:
        """End the thread or the process, and wait for its end."""

    def _show(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress.done, progress.total)

    @abstractmethod
    def _on_start(self, message: Ready | Failed) -> None:
        """The engine has been built, or could not be, or has broken down."""

    def _on_message(self, message: Message) -> None:
        """Take what the engine says; whatever it is, it shows that the engine's loop turns."""
        self._last_beat = time.monotonic()
        if isinstance(message, Report):
            self._receive(message)
        elif isinstance(message, Progress):
            self._show(message)
        else:
            self._on_start(message)

    def _receive(self, report: Report) -> None:
        """Deliver what the engine reports."""
        self._stats = report.stats
        for update in report.updates:
            self._deliver(update.request_id, update, update.finish_reason is not None)
        for refusal in report.refusals:
            self._deliver(refusal.request_id, refusal.error, True)

    def _deliver(self, request_id: int, item: Update | PeltonError, is_last: bool) -> None:
        deliver = self._inboxes.pop(request_id, None) if is_last else self._inboxes.get(request_id)
        if deliver is not None:
            deliver(item)

    def _fail_all(self, error: PeltonError) -> None:
        """End every request in flight."""
        inboxes, self._inboxes, self._stats = self._inboxes, {}, NO_STATS
        for deliver in inboxes.values():
            deliver(error)


class ThreadClient(EngineClient):
    """The engine in a thread of this process. If it fails it stays dead: a thread cannot be killed."""

    def __init__(self, builder: str) -> None:
        """builder: "module:function", the host.Builder to call."""
        super().__init__()
        self._builder = builder
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="pelton-engine", daemon=True)

    async def start(self, args: EngineArgs, on_progress: OnProgress | None = None) -> None:
        self._on_progress = on_progress
        self._send(Start(args))
        self._thread.start()
        self.info = await self._started
        self.state = State.READY

    def _run(self) -> None:
        why = "the engine has ended"
        try:
            host(self._builder, self._commands, lambda message: self._post(self._on_message, message))
        except Exception as error:  # a bug in the engine: its door says so to whoever asks
            logger.exception("the engine failed")
            why = f"the engine failed: {type(error).__name__}: {error}"
        finally:
            self._post(self._on_end, why)

    def _post(self, function: Callable[..., None], argument: object) -> None:
        """Call `function` on the event loop's thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed without close(): nobody listens any more
            self._loop.call_soon_threadsafe(function, argument)

    def _on_start(self, message: Ready | Failed) -> None:
        if self._started.done():  # close() did not wait for it
            return
        if isinstance(message, Ready):
            self._started.set_result(message.info)
        else:
            self.state, self._why = State.DEAD, str(message.error)
            self._started.set_exception(message.error)

    def _on_end(self, why: str) -> None:
        if self.state not in (State.CLOSED, State.DEAD):
            self.state, self._why = State.DEAD, why
        self._fail_all(EngineDeadError(why))
        if not self._started.done():
            self._started.set_exception(EngineDeadError(why))
        self._ended.set()

    def _send(self, command: Command) -> None:
        self._commands.put(command)

    async def _stop(self) -> None:
        self._send(Close())
        if self._started.done():
            await self._ended.wait()
            self._thread.join()  # its last act was to say that it ends
        else:  # it still loads, and will see Close afterwards
            self._started.cancel()
