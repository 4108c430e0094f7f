"""How products of few rows are cut: what a block needs fits into the shared memory of every GPU."""

from __future__ import annotations

import pytest
import torch

from pelton.ops.cuda import cuts, few_rows

GPUS = [(108, 163 << 10), (28, 99 << 10), (82, 99 << 10), (128, 99 << 10), (132, 227 << 10)]  # processors, bytes
HOPPER = GPUS[-1]
SHAPES = [(64, 192), (1024, 1024), (6144, 4096), (4096, 14336), (28672, 4096), (57344, 8192), (262144, 5376)]
PIECES = (8, 18, 20, 32, 36, 40, 48, 64, 96)  # bytes: from 2 bits of a code to 8 with a scale and a minimum for each 16
STATIC = 1 << 10  # at most, but for tables of values


@pytest.mark.parametrize(("processors", "memory"), GPUS)
@pytest.mark.parametrize("same", [False, True])
def test_more_rows_fit(processors: int, memory: int, same: bool) -> None:
    for num_out, num_in in SHAPES:
        for piece_bytes in PIECES:
            for num_rows, gated in [(rows, gated) for rows in (9, 16, 17, 32, 33, 64) for gated in (False, True)]:
                cut = cuts.more(num_rows, num_out, num_in, gated, piece_bytes, processors, memory, same)
                needed = cut.shared_bytes(piece_bytes) + (8 << 10) + STATIC
                assert cut.STAGES >= 2 and cut.BLOCKS * needed <= memory, (num_out, num_in, piece_bytes, cut)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("has_min", [False, True])
def test_more_rows_fit_on_hopper(same: bool, has_min: bool) -> None:
    processors, memory = HOPPER
    for num_out, num_in in SHAPES:
        for piece_bytes in PIECES:
            for num_rows, gated in [(rows, gated) for rows in (1, 9, 16, 17, 32, 33, 64) for gated in (False, True)]:
                given = num_rows, num_out, num_in, gated, piece_bytes, has_min, processors, memory
                cut = cuts.more_on_hopper(*given, same)
                needed = cut.shared_bytes(piece_bytes) + (8 << 10) + STATIC
                assert cut.STAGES >= 2 and needed <= memory and cut.SPLIT <= 8, (num_out, num_in, piece_bytes, cut)
                sums = 4 * cut.MT * 4 * cut.NT * 32 * cut.WARPS  # bytes that a team leaves for the first
                assert sums * (cut.TEAMS - 1) <= cut.shared_bytes(piece_bytes)


@pytest.mark.parametrize(("processors", "memory"), GPUS)
def test_few_rows_fit(processors: int, memory: int) -> None:
    for num_out, num_in in SHAPES:
        for num_rows, gated in [(rows, gated) for rows in (1, 4, 8, 9, 17, 33, 64) for gated in (False, True)]:
            for dense, same in ((False, False), (False, True), (True, False)):
                cut = cuts.few(num_rows, num_out, num_in, gated, dense, processors, same)
                if not dense:
                    cut = cuts.with_table(cut, num_out, processors, memory)
                assert cut.shared_bytes(64) + STATIC <= memory, (num_out, num_in, cut)


@pytest.mark.parametrize(("processors", "memory"), GPUS)
@pytest.mark.parametrize("same", [False, True])
def test_a_larger_table_costs_no_warps(processors: int, memory: int, same: bool) -> None:
    for num_out, num_in in [*SHAPES, (4096, 4096), (8192, 4096)]:
        for num_rows, gated in [(rows, gated) for rows in (1, 2, 8, 16, 64) for gated in (False, True)]:
            before = cuts.few(num_rows, num_out, num_in, gated, False, processors, same)
            cut = cuts.with_table(before, num_out, processors, memory)
            assert cut.num_threads <= 512 and 0 <= cut.TEAMS * cut.grid(num_out)[0] - before.grid(num_out)[0] < 2
            if cut.ENTRY == 256:
                blocks = memory // (cut.shared_bytes(0) + STATIC)
                most = 32 if before.MT == 1 else 16  # warps
                needed = min(-(-before.grid(num_out)[0] // processors) * before.WARPS, most)
                assert blocks * cut.TEAMS * cut.WARPS >= needed, (num_out, num_in, cut)
            assert cut.ENTRY == 256 or (processors, memory) != HOPPER or cut.ROWS > 2


@pytest.mark.parametrize(("processors", "memory"), GPUS)
def test_dense_rows_fit(processors: int, memory: int) -> None:
    for num_out, num_in in SHAPES:
        for num_rows in range(1, 10):
            cut = cuts.dense(num_rows, num_out, num_in, processors, memory)
            if cut is None:
                assert num_rows > 8 or num_in > 4096 or memory < HOPPER[1]
                continue
            assert num_rows <= 8 and cut.shared_bytes(0) + STATIC <= memory, (num_out, num_in, cut)
            assert 16 * num_rows <= cut.num_threads and cut.grid(num_out)[0] <= processors


def test_no_rows_are_no_launch() -> None:
    weight = torch.zeros(32, 128, dtype=torch.bfloat16)
    few_rows.multiply(weight[:0], weight, torch.empty(0, 32))
    numbers = weight.to(torch.int8)
    few_rows.multiply_int8(numbers[:0], torch.empty(0), numbers, torch.ones(32), torch.empty(0, 32))
