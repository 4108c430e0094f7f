"""A rank beside rank 0: `python -m pelton.engine.worker FD RANK FOLDER MODULE:FUNCTION`, started by `ranks`.

FD is a socket to rank 0. In FOLDER ranks find each other; whoever ends removes it. MODULE:FUNCTION, a WorkerBuilder,
builds the rank's runner, which does what rank 0's does.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from pelton.config import EngineArgs
from pelton.engine.core import Runner
from pelton.engine.host import load_function
from pelton.engine.messages import Begin, Failed, Finish, Meet, Met, Run
from pelton.engine.process import Send, attach
from pelton.engine.step import Started, StepPlan
from pelton.errors import DeviceLostError, EngineDeadError, PeltonError

ALONE_S = 20.0  # rank 0 asks for a meeting so soon, if what failed here failed there, too

logger = logging.getLogger(__name__)


class RankRunner(Runner, Protocol):
    """A rank's runner."""

    @property
    def place(self) -> int: ...

    def start(self, plan: StepPlan) -> Started | None: ...


WorkerBuilder = Callable[[EngineArgs, int, Path, Callable[[], None]], RankRunner]
"""Of the arguments, the rank, the folder where ranks find each other, and a function that waits for rank 0."""


def main(fd: int, rank: int, folder: str, builder: str) -> int:
    """Serve rank 0 at the other end of socket `fd`; returns the exit code."""
    orders, send = attach(fd, f"rank {rank}", partial(shutil.rmtree, folder, ignore_errors=True))
    try:
        build: WorkerBuilder = load_function(builder)
        try:
            runner = build(orders.get().args, rank, Path(folder), lambda: send(Met()))
        except PeltonError as error:
            send(Failed(error))
            return 1
        work(runner, orders, send)
    except Exception as error:
        logger.exception("rank %d failed", rank)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        send(Failed(EngineDeadError(f"rank {rank} failed: {reason}")))
    return 1


def work(runner: RankRunner, orders: SimpleQueue[Any], send: Send) -> None:
    """Do what rank 0 does, until the process ends.

    What fails on every rank at the same place is rank 0's to deal with: it asks for a meeting, and goes on. Raises what
    failed here alone: then this rank no longer is where the others are.
    """
    started: deque[tuple[int, Started | None]] = deque()  # and their step ids
    while True:
        order = orders.get()
        try:
            _obey(order, runner, started, send)
        except Exception as error:
            logger.debug("%s failed", type(order).__name__, exc_info=True)
            if isinstance(error, DeviceLostError) or not _is_met(orders):
                raise
            logger.debug("so it did on rank 0: %s", error)
            send(Met(runner.place))


def _obey(order: Any, runner: RankRunner, started: deque[tuple[int, Any]], send: Send) -> None:
    if isinstance(order, Run):
        started.clear()  # what is left of steps that failed
        runner.run(order.plan)
    elif isinstance(order, Begin):
        started.append((order.plan.step_id, runner.start(order.plan)))
    elif isinstance(order, Finish):
        step_id, step = started.popleft()
        while step_id != order.step_id:
            step_id, step = started.popleft()
        step.finish()
    elif isinstance(order, Meet):
        send(Met(runner.place))


def _is_met(orders: SimpleQueue[Any]) -> bool:
    try:
        return isinstance(orders.get(timeout=ALONE_S), Meet)
    except Empty:
        return False


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))  # no waiting for ranks that are lost
