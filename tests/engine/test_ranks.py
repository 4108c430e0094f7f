"""The ranks beside rank 0 are processes: they follow it, end with it, and when one is lost the engine says so."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from pelton.config import CacheConfig, EngineArgs, KVGroup, SchedulerConfig
from pelton.engine import ranks, worker
from pelton.engine.core import EngineCore
from pelton.engine.fake import FakeRunner
from pelton.engine.messages import Begin, Finish, Meet, Met, Run
from pelton.engine.ranks import TeamRunner, Workers
from pelton.engine.scheduler import Scheduler
from pelton.engine.step import EngineRequest, StepPlan, StepResult
from pelton.errors import DeviceError, DeviceLostError, EngineDeadError, ModelFormatError, OutOfMemoryError
from pelton.types import SamplingParams

BUILDER = "fake_engine:build_worker"
HANG, CRASH, FAIL, FULL = 101, 102, 103, 105
CACHE = CacheConfig(block_size=16, num_blocks=1025, groups=(KVGroup(None, (0,)),), enable_prefix_caching=True)
LIMITS = SchedulerConfig(16, 256, 20, 512, True)


@pytest.fixture(autouse=True)
def _find_fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


class First(FakeRunner):
    """Rank 0's runner."""

    place = 0

    def can_start(self, plan: StepPlan) -> bool:
        return False

    def start(self, plan: StepPlan) -> None:
        """Never called."""


@pytest.fixture
def start() -> Iterator[Callable[..., Workers]]:
    made: list[Workers] = []

    def start(size: int = 3, model: str = "fake") -> Workers:
        made.append(Workers(BUILDER, EngineArgs(model=model, tensor_parallel_size=size)))
        return made[-1]

    yield start
    for workers in made:
        workers.close()
        assert not any(map(is_running, workers.pids))


def core_of(workers: Workers) -> EngineCore:
    """An engine of these ranks, once all are there."""
    workers.wait()
    return EngineCore(Scheduler(LIMITS, CACHE), TeamRunner(First(CACHE, vocab_size=100), workers))


def submit(core: EngineCore, request_id: int, prompt: list[int], max_tokens: int = 5) -> None:
    core.submit(EngineRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))


def run(core: EngineCore) -> dict[int, str | None]:
    """Why each request ended."""
    ends = {}
    while core.has_work():
        ends |= {u.request_id: u.error or u.finish_reason for u in core.step() if u.finish_reason}
    return ends


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ranks_meet_follow_and_end(start: Callable[..., Workers]) -> None:
    workers = start()
    core = core_of(workers)
    assert sorted(os.listdir(workers.folder)) == ["1", "2"]
    for i in range(8):
        submit(core, i, [1, 2, i])
    assert run(core) == dict.fromkeys(range(8), "length")
    workers.meet(0, RuntimeError())
    workers.check()
    workers.close()
    workers.close()
    assert not any(map(is_running, workers.pids)) and not Path(workers.folder).exists()
    with pytest.raises(EngineDeadError, match="shut down"):
        workers.send(Meet())


def test_they_end_with_the_object() -> None:
    workers = Workers(BUILDER, EngineArgs(model="fake", tensor_parallel_size=2))
    pids, folder = workers.pids, workers.folder
    del workers
    gc.collect()
    assert not any(map(is_running, pids)) and not Path(folder).exists()


def test_a_request_that_fails_everywhere_fails_alone(start: Callable[..., Workers]) -> None:
    workers = start()
    core = core_of(workers)
    core.runner.runner.raises.add(1)  # type: ignore[attr-defined]
    submit(core, 0, [1, 2])
    submit(core, 1, [FAIL, 2])
    submit(core, 2, [3, 4])
    ends = run(core)
    assert ends[0] == ends[2] == "length" and "injected failure" in str(ends[1])
    workers.check()


@pytest.mark.parametrize("moment", ["idle", "in a step"])
def test_a_rank_that_dies_ends_the_engine(start: Callable[..., Workers], moment: str) -> None:
    workers, called = start(), threading.Event()
    workers.on_lost(called.set)
    core = core_of(workers)
    submit(core, 0, [1, 2], max_tokens=400)
    core.step()
    if moment == "idle":
        os.kill(workers.pids[1], signal.SIGKILL)
        reason = "rank 2's process was killed by signal 9, as happens when memory runs out"
    else:
        submit(core, 1, [CRASH], max_tokens=400)
        reason = r"rank [12]'s process exited with code 7"
    assert moment == "in a step" or called.wait(5)
    with pytest.raises(EngineDeadError, match=reason):
        for _ in range(200):
            core.step()
            time.sleep(0.01)
    assert called.wait(5) and not any(map(is_running, workers.pids))
    with pytest.raises(EngineDeadError, match=reason):
        core.step()


