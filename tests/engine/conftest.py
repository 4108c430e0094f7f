"""An engine with a fake runner, checked after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from pelton.config import FEW_TOKENS, CacheConfig, KVGroup, SchedulerConfig
from pelton.engine.core import EngineCore
from pelton.engine.fake import FakeRunner
from pelton.engine.scheduler import Scheduler
from pelton.engine.step import EngineRequest, StepPlan, StepResult, TokenLogprobs, Update
from pelton.errors import OutOfMemoryError
from pelton.types import SamplingParams


@dataclass
class Story:
    """All that was reported of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    scheduled_times: list[float] = field(default_factory=list)

    def tell(self, update: Update) -> None:
        assert self.finish_reason is None, f"request {update.request_id} goes on after its last update"
        assert update.token_ids or update.prompt_logprobs or update.finish_reason, "an update that says nothing"
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs or []
        if update.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, f"request {update.request_id} got its prompt_logprobs twice"
            self.prompt_logprobs = update.prompt_logprobs
        if update.scheduled_time is not None:
            self.scheduled_times.append(update.scheduled_time)
        self.num_cached_tokens = update.num_cached_tokens
        self.finish_reason, self.stop_reason, self.error = update.finish_reason, update.stop_reason, update.error


@dataclass(eq=False)
class Begun:
    """A step that a runner has begun, and what comes of it, once that is certain."""

    plan: StepPlan
    outcome: StepResult | Exception | None = None


