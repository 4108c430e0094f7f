"""From a plan's chunks to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pelton.engine.step import Chunk
from pelton.layers.batch import Batch, GroupSlots
from pelton.ops import gpu
from pelton.ops.sampling import Draws
from pelton.runner.kv_cache import KVCache
from pelton.runner.requests import RequestState

Previous = tuple[Tensor, Sequence[int]]
"""The samples of a step that may still run, int64 on the device, and for each request of the next one its first token's
place among them; -1: that is known."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a step, all in one piece of memory; what is needed of few requests comes first."""

    memory: Tensor  # int64
    draw_wholes: Tensor  # [R, 3]: see `ops.sampling.Draws`; without a row, which is -1: no draw
    draw_factors: Tensor  # [R, 4] float64
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    query_starts: Tensor  # [R + 1]
    context_lens: Tensor  # [R]
    sampled_rows: Tensor  # [R]: tokens whose logits are sampled; then the first token
    previous_rows: Tensor  # [R]: which sample of the step before is the first token; -1: the one that is given
    groups: list[GroupSlots]

    @classmethod
    def make(cls, max_tokens: int, max_requests: int, max_blocks: int, num_groups: int, device: torch.device) -> Inputs:
        """Zeros; on the host in memory that a GPU reads (for `device` "cuda": there)."""
        draws = [3 * max_requests, 4 * max_requests]
        sizes = [*draws, max_tokens, max_tokens, max_requests + 1, *[max_requests] * 3, *[max_tokens] * num_groups]
        num_tables = max_requests * num_groups * max_blocks
        is_pinned = device.type == "cpu" and torch.cuda.is_available()
        memory = torch.zeros(sum(sizes) + num_tables, dtype=torch.int64, device=device, pin_memory=is_pinned)
        wholes, factors, *parts, tables = torch.split(memory, [*sizes, num_tables])
        wholes, factors = wholes.fill_(-1).view(-1, 3), factors.view(torch.float64).view(-1, 4)
        tables = tables.view(max_requests, num_groups, max_blocks)
        groups = [GroupSlots(slots, tables[:, i]) for i, slots in enumerate(parts[6:])]
        token_ids, positions, query_starts, context_lens, sampled, previous = parts[:6]
        return cls(
            memory, wholes, factors, token_ids, positions, query_starts, context_lens, sampled, previous, groups
        )

    def size(self, num_requests: int) -> int:
        """How much of the memory holds what is needed of so many requests."""
        tables = self.groups[0].block_table
        return int(tables.storage_offset()) + num_requests * tables.stride(0)


class BatchBuffers:
    """The memory of a step's inputs, filled anew for each step, always in the same place on the device: a captured
    forward pass reads it there. Tokens and requests beyond a step's own are left over from earlier ones; no request
    owns them."""

    def __init__(self, kv: KVCache, max_tokens: int, max_requests: int, max_blocks: int) -> None:
        """max_blocks: the longest block table of a request."""
        self.kv = kv
        self.max_tokens, self.max_requests, self.max_blocks = max_tokens, max_requests, max_blocks
        sizes = max_tokens, max_requests, max_blocks, len(kv.groups)
        self.host = self._other = Inputs.make(*sizes, torch.device("cpu"))
        self.device = self.host
        if kv.device.type != "cpu":  # while one is on its way to the device, the other is filled
            self.device, self._other = Inputs.make(*sizes, kv.device), Inputs.make(*sizes, torch.device("cpu"))
        self._sent: torch.cuda.Event | None = None  # when what `host` held is on the device; and the other
        self._other_sent: torch.cuda.Event | None = None

    def fill(self, chunks: Sequence[Chunk], states: Sequence[RequestState]) -> tuple[int, list[int]]:
        """Write the chunks, in their order; `states` are those of the chunks' requests. Returns the number of tokens
        and where each chunk starts (and the last ends)."""
        self.host, self._other = self._other, self.host
        self._sent, self._other_sent = self._other_sent, self._sent
        if self._sent is not None:
            self._sent.synchronize()
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
        self.host.token_ids.numpy()[:num_tokens] = token_ids
        self.host.positions.numpy()[:num_tokens] = positions
        query_starts = self.host.query_starts.numpy()
        query_starts[: len(starts)] = starts
        query_starts[len(starts) :] = num_tokens
        self.host.context_lens.numpy()[: len(chunks)] = context_lens
        sampled = [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.sample]
        sampled_rows = self.host.sampled_rows.numpy()
        sampled_rows[: len(sampled)] = sampled
        sampled_rows[len(sampled) :] = 0
        for group_id, group in enumerate(self.host.groups):
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
        for group in self.host.groups:
            group.slots[begin:end] = 0

    def fill_draws(self, draws: Draws | None, num_requests: int) -> None:
        """Write what a captured step of so many requests samples by; None: nothing is drawn."""
        wholes, factors = self.host.draw_wholes.numpy(), self.host.draw_factors.numpy()
        num = 0
        if draws is not None:
            num = len(draws[0])
            wholes[:num], factors[:num] = draws
        wholes[num:num_requests] = -1

    def upload(self, num_requests: int, previous: Previous | None = None) -> None:
        """Bring what was filled to the cache's device, and there fill in what was sampled meanwhile."""
        if previous is not None:
            self.host.previous_rows.numpy()[:num_requests] = previous[1]
        if self.device is not self.host:
            size = self.host.size(num_requests)
            _copy(self.device.memory[:size], self.host.memory[:size])
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()
        if previous is not None:
            from pelton.ops.cuda.rows import fill_in_  # its kernels need Triton

            there = self.device
            fill_in_(there.token_ids, there.query_starts, there.previous_rows[:num_requests], previous[0])

    def batch(
        self, num_tokens: int, num_requests: int, num_wanted: int | None = None,
        prompts: Sequence[tuple[int, int]] = (),
    ) -> Batch:
        """The first tokens and requests, on the cache's device, as they were uploaded last or will be. num_wanted: of
        sampled rows whose hidden states are asked for, if not all are. prompts: see Batch."""
        inputs = self.device
        groups = [
            GroupSlots(group.slots[:num_tokens], group.block_table[:num_requests]) for group in inputs.groups
        ]
        return Batch(
            token_ids=inputs.token_ids[:num_tokens],
            positions=inputs.positions[:num_tokens],
            query_starts=inputs.query_starts[: num_requests + 1],
            context_lens=inputs.context_lens[:num_requests],
            kv=[(cache, groups[i]) for cache, i in zip(self.kv.layers, self.kv.group_of_layer, strict=True)],
            wanted=None if num_wanted is None else inputs.sampled_rows[:num_wanted],
            prompts=prompts,
        )


def _copy(there: Tensor, here: Tensor) -> None:
    """From pinned memory to a GPU, without waiting."""
    if gpu.why_not():
        there.copy_(here, non_blocking=True)
    else:
        from pelton.ops.cuda.rows import copy_from_host_

        copy_from_host_(there, here)
