"""The whole engine under a seeded clock, in hundreds of small random worlds, every invariant checked at every step.

Each world draws its own groups, windows, block size, limits and (small) cache, and then requests that share prefixes
and arrive, are aborted, preempted and failed at random moments. Whatever happens to the others, each request must
get the very tokens that it gets alone. A failure names its seed; `World(seed, make_engine).run()` is that world.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from pelton.config import KVGroup, blocks_for
from pelton.engine.step import StepPlan, StepResult
from pelton.errors import OutOfMemoryError, OverloadedError, RequestError
from pelton.types import RepetitionDetectionParams

NUM_BATCHES, SEEDS_PER_BATCH = 8, 75
VOCAB_SIZE = 24
EOS = (3,)


class World:
    """One seed's engine, its requests, and what is going to happen to them."""

    def __init__(self, seed: int, make_engine: Any) -> None:
        self.rng = rng = Random(seed)
        self.make_engine = make_engine
        self.windows = [rng.choice([None, None, 1, 2, 3, 5, 8, 13]) for _ in range(rng.randint(1, 4))]
        self.max_model_len = rng.randint(16, 56)
        chunked = rng.random() < 0.8
        chunk = rng.randint(1, rng.choice([6, 24])) if chunked else self.max_model_len + rng.randint(0, 20)
        deterministic = seed % 3 == 0
        self.least = 17 if deterministic else 1  # tokens of a chunk that cannot be cut
        chunk = max(chunk, rng.randint(17, 30)) if deterministic else chunk
        block_size = rng.choice([1, 2, 4, 8])
        groups = [KVGroup(window, (0,)) for window in self.windows]
        need = blocks_for(self.max_model_len, block_size, groups, chunk)  # for one request of full length
        self.engine = make_engine(
            windows=self.windows,
            block_size=block_size,
            num_blocks=2 + int(need * rng.choice([0.8, 1.0, 1.0, 1.3, 2.0])),
            caching=rng.random() < 0.85,
            max_num_seqs=rng.randint(1, 8),
            max_num_batched_tokens=chunk,
            max_waiting=rng.choice([2, 20]),
            max_model_len=self.max_model_len,
            chunked=chunked,
            begins=["", "late", "", "at once"][seed % 4],
            deterministic=deterministic,
        )
        self.engine.runner.vocab_size = VOCAB_SIZE
        self.engine.coin = lambda: rng.random() < 0.5
        self.needing = rng.choice([0.0, 0.2, 1.0])  # share of the requests that may need results before they go on
        self.arrivals = sorted(rng.randint(0, 20) for _ in range(rng.randint(3, 14)))
        self.prefixes = [self._tokens(rng.randint(1, self.max_model_len // 2)) for _ in range(2)]
        self.requests: list[dict[str, Any]] = []  # what was submitted, by id
        self.failing: set[int] = set()
        self.heavy: set[int] = set()  # those of them that no memory is enough for
        self.aborted: set[int] = set()
        self.counts: Counter[str] = Counter()
        self._make_flaky()

    def run(self) -> Counter[str]:
        """Play to the end; returns how often what happened."""
        most_steps = self.arrivals[-1] + len(self.arrivals) * (len(self.arrivals) + 1) * self.max_model_len
        while self.arrivals or self.engine.scheduler.has_work():
            self._submit_arrivals()
            self._disturb()
            self.engine.step(while_running=self._disturb)
            assert self.engine.now < most_steps, "requests do not come to an end"
        stories = self.engine.finish()
        for request_id, story in stories.items():
            self._compare(request_id, story)
        stats = self.engine.scheduler.stats()
        self.counts.update(preempted=stats.num_preemptions, ahead=self.engine.num_ahead)
        self.counts.update(hits=stats.num_prefix_hits, steps=int(self.engine.now))
        assert stats.num_prefix_hits <= stats.num_prefix_queries
        return self.counts

    def _submit_arrivals(self) -> None:
        while self.arrivals and self.arrivals[0] <= self.engine.now:
            self.arrivals.pop(0)
            request = self._request()
            try:
                self.engine.submit(**request)
                self.requests.append(request)
            except OverloadedError:
                self.counts["overloaded"] += 1
            except RequestError:
                self.counts["refused"] += 1

    def _tokens(self, length: int) -> list[int]:
        return [self.rng.randrange(VOCAB_SIZE) for _ in range(length)]

    def _request(self) -> dict[str, Any]:
        rng = self.rng
        prefix = rng.choice(self.prefixes)
        prompt = prefix[: rng.choice([0, len(prefix), rng.randint(0, len(prefix))])] + self._tokens(rng.randint(0, 6))
        max_tokens = rng.randint(0, self.max_model_len)
        needs_results = rng.random() < self.needing
        return {
            "prompt": prompt,
            "priority": rng.choice([0, 0, 1, 2]),
            "salt": rng.choice(["", "", "", "other"]),
            "eos": EOS,
            "max_tokens": max_tokens,
            "min_tokens": rng.randint(0, min(max_tokens, 6)) if needs_results else 0,
            "ignore_eos": rng.random() < 0.8,
            "stop_token_ids": rng.choice([[], [], [], [4]]),
            "logprobs": rng.choice([None, None, 1]),
            "prompt_logprobs": rng.choice([None, None, 1]) if needs_results else None,
            "seed": rng.choice([None, 1, 2]),
            "repetition_detection": rng.choice([None, None, RepetitionDetectionParams(3, 1, 2)]),
        }

    def _disturb(self) -> None:
        """Sometimes abort a request, or let it fail in the runner from now on."""
        alive = [i for i, story in self.engine.stories.items() if not story.finish_reason]
        if alive and self.rng.random() < 0.015:
            victim = self.rng.choice(alive)
            self.aborted.add(victim)
            self.engine.scheduler.abort(victim)
        if alive and self.rng.random() < 0.01:
            victim = self.rng.choice(alive)
            self.failing.add(victim)
            how = self.rng.choice([self.engine.runner.raises, self.engine.runner.errors, self.heavy])
            if isinstance(how, dict):
                how[victim] = "not finite"
            else:
                how.add(victim)

    def _make_flaky(self) -> None:
        """The runner sometimes breaks down after a batch, for no request's fault: halves of the batch do run. In some
        worlds memory runs out at random, before or after a batch was computed, or for a time in all batches of some
        size; and always for a few requests, whatever the size."""
        run, rng = self.engine.runner.run, self.rng
        runs_out = rng.choice([0.0, 0.0, 0.02, 0.3])
        room, until = 1, 0.0  # tokens that fit for some time

        def flaky(plan: StepPlan) -> StepResult:
            nonlocal room, until
            if runs_out and plan.chunks and rng.random() < 0.01:
                room, until = self.least + rng.randint(0, 11), self.engine.now + rng.randint(1, 30)
            run(plan if rng.random() < 0.5 else replace(plan, chunks=()))
            is_heavy = any(chunk.request_id in self.heavy for chunk in plan.chunks)
            fails = rng.random() < runs_out or (self.engine.now < until and plan.num_tokens > room)
            if plan.chunks and (is_heavy or (plan.num_tokens > self.least and fails)):
                self.counts["out of memory"] += 1
                raise OutOfMemoryError("no room")
            result: StepResult = run(plan)
            if len(plan.chunks) > 1 and rng.random() < 0.03:
                raise RuntimeError("a kernel failed")
            return result

        self.engine.runner.run = flaky

    def _compare(self, request_id: int, story: Any) -> None:
        """Hold what one request got against the same request alone in a roomy engine."""
        engine = self.make_engine(windows=self.windows, num_blocks=400, block_size=8, caching=False,
                                  max_num_batched_tokens=1000, max_model_len=self.max_model_len)
        engine.runner.vocab_size = VOCAB_SIZE
        engine.submit(**self.requests[request_id])
        while engine.scheduler.has_work():
            engine.step()
        alone = engine.stories[0]
        self.counts[story.finish_reason] += 1
        if story.finish_reason in ("abort", "error"):
            assert request_id in (self.aborted if story.finish_reason == "abort" else self.failing)
            assert story.token_ids == alone.token_ids[: len(story.token_ids)]
            assert story.prompt_logprobs in (None, alone.prompt_logprobs)
        else:
            for name in ("token_ids", "logprobs", "prompt_logprobs", "finish_reason", "stop_reason"):
                assert getattr(story, name) == getattr(alone, name), f"request {request_id}: other {name} than alone"


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_every_request_gets_what_it_gets_alone(
    batch: int, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pelton.engine.scheduler.CALM_STEPS", 4)  # steps are soon large enough to fail again
    for module in ("core", "scheduler"):  # they report each injected failure
        monkeypatch.setattr(logging.getLogger(f"pelton.engine.{module}"), "disabled", True)
    counts: Counter[str] = Counter()
    for seed in range(batch * SEEDS_PER_BATCH, (batch + 1) * SEEDS_PER_BATCH):
        try:
            counts += World(seed, make_engine).run()
        except Exception as error:
            raise AssertionError(f"the failing seed is {seed}: {error}") from error
    for event in ("stop", "length", "repetition", "abort", "error", "preempted", "ahead", "hits", "refused",
                  "overloaded", "out of memory"):
        assert counts[event] > 0, f"the simulation no longer leads to {event}"
