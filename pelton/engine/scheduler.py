"""Which tokens of which requests each step computes, in which KV blocks, and what the results mean.

Requests are ranked by (priority, order of arrival), and that one order decides everything: running requests are
served first, best rank first, and each gets at least one token a step; what is left of the step goes to those that
wait. When blocks run out, the running request of worst rank gives up its own (its tokens are kept and computed
again later), but never for one that ranks below it. Admission follows rank strictly, so no request is overtaken by
one that ranks below it, and a request that was preempted is the next of its priority to come back.

A waiting request does not preempt a running one, whatever its priority: it gets the next place that is free.

Where the memory did not hold a step, steps are smaller for a while (shrink), and the running requests of worst rank
give up their blocks if there are more of them than tokens.

With `deterministic` each token is always computed by the same kernel, as a GPU has one for chunks and one for at most
FEW_TOKENS tokens of a request: prompts in chunks of more, unless they are no longer, what was generated in chunks of at
most so many, should it be computed again. Of a prompt more than FEW_TOKENS are computed, whatever is found of it, and
only blocks of prompts are shared. A prompt may have to wait for a step that has room for such a chunk.

commit() goes by the plan it is given and skips requests that have ended meanwhile, and a block that is given back
is written again only by a later plan. So a loop may plan step n + 1 while step n runs (schedule_ahead).
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from pelton.config import FEW_TOKENS, CacheConfig, SchedulerConfig, blocks_for
from pelton.engine.block_pool import BlockPool
from pelton.engine.kv_tables import KVTables
from pelton.engine.request import Request
from pelton.engine.step import Chunk, EngineRequest, StepPlan, StepResult, Update
from pelton.errors import ConfigError, OverloadedError, PromptTooLongError, RequestError

logger = logging.getLogger(__name__)

CALM_STEPS = 32  # that fit, before steps become larger again
STEP_SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # bounds that steps are counted by


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """The engine at one moment; all but the first three only ever grow."""

    num_running: int
    num_waiting: int
    kv_usage: float  # share of the KV blocks that requests hold, 0 to 1
    num_prefix_queries: int  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int  # prompt tokens found there
    num_preemptions: int
    num_tokens: int = 0  # tokens computed
    step_sizes: tuple[int, ...] = (0,) * (len(STEP_SIZES) + 1)
    """Item i: steps of more than STEP_SIZES[i - 1] and at most STEP_SIZES[i] tokens; the last one: larger steps."""


class Scheduler:
    """The requests of one engine, from add() to their final Update. See the module's docstring for the policy."""

    def __init__(
        self, config: SchedulerConfig, cache: CacheConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < config.max_model_len:
            raise ConfigError(
                f"without chunked prefill a step must hold a whole prompt: raise --max-num-batched-tokens from "
                f"{config.max_num_batched_tokens} to {config.max_model_len}, or lower --max-model-len"
            )
        self._config = config
        self._cache = cache
        self._clock = clock
        self._pool = BlockPool(cache.num_blocks)
        self._max_tokens = config.max_num_batched_tokens  # of a step; fewer where the memory did not hold them
        self._num_calm = 0  # steps that fit since that last changed
        self._requests: dict[int, Request] = {}
        self._waiting: list[Request] = []  # by rank
        self._running: list[Request] = []  # by rank
        self._gone: list[int] = []  # ended since the last plan
        self._untold: list[EngineRequest] = []  # scheduled, and perhaps unknown to the runner
        self._aborted: list[Update] = []  # to be delivered by the next commit
        self._num_added = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._num_tokens = 0
        self._step_sizes = [0] * (len(STEP_SIZES) + 1)

    # --- in and out ---------------------------------------------------------------------------------------------

    def add(self, spec: EngineRequest) -> None:
        """Queue a request. Raises RequestError if it can never run, OverloadedError if the queue is full."""
        max_model_len = self._config.max_model_len
        num_prompt = len(spec.prompt_token_ids)
        if spec.request_id in self._requests:
            raise RequestError(f"request {spec.request_id} exists already; use a new id")
        if num_prompt == 0:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if num_prompt > max_model_len:
            raise PromptTooLongError(
                f"the prompt has {num_prompt} tokens and the context holds {max_model_len}; shorten it", "prompt"
            )
        max_tokens = max_model_len if spec.params.max_tokens is None else spec.params.max_tokens
        most = max(num_prompt, min(num_prompt + max_tokens, max_model_len) - 1)  # the last token is never computed
        if (need := self._blocks_for(most)) > self._pool.num_blocks - 1:
            raise RequestError(
                f"{num_prompt} prompt tokens and up to {max_tokens} new ones need {need} KV blocks, there are "
                f"{self._pool.num_blocks - 1}; ask for fewer tokens or give the KV cache more memory"
            )
        if len(self._waiting) >= self._config.max_waiting:
            raise OverloadedError(f"the queue is full ({len(self._waiting)} requests wait); try again later")
        self._num_added += 1
        kv = KVTables(self._pool, self._cache, spec.cache_salt, self._most_shared(num_prompt))
        request = Request(spec, (spec.priority, self._num_added), kv, max_tokens, max_model_len)
        self._requests[spec.request_id] = request
        insort(self._waiting, request, key=_rank)

    def abort(self, request_id: int) -> None:
        """End a request now, if it is still there; the next commit() delivers its last update."""
        request = self._requests.get(request_id)
        if request is not None:
            self._aborted.append(self._finish(request, self._update(request), "abort"))

    def has_work(self) -> bool:
        """Whether any request, or the last update of one, is still here."""
        return bool(self._requests or self._aborted)

    def stats(self) -> SchedulerStats:
        """Counts for the metrics page."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_usage=self._pool.usage,
            num_prefix_queries=self._prefix_queries,
            num_prefix_hits=self._prefix_hits,
            num_preemptions=self._num_preemptions,
            num_tokens=self._num_tokens,
            step_sizes=tuple(self._step_sizes),
        )

    # --- planning -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step's plan: at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests."""
        chunks: list[Chunk] = []
        new = [spec for spec in self._untold if spec.request_id in self._requests]
        self._untold = []
        budget, is_short = self._schedule_running(chunks)
        if not is_short:
            self._schedule_waiting(chunks, new, budget)
        gone, self._gone = tuple(self._gone), []
        return self._plan(new, chunks, gone)

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The plan after one that still runs: what is left of its prompts, the token behind each of its other requests,
        and new requests in the room that is left. Requests that will have ended for certain are left out; one that ends
        unexpectedly is computed in vain. None if that needs results of `plan`, or more blocks than are free.
        """
        ends = {chunk.request_id: chunk for chunk in plan.chunks}
        if any(request.request_id not in ends for request in self._running):
            return None
        if any(ends[request.request_id].sample and request.spec.needs_results for request in self._running):
            return None
        budget = self._max_tokens
        nexts: list[tuple[Request, int, int]] = []
        for num_behind, request in zip(reversed(range(len(self._running))), self._running, strict=True):
            chunk = ends[request.request_id]
            start, num_known = chunk.start + chunk.num_tokens, len(request.token_ids)
            if start < num_known:
                num_tokens = self._num_next(request, start, budget - num_behind)
            else:
                num_tokens = int(chunk.sample and not request.ends_at(num_known + 1))
            if num_tokens:
                nexts.append((request, start, num_tokens))
                budget -= num_tokens
        num_missing = sum(request.kv.num_missing(start + num_tokens) for request, start, num_tokens in nexts)
        if num_missing > self._pool.num_free:
            return None
        chunks = [self._chunk_ahead(*each) for each in nexts]
        new: list[EngineRequest] = []
        self._schedule_waiting(chunks, new, budget)
        if not chunks:
            return None
        gone = tuple(request_id for request_id in self._gone if request_id not in ends)
        self._gone = [request_id for request_id in self._gone if request_id in ends]  # the runner may still need them
        return self._plan(new, chunks, gone)

    def _chunk_ahead(self, request: Request, start: int, num_tokens: int) -> Chunk:
        """A running request's chunk behind one that still runs."""
        end, first = start + num_tokens, start // self._cache.block_size
        request.kv.grow(end)
        sample = end >= len(request.token_ids) and request.max_tokens > 0
        return Chunk(request.request_id, start, num_tokens, first, request.kv.entries(first), sample)

    def take_back(self, plan: StepPlan) -> None:
        """Forget a plan of schedule_ahead(), which the runner may not have seen; what it would have computed is planned
        again."""
        self._gone += plan.gone
        self._untold += plan.new
        for chunk in plan.chunks:
            request = self._requests.get(chunk.request_id)
            if request is not None and chunk.table_start == 0:
                request.has_table = False

    def without_ended(self, plan: StepPlan) -> StepPlan:
        """What is still wanted of a plan that was made some time ago and is to be run now."""
        return replace(plan, chunks=tuple(chunk for chunk in plan.chunks if chunk.request_id in self._requests))

    def can_cut(self, chunk: Chunk) -> bool:
        """Whether half of a chunk can be computed without the rest."""
        if self._config.deterministic and FEW_TOKENS < chunk.num_tokens <= 2 * FEW_TOKENS + 1:
            return False
        return chunk.num_tokens > 1

    def shrink(self, num_tokens: int) -> None:
        """A step of so many tokens did not fit the memory: for a while each has at most half of them."""
        least = 2 * FEW_TOKENS + 1 if self._config.deterministic else 1  # of which the smallest chunk may consist
        self._max_tokens, self._num_calm = max(least, min(self._max_tokens, num_tokens // 2)), 0
        logger.warning("a step of %d tokens did not fit the memory; the next have at most %d", num_tokens,
                       self._max_tokens)
        while len(self._running) > self._max_running:
            self._preempt(self._running[-1])

    def _grow(self) -> None:
        """A step fitted."""
        self._num_calm += 1
        if self._num_calm == CALM_STEPS:
            self._max_tokens, self._num_calm = min(2 * self._max_tokens, self._config.max_num_batched_tokens), 0

    @property
    def _is_reduced(self) -> bool:
        """Whether steps are smaller than they are meant to be."""
        return self._max_tokens < self._config.max_num_batched_tokens

    @property
    def _max_running(self) -> int:
        """Each running request gets a token in each step, so there are never more of them than tokens."""
        return min(self._config.max_num_seqs, self._max_tokens)

    def _plan(self, new: list[EngineRequest], chunks: list[Chunk], gone: tuple[int, ...]) -> StepPlan:
        self._num_steps += 1
        return StepPlan(self._num_steps, tuple(new), tuple(chunks), gone)

    def _schedule_running(self, chunks: list[Chunk]) -> tuple[int, bool]:
        """Serve running requests by rank; returns the tokens left, and whether one had too few of them or of blocks."""
        budget = self._max_tokens
        num_before, is_short = len(self._running), False
        for index, request in enumerate(self._running):  # preemption shortens the list behind the current request
            num_behind = len(self._running) - index - 1  # a token is kept for each of them
            num_tokens = self._num_next(request, request.num_computed, budget - num_behind)
            if num_tokens and self._make_room(request, num_tokens):
                first = request.num_computed // self._cache.block_size if request.has_table else 0
                chunks.append(_chunk(request, num_tokens, first))
                budget -= num_tokens
            else:
                is_short = True
        return budget, is_short or len(self._running) < num_before

    def _num_next(self, request: Request, start: int, room: int) -> int:
        """How many of a request's tokens from `start` on the next step computes, of at most `room`; 0: it waits."""
        num_left = min(len(request.token_ids) - start, room)
        prompt_left = request.num_prompt - start
        if not self._config.deterministic:
            return num_left
        if request.num_prompt <= FEW_TOKENS or prompt_left <= 0:
            return min(num_left, FEW_TOKENS)
        if prompt_left <= room:
            return prompt_left
        num_tokens = min(room, prompt_left - FEW_TOKENS - 1)  # what is left is to be a chunk too
        return num_tokens if num_tokens > FEW_TOKENS else 0

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Give a running request blocks for its next tokens, preempting those that rank below it if need be."""
        num_known = request.num_computed + num_tokens
        while request.kv.num_missing(num_known) > self._pool.num_free:
            if self._running[-1] is request:
                return False
            self._preempt(self._running[-1])
        request.kv.grow(num_known)
        return True

    def _preempt(self, request: Request) -> None:
        """Take the blocks of a running request. Those that are full can be found while they last."""
        self._running.remove(request)
        request.is_running = False
        request.num_computed = 0
        request.kv.free()
        insort(self._waiting, request, key=_rank)
        self._num_preemptions += 1

    def _schedule_waiting(self, chunks: list[Chunk], new: list[EngineRequest], budget: int) -> None:
        """Admit waiting requests in order of rank, until one does not fit."""
        while self._waiting and budget and len(self._running) < self._max_running:
            request = self._waiting[0]
            prefix = request.kv.find_prefix(request.token_ids, self._max_prefix(request))
            start = len(prefix[0]) * self._cache.block_size
            num_tokens, most = (self._num_next(request, start, room) for room in (budget, request.max_model_len))
            if num_tokens < (1 if self._config.enable_chunked_prefill or self._is_reduced else most):
                return
            if not self._has_room(request, prefix):
                return
            self._admit(request, prefix, num_tokens, new)
            chunks.append(_chunk(request, num_tokens, 0))
            budget -= num_tokens

    def _most_shared(self, num_prompt: int) -> int | None:
        """Tokens of a request whose blocks others may find, or None: all."""
        if not self._config.deterministic:
            return None
        return num_prompt if num_prompt > FEW_TOKENS else 0

    def _max_prefix(self, request: Request) -> int:
        """Tokens that may come from the prefix cache."""
        if not self._config.deterministic:
            return request.max_prefix
        return min(request.max_prefix, request.num_prompt - FEW_TOKENS - 1)

    def _has_room(self, request: Request, prefix: list[list[int]]) -> bool:
        """Whether all tokens known of a request fit beside its prefix, not only its first chunk: a request that is
        let in too early is soon preempted. One that is alone always fits, because add() has seen to it."""
        shared = [block_id for blocks in prefix for block_id in blocks if block_id]
        num_new = self._blocks_for(len(request.token_ids)) - len(shared)
        return num_new <= self._pool.num_free - self._pool.num_unheld(shared)

    def _admit(self, request: Request, prefix: list[list[int]], num_tokens: int, new: list[EngineRequest]) -> None:
        """Move a request from waiting to running, with its prefix and room for its first chunk."""
        self._waiting.remove(request)
        insort(self._running, request, key=_rank)
        request.is_running = True
        request.num_computed = request.kv.adopt(prefix)  # held before anything is allocated
        request.kv.grow(request.num_computed + num_tokens)
        if request.scheduled_time is None:
            request.scheduled_time = self._clock()
            request.num_cached = request.num_computed
            self._prefix_hits += request.num_cached
            self._prefix_queries += request.num_prompt if self._cache.enable_prefix_caching else 0
            new.append(request.spec)

    def _blocks_for(self, num_tokens: int) -> int:
        cache = self._cache
        return blocks_for(num_tokens, cache.block_size, cache.groups, self._config.max_num_batched_tokens)

    # --- results ------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[Update]:
        """Apply what a step computed. Requests aborted meanwhile are no longer here: their results are dropped."""
        updates, self._aborted = self._aborted, []
        if plan.chunks:
            self._num_tokens += plan.num_tokens
            self._step_sizes[bisect_left(STEP_SIZES, plan.num_tokens)] += 1
            if self._is_reduced:
                self._grow()
        for chunk in plan.chunks:
            request = self._requests.get(chunk.request_id)
            if request is not None:
                update = self._advance(request, chunk, result)
                if update is not None:
                    updates.append(update)
        return updates

    def _advance(self, request: Request, chunk: Chunk, result: StepResult) -> Update | None:
        """Apply one chunk's result; returns an update if it says anything."""
        request_id = request.request_id
        error = _find_fault(request, chunk, result)
        if error is not None:  # nothing this chunk wrote is shared
            return self._finish(request, self._update(request, error), "error")
        request.num_computed = chunk.start + chunk.num_tokens
        request.kv.commit(request.token_ids, request.num_computed)
        request.add_prompt_logprobs(chunk.start, result.prompt_logprobs.get(request_id, []))
        if chunk.sample:
            request.token_ids.append(result.token_ids[request_id])
        elif request.num_left:
            return None  # a part of the prompt
        update = self._update(request)
        update.prompt_logprobs = request.take_prompt_logprobs()
        if chunk.sample:
            update.token_ids = request.token_ids[-1:]
            update.logprobs = [result.logprobs[request_id]] if request_id in result.logprobs else None
        finish_reason, stop_reason = request.finish_reason()
        if finish_reason is not None:
            self._finish(request, update, finish_reason, stop_reason)
        return update

    def _update(self, request: Request, error: str | None = None) -> Update:
        """A new update about a request; the first one says when it was scheduled."""
        scheduled_time = None if request.has_reported else request.scheduled_time
        request.has_reported = True
        return Update(
            request.request_id, error=error, num_cached_tokens=request.num_cached, scheduled_time=scheduled_time
        )

    def _finish(self, request: Request, update: Update, reason: str, stop_reason: int | None = None) -> Update:
        """End a request with its last update: nothing of it stays, except full blocks that others may find."""
        update.finish_reason, update.stop_reason = reason, stop_reason
        (self._running if request.is_running else self._waiting).remove(request)
        del self._requests[request.request_id]
        request.kv.free()
        if request.scheduled_time is not None:
            self._gone.append(request.request_id)
        return update

    def check(self) -> None:
        """Assert every invariant of the engine's state. For tests, and for an engine that has nothing to do."""
        for queue, is_running in ((self._waiting, False), (self._running, True)):
            assert queue == sorted(queue, key=_rank), "a queue is not in order of rank"
            assert all(request.is_running is is_running for request in queue), "a request is in the wrong queue"
        queued = [request.request_id for request in (*self._waiting, *self._running)]
        assert sorted(queued) == sorted(self._requests), "a request is not in exactly one queue"
        assert len(self._running) <= self._max_running, "too many requests run"
        latest = {request.rank[0]: request.rank for request in self._running}  # of each priority
        for request in self._waiting:
            assert request.rank >= latest.get(request.rank[0], request.rank), "a later request overtook this one"
        assert not set(self._gone) & set(self._requests), "a live request is reported as gone"
        assert not {u.request_id for u in self._aborted} & set(self._requests), "an aborted request is alive"
        for request in self._requests.values():
            request.check()
        self._pool.check(Counter(block_id for request in self._running for block_id in request.kv.held()))


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _chunk(request: Request, num_tokens: int, table_start: int) -> Chunk:
    """The next `num_tokens` tokens of a request. Its first chunk after admission brings the whole table, each later
    one the entries that it writes to."""
    request.has_table = True
    return Chunk(
        request_id=request.request_id,
        start=request.num_computed,
        num_tokens=num_tokens,
        table_start=table_start,
        blocks=request.kv.entries(table_start),
        sample=num_tokens == request.num_left and request.max_tokens > 0,
    )


def _find_fault(request: Request, chunk: Chunk, result: StepResult) -> str | None:
    """Why a request cannot go on after this chunk: the runner says so, or left out what was asked."""
    request_id, params = request.request_id, request.spec.params
    if request_id in result.errors:
        return result.errors[request_id]
    if chunk.sample and request_id not in result.token_ids:
        return "the model returned no token"
    if chunk.sample and params.wants_logprobs and request_id not in result.logprobs:
        return "the model returned no log-probabilities"
    if request.prompt_logprobs is not None:
        num_entries = max(0, min(chunk.start + chunk.num_tokens, request.num_prompt - 1) - chunk.start)
        if len(result.prompt_logprobs.get(request_id, [])) != num_entries:
            return f"the model did not return {num_entries} prompt log-probabilities"
    return None
