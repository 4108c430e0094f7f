"""The KV blocks of one engine: who holds them, what they contain, and which is given up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from pelton.errors import ConfigError

NULL_BLOCK = 0
"""Never handed out: stands in a table for a block that has left a sliding window."""

BlockKey = tuple[int, bytes]
"""What a full block contains: (KV group, SHA-256 over all tokens up to the block's end)."""


class BlockPool:
    """Block ids 1 .. num_blocks - 1. One pool serves all KV groups: a block is as large in each of them.

    Each block is in one of three states:

    | state  | holders | key             | kept in                                          |
    |--------|---------|-----------------|--------------------------------------------------|
    | used   | >= 1    | once it is full | tables of requests                               |
    | cached | 0       | yes             | `_cached`, the least recently released one first |
    | blank  | 0       | no              | `_blank`                                         |

    Cached and blank blocks are free: blank ones are handed out first, then the oldest cached one loses its key.
    All operations on one block take constant time.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ConfigError(f"the KV cache needs at least 2 blocks, got {num_blocks}; give it more memory")
        self.num_blocks = num_blocks
        self._num_holders = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._by_key: dict[BlockKey, int] = {}
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can hand out."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that can still be found by their key."""
        return len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the blocks that requests hold, 0 to 1."""
        return 1.0 - self.num_free / (self.num_blocks - 1)

    def allocate(self) -> int:
        """A free block with one holder and no key. The caller has looked at `num_free`."""
        if self._blank:
            block_id = self._blank.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
        self._num_holders[block_id] = 1
        return block_id

    def acquire(self, block_id: int) -> None:
        """One more holder of a block that was found by its key."""
        if self._num_holders[block_id] == 0:
            del self._cached[block_id]
        self._num_holders[block_id] += 1

    def release(self, block_id: int) -> None:
        """One holder less; without holders the block is free, and while it has a key it can be found."""
        if self._num_holders[block_id] == 0:
            raise ValueError(f"block {block_id} is released, but nobody holds it")
        self._num_holders[block_id] -= 1
        if self._num_holders[block_id] == 0:
            if self._keys[block_id] is None:
                self._blank.append(block_id)
            else:
                self._cached[block_id] = None

    def find(self, key: BlockKey) -> int:
        """The block with this content, or the null block."""
        return self._by_key.get(key, NULL_BLOCK)

    def register(self, block_id: int, key: BlockKey) -> None:
        """Make a full block findable. If another block has this content already, that one stays the one found."""
        if self._num_holders[block_id] == 0 or self._keys[block_id] not in (None, key):
            raise ValueError(f"block {block_id} gets a key, but nobody holds it or it has another one")
        if key not in self._by_key:
            self._by_key[key] = block_id
            self._keys[block_id] = key

    def key_of(self, block_id: int) -> BlockKey | None:
        """The key under which this very block is found."""
        return self._keys[block_id]

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free, so that acquiring them lowers `num_free`."""
        return sum(block_id in self._cached for block_id in block_ids)

    def _forget(self, block_id: int) -> None:
        key = self._keys[block_id]
        if key is not None:
            del self._by_key[key]
            self._keys[block_id] = None

    def check(self, holders: Mapping[int, int]) -> None:
        """Assert every invariant; `holders` counts for each block the tables that it stands in."""
        used = {block_id: count for block_id, count in enumerate(self._num_holders) if count}
        assert used == dict(holders), "a block is not held by as many tables as it stands in"
        assert len(used) + self.num_free == self.num_blocks - 1, "used and free blocks are not all blocks"
        assert {NULL_BLOCK, *used, *self._blank, *self._cached} == set(range(self.num_blocks)), "not a partition"
        assert not any(self._keys[block_id] for block_id in self._blank), "a blank block has a key"
        assert all(self._keys[block_id] for block_id in self._cached), "a cached block has no key"
        keyed = {key: block_id for block_id, key in enumerate(self._keys) if key is not None}
        assert keyed == self._by_key, "keys and blocks disagree"
