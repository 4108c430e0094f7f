"""EngineCore: one request's failure is its own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pelton.config import CacheConfig, KVGroup, SchedulerConfig
from pelton.engine.core import EngineCore
from pelton.engine.fake import FakeRunner
from pelton.engine.scheduler import CALM_STEPS, Scheduler
from pelton.engine.step import EngineRequest, StepPlan, StepResult
from pelton.errors import DeviceLostError, OutOfMemoryError
from pelton.types import SamplingParams


@pytest.fixture
def core() -> EngineCore:
    cache = CacheConfig(4, 50, (KVGroup(None, (0,)), KVGroup(6, (1,))), True)
    return EngineCore(Scheduler(SchedulerConfig(8, 64, 10, 64, True), cache), FakeRunner(cache))


def test_requests_from_submission_to_their_last_token(core: EngineCore) -> None:
    for request_id in range(3):
        core.submit(EngineRequest(request_id, [request_id] * 5, SamplingParams(max_tokens=3)))
    updates = [core.step() for _ in range(3)]
    assert [[u.request_id for u in step] for step in updates] == [[0, 1, 2]] * 3
    assert [u.finish_reason for u in updates[-1]] == ["length"] * 3
    assert not core.has_work()


@pytest.mark.parametrize("culprits", [{0}, {4}, {1, 2}, {0, 1, 2, 3, 4}])
def test_a_failing_request_is_found_and_ended_alone(core: EngineCore, culprits: set[int]) -> None:
    for request_id in range(5):
        core.submit(EngineRequest(request_id, [request_id] * 5, SamplingParams(max_tokens=3)))
    core.step()
    core.runner.raises |= culprits
    failed = {u.request_id: u.error for u in core.step() if u.finish_reason == "error"}
    assert set(failed) == culprits
    assert all(error and "injected failure" in error and "\n" not in error for error in failed.values())
    assert {u.request_id for u in core.step()} == {0, 1, 2, 3, 4} - culprits
    core.scheduler.check()


def test_abort_is_reported_once_by_the_next_step(core: EngineCore) -> None:
    core.submit(EngineRequest(7, [1, 2, 3], SamplingParams(max_tokens=30)))
    core.step()
    core.abort(7)
    core.abort(7)
    core.abort(8)
    assert core.has_work()
    assert [(u.request_id, u.finish_reason) for u in core.step()] == [(7, "abort")]
    assert not core.has_work()


def test_running_a_plan_twice_gives_the_same_result(core: EngineCore) -> None:
    for request_id in range(3):
        core.submit(EngineRequest(request_id, [request_id] * 5, SamplingParams(max_tokens=3)))
    for _ in range(2):
        plan = core.scheduler.schedule()
        first, second = core.runner.run(plan), core.runner.run(plan)
        assert first == second
        core.scheduler.commit(plan, second)
    assert not core.runner.faults


def test_a_runner_that_fails_without_work_is_broken(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(plan: StepPlan) -> StepResult:
        raise RuntimeError("no device")

    monkeypatch.setattr(core.runner, "run", run)
    with pytest.raises(RuntimeError, match="no device"):
        core.step()


class Ahead(FakeRunner):
    """Computes a step when its result is asked for."""

    def start(self, plan: StepPlan) -> Any:
        self.started.append(plan.step_id)
        return SimpleNamespace(finish=lambda: self.run(plan))


@pytest.fixture
def ahead(core: EngineCore) -> EngineCore:
    runner = Ahead(core.scheduler._cache)
    runner.started = []
    return EngineCore(core.scheduler, runner)


def play(core: EngineCore) -> tuple[dict[int, list[int]], int]:
    """The tokens of five requests of which some end early, and the number of steps."""
    for request_id in range(5):
        params = SamplingParams(max_tokens=4 + request_id)
        core.submit(EngineRequest(request_id, [request_id] * 5, params, eos_token_ids=(7,)))
    core.runner.scripts = {1: [5, 6, 7, 8], 3: [7]}
    tokens: dict[int, list[int]] = {request_id: [] for request_id in range(5)}
    steps = 0
    while core.has_work():
        steps += 1
        for update in core.step():
            tokens[update.request_id] += update.token_ids
        core.scheduler.check()
    assert not core.runner.faults
    return tokens, steps


def test_steps_begun_ahead_give_the_same_tokens(core: EngineCore) -> None:
    cache = CacheConfig(4, 50, (KVGroup(None, (0,)), KVGroup(6, (1,))), True)
    other = EngineCore(Scheduler(SchedulerConfig(8, 64, 10, 64, True), cache), Ahead(cache))
    other.runner.started = []
    tokens, steps = play(core)
    assert (tokens, steps) == play(other)
    assert tokens[1] == [5, 6, 7] and tokens[3] == [7]
    assert other.runner.started == list(range(1, steps + 1))


def test_a_step_begun_ahead_is_run_again_where_the_one_before_fails(ahead: EngineCore) -> None:
    for request_id in range(3):
        ahead.submit(EngineRequest(request_id, [request_id] * 5, SamplingParams(max_tokens=6)))
    ahead.step()
    ahead.runner.raises |= {1}
    assert {u.request_id: u.finish_reason for u in ahead.step()} == {0: None, 1: "error", 2: None}
    ahead.runner.raises.clear()
    ends = [u.finish_reason for _ in range(4) for u in ahead.step()]
    assert ends.count("length") == 2 and not ahead.has_work() and not ahead.runner.faults


def test_a_waiting_request_is_admitted_although_steps_are_begun_ahead(ahead: EngineCore) -> None:
    ahead.submit(EngineRequest(0, [1] * 5, SamplingParams(max_tokens=9)))
    ahead.step()
    ahead.submit(EngineRequest(1, [2] * 5, SamplingParams(max_tokens=9)))
    assert [[u.request_id for u in ahead.step()] for _ in range(3)][-1] == [0, 1]


def test_a_request_that_ended_is_gone_only_when_no_step_needs_it(ahead: EngineCore) -> None:
    ahead.runner.scripts = {0: [7], 1: [5, 5, 5, 5, 5]}
    for request_id in range(2):
        params = SamplingParams(max_tokens=5)
        ahead.submit(EngineRequest(request_id, [request_id] * 5, params, eos_token_ids=(7,)))
    first, second = ahead.step(), ahead.step()  # request 0 ends in the first; the second was begun with it
    assert [u.finish_reason for u in first] == ["stop", None] and [u.request_id for u in second] == [1]
    plan, _ = ahead._ahead or pytest.fail("no step was begun ahead")
    assert plan.gone == () and ahead.runner.request_ids == {0, 1}
    ahead.step()
    ahead.step()
    assert ahead.runner.request_ids == {1}


# --- memory that runs out, a device that is lost --------------------------------------------------------------------


def limit(core: EngineCore, room: dict[str, int]) -> list[int]:
    """Let the runner hold only `room["tokens"]` tokens; returns the sizes it is asked for."""
    run, sizes = core.runner.run, []

    def limited(plan: StepPlan) -> StepResult:
        sizes.append(plan.num_tokens)
        if plan.num_tokens > room["tokens"]:
            core.runner.run_plan(replace(plan, chunks=()))
            raise OutOfMemoryError("no room; lower --max-num-seqs")
        return run(plan)

    core.runner.run, core.runner.run_plan = limited, run
    return sizes


def test_where_memory_runs_out_nothing_fails_and_steps_are_smaller_for_a_while() -> None:
    cache = CacheConfig(4, 400, (KVGroup(None, (0,)),), True)
    core = EngineCore(Scheduler(SchedulerConfig(8, 64, 10, 300, True), cache), FakeRunner(cache))
    for request_id in range(8):
        core.submit(EngineRequest(request_id, [request_id] * 3, SamplingParams(max_tokens=200)))
    core.step()
    room = {"tokens": 5}
    sizes = limit(core, room)
    assert [u.request_id for u in core.step()] == list(range(8))  # in two parts
    assert sizes == [8, 4, 4]
    stats = core.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions) == (4, 4, 4)
    core.scheduler.check()
    assert [u.request_id for u in core.step()] == [0, 1, 2, 3]
    room["tokens"] = 64
    for _ in range(CALM_STEPS):
        core.step()
    assert core.scheduler.stats().num_running == 8
    assert not core.runner.faults


def test_a_prompt_that_does_not_fit_at_once_is_computed_in_parts(core: EngineCore) -> None:
    core.submit(EngineRequest(0, list(range(40)), SamplingParams(max_tokens=1)))
    sizes = limit(core, {"tokens": 12})
    assert core.step() == []
    assert sizes == [40, 20, 10]
    assert [u.finish_reason for _ in range(3) for u in core.step()] == ["length"]
    assert sizes[3:] == [20, 10, 10, 10] and not core.runner.faults


def test_a_request_that_does_not_fit_alone_fails_alone(core: EngineCore) -> None:
    for request_id in range(3):
        core.submit(EngineRequest(request_id, [request_id] * 5, SamplingParams(max_tokens=3)))
    run = core.runner.run

    def heavy(plan: StepPlan) -> StepResult:
        if any(chunk.request_id == 1 for chunk in plan.chunks):
            raise OutOfMemoryError("no room; lower --max-num-seqs")
        return run(plan)

    core.step()
    core.runner.run = heavy
    errors = {u.request_id: u.error for u in core.step()}
    assert errors == {0: None, 1: "even alone this request does not fit: no room; lower --max-num-seqs", 2: None}
    assert core.scheduler.stats().num_running == 2  # the others are not made to wait


def test_what_was_planned_ahead_is_taken_back_where_memory_runs_out(ahead: EngineCore) -> None:
    ahead.runner.scripts = {0: [7], 1: [5] * 9}
    for request_id in range(2):
        params = SamplingParams(max_tokens=9)
        ahead.submit(EngineRequest(request_id, [request_id] * 5, params, eos_token_ids=(7,)))
    ahead.step()
    ahead.step()
    ahead.runner.started.clear()
    run = ahead.runner.run

    def once(plan: StepPlan) -> StepResult:
        ahead.runner.run = run
        raise OutOfMemoryError("no room")

    ahead.runner.run = once
    assert [u.token_ids for u in ahead.step()] == [[5]]
    assert len(ahead.runner.started) == 1 and ahead._ahead is None  # and in that plan request 0 was gone
    ahead.step()
    assert ahead.runner.request_ids == {1} and not ahead.runner.faults


def test_who_was_let_in_ahead_is_told_of_again_where_memory_runs_out(ahead: EngineCore) -> None:
    """With all of its blocks, of which the first are found."""
    ahead.submit(EngineRequest(0, list(range(9)), SamplingParams(max_tokens=1)))
    ahead.step()
    ahead.submit(EngineRequest(1, list(range(50, 62)), SamplingParams(max_tokens=2)))
    run, begin, plans = ahead.runner.run, ahead.runner.start, []

    def start(plan: StepPlan) -> Any:
        if plan.step_id > 2:
            return None  # without a look at it
        ahead.submit(EngineRequest(2, [*range(8), 100, 101], SamplingParams(max_tokens=2)))
        return begin(plan)

    def once(plan: StepPlan) -> StepResult:
        plans.append(plan)
        if len(plans) == 1:
            raise OutOfMemoryError("no room")
        return run(plan)

    ahead.runner.start, ahead.runner.run = start, once
    ahead.step()
    assert ahead._ahead is None and ahead.runner.request_ids == {1} and ahead.scheduler.stats().num_running == 2
    while ahead.has_work():
        ahead.step()
    assert [[spec.request_id for spec in plan.new] for plan in plans] == [[1], [1], [2], []]
    assert [(c.start, c.table_start) for plan in plans for c in plan.chunks if c.request_id == 2] == [(8, 0), (10, 2)]
    assert not ahead.runner.faults
    assert ahead.scheduler.stats().num_tokens == 9 + 12 + 3 + 1  # what was planned twice is counted once


def test_what_has_not_begun_leaves_out_who_has_ended_meanwhile(ahead: EngineCore) -> None:
    ahead.runner.scripts = {0: [7], 1: [5, 5, 5]}
    for request_id in range(2):
        params = SamplingParams(max_tokens=5)
        ahead.submit(EngineRequest(request_id, [request_id] * 5, params, eos_token_ids=(7,)))
    start = ahead.runner.start
    ahead.runner.start = lambda plan: start(plan) if plan.step_id == 1 else None
    run, plans = ahead.runner.run, []
    ahead.runner.run = lambda plan: [plans.append(plan), run(plan)][1]
    ahead.step()
    assert {chunk.request_id for chunk in ahead._ahead[0].chunks} == {0, 1}
    ahead.step()
    assert [{chunk.request_id for chunk in plan.chunks} for plan in plans] == [{0, 1}, {1}]


@pytest.mark.parametrize("where", ["run", "start", "finish"])
def test_a_lost_device_ends_the_engine(ahead: EngineCore, where: str) -> None:
    for request_id in range(3):
        ahead.submit(EngineRequest(request_id, [request_id] * 5, SamplingParams(max_tokens=6)))
    calls: list[StepPlan] = []

    def lost(plan: StepPlan) -> StepResult:
        calls.append(plan)
        raise DeviceLostError("the GPU is lost")

    if where == "start":
        ahead.runner.start = lost
    else:
        ahead.runner.run = lost
    if where == "run":
        ahead.runner.start = lambda plan: None
    with pytest.raises(DeviceLostError, match="the GPU is lost"):
        ahead.step()
    assert len(calls) == 1
