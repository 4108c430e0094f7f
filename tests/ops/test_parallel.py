"""What ranks share, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pelton.errors import ConfigError
from pelton.ops.native import native, reason
from pelton.ops.parallel import ALONE, Ranks
from pelton.ops.recording import NotRecordable, Recorder

InRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]


@pytest.mark.parametrize(("size", "unit", "num_ranks"), [(12, 1, 3), (12, 2, 3), (96, 16, 2), (7, 7, 1), (5, 1, 5)])
def test_shares_are_equal_whole_units_in_order(size: int, unit: int, num_ranks: int) -> None:
    shares = [Ranks(rank, num_ranks).share(size, unit, what="x") for rank in range(num_ranks)]
    assert [i for share in shares for i in share] == list(range(size))
    assert {len(share) for share in shares} == {size // num_ranks}
    assert all(share.start % unit == 0 for share in shares)


def test_fewer_units_than_ranks_are_had_by_several() -> None:
    shares = [Ranks(rank, 6).share(24, 8, what="x", or_same=True) for rank in range(6)]
    assert shares == [range(0, 8)] * 2 + [range(8, 16)] * 2 + [range(16, 24)] * 2


@pytest.mark.parametrize(("size", "or_same"), [(8, False), (8, True), (2, False), (4, True)])
def test_what_cannot_be_shared_evenly_is_one_line(size: int, or_same: bool) -> None:
    with pytest.raises(ConfigError, match=r"^--tensor-parallel-size 6 does not divide the width, \d; use a size"):
        Ranks(0, 6).share(size, what="the width", or_same=or_same)


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(in_ranks: InRanks, size: int) -> None:
    rows = torch.randn(size, 5, 4)

    def run(ranks: Ranks) -> Any:
        mine = rows[ranks.rank]
        least = ranks.least([10 + ranks.rank, -ranks.rank, 1 << 40], torch.device("cpu"))
        total = mine.clone()
        assert ranks.all_reduce_(total) is total
        return total, ranks.all_gather(mine), ranks.broadcast_(torch.tensor([ranks.rank + 7])), least

    for total, gathered, first, least in in_ranks(size, run):
        torch.testing.assert_close(total, rows.sum(0))
        assert torch.equal(gathered, torch.cat(list(rows), dim=1))
        assert first.tolist() == [7] and least == [10, 1 - size, 1 << 40]


def test_a_rank_that_is_alone_does_nothing() -> None:
    x = torch.randn(3, 4)
    assert ALONE.all_reduce_(x) is ALONE.all_gather(x) is ALONE.broadcast_(x) is x
    assert ALONE.share(7, what="x") == range(7)


@pytest.mark.skipif(native is None, reason=reason)
def test_collectives_are_not_recorded() -> None:
    x = torch.ones(2, 2)
    with pytest.raises(NotRecordable, match="what ranks tell each other"), Recorder(2):
        Ranks(0, 2).all_reduce_(x)
