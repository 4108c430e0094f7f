"""The engine's loop: schedule, run, commit. It is policy over plain data and imports no torch."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Protocol

from pelton.engine.scheduler import Scheduler
from pelton.engine.step import Chunk, EngineRequest, Started, StepPlan, StepResult, Update
from pelton.errors import DeviceLostError, EngineDeadError, OutOfMemoryError

logger = logging.getLogger(__name__)

FATAL = DeviceLostError, EngineDeadError  # no plan will ever run again


class Runner(Protocol):
    """What computes a plan. Running the same plan twice must give the same result and leave the same state.

    It raises OutOfMemoryError if a smaller plan may fit, once it has released what memory it can, and DeviceLostError
    or EngineDeadError if no plan will ever run again. Whatever it raises, it has taken over which requests are new and
    which are gone.
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
        self._unfit: StepPlan | None = None  # a plan that the memory did not hold

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
        """Compute one batch: at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests.

        Whatever fails is failed alone, but DeviceLostError and EngineDeadError: then the engine is of no use any more.
        """
        plan, started = self._ahead or self._begin(self.scheduler.schedule())
        self._ahead = None
        result = None if started is None else self._finish(plan, started)
        if result is None:  # where it failed, the traceback and the tensors that it held are gone
            plan, result = self._run(self.scheduler.without_ended(plan))
        updates = self.scheduler.commit(plan, result)
        if self._unfit is not None:
            self._shrink(self._unfit, result)
        return updates

    def _begin(self, plan: StepPlan) -> tuple[StepPlan, Started | None]:
        """Begin a step if the runner can; it is run later where that fails."""
        start = getattr(self.runner, "start", None)
        if start is None or not plan.chunks:
            return plan, None
        try:
            return plan, start(plan)
        except FATAL:
            raise
        except Exception as error:  # if it fails again when it is run, the requests that are at fault are found
            self._note_failure(plan, error)
            return plan, None

    def _finish(self, plan: StepPlan, started: Started) -> StepResult | None:
        """While the step runs, the next one is planned, and begun behind it on the device. None: the step failed, and
        both are to be run."""
        next_plan = self.scheduler.schedule_ahead(plan)
        if next_plan is not None:
            self._ahead = self._begin(next_plan)
        try:
            return started.finish()
        except FATAL:
            raise
        except Exception as error:  # a kernel failed, and what was begun behind it is void
            self._note_failure(plan, error)
            if next_plan is not None:
                self._ahead = next_plan, None
            return None

    def _run(self, plan: StepPlan) -> tuple[StepPlan, StepResult]:
        """Run a plan; if that fails, find the requests that make it fail and fail only those.

        The plan is halved until a failing half is one chunk; where memory runs out, even that is cut, and its rest left
        for later steps. Chunks are idempotent, so running one again is safe. Returns also the part that was computed.
        """
        try:
            return plan, self.runner.run(plan)
        except FATAL:
            raise
        except Exception as error:  # whatever a kernel throws: it is reported to the request it belongs to
            if not plan.chunks:
                raise
            self._note_failure(plan, error)
            is_memory = isinstance(error, OutOfMemoryError)
            if len(plan.chunks) == 1 and not (is_memory and self.scheduler.can_cut(plan.chunks[0])):
                return plan, _failed(plan, error)
        if len(plan.chunks) == 1:
            return self._run(replace(plan, chunks=(_first_half(plan.chunks[0]),)))
        middle = len(plan.chunks) // 2
        first, result = self._run(replace(plan, chunks=plan.chunks[:middle]))
        second, other = self._run(replace(plan, chunks=plan.chunks[middle:]))
        return replace(plan, chunks=first.chunks + second.chunks), _merge(result, other)

    def _note_failure(self, plan: StepPlan, error: Exception) -> None:
        logger.debug("step %d failed", plan.step_id, exc_info=error)
        if isinstance(error, OutOfMemoryError) and (self._unfit is None or self._unfit.step_id != plan.step_id):
            self._unfit = plan

    def _shrink(self, plan: StepPlan, result: StepResult) -> None:
        """Memory ran out: what was planned ahead does not go on from what was computed, and the next steps are smaller
        than the plan that did not fit, unless that was a single request's doing."""
        self._unfit = None
        if self._ahead is not None:
            self.scheduler.take_back(self._ahead[0])
            self._ahead = None
        if not result.errors:
            self.scheduler.shrink(plan.num_tokens)


def _failed(plan: StepPlan, error: Exception) -> StepResult:
    """The result of a plan of one chunk, which cannot be cut where memory ran out."""
    request_id = plan.chunks[0].request_id
    logger.error("request %d failed in step %d", request_id, plan.step_id, exc_info=error)
    if isinstance(error, OutOfMemoryError):
        return StepResult(plan.step_id, errors={request_id: f"even alone this request does not fit: {error}"})
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return StepResult(plan.step_id, errors={request_id: f"this request failed in the model: {reason}"})


def _first_half(chunk: Chunk) -> Chunk:
    return replace(chunk, num_tokens=chunk.num_tokens // 2, sample=False)


def _merge(a: StepResult, b: StepResult) -> StepResult:
    return StepResult(
        a.step_id,
        token_ids=a.token_ids | b.token_ids,
        logprobs=a.logprobs | b.logprobs,
        prompt_logprobs=a.prompt_logprobs | b.prompt_logprobs,
        errors=a.errors | b.errors,
    )
