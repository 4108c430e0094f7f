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
    """The memory of a step's inputs, filled anew for each step, always in the same place: a captured forward pass reads
    it there. Tokens and requests beyond a step's own are left over from earlier ones; no request owns them."""

    def __init__(self, kv: KVCache, max_tokens: int, max_requests: int, max_blocks: int) -> None:
        """max_blocks: the longest block table of a request."""
        self.kv = kv
        self.max_tokens, self.max_requests = max_tokens, max_requests
        sizes = [(max_tokens,), (max_tokens,), (max_requests + 1,), (max_requests,), (max_requests,)]
        group_sizes = [(max_tokens,), (max_requests, max_blocks)]
        host = [_zeros(size, kv.device) for size in [*sizes, *group_sizes * len(kv.groups)]]
        self._pairs = [(tensor, tensor.to(kv.device)) for tensor in host]
        self.token_ids, self.positions, self.query_starts, self.context_lens, self.sampled_rows = host[:5]
        self.groups = _groups(host)

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

    def clear_slots(self, begin: int, end: int) -> None:
        """Let tokens begin .. end - 1, which no request owns, be written to the null block."""
        for group in self.groups:
            group.slots[begin:end] = 0

    def batch(self, num_tokens: int, num_requests: int) -> Batch:
        """The first tokens and requests, on the cache's device, as they are filled now or will be."""
        device = [tensor for _, tensor in self._pairs]
        token_ids, positions, query_starts, context_lens, _ = device[:5]
        groups = [
            GroupSlots(group.slots[:num_tokens], group.block_table[:num_requests]) for group in _groups(device)
        ]
        return Batch(
            token_ids=token_ids[:num_tokens],
            positions=positions[:num_tokens],
            query_starts=query_starts[: num_requests + 1],
            context_lens=context_lens[:num_requests],
            kv=[(cache, groups[i]) for cache, i in zip(self.kv.layers, self.kv.group_of_layer, strict=True)],
        )

    def rows(self, num_sampled: int) -> Tensor:
        """The tokens to sample after, on the cache's device."""
        return self._pairs[4][1][:num_sampled]

    def upload(self, num_tokens: int, num_requests: int) -> None:
        """Bring what was filled to the cache's device."""
        if self.kv.device.type == "cpu":
            return
        counts = [num_tokens, num_tokens, num_requests + 1, num_requests, num_requests]
        counts += [num_tokens, num_requests] * len(self.groups)
        for (host, device), count in zip(self._pairs, counts, strict=True):
            device[:count].copy_(host[:count], non_blocking=True)


def _zeros(size: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")


def _groups(tensors: Sequence[Tensor]) -> list[GroupSlots]:
    """The tensors behind the first five, two for each group."""
    return [GroupSlots(*tensors[i : i + 2]) for i in range(5, len(tensors), 2)]
