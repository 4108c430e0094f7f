"""KVTables: prefix keys, prefixes found, blocks that leave a window."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.config import CacheConfig, KVGroup
from pelton.engine.block_pool import NULL_BLOCK, BlockPool
from pelton.engine.kv_tables import KVTables

TOKENS = list(range(100, 140))


def make_cache(*windows: int | None, block_size: int = 4, caching: bool = True) -> CacheConfig:
    return CacheConfig(block_size, 100, tuple(KVGroup(window, (i,)) for i, window in enumerate(windows)), caching)


def compute(pool: BlockPool, cache: CacheConfig, tokens: list[int], salt: str = "") -> KVTables:
    """Tables whose request has computed all of `tokens`."""
    tables = KVTables(pool, cache, salt)
    tables.grow(len(tokens))
    tables.commit(tokens, len(tokens))
    tables.check(tokens, len(tokens))
    return tables


def test_full_blocks_are_shared_once_committed() -> None:
    pool, cache = BlockPool(100), make_cache(None)
    tables = KVTables(pool, cache)
    tables.grow(10)
    other = KVTables(pool, cache)
    assert other.find_prefix(TOKENS, 39) == [[]]
    tables.commit(TOKENS, 7)
    assert other.find_prefix(TOKENS, 39) == [[1]]
    tables.commit(TOKENS, 10)
    assert other.find_prefix(TOKENS, 39) == [[1, 2]]
    assert other.adopt([[1, 2]]) == 8
    pool.check(Counter([*tables.held(), *other.held()]))


def test_a_prefix_is_cut_to_its_limit_and_to_whole_blocks() -> None:
    pool, cache = BlockPool(100), make_cache(None)
    compute(pool, cache, TOKENS[:12])
    for limit, num_blocks in ((12, 3), (11, 2), (8, 2), (3, 0), (0, 0)):
        assert len(KVTables(pool, cache).find_prefix(TOKENS, limit)[0]) == num_blocks


def test_one_other_token_changes_every_key_after_it() -> None:
    pool, cache = BlockPool(100), make_cache(None)
    compute(pool, cache, TOKENS[:16])
    other = [*TOKENS[:5], 7, *TOKENS[6:]]
    assert len(KVTables(pool, cache).find_prefix(other, 39)[0]) == 1


@pytest.mark.parametrize("salt", ["x", "\udce4", "\0", "x" * 10_000])
def test_salts_do_not_share(salt: str) -> None:
    pool, cache = BlockPool(100), make_cache(None)
    compute(pool, cache, TOKENS[:8], salt)
    assert KVTables(pool, cache).find_prefix(TOKENS, 39) == [[]]
    assert len(KVTables(pool, cache, salt).find_prefix(TOKENS, 39)[0]) == 2


def test_groups_do_not_share_blocks() -> None:
    pool, cache = BlockPool(100), make_cache(None, 100)
    compute(pool, cache, TOKENS[:8])
    full, window = KVTables(pool, cache).find_prefix(TOKENS, 39)
    assert not set(full) & set(window)


def test_nothing_is_shared_without_prefix_caching() -> None:
    pool, cache = BlockPool(100), make_cache(None, 5, caching=False)
    compute(pool, cache, TOKENS[:16]).free()
    assert KVTables(pool, cache).find_prefix(TOKENS, 39) == [[], []]
    assert pool.num_cached == 0
    assert pool.usage == 0.0


@pytest.mark.parametrize(("window", "num_computed", "num_nulls"), [
    (1, 3, 0), (1, 4, 1), (5, 7, 0), (5, 8, 1), (5, 11, 1), (5, 12, 2), (6, 8, 0), (6, 9, 1), (100, 40, 0),
])
def test_blocks_that_left_the_window_are_given_back(window: int, num_computed: int, num_nulls: int) -> None:
    """The next query, at position `num_computed`, sees the window - 1 tokens before it."""
    pool, cache = BlockPool(100), make_cache(window)
    tables = compute(pool, cache, TOKENS[:num_computed])
    assert list(tables.entries(0)[0]).count(NULL_BLOCK) == num_nulls
    assert len(list(tables.held())) == -(-num_computed // 4) - num_nulls


def test_a_prefix_holds_of_a_window_group_only_what_the_next_query_sees() -> None:
    pool, cache = BlockPool(100), make_cache(None, 6)
    compute(pool, cache, TOKENS[:20]).free()
    full, window = KVTables(pool, cache).find_prefix(TOKENS, 39)
    assert len(full) == len(window) == 5
    assert NULL_BLOCK not in full
    assert [block == NULL_BLOCK for block in window] == [True, True, True, False, False]


def test_the_end_of_a_freed_table_is_evicted_first() -> None:
    pool, cache = BlockPool(6), make_cache(None)
    compute(pool, cache, TOKENS[:20]).free()
    pool.allocate()
    assert len(KVTables(pool, cache).find_prefix(TOKENS, 39)[0]) == 4


def test_num_missing_counts_all_groups() -> None:
    tables = KVTables(BlockPool(100), make_cache(None, 5, 5))
    assert tables.num_missing(9) == 9
    tables.grow(9)
    assert tables.num_missing(12) == 0
    assert tables.num_missing(13) == 3


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    windows=st.lists(st.sampled_from([None, 1, 3, 5, 6, 11]), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 2, 4]),
    lost=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=6),
    limit=st.integers(0, 31),
)
def test_find_prefix_is_the_longest_that_serves(
    windows: list[int | None], block_size: int, lost: set[tuple[int, int]], limit: int
) -> None:
    """Against the definition, tried for each length from the longest down, with some blocks evicted."""
    pool, cache = BlockPool(1000), make_cache(*windows, block_size=block_size)
    owner = KVTables(pool, cache)
    ids: list[list[int]] = [[] for _ in windows]
    for end in range(block_size, 33, block_size):  # block by block, noting each id before it leaves its window
        owner.grow(end)
        for group, (entry,) in enumerate(owner.entries(end // block_size - 1)):
            ids[group].append(entry)
        owner.commit(TOKENS, end)
    owner.free()
    for group, index in lost:
        if group < len(ids) and index < len(ids[group]):
            ids[group][index] = NULL_BLOCK
    keep = {block for blocks in ids for block in blocks}
    keys = {block: pool.key_of(block) for block in keep if block}
    fresh = BlockPool(1000)
    for block in sorted(range(1, 1000)):
        assert fresh.allocate() == block
        if block in keys:
            fresh.register(block, keys[block])

    def serves(n: int) -> bool:
        for window, blocks in zip(windows, ids, strict=True):
            first = 0 if window is None else max(0, n * block_size - window + 1) // block_size
            if NULL_BLOCK in blocks[first:n]:
                return False
        return True

    expected = next(n for n in range(limit // block_size, -1, -1) if serves(n))
    prefix = KVTables(fresh, cache).find_prefix(TOKENS, limit)
    assert [len(blocks) for blocks in prefix] == [expected] * len(windows)
    for window, blocks, right in zip(windows, prefix, ids, strict=True):
        first = 0 if window is None else max(0, expected * block_size - window + 1) // block_size
        assert blocks == [NULL_BLOCK] * first + right[first:expected]
