"""From a plan's chunks to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pelton.engine.step import Chunk
from pelton.layers.batch import Batch, GroupSlots
from pelton.runner.kv_cache import KVCache
from pelton.runner.requests import RequestState


class BatchBuffers:
    """The memory of a step's inputs, filled anew for each step, always in the same place: a recorded forward pass
    reads it there. Tokens and requests beyond a step's own are left over from earlier ones; no request owns them."""

    def __init__(self, kv: KVCache, max_tokens: int, max_requests: int, max_blocks: int) -> None:
        """max_blocks: the longest block table of a request."""
        self.kv = kv
        self.token_ids, self.positions = _zeros(max_tokens), _zeros(max_tokens)
        self.query_starts, self.context_lens = _zeros(max_requests + 1), _zeros(max_requests)
        self.sampled_rows = _zeros(max_requests)
        self.groups = [
            GroupSlots(_zeros(max_tokens), _zeros(max_requests, max_blocks)) for _ in range(len(kv.groups))
        ]

    def fill(self, chunks: Sequence[Chunk], states: Sequence[RequestState]) -> tuple[int, list[int]]:
        """Write the chunks, in their order; `states` are those of the chunks' requests. Returns the number of tokens
        and where each chunk starts (and the last ends)."""
        token_ids: list[int] = []
        positions: list[int] = []
        starts, context_lens = [0], []
        for chunk, state in zip(chunks, states, strict=True):
            end = chunk.start + chunk.num_tokens
            token_ids += state.token_ids[chunk.start : end]
            positions += range(chunk.start, end)
            starts.append(len(token_ids))
            context_lens.append(end)
        num_tokens = len(token_ids)
        self.token_ids.numpy()[:num_tokens] = token_ids
        self.positions.numpy()[:num_tokens] = positions
        query_starts = self.query_starts.numpy()
        query_starts[: len(starts)] = starts
        query_starts[len(starts) :] = num_tokens
        self.context_lens.numpy()[: len(chunks)] = context_lens
        for group_id, group in enumerate(self.groups):
            self._fill_group(group, chunks, [state.tables[group_id] for state in states], starts)
        return num_tokens, starts

    def _fill_group(
        self, group: GroupSlots, chunks: Sequence[Chunk], tables: Sequence[list[int]], starts: list[int]
    ) -> None:
        size, slots, rows = self.kv.block_size, group.slots.numpy(), group.block_table.numpy()
        for chunk, table, start, row in zip(chunks, tables, starts, rows, strict=False):
            row[: len(table)] = table
            if chunk.num_tokens == 1:
                slots[start] = table[chunk.start // size] * size + chunk.start % size
            else:
                places = np.arange(chunk.start, chunk.start + chunk.num_tokens)
                slots[start : start + chunk.num_tokens] = row[places // size] * size + places % size

    def whole(self) -> Batch:
        """All of the buffers, as the batch that a forward pass is recorded with."""
        return self._batch(len(self.token_ids), len(self.context_lens), torch.device("cpu"))

    def batch(self, num_tokens: int, num_requests: int) -> Batch:
        """What was filled, on the cache's device."""
        return self._batch(num_tokens, num_requests, self.kv.device)

    def _batch(self, num_tokens: int, num_requests: int, device: torch.device) -> Batch:
        groups = [
            GroupSlots(group.slots[:num_tokens].to(device), group.block_table[:num_requests].to(device))
            for group in self.groups
        ]
        return Batch(
            token_ids=self.token_ids[:num_tokens].to(device),
            positions=self.positions[:num_tokens].to(device),
            query_starts=self.query_starts[: num_requests + 1].to(device),
            context_lens=self.context_lens[:num_requests].to(device),
            kv=[(cache, groups[i]) for cache, i in zip(self.kv.layers, self.kv.group_of_layer, strict=True)],
        )


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)
