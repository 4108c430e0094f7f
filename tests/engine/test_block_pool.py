"""BlockPool: by example, and against a model made of plain dicts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pelton.engine.block_pool import NULL_BLOCK, BlockPool
from pelton.errors import ConfigError


def test_hands_out_every_block_but_the_null_block() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate() for _ in range(pool.num_free)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    assert pool.usage == 1.0


def test_needs_a_block_beside_the_null_block() -> None:
    with pytest.raises(ConfigError, match="at least 2 blocks, got 1"):
        BlockPool(1)


def test_a_released_block_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.register(block, (0, b"a"))
    pool.release(block)
    assert pool.find((0, b"a")) == block
    assert pool.find((1, b"a")) == NULL_BLOCK
    assert pool.allocate() == block
    assert pool.find((0, b"a")) == NULL_BLOCK


def test_blank_blocks_go_before_cached_ones_and_the_oldest_cached_one_first() -> None:
    pool = BlockPool(5)
    a, b, c, d = (pool.allocate() for _ in range(4))
    for block, name in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.register(block, (0, name))
    for block in (b, c, d, a):
        pool.release(block)
    pool.acquire(pool.find((0, b"b")))  # used again: the newest when released
    pool.release(b)
    assert [pool.allocate() for _ in range(4)] == [d, c, a, b]


def test_the_first_of_two_equal_blocks_is_the_one_found() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, (0, b"a"))
    pool.register(second, (0, b"a"))
    assert pool.find((0, b"a")) == first
    assert pool.key_of(second) is None
    pool.release(second)
    assert pool.num_cached == 0


def test_misuse_is_an_error() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.register(block, (0, b"a"))
    with pytest.raises(ValueError, match="another"):
        pool.register(block, (0, b"b"))
    pool.release(block)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(block)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.register(2, (0, b"b"))


@pytest.mark.parametrize("harm", [
    lambda pool, held: pool._blank.append(held),
    lambda pool, held: pool._cached.popitem(),
    lambda pool, held: pool._by_key.clear(),
    lambda pool, held: pool._num_holders.__setitem__(held, 2),
])
def test_check_notices_harm(harm) -> None:
    pool = BlockPool(4)
    held, cached = pool.allocate(), pool.allocate()
    pool.register(cached, (0, b"a"))
    pool.release(cached)
    pool.check({held: 1})
    harm(pool, held)
    with pytest.raises(AssertionError):
        pool.check({held: 1})


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations, next to a model: who holds what, and the keys of free blocks from old to new."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.holds: list[int] = []  # one entry a holder
        self.keys: dict[int, tuple[int, bytes]] = {}
        self.cached: list[int] = []

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def allocate(self) -> None:
        blank = {1, 2, 3, 4, 5} - set(self.holds) - set(self.cached)
        block = self.pool.allocate()
        if blank:
            assert block in blank
        else:
            assert block == self.cached.pop(0)
            del self.keys[block]
        self.holds.append(block)

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), group=st.integers(0, 1), name=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, data: st.DataObject, group: int, name: bytes) -> None:
        block, key = data.draw(st.sampled_from(self.holds)), (group, name)
        if block in self.keys:
            key = self.keys[block]
        self.pool.register(block, key)
        if key not in self.keys.values():
            self.keys[block] = key

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.keys)))
        assert self.pool.num_unheld([block]) == (block in self.cached)
        self.pool.acquire(self.pool.find(self.keys[block]))
        self.holds.append(block)
        if block in self.cached:
            self.cached.remove(block)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.holds))
        self.pool.release(block)
        self.holds.remove(block)
        if block not in self.holds and block in self.keys:
            self.cached.append(block)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check(Counter(self.holds))
        assert self.pool.num_free == 5 - len(set(self.holds))
        assert self.pool.num_cached == len(self.cached)
        for group in (0, 1):
            for name in (b"a", b"b", b"c"):
                blocks = [block for block, key in self.keys.items() if key == (group, name)]
                assert self.pool.find((group, name)) == (blocks[0] if blocks else NULL_BLOCK)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None)
test_pool_against_model = PoolMachine.TestCase
