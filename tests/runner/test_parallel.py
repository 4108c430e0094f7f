"""What rank 0 tells the others of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pelton.ops.parallel import Ranks
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


@pytest.mark.parametrize("begin", [Leader.__call__, Leader.start])
def test_the_others_hear_of_a_failure(begin: Callable[..., object]) -> None:
    said: list[list[int]] = []
    with pytest.raises(RuntimeError, match="broken"):
        begin(Leader(Broken(0), Wire(0, said)), STATES, LOGITS)
    assert said == [[FAILED, FAILED]]
    with pytest.raises(RuntimeError, match="rank 0 could not sample"):
        Follower(Wire(1, said))(STATES, LOGITS)
