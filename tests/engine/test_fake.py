"""FakeRunner notices what the simulation relies on it to notice."""

from __future__ import annotations

import pytest

from pelton.config import CacheConfig, KVGroup
from pelton.engine.fake import FakeRunner
from pelton.engine.step import Chunk, EngineRequest, StepPlan
from pelton.types import SamplingParams


def run(runner: FakeRunner, *chunks: Chunk, new: tuple[EngineRequest, ...] = ()) -> dict[int, int]:
    return runner.run(StepPlan(1, new, chunks, ())).token_ids


@pytest.fixture
def runner() -> FakeRunner:
    """Two requests of one prompt, the first four tokens of each computed in block 1 and in block 2."""
    runner = FakeRunner(CacheConfig(2, 9, (KVGroup(3, (0,)),), True))
    params = SamplingParams(max_tokens=9)
    new = tuple(EngineRequest(i, [5, 6, 7, 8, 9], params) for i in range(2))
    run(runner, Chunk(0, 0, 4, 0, ((1, 2),), False), Chunk(1, 0, 4, 0, ((3, 4),), False), new=new)
    assert not runner.faults
    return runner


def test_the_token_depends_on_what_is_seen_alone(runner: FakeRunner) -> None:
    tokens = run(runner, Chunk(0, 4, 1, 2, ((5,),), True), Chunk(1, 4, 1, 0, ((0, 2, 6),), True))
    assert tokens[0] == tokens[1]
    assert not runner.faults


@pytest.mark.parametrize(("blocks", "fault"), [
    ((1, 0, 5), "positions 2..4 hold"),  # a block inside the window is gone
    ((1, 1, 5), "positions 2..4 hold"),  # holds other positions
    ((1, 7, 5), "positions 2..4 hold"),  # was never written
    ((1, 2, 2), "positions 2..4 hold"),  # the new token overwrites an older one
    ((1, 2, 0), "null block"),
])
def test_a_wrong_block_is_a_fault(runner: FakeRunner, blocks: tuple[int, ...], fault: str) -> None:
    run(runner, Chunk(0, 4, 1, 0, (blocks,), True))
    assert fault in runner.faults[0]


def test_a_request_writing_into_anothers_block_is_a_fault_of_the_reader(runner: FakeRunner) -> None:
    run(runner, Chunk(0, 4, 1, 2, ((3,),), False))
    assert not runner.faults
    run(runner, Chunk(1, 4, 1, 0, ((3, 3, 6),), True))
    assert "request 1" in runner.faults[0]
