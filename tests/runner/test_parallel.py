"""What rank 0 tells the others of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pelton.engine.step import Chunk, StepPlan
from pelton.ops.parallel import Ranks
from pelton.ops.prompts import are_prompts
from pelton.ops.sampling import Draws
from pelton.runner.graph import Decodes
from pelton.runner.model_runner import ModelRunner
from pelton.runner.parallel import FAILED, NO_TOKEN, Follower, Leader
from pelton.runner.requests import RequestState
from pelton.runner.sampler import Sample, Sampler

LOGITS = torch.zeros(2, 5)
STATES: list[RequestState] = [None, None]  # type: ignore[list-item]  # nobody looks at them


class Wire(Ranks):
    """Of two ranks, the one that has something to say: what it said; or the other, which hears that."""

    def __init__(self, rank: int, said: list[list[int]]) -> None:
        super().__init__(rank, 2)
        self.said = said

    def broadcast_(self, x: Tensor) -> Tensor:
        if self.rank == 0:
            self.said.append(x.tolist())
            return x
        return x.copy_(torch.tensor(self.said.pop(0)))


class Fake(Sampler):
    """Samples 3, and nothing for a second request."""

    def __call__(self, states: Sequence[RequestState], logits: Tensor) -> list[Sample | str]:
        return [(3, None), "not finite"]

    def start(
        self, states: Sequence[RequestState], logits: Tensor, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], list[Sample | str]]]:
        return torch.tensor([3, NO_TOKEN]) if token_ids is None else token_ids, lambda: self(states, logits)


class Broken(Sampler):
    """Fails."""

    def draws(self, states: Sequence[RequestState], logits: Tensor) -> Draws | None:
        return None

    def __call__(self, states: Sequence[RequestState], logits: Tensor) -> list[Sample | str]:
        raise RuntimeError("broken")

    def start(
        self, states: Sequence[RequestState], logits: Tensor, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], list[Sample | str]]]:
        raise RuntimeError("broken")


def test_the_others_hear_what_was_sampled() -> None:
    said: list[list[int]] = []
    leader, follower = Leader(Fake(0), Wire(0, said)), Follower(Wire(1, said))
    assert leader(STATES, LOGITS) == [(3, None), "not finite"]
    first, second = follower(STATES, LOGITS)
    assert first == (3, None) and isinstance(second, str)

    assert leader.start(STATES, LOGITS)[1]() == [(3, None), "not finite"]
    captured = torch.tensor([4, 1])  # by a captured step, in whose place the next one's first tokens are looked up
    assert leader.start(STATES, LOGITS, captured)[0] is captured
    assert said == [[3, NO_TOKEN], [4, 1]]
    assert follower.draws(STATES, LOGITS) is None


@pytest.mark.parametrize("is_begun", [False, True])
def test_the_others_hear_of_a_failure(is_begun: bool) -> None:
    """Where a step is begun there may be more of it, and rank 0 goes on as they do."""
    said: list[list[int]] = []
    leader = Leader(Broken(0), Wire(0, said))
    sample = leader.start(STATES, LOGITS)[1] if is_begun else partial(leader, STATES, LOGITS)
    assert said == ([[FAILED, FAILED]] if is_begun else [])
    with pytest.raises(RuntimeError, match="broken"):
        sample()
    assert said == [[FAILED, FAILED]]
    with pytest.raises(RuntimeError, match="rank 0 could not sample"):
        Follower(Wire(1, said))(STATES, LOGITS)


def test_ranks_stay_in_step_where_a_part_cannot_be_sampled() -> None:
    """Decodes, of which that is so, and a prompt: all ranks compute both, and fail when they are waited for."""
    said: list[list[int]] = []
    plan = StepPlan(1, (), (Chunk(1, 20, 1, 0, ((),), True), Chunk(2, 0, 30, 0, ((),), True)), ())
    places: list[int] = []
    for rank, sampler in ((0, Leader(Broken(0), Wire(0, said))), (1, Follower(Wire(1, said)))):
        runner: Any = object.__new__(ModelRunner)
        runner.graph, runner.sampler, runner._apart = object.__new__(Decodes), sampler, True
        states = [SimpleNamespace(needs_results=False, token_ids=[0] * 30) for _ in plan.chunks]
        runner.requests = SimpleNamespace(update=lambda plan, states=states: states)
        runner.buffers = runner.graph.buffers = SimpleNamespace(fill=lambda chunks, states: (len(chunks), []))
        runner.graph.logits, runner.graph.token_ids = LOGITS[:1], torch.zeros(1, dtype=torch.int64)
        computed: list[bool] = []

        def compute(*given: Any, computed: list[bool] = computed) -> tuple[None, Tensor]:
            computed.append(are_prompts())
            return None, LOGITS[:1]

        runner._forward = runner.graph.run = compute
        started = runner._start(plan)
        assert computed == [False, True]
        with pytest.raises(RuntimeError, match="rank 0 could not sample" if rank else "broken"):
            started.finish()
        places.append(len(said))
    assert places == [2, 0]
