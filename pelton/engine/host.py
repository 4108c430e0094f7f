"""An engine at work behind a door: build it, then loop over its commands and its steps. Runs in a thread or a process.

The loop reports after every step, and twice a second when there is nothing to do: that is the engine's heartbeat.
Nobody else beats for it, so a loop that stands still is noticed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any

from pelton.config import EngineArgs
from pelton.engine.core import EngineCore
from pelton.engine.messages import (
    Abort,
    Close,
    Command,
    EngineInfo,
    Failed,
    Message,
    Progress,
    Ready,
    Refusal,
    Report,
    Start,
)
from pelton.engine.step import EngineRequest
from pelton.errors import EngineDeadError, OverloadedError, PeltonError, RequestError
from pelton.types import OnProgress

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine, and what its doors need to know of it."""

    core: EngineCore
    info: EngineInfo


Builder = Callable[[EngineArgs, OnProgress], Engine]


def load_function(name: str) -> Any:
    """The function "module:function". Importing its module is what loads torch."""
    # OpenMP reads this when torch is loaded. By default its threads spin for milliseconds when they wait, and on a
    # machine with anything else to do they take the cores from the very threads they wait for: decoding was up to
    # thirty times slower. A short spin (about 20 us) still covers the gap between two ops.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def load_builder(name: str) -> Builder:
    """The Builder "module:function"."""
    builder: Builder = load_function(name)
    return builder


def host(builder: str, commands: SimpleQueue[Command], send: Callable[[Message], None]) -> bool:
    """Build the engine of the Start command and run it until Close. Returns whether it could be built.

    builder: "module:function", a Builder. It is imported first, torch with it, while the door may still be looking
    for the model's files.
    """
    try:
        build = load_builder(builder)
        start = commands.get()
        if not isinstance(start, Start):
            return False
        engine = build(start.args, lambda done, total: send(Progress(done, total)))
    except PeltonError as error:
        send(Failed(error))
        return False
    except Exception as error:  # not foreseen, so it goes to the log as it is, and to the door as one line
        logger.exception("the engine could not be built")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        send(Failed(EngineDeadError(f"the engine could not be built: {reason}")))
        return False
    send(Ready(engine.info))
    run(engine.core, commands, send)
    return True


def run(core: EngineCore, commands: SimpleQueue[Command], send: Callable[[Message], None]) -> None:
    """The engine's loop, until Close. A command takes effect before the next step."""
    unchecked = False
    while True:
        has_work = core.has_work()
        refusals = []
        taken = _take(commands, 0.0 if has_work else HEARTBEAT_S)
        for command in taken:
            if isinstance(command, Close):
                return
            if refusal := _apply(core, command):
                refusals.append(refusal)
        updates = core.step() if core.has_work() else []
        if has_work or taken:
            unchecked = True
        elif unchecked:  # time to make sure that nothing was left behind
            core.scheduler.check()
            unchecked = False
        send(Report(core.scheduler.stats(), updates, refusals))


def _take(commands: SimpleQueue[Command], timeout: float) -> list[Command]:
    """All commands that are there; waits for the first for at most `timeout` seconds."""
    taken = []
    try:
        if timeout:
            taken.append(commands.get(timeout=timeout))
        while True:
            taken.append(commands.get_nowait())
    except Empty:
        return taken


def _apply(core: EngineCore, command: Command) -> Refusal | None:
    if isinstance(command, Refusal):
        return command
    if isinstance(command, Abort):
        core.abort(command.request_id)
    elif isinstance(command, EngineRequest):
        try:
            core.submit(command)
        except (RequestError, OverloadedError) as error:
            return Refusal(command.request_id, error)
    return None
