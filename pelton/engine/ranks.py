"""Rank 0's side of an engine of several ranks: the processes of the others, and a runner that leads them.

    rank 0 --Run, Begin, Finish--> the others    what rank 0's runner does, they do, in the same order

Each rank has a share of the model on a device of its own. Within a step they wait for each other, so none is asked
whether it is done. Where rank 0 fails, it makes sure that the others have come as far, and then may run what smaller
plans it likes; a rank that dies, or fails where others do not, ends the engine.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from pelton.config import EngineArgs
from pelton.engine.messages import Begin, Failed, Finish, Meet, Met, Order, Run, Start
from pelton.engine.process import EXIT_S, RECEIVE_BYTES, how_it_ended, launch
from pelton.engine.step import EngineRequest, Started, StepPlan, StepResult
from pelton.engine.wire import FrameParser, WireError, encode
from pelton.engine.worker import RankRunner
from pelton.errors import DeviceError, DeviceLostError, EngineDeadError, PeltonError
from pelton.types import SamplingParams

ANSWER_S = 30.0  # after a step that failed, for what the others still compute

T = TypeVar("T")


class LeadingRunner(RankRunner, Protocol):
    """Rank 0's own runner."""

    def can_start(self, plan: StepPlan) -> bool: ...


class Workers:
    """The processes of ranks 1 to N - 1. They end with this object, and with this process."""

    def __init__(self, builder: str, args: EngineArgs) -> None:
        """builder: "module:function", the worker.WorkerBuilder that they call."""
        self.folder = tempfile.mkdtemp(prefix="pelton-ranks-")
        self._members: list[_Member] = []
        self._why: PeltonError | None = None  # they are gone
        self._finalizer = weakref.finalize(self, _end, self._members, self.folder)
        for rank in range(1, args.tensor_parallel_size):
            self._members.append(_Member(rank, self.folder, builder))
        self.send(Start(args))

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [member.process.pid for member in self._members]

    def on_lost(self, call: Callable[[], None]) -> None:
        """When one is lost, and at the end: call this, from a thread of its own."""
        for member in self._members:
            member.on_lost = call

    def send(self, order: Order) -> None:
        """To all. EngineDeadError if one is gone."""
        self.check()
        frame = encode(order)
        for member in self._members:
            try:
                member.socket.sendall(frame)
            except OSError:
                member.thread.join()  # until it is known why
                self.check()

    def wait(self) -> None:
        """Until each has come to the next place where all meet. EngineDeadError, or what keeps one from it."""
        for member in self._members:
            if member.answers.get() is None:
                self._give_up(member.error)

    def meet(self, place: int, failure: Exception) -> None:
        """After a failure here, at this place: make sure that the others are there. EngineDeadError if they are not."""
        self.send(Meet())
        for member in self._members:
            with suppress(Empty):
                answer = member.answers.get(timeout=ANSWER_S)
                if answer is None:
                    self._give_up(member.error)
                elif answer.place == place:
                    continue
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            self._give_up(EngineDeadError(f"rank 0 failed where rank {member.rank} did not: {reason}"))

    def check(self, patience: float = 0.0) -> None:
        """Raise if one is lost, or is in so many seconds."""
        if self._why is not None:
            raise self._why
        for member in self._members:
            member.thread.join(patience)
            if member.error is not None:
                self._give_up(member.error)

    @contextmanager
    def building(self) -> Iterator[None]:
        """While rank 0 is built: what ends that ends the others, and what one of them says comes before what only
        follows from it."""
        try:
            yield
            self.check()
        except BaseException as error:
            if not isinstance(error, PeltonError) or isinstance(error, DeviceError):
                self.check(EXIT_S)
            self.close()
            raise

    def close(self) -> None:
        """End them. May be called twice."""
        self._why = self._why or EngineDeadError("the engine was shut down")
        self._finalizer()

    def _give_up(self, error: PeltonError | None) -> None:
        self._why = error or EngineDeadError("a rank is lost")
        self._finalizer()
        raise self._why


class _Member:
    """One process, and the thread that hears it."""

    def __init__(self, rank: int, folder: str, builder: str) -> None:
        self.rank = rank
        self.process, self.socket = launch(
            "pelton.engine.worker", str(rank), folder, builder,
            environment={"CUDA_VISIBLE_DEVICES": _device_of(rank)},
        )  # fmt: skip
        self.answers: SimpleQueue[Met | None] = SimpleQueue()  # None: there will be no more
        self.error: PeltonError | None = None  # why it is lost
        self.on_lost: Callable[[], None] = lambda: None
        self.thread = threading.Thread(target=self._listen, name=f"pelton-rank-{rank}", daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        parser = FrameParser()
        error: PeltonError | None = None
        with suppress(OSError, WireError):
            while data := self.socket.recv(RECEIVE_BYTES):
                for message in parser.feed(data):
                    if isinstance(message, Failed):
                        error = message.error
                    else:
                        self.answers.put(message)
        self.error = error or EngineDeadError(
            f"rank {self.rank}'s process {how_it_ended(self._see_out())}; the engine cannot go on without it"
        )
        self.answers.put(None)
        self.on_lost()

    def _see_out(self) -> int:
        """Wait for the end of a process whose socket is closed; returns its exit code."""
        try:
            return self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def end(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._see_out()
        if threading.current_thread() is not self.thread:
            self.thread.join(EXIT_S)
        self.socket.close()


def _end(members: Sequence[_Member], folder: str) -> None:
    for member in members:
        member.end()
    shutil.rmtree(folder, ignore_errors=True)


def _device_of(rank: int) -> str:
    """The one GPU that a rank sees: of those that are visible here, the one of its number."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(rank)
    devices = visible.split(",")
    return devices[rank].strip() if rank < len(devices) else ""


class TeamRunner:
    """Runs plans on all ranks. Implements core.Runner.

    A step that fails on rank 0 can be run again in parts if the others failed with it, or were done.
    """

    def __init__(self, runner: LeadingRunner, workers: Workers) -> None:
        self.runner = runner
        self.workers = workers

    def run(self, plan: StepPlan) -> StepResult:
        self.workers.send(Run(_bare(plan)))
        return self.together(partial(self.runner.run, plan))

    def start(self, plan: StepPlan) -> Started | None:
        if not self.runner.can_start(plan):
            return None
        self.workers.send(Begin(_bare(plan)))
        started = self.together(partial(self.runner.start, plan))
        return None if started is None else _Started(self, plan.step_id, started)

    def together(self, do: Callable[[], T]) -> T:
        """`do`, which the others have been told to do. EngineDeadError if they are lost."""
        try:
            result = do()
        except DeviceLostError:
            self.workers.check()  # which may be why
            self.workers.close()
            raise
        except Exception as error:
            self.workers.meet(self.runner.place, error)
            raise
        self.workers.check()
        return result


class _Started:
    """A step that all ranks have begun."""

    def __init__(self, team: TeamRunner, step_id: int, started: Started) -> None:
        self._team = team
        self._step_id = step_id
        self._started = started

    def finish(self) -> StepResult:
        self._team.workers.send(Finish(self._step_id))
        return self._team.together(self._started.finish)


def _bare(plan: StepPlan) -> StepPlan:
    """What the others need of a plan: how a request is sampled is rank 0's business."""
    return replace(plan, new=tuple(map(_bare_request, plan.new)))


def _bare_request(request: EngineRequest) -> EngineRequest:
    params = SamplingParams(prompt_logprobs=request.params.prompt_logprobs)
    return EngineRequest(request.request_id, request.prompt_token_ids, params)