class Engine:
    """An engine with a fake runner. `stories` holds what was reported, by request id."""

    def __init__(
        self,
        windows: Iterable[int | None] = (None,),
        block_size: int = 4,
        num_blocks: int = 129,
        caching: bool = True,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        max_waiting: int = 100,
        max_model_len: int = 128,
        chunked: bool = True,
        begins: str = "",
        deterministic: bool = False,
    ) -> None:
        """begins: "late" or "at once", if steps are begun while the one before runs: when they are computed.
        deterministic: it is checked that each token a request sees was computed by the kernel that always computes it.
        """
        groups = tuple(KVGroup(window, (layer,)) for layer, window in enumerate(windows))
        self.cache = CacheConfig(block_size, num_blocks, groups, caching)
        limits = max_num_seqs, max_num_batched_tokens, max_waiting, max_model_len
        self.config = SchedulerConfig(*limits, chunked, deterministic)
        self.kernels: dict[tuple[int, int], bool] = {}  # of each slot, whether it was computed as a chunk's
        self.now = 0.0
        self.scheduler = Scheduler(self.config, self.cache, lambda: self.now)
        self.runner = FakeRunner(self.cache)
        watched = SimpleNamespace(run=self._run)
        if begins:
            watched.start = self._start
        self.begins = begins
        self.begun: list[Begun] = []  # and not finished
        self.coin: Callable[[], bool] = lambda: True  # for what a runner may do one way or the other
        self.core = EngineCore(self.scheduler, watched)
        self.num_ahead = 0  # steps planned while another ran
        self.plan: StepPlan | None = None  # of the step that runs
        self.planned: set[int] = set()  # steps that have been checked
        self.computed: set[int] = set()
        self.broken: list[AssertionError] = []  # what was wrong with plans: where they are seen, errors are caught
        self.num_unfit: int | None = None  # tokens of the step before, if memory ran out in it; 0: for one request
        self.specs: dict[int, EngineRequest] = {}
        self.stories: dict[int, Story] = {}
        self.seen: dict[int, int] = {}  # requests that were new in a plan, and of which step

    def submit(self, prompt: list[int], *, priority: int = 0, salt: str = "", eos: tuple[int, ...] = (),
               script: Iterable[int] = (), **params: object) -> int:
        """Add a request; returns its id. `script` is what it is made to generate."""
        request_id = len(self.stories)
        spec = EngineRequest(request_id, prompt, SamplingParams(**params), eos, priority=priority, cache_salt=salt)
        self.scheduler.add(spec)
        self.specs[request_id] = spec
        self.runner.scripts[request_id] = list(script)
        self.stories[request_id] = Story()
        return request_id

    def step(self, while_running: Callable[[], None] = lambda: None) -> StepPlan:
        """One step, with everything checked; `while_running` is called while it runs. Returns its plan."""
        self.plan, self.while_running = None, while_running
        num_unfit, self.num_unfit = self.num_unfit, None
        updates = self.core.step()
        for error in self.broken:
            raise error
        assert not self.runner.faults, self.runner.faults
        assert self.plan is not None
        if num_unfit:
            least = 17 if self.config.deterministic else 1
            assert self.plan.num_tokens <= max(least, num_unfit // 2), "no smaller step where memory ran out"
        self.num_ahead += self.core._ahead is not None
        for update in updates:
            self.stories[update.request_id].tell(update)
        self.scheduler.check()
        self.now += 1.0
        return self.plan

    def _run(self, plan: StepPlan) -> StepResult:
        self._see(plan)
        assert not self.begun, "a step is run while one that was begun before is not finished"
        self._notice(plan)
        try:
            return self._compute(plan)
        except Exception as error:
            self._note_failure(error, self.plan, plan)
            raise

    def _start(self, plan: StepPlan) -> SimpleNamespace | None:
        self._see(plan)
        if any(self.specs[chunk.request_id].needs_results for chunk in plan.chunks):
            if self.coin():
                self.runner.take_over(plan)
            return None
        step = Begun(plan)
        if self.begins == "at once" and all(isinstance(before.outcome, StepResult) for before in self.begun):
            try:
                step.outcome = self._compute(plan)
            except Exception as error:
                if self.coin():
                    self._note_failure(error, plan, plan)
                    raise
                step.outcome = error
        self.begun.append(step)
        return SimpleNamespace(finish=lambda: self._finish(step))

    def _finish(self, step: Begun) -> StepResult:
        self._notice(step.plan)
        self.begun.remove(step)
        try:
            if isinstance(step.outcome, Exception):
                raise step.outcome
            result = step.outcome or self._compute(step.plan)
            if result.errors and self.num_unfit:  # of the step behind
                self.num_unfit = 0
            return result
        except Exception as error:
            self._note_failure(error, step.plan, step.plan)
            for spoiled in (step, *self.begun):
                self.runner.spoil(spoiled.plan)
            self.begun.clear()
            raise

    def _notice(self, plan: StepPlan) -> None:
        """A step runs."""
        if self.plan is None:
            self.plan = plan
            self.while_running()

    def _compute(self, plan: StepPlan) -> StepResult:
        result = self.runner.run(plan)
        if self.config.deterministic:
            self._check_kernels(plan)
        self.computed.add(plan.step_id)
        return result

    def _note_failure(self, error: Exception, plan: StepPlan, part: StepPlan) -> None:
        """plan: the whole step's. part: of it, what failed."""
        if isinstance(error, OutOfMemoryError):
            failing = {*self.runner.raises, *self.runner.errors}
            is_one = len(part.chunks) == 1 and not self.scheduler.can_cut(part.chunks[0])
            is_one = is_one or any(chunk.request_id in failing for chunk in plan.chunks)
            self.num_unfit = 0 if is_one or self.num_unfit == 0 else plan.num_tokens

    def finish(self) -> dict[int, Story]:
        """Step until nothing is left to do; everything must be given back."""
        while self.scheduler.has_work() or self.core._ahead is not None:
            self.step()
        self.step()  # tells the runner who is gone
        assert not self.runner.request_ids, "the runner keeps state of requests that ended"
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
        assert all(story.finish_reason for story in self.stories.values())
        return self.stories

    def _see(self, plan: StepPlan) -> None:
        """Check a plan that is seen first."""
        if plan.step_id not in self.planned:
            self.planned.add(plan.step_id)
            try:
                self._check_plan(plan)
            except AssertionError as error:
                self.broken.append(error)

    def _check_plan(self, plan: StepPlan) -> None:
        self.scheduler.check()
        stats = self.scheduler.stats()
        assert plan.chunks or not stats.num_running + stats.num_waiting, "a step without progress"
        ids = [chunk.request_id for chunk in plan.chunks]
        new = {spec.request_id for spec in plan.new}
        assert len(ids) == len(set(ids)) <= self.config.max_num_seqs
        assert sum(chunk.num_tokens for chunk in plan.chunks) <= self.config.max_num_batched_tokens
        assert all(chunk.num_tokens > 0 for chunk in plan.chunks)
        assert not any(self.seen.get(i) in self.computed for i in new), "a request is new twice"
        self.seen |= dict.fromkeys(new, plan.step_id)
        assert set(ids) <= self.seen.keys(), "a chunk of a request that the runner does not know"
        assert set(plan.gone) <= self.seen.keys(), "a request is gone that never was"
        assert not set(plan.gone) & set(ids)
        for chunk in plan.chunks:
            spec = self.specs[chunk.request_id]
            num_prompt, max_tokens = len(spec.prompt_token_ids), spec.params.max_tokens
            most = self.config.max_model_len if max_tokens is None else num_prompt + max_tokens
            most = max(num_prompt, min(most, self.config.max_model_len) - 1)
            assert chunk.start + chunk.num_tokens <= most, "a token that nothing follows is computed"

    def _check_kernels(self, plan: StepPlan) -> None:
        """What a request sees was computed in chunks of many tokens where it is a prompt of many, else in few."""
        size = self.cache.block_size
        for chunk in plan.chunks:
            for table in self.runner.tables_of(chunk.request_id):
                for p in range(chunk.start, chunk.start + chunk.num_tokens):
                    self.kernels[table[p // size], p % size] = chunk.num_tokens > FEW_TOKENS
        for chunk in plan.chunks:
            num_prompt, end = self.runner.num_prompt(chunk.request_id), chunk.start + chunk.num_tokens
            for group, table in zip(self.cache.groups, self.runner.tables_of(chunk.request_id), strict=True):
                for p in range(0 if group.window is None else max(0, chunk.start - group.window + 1), end):
                    is_chunks = p < num_prompt and num_prompt > FEW_TOKENS
                    if self.kernels[table[p // size], p % size] != is_chunks:
                        self.runner.faults.append(f"position {p} that {chunk} sees was computed by the other kernel")


@pytest.fixture
def make_engine() -> type[Engine]:
    return Engine
