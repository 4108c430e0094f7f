"""The memory of keys and values: for each layer a cache of blocks, shared between KV groups.

Layer i of every group lives in the same tensors: a block belongs to one group at a time, and the engine's block pool
says to which. So L layers in groups of n need n caches.
"""

from __future__ import annotations

import torch

from pelton.config import CacheConfig, KVLayer
from pelton.ops import LayerCache, make_cache


class KVCache:
    """`layers[i]` is layer i's cache."""

    def __init__(self, config: CacheConfig, kv_layers: list[KVLayer], device: torch.device) -> None:
        first = kv_layers[0]
        num_caches = max(len(group.layer_ids) for group in config.groups)
        dtype = getattr(torch, config.dtype)
        caches = [
            make_cache(config.num_blocks, config.block_size, first.num_kv_heads, first.head_size, dtype, device)
            for _ in range(num_caches)
        ]
        self.device = device
        self.block_size = config.block_size
        self.groups = config.groups
        self.group_of_layer = [0] * len(kv_layers)
        self.layers: list[LayerCache] = [caches[0]] * len(kv_layers)
        for group_id, group in enumerate(config.groups):
            for i, layer_id in enumerate(group.layer_ids):
                self.group_of_layer[layer_id] = group_id
                self.layers[layer_id] = caches[i]
