"""The engine's loop: schedule, run, commit. It is policy over plain data and imports no torch."""

from __future__ import annotations

import logging
from typing import Protocol

from pelton.engine.scheduler import Scheduler
from pelton.engine.step import Chunk, EngineRequest, StepPlan, StepResult, Update

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What computes a plan. Running the same plan twice must give the same result and leave the same state."""

    def run(self, plan: StepPlan) -> StepResult: ...


class EngineCore:
    """One model's requests, from submission to their last token."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner

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
        plan = self.scheduler.schedule()
        result = run_isolated(self.runner, plan)
        return self.scheduler.commit(plan, result)


def run_isolated(runner: Runner, plan: StepPlan) -> StepResult:
    """Run a plan; if that fails, find the requests that make it fail and fail only those.

    The plan is halved until a failing half is one chunk. Chunks are idempotent, so running one again is safe.
    """
    try:
        return runner.run(plan)
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
