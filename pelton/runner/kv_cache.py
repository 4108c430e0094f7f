"""The memory of keys and values: for each layer a cache of blocks, shared between KV groups.

Layer i of every group lives in the same tensor: a block belongs to one group at a time, and the engine's block pool
says to which. So L layers in groups of n need n tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelton.config import CacheConfig, KVLayer


class KVCache:
    """`layers[i]` is layer i's cache [2, B, S, G, D]: keys and values, B blocks, S slots, G heads, D head size."""

    def __init__(
        self, config: CacheConfig, kv_layers: list[KVLayer], dtype: torch.dtype, device: torch.device
    ) -> None:
        first = kv_layers[0]
        shape = (2, config.num_blocks, config.block_size, first.num_kv_heads, first.head_size)
        num_tensors = max(len(group.layer_ids) for group in config.groups)
        tensors = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_tensors)]
        self.block_size = config.block_size
        self.groups = config.groups
        self.group_of_layer = [0] * len(kv_layers)
        self.layers: list[Tensor] = [tensors[0]] * len(kv_layers)
        for group_id, group in enumerate(config.groups):
            for i, layer_id in enumerate(group.layer_ids):
                self.group_of_layer[layer_id] = group_id
                self.layers[layer_id] = tensors[i]
