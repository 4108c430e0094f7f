"""The inputs of a step, where those of an earlier one have been."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pelton.engine.step import Chunk
from pelton.runner.batch import BatchBuffers


def test_a_step_leaves_nothing_of_a_larger_one() -> None:
    kv: Any = SimpleNamespace(device=torch.device("cpu"), groups=[None], block_size=4)
    buffers = BatchBuffers(kv, max_tokens=16, max_requests=3, max_blocks=4)
    tokens, tables = [[10 * i + k for k in range(5)] for i in range(3)], [[1, 2], [3, 4], [5, 6]]
    states: list[Any] = [SimpleNamespace(token_ids=tokens[i], tables=[tables[i]]) for i in range(3)]

    def chunk(i: int, start: int, num_tokens: int, sample: bool) -> Chunk:
        return Chunk(i, start, num_tokens, 0, (tuple(tables[i]),), sample)

    buffers.fill([chunk(i, 0, 5, sample=True) for i in range(3)], states)
    assert buffers.host.sampled_rows.tolist() == [4, 9, 14]
    found = buffers.fill([chunk(1, 3, 2, sample=True), chunk(2, 0, 1, sample=False)], states[1:])
    assert found == (3, [0, 2, 3])
    buffers.clear_slots(3, 8)  # what fills a step up is written to the null block
    host, group = buffers.host, buffers.host.groups[0]
    assert host.token_ids[:3].tolist() == [13, 14, 20] and host.positions[:3].tolist() == [3, 4, 0]
    assert host.query_starts.tolist() == [0, 2, 3, 3] and host.context_lens[:2].tolist() == [5, 1]
    assert host.sampled_rows.tolist() == [1, 0, 0]
    assert group.slots[:8].tolist() == [3 * 4 + 3, 4 * 4, 5 * 4, 0, 0, 0, 0, 0]
    assert group.block_table[:2, :2].tolist() == [[3, 4], [5, 6]]
