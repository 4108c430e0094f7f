"""What the layers need to know about one step's tokens. Built by runner/batch.py, passed to every forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pelton import ops
from pelton.ops import LayerCache


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
    query_starts: Tensor  # [R + 1] int64: request r owns tokens query_starts[r] .. query_starts[r + 1] - 1
    context_lens: Tensor  # [R] int64: tokens of each request in the cache once this step is done
    kv: Sequence[tuple[LayerCache, GroupSlots]]  # for each layer: its cache and its group's slots
    wanted: Tensor | None = None  # [M] int64: rows whose hidden states are asked for; None: all
    prompts: Sequence[tuple[int, int]] = ()  # where each request's tokens lie, if they are long and whole contexts


def select(x: Tensor, wanted: Tensor | None) -> Tensor:
    """Rows of x [T, K] that are wanted [M]: all, if none are named."""
    return x if wanted is None else ops.select_rows(x, wanted)
