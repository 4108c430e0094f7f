"""What the layers need to know about one step's tokens. Built by runner/batch.py, passed to every forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroupSlots:
    """Where one KV group keeps the tokens of this step's requests."""

    slots: Tensor  # [T] int64: slot of each new token in the flat cache, block * block_size + offset
    block_table: Tensor  # [R, blocks] int64: block ids of each request, padded with the null block


@dataclass(frozen=True)
class Batch:
    """T new tokens of R requests, one request after the other."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    query_starts: list[int]  # R + 1: request r owns tokens query_starts[r] .. query_starts[r + 1] - 1
    context_lens: list[int]  # R: tokens of each request in the cache once this step is done
    kv: Sequence[tuple[Tensor, GroupSlots]]  # for each layer: its cache [2, B, S, G, D] and its group's slots
