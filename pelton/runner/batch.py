"""From a plan's chunks to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pelton.engine.step import Chunk
from pelton.layers.batch import Batch, GroupSlots
from pelton.runner.kv_cache import KVCache
from pelton.runner.requests import RequestState


def build_batch(chunks: Sequence[Chunk], states: Sequence[RequestState], kv: KVCache, device: torch.device) -> Batch:
    """The Batch of these chunks, in their order; `states` are those of the chunks' requests."""
    token_ids: list[int] = []
    positions: list[int] = []
    for chunk, state in zip(chunks, states, strict=True):
        end = chunk.start + chunk.num_tokens
        token_ids += state.token_ids[chunk.start : end]
        positions += range(chunk.start, end)
    position_tensor = _tensor(positions, device)
    query_starts = [0, *accumulate(chunk.num_tokens for chunk in chunks)]
    owner = torch.repeat_interleave(_tensor([chunk.num_tokens for chunk in chunks], device))  # [T] request of a token
    groups = []
    for group_id in range(len(kv.groups)):
        table = _block_table([state.tables[group_id] for state in states], device)
        block = table[owner, position_tensor // kv.block_size]
        groups.append(GroupSlots(block * kv.block_size + position_tensor % kv.block_size, table))
    return Batch(
        token_ids=_tensor(token_ids, device),
        positions=position_tensor,
        query_starts=query_starts,
        context_lens=[chunk.start + chunk.num_tokens for chunk in chunks],
        kv=[(cache, groups[group_id]) for cache, group_id in zip(kv.layers, kv.group_of_layer, strict=True)],
    )


def _block_table(tables: Sequence[list[int]], device: torch.device) -> Tensor:
    """[R, blocks], padded with the null block."""
    longest = max(len(table) for table in tables)
    return _tensor([table + [0] * (longest - len(table)) for table in tables], device)


def _tensor(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
