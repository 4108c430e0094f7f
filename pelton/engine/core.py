"""The engine's loop: schedule, run, commit. It is policy over plain data and imports no torch."""

from __future__ import annotations

import logging
from typing import Protocol

from pelton.engine.scheduler import Scheduler
from pelton.engine.step import Chunk, EngineRequest, Started, StepPlan, StepResult, Update
from pelton.errors import EngineDeadError

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What computes a plan. Running the same plan twice must give the same result and leave the same state.

    A runner that can begin a step before the one before has ended also has start(plan) -> Started | None: None where a
    result is needed at once, and run() is to be called.
    """

    def run(self, plan: StepPlan) -> StepResult: ...


class EngineCore:
    """One model's requests, from submission to their last token."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._ahead: tuple[StepPlan, Started | None] | None = None  # a step that is planned, and perhaps has begun

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError if it can never run, OverloadedError if the queue is full."""
        self.scheduler.add(request)

    def abort(self, request_id: int) -> None:
        """End a request, if it is still there; its last update comes with the next step."""
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether step() would do anything."""
        return self.scheduler.has_work()

    def step(self) -> list[Update]:
        """Compute one batch: at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests."""
        plan, started = self._ahead or self._begin(self.scheduler.schedule())
        self._ahead = None
        if started is None:
            return self.scheduler.commit(plan, run_isolated(self.runner, plan))
        # While the step runs, the next one is planned, and begun behind it on the device.
        next_plan = self.scheduler.schedule_ahead(plan)
        if next_plan is not None:
            self._ahead = self._begin(next_plan)
        try:
            result = started.finish()
        except Exception:  # a kernel failed, and what was begun behind it is void
            logger.debug("step %d failed", plan.step_id, exc_info=True)
            if next_plan is not None:
                self._ahead = next_plan, None
            result = run_isolated(self.runner, plan)
        return self.scheduler.commit(plan, result)

    def _begin(self, plan: StepPlan) -> tuple[StepPlan, Started | None]:
        """Begin a step if the runner can; it is run later where that fails."""
        start = getattr(self.runner, "start", None)
        if start is None or not plan.chunks:
            return plan, None
        try:
            return plan, start(plan)
        except Exception:  # it will fail again when it is run, where the requests that are at fault are found
            logger.debug("step %d could not be begun", plan.step_id, exc_info=True)
            return plan, None


def run_isolated(runner: Runner, plan: StepPlan) -> StepResult:
    """Run a plan; if that fails, find the requests that make it fail and fail only those.

    The plan is halved until a failing half is one chunk. Chunks are idempotent, so running one again is safe.
    """
    try:
        return runner.run(plan)
    except EngineDeadError:  # nothing can be run any more
        raise
    except Exception as error:  # whatever a kernel throws: it is reported to the request it belongs to
        if not plan.chunks:
            raise
        if len(plan.chunks) == 1:
            request_id = plan.chunks[0].request_id
            logger.exception("request %d failed in step %d", request_id, plan.step_id)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return StepResult(plan.step_id, errors={request_id: f"this request failed in the model: {reason}"})
        middle = len(plan.chunks) // 2
        first = run_isolated(runner, _with_chunks(plan, plan.chunks[:middle]))
        second = run_isolated(runner, _with_chunks(plan, plan.chunks[middle:]))
        return _merge(first, second)


def _with_chunks(plan: StepPlan, chunks: tuple[Chunk, ...]) -> StepPlan:
    return StepPlan(plan.step_id, plan.new, chunks, plan.gone)


def _merge(a: StepResult, b: StepResult) -> StepResult:
    return StepResult(
        a.step_id,
        token_ids=a.token_ids | b.token_ids,
        logprobs=a.logprobs | b.logprobs,
        prompt_logprobs=a.prompt_logprobs | b.prompt_logprobs,
        errors=a.errors | b.errors,
    )
