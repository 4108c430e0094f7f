"""The block tables of one request, one for each KV group, and the keys under which its prefixes are shared."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from hashlib import sha256

from pelton.config import CacheConfig
from pelton.engine.block_pool import NULL_BLOCK, BlockPool

_ALL = sys.maxsize


class KVTables:
    """Entry i of a group's table is the block that holds tokens i * block_size .. (i + 1) * block_size - 1.

    All tables have the same length. A query at position p of a group with a window attends to positions
    p - window + 1 .. p, so blocks before that are given back and the null block takes their place.

    A block's key chains SHA-256 from the cache salt over the token ids of each block up to it: blocks are shared
    only by requests of one salt whose tokens are the same from the first on.
    """

    def __init__(
        self, pool: BlockPool, cache: CacheConfig, cache_salt: str = "", most_shared: int | None = None
    ) -> None:
        """most_shared: only blocks within so many tokens are given to others."""
        self._pool = pool
        self._block_size = cache.block_size
        self._shares = cache.enable_prefix_caching
        self._most_shared = sys.maxsize if most_shared is None else most_shared
        self._windows = [group.window for group in cache.groups]
        self._tables: list[list[int]] = [[] for _ in cache.groups]
        self._num_left = [0] * len(cache.groups)  # for each table, how many null blocks it begins with
        self._num_registered = 0  # entries whose keys the pool has been given
        self._root = sha256(cache_salt.encode("utf-8", "surrogatepass")).digest()
        self._digests: list[bytes] = []

    def find_prefix(self, token_ids: Sequence[int], limit: int) -> list[list[int]]:
        """The tables of the longest cached prefix of at most `limit` tokens, ready for adopt(); takes no block.

        A prefix of n blocks serves if each full-attention group has all n, and each window group those that the
        next query can see: the last ceil((window - 1) / block_size) of the n.
        """
        if not self._shares:
            return [[] for _ in self._tables]
        needs = [_ALL if w is None else -(-(w - 1) // self._block_size) for w in self._windows]
        found: list[list[int]] = [[] for _ in self._tables]
        runs = [0] * len(needs)  # for each group, how many blocks in a row have been found up to here
        best = 0
        for n in range(1, limit // self._block_size + 1):
            digest = self._digest(token_ids, n - 1)
            for group, blocks in enumerate(found):
                blocks.append(self._pool.find((group, digest)))
                runs[group] = runs[group] + 1 if blocks[-1] != NULL_BLOCK else 0
            if all(run >= min(need, n) for run, need in zip(runs, needs, strict=True)):
                best = n
            elif any(need == _ALL and run < n for run, need in zip(runs, needs, strict=True)):
                break
        starts = [max(0, best - need) for need in needs]
        return [[NULL_BLOCK] * s + blocks[s:best] for s, blocks in zip(starts, found, strict=True)]

    def adopt(self, prefix: list[list[int]]) -> int:
        """Begin with the tables found by find_prefix(); returns the number of tokens they hold."""
        for group, blocks in enumerate(prefix):
            self._num_left[group] = blocks.count(NULL_BLOCK)
            for block_id in blocks[self._num_left[group] :]:
                self._pool.acquire(block_id)
        self._tables = prefix
        self._num_registered = len(prefix[0])
        return len(prefix[0]) * self._block_size

    def num_missing(self, num_tokens: int) -> int:
        """Blocks that grow(num_tokens) would allocate."""
        length = -(-num_tokens // self._block_size)
        return max(0, length - len(self._tables[0])) * len(self._tables)

    def grow(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens. The caller has compared num_missing() with the pool."""
        length = -(-num_tokens // self._block_size)
        for table in self._tables:
            while len(table) < length:
                table.append(self._pool.allocate())

    def commit(self, token_ids: Sequence[int], num_computed: int) -> None:
        """The first `num_computed` tokens are in the cache: share the blocks that are full, drop what no query sees."""
        if self._shares:
            for index in range(self._num_registered, min(num_computed, self._most_shared) // self._block_size):
                digest = self._digest(token_ids, index)
                for group, table in enumerate(self._tables):
                    self._pool.register(table[index], (group, digest))
                self._num_registered = index + 1
        for group, window in enumerate(self._windows):
            if window is not None:
                self._slide(group, max(0, num_computed - window + 1) // self._block_size)

    def _slide(self, group: int, first: int) -> None:
        """Give back the blocks before entry `first`."""
        table = self._tables[group]
        for index in range(self._num_left[group], first):
            self._pool.release(table[index])
            table[index] = NULL_BLOCK
            self._num_left[group] = index + 1

    def free(self) -> None:
        """Give everything back, the end first: a prefix is of use without what follows it, not the other way."""
        for entries in reversed(list(zip(*self._tables, strict=True))):
            for block_id in entries:
                if block_id != NULL_BLOCK:
                    self._pool.release(block_id)
        self._tables = [[] for _ in self._windows]
        self._num_left = [0] * len(self._windows)
        self._num_registered = 0

    def entries(self, start: int) -> tuple[tuple[int, ...], ...]:
        """Each table from entry `start` on."""
        return tuple([tuple(table[start:]) for table in self._tables])

    def held(self) -> Iterator[int]:
        """The blocks that this request holds."""
        return (block_id for table in self._tables for block_id in table if block_id != NULL_BLOCK)

    def _digest(self, token_ids: Sequence[int], index: int) -> bytes:
        """SHA-256 over the tokens up to the end of entry `index`, all of them known."""
        while len(self._digests) <= index:
            start = len(self._digests) * self._block_size
            parent = self._digests[-1] if self._digests else self._root
            tokens = array("q", token_ids[start : start + self._block_size])
            self._digests.append(sha256(parent + tokens.tobytes()).digest())
        return self._digests[index]

    def check(self, token_ids: Sequence[int], num_computed: int) -> None:
        """Assert that the tables hold what `num_computed` tokens need, and that shared blocks are the right ones."""
        length = len(self._tables[0])
        assert all(len(table) == length for table in self._tables), "tables of different lengths"
        assert length * self._block_size >= num_computed, "computed tokens without a block"
        for group, (window, table) in enumerate(zip(self._windows, self._tables, strict=True)):
            first = 0 if window is None else max(0, num_computed - window + 1) // self._block_size
            nulls = [block_id == NULL_BLOCK for block_id in table]
            assert nulls == [index < first for index in range(length)], "null blocks are not those before the window"
            for index in range(first, min(self._num_registered, length)):
                key = (group, self._digest(token_ids, index))
                assert self._pool.key_of(table[index]) in (None, key), "a shared block has a wrong key"