@pytest.mark.parametrize(("model", "kind", "message"), [
    ("broken", ModelFormatError, "tensor x is missing on rank [12]"), ("buggy", EngineDeadError, "failed: KeyError"),
])  # fmt: skip
def test_what_keeps_a_rank_from_starting_reaches_rank_0(
    start: Callable[..., Workers], model: str, kind: type[Exception], message: str
) -> None:
    workers = start(model=model)
    with pytest.raises(kind, match=message), workers.building():
        workers.wait()


@pytest.mark.parametrize("follows", [RuntimeError("closed by peer"), DeviceError("steps could not be captured")])
def test_what_only_follows_from_a_lost_rank_is_not_what_is_told(
    start: Callable[..., Workers], follows: Exception
) -> None:
    workers = start(model="broken")
    with pytest.raises(ModelFormatError, match="rank [12]"), workers.building():
        raise follows
    workers = start()
    with pytest.raises(ZeroDivisionError), workers.building():
        raise ZeroDivisionError


def test_a_rank_that_does_not_answer_ends_the_engine(
    start: Callable[..., Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "ANSWER_S", 0.2)
    workers = start(2)
    core = core_of(workers)
    core.runner.runner.raises.add(0)  # type: ignore[attr-defined]
    submit(core, 0, [HANG])
    with pytest.raises(EngineDeadError, match="rank 0 failed where rank 1 did not: RuntimeError: injected failure"):
        core.step()
    assert not any(map(is_running, workers.pids))


def test_a_rank_that_runs_out_of_memory_alone_ends_the_engine(start: Callable[..., Workers]) -> None:
    workers = start()
    core = core_of(workers)
    submit(core, 0, [FULL, 2], max_tokens=400)
    submit(core, 1, [3, 4], max_tokens=400)
    with pytest.raises(EngineDeadError, match=r"^rank [12] failed: OutOfMemoryError: no room; lower something$"):
        for _ in range(200):
            core.step()
            time.sleep(0.01)
    assert not any(map(is_running, workers.pids))


def test_rank_0_that_runs_out_of_memory_alone_ends_the_engine(
    start: Callable[..., Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others answer, but have met where it has not."""
    workers = start()
    core = core_of(workers)

    def run(plan: StepPlan) -> StepResult:
        core.runner.runner.place = -1  # type: ignore[attr-defined]
        raise OutOfMemoryError("no room; lower something")

    monkeypatch.setattr(core.runner.runner, "run", run)  # type: ignore[attr-defined]
    submit(core, 0, [1, 2])
    submit(core, 1, [3, 4])
    message = r"^rank 0 failed where rank 1 did not: OutOfMemoryError: no room; lower something$"
    for _ in range(2):
        with pytest.raises(EngineDeadError, match=message):
            core.step()
    assert not any(map(is_running, workers.pids))


def test_a_gpu_that_rank_0_loses_is_told_as_such(
    start: Callable[..., Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = start()
    core = core_of(workers)

    def run(plan: StepPlan) -> StepResult:
        raise DeviceLostError("the GPU is lost")

    monkeypatch.setattr(core.runner.runner, "run", run)  # type: ignore[attr-defined]
    submit(core, 0, [1, 2])
    with pytest.raises(DeviceLostError, match="the GPU is lost"):
        core.step()
    assert not any(map(is_running, workers.pids))


SCRIPT = f"""
import time
from pelton.config import EngineArgs
from pelton.engine.ranks import Workers

workers = Workers("{BUILDER}", EngineArgs(model="fake", tensor_parallel_size=3))
workers.wait()
print(*workers.pids, flush=True)
time.sleep(60)
"""


def test_ranks_go_with_rank_0(tmp_path: Path) -> None:
    """Also where it is killed; and a script needs no `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stdout is not None
        pids = [int(pid) for pid in first.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_running, pids))
        first.kill()
        first.wait()
        deadline = time.monotonic() + 5
        while (any(map(is_running, pids)) or list(tmp_path.glob("pelton-ranks-*"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(is_running, pids)) and not list(tmp_path.glob("pelton-ranks-*"))


# --- one GPU for each -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("visible", "expected"), [(None, "2"), ("4,5,6,7", "6"), ("0, 1, GPU-x", "GPU-x"), ("3", "")])
def test_a_rank_sees_one_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ranks._device_of(2) == expected


# --- a rank's loop ----------------------------------------------------------------------------------------------------


class Noting:
    """A runner that notes what it is told, and fails at some step. Its place is how much that was."""

    def __init__(self, fails_at: int = -1, error: type[Exception] = RuntimeError) -> None:
        self.notes: list[str] = []
        self.fails_at = fails_at
        self.error = error

    @property
    def place(self) -> int:
        return len(self.notes)

    def _note(self, what: str, plan: StepPlan) -> None:
        self.notes.append(f"{what} {plan.step_id}")
        if plan.step_id == self.fails_at:
            raise self.error(f"step {plan.step_id}")

    def run(self, plan: StepPlan) -> StepResult:
        self._note("run", plan)
        return StepResult(plan.step_id)

    def start(self, plan: StepPlan) -> Any:
        self._note("start", plan)

        class Started:
            def finish(_) -> StepResult:  # noqa: N805
                self.notes.append(f"finish {plan.step_id}")
                return StepResult(plan.step_id)

        return Started()


def follow(runner: Noting, *orders: Any) -> list[Any]:
    """Give a rank orders; returns its answers. Raises what it fails with, at the latest when there are no more."""
    queue: SimpleQueue[Any] = SimpleQueue()
    answers: list[Any] = []
    for order in orders:
        queue.put(order)
    try:
        worker.work(runner, queue, answers.append)
    except IndexError:  # asked to finish what was not begun
        return answers


def plan(step_id: int) -> StepPlan:
    return StepPlan(step_id, (), (), ())


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "ALONE_S", 0.05)


def test_steps_are_begun_and_finished_in_order() -> None:
    runner = Noting()
    orders = [Begin(plan(1)), Begin(plan(2)), Finish(1), Begin(plan(3)), Finish(2), Finish(3), Run(plan(4)), Meet()]
    assert follow(runner, *orders, Finish(0)) == [Met(7)]
    assert runner.notes == ["start 1", "start 2", "finish 1", "start 3", "finish 2", "finish 3", "run 4"]


def test_what_was_begun_is_void_when_a_step_is_run() -> None:
    runner = Noting()
    assert follow(runner, Begin(plan(1)), Begin(plan(2)), Run(plan(1)), Finish(2)) == []
    assert runner.notes == ["start 1", "start 2", "run 1"]


def test_a_step_that_could_not_be_begun_on_rank_0_is_not_finished() -> None:
    runner = Noting()
    orders = [Begin(plan(1)), Begin(plan(2)), Meet(), Finish(1), Begin(plan(3)), Finish(3)]
    assert follow(runner, *orders, Finish(0), Finish(0)) == [Met(2)]
    assert runner.notes == ["start 1", "start 2", "finish 1", "start 3", "finish 3"]


@pytest.mark.parametrize("order", [Run, Begin])
def test_what_fails_here_and_on_rank_0_is_followed_by_a_meeting(order: Any) -> None:
    runner = Noting(fails_at=1)
    assert follow(runner, order(plan(1)), Meet(), Run(plan(2)), Meet(), Finish(0)) == [Met(1), Met(2)]
    assert runner.notes[1:] == ["run 2"]


@pytest.mark.parametrize("others", [[], [Run(plan(2)), Meet()]], ids=["rank 0 waits", "rank 0 has gone on"])
def test_a_rank_that_fails_alone_gives_up(others: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="step 1"):
        follow(Noting(fails_at=1), Run(plan(1)), *others)


def test_a_rank_that_loses_its_gpu_gives_up() -> None:
    with pytest.raises(DeviceLostError, match="step 1"):
        follow(Noting(fails_at=1, error=DeviceLostError), Run(plan(1)), Meet())


# --- both ends --------------------------------------------------------------------------------------------------------


class Ahead(FakeRunner):
    """Begins steps; computes one when its result is asked for. Its place is the number of steps computed."""

    place = 0

    def run(self, plan: StepPlan) -> StepResult:
        result = super().run(plan)
        self.place += 1
        return result

    def can_start(self, plan: StepPlan) -> bool:
        return True

    def start(self, plan: StepPlan) -> Any:
        return SimpleNamespace(finish=lambda: self.run(plan))


class Failing(Ahead):
    """Request 3 fails with its fifth token."""

    def run(self, plan: StepPlan) -> StepResult:
        if any(chunk.request_id == 3 and chunk.start == 8 for chunk in plan.chunks):
            self.raises.add(3)
        return super().run(plan)


class Short(Ahead):
    """Memory runs out in some calls, of all ranks alike; and in some that rank 0 begins, when it samples."""

    def __init__(self, rank: int) -> None:
        super().__init__(CACHE)
        self.random = Random(7)
        self.sampling = Random(8) if rank == 0 else None

    def run(self, plan: StepPlan) -> StepResult:
        self._ask_for_memory(plan, self.random)
        return super().run(plan)

    def start(self, plan: StepPlan) -> Any:
        self._ask_for_memory(plan, self.random)
        if self.sampling is not None:
            self._ask_for_memory(plan, self.sampling)
        return super().start(plan)

    def _ask_for_memory(self, plan: StepPlan, random: Random) -> None:
        if plan.num_tokens > 1 and random.random() < 0.2:
            FakeRunner.run(self, replace(plan, chunks=()))  # takes over which requests are new and gone
            raise OutOfMemoryError("no room")


class Thread:
    """Stands for Workers: one other rank, a thread with a runner of its own."""

    def __init__(self, runner: Ahead) -> None:
        self.runner, self.orders, self.answers = runner, SimpleQueue[Any](), SimpleQueue[Any]()
        self.seen: list[str] = []
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        with suppress(IndexError):
            worker.work(self.runner, self.orders, self.answers.put)

    def send(self, order: Any) -> None:
        self.seen.append(type(order).__name__)
        self.orders.put(order)

    def meet(self, place: int, failure: Exception) -> None:
        self.send(Meet())
        with suppress(Empty):
            if self.answers.get(timeout=5) == Met(place):
                return
        raise EngineDeadError("the ranks are not in step") from failure

    def check(self) -> None:
        """It lives."""

    def close(self) -> None:
        for _ in range(2):
            self.send(Finish(-1))
        self.thread.join(5)
        assert not self.thread.is_alive()


def play(core: EngineCore) -> tuple[dict[int, list[int]], dict[int, str | None]]:
    """Each request's tokens, and how it ended."""
    tokens: dict[int, list[int]] = {}
    ends = {}
    while core.has_work():
        for update in core.step():
            tokens[update.request_id] = tokens.get(update.request_id, []) + update.token_ids
            ends[update.request_id] = update.finish_reason
        core.scheduler.check()
    return tokens, ends


def test_steps_are_begun_ahead_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five requests, of which one ends unexpectedly and one fails on all ranks; both ranks see all tokens."""
    monkeypatch.setattr(worker, "ALONE_S", 5.0)
    other = Thread(Failing(CACHE))
    core = EngineCore(Scheduler(LIMITS, CACHE), TeamRunner(Failing(CACHE), other))  # type: ignore[arg-type]
    for runner in (core.runner.runner, other.runner):  # type: ignore[attr-defined]
        runner.scripts = {1: [5, 6, 7, 8]}
    for request_id in range(5):
        params = SamplingParams(max_tokens=9 + request_id)
        core.submit(EngineRequest(request_id, [request_id] * 5, params, eos_token_ids=(7,)))
    tokens, ends = play(core)
    assert not core.runner.runner.faults  # type: ignore[attr-defined]
    core.runner.run(plan(99))
    other.close()
    assert not other.runner.faults
    assert {"Begin", "Finish", "Run", "Meet"} <= set(other.seen)
    assert ends == {0: "length", 1: "stop", 2: "length", 3: "error", 4: "length"}
    assert tokens[1] == [5, 6, 7] and [len(tokens[i]) for i in (0, 2, 3, 4)] == [9, 11, 4, 13]


def test_memory_that_runs_out_on_all_ranks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "ALONE_S", 5.0)
    monkeypatch.setattr("pelton.engine.scheduler.CALM_STEPS", 2)  # steps are soon large enough to fail again
    other = Thread(Short(1))
    team = EngineCore(Scheduler(LIMITS, CACHE), TeamRunner(Short(0), other))  # type: ignore[arg-type]
    alone = EngineCore(Scheduler(LIMITS, CACHE), Ahead(CACHE))
    for core in (team, alone):
        for request_id in range(8):
            params = SamplingParams(max_tokens=20 + 3 * request_id, ignore_eos=True)
            core.submit(EngineRequest(request_id, [request_id] * (1 + 9 * request_id), params))
    try:
        assert play(team) == play(alone)
    finally:
        other.close()
    assert team.runner.runner.place == other.runner.place  # type: ignore[attr-defined]
    assert not team.runner.runner.faults and not other.runner.faults  # type: ignore[attr-defined]
    assert team.scheduler.stats().num_preemptions > 0
    assert other.seen.count("Begin") > other.seen.count("Finish") > 20 and other.seen.count("Meet") > 20
