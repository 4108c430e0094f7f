"""How products are cut: what a block needs fits into the shared memory of every GPU."""

from __future__ import annotations

import pytest
import torch

from pelton.ops.cuda import cuts, few_rows

GPUS = [(108, 163 << 10), (28, 99 << 10), (82, 99 << 10), (128, 99 << 10), (132, 227 << 10)]  # processors, bytes
HOPPER = GPUS[-1]
SHAPES = [(64, 192), (1024, 1024), (6144, 4096), (4096, 14336), (28672, 4096), (57344, 8192), (262144, 5376)]
PIECES = (8, 18, 20, 32, 36, 40, 48, 64, 96)  # bytes: from 2 bits of a code to 8 with a scale and a minimum for each 16
MOST_LOOKED_UP = 32  # bytes of a piece, whose codes have 4 bits
STATIC = 1 << 10  # at most, but for tables of values


@pytest.mark.parametrize(("processors", "memory"), GPUS)
@pytest.mark.parametrize("parts", [None, 1, 8])
def test_more_rows_fit(processors: int, memory: int, parts: int | None) -> None:
    for num_out, num_in in SHAPES:
        for piece_bytes in PIECES:
            for num_rows, gated in [(rows, gated) for rows in (1, 9, 16, 17, 32, 33, 64) for gated in (False, True)]:
                cut = cuts.more(num_rows, num_out, num_in, gated, piece_bytes, processors, memory, parts)
                needed = cut.shared_bytes(piece_bytes) + (8 << 10) + STATIC
                assert cut.STAGES >= 2 and cut.BLOCKS * needed <= memory, (num_out, num_in, piece_bytes, cut)


@pytest.mark.parametrize("parts", [None, 1, 2, 8])
@pytest.mark.parametrize("has_min", [False, True])
def test_more_rows_fit_on_hopper(parts: int | None, has_min: bool) -> None:
    processors, memory = HOPPER
    for num_out, num_in in SHAPES:
        for piece_bytes in PIECES:
            for num_rows, gated in [(rows, gated) for rows in (1, 9, 16, 17, 32, 33, 64) for gated in (False, True)]:
                given = num_rows, num_out, num_in, gated, piece_bytes, has_min, processors, memory
                cut = cuts.more_on_hopper(*given, parts)
                needed = cut.shared_bytes(piece_bytes) + (8 << 10) + STATIC
                assert cut.STAGES >= 2 and needed <= memory and cut.SPLIT <= 8, (num_out, num_in, piece_bytes, cut)
                sums = 4 * cut.MT * 4 * cut.NT * 32 * cut.WARPS  # bytes that a team leaves for the first
                assert sums * (cut.TEAMS - 1) <= cut.shared_bytes(piece_bytes)


@pytest.mark.parametrize(("processors", "memory"), GPUS)
def test_same_rows_of_few_fit(processors: int, memory: int) -> None:
    for num_out, num_in in SHAPES:
        parts = cuts.same_parts(num_out, num_in, processors)
        assert num_in >= 256 * parts or parts == 1
        for piece_bytes in PIECES:
            for looked_up in (False, True) if piece_bytes <= MOST_LOOKED_UP else (False,):
                cut = cuts.same_of_few(num_out, piece_bytes, looked_up, parts, processors, memory)
                assert cut.STAGES >= 2 and cut.BLOCKS * (cut.shared_bytes(piece_bytes) + (8 << 10) + STATIC) <= memory
                assert cut.grid(num_out)[0] <= cuts.MAX_SHARING * processors or parts == 1


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_table_of_values_fits(blocks: int) -> None:
    for memory in {memory for _, memory in GPUS}:
        for warps, teams in ((4, 1), (8, 1), (8, 2)):
            before = cuts.More(1, 2, warps, 1, 3, blocks, teams)
            cut = cuts.with_more_table(before, 20, memory)
            fits = blocks * (cut.shared_bytes(20) + 256 * cut.ENTRY + STATIC) <= memory
            assert cut == before or (fits and cut.ENTRY > before.ENTRY)
            assert blocks > 1 or memory < HOPPER[1] or cut.ENTRY == 128


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


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_dense_rows_fit_in_parts(parts: int) -> None:
    processors, memory = HOPPER
    for num_out, num_in in SHAPES:
        for num_rows in range(1, 10):
            cut = cuts.dense_in_parts(num_rows, num_out, num_in, parts, processors, memory)
            if cut is None:
                assert num_rows > 4 or num_in > 8192
                continue
            assert cut.shared_bytes(0) + STATIC <= memory and cut.STAGES >= 2, (num_out, num_in, cut)
            assert parts == cut.PARTS and cut.WARPS % parts == 0 and cut.num_threads <= 512
            assert parts == 1 or 16 * num_rows <= 32 * parts  # a thread for each number of a team's tile


@pytest.mark.parametrize("has_values", [False, True])
def test_many_rows_fit(has_values: bool) -> None:
    """Memory, and what blocks that share columns leave there and count."""
    processors, memory = HOPPER
    for num_out, num_in in SHAPES:
        compiled = [cut.defines for cut in cuts.all_many(1024, num_out, num_in, has_values, processors, memory)]
        for num_rows in range(1, 1025, 7):
            cut = cuts.many(num_rows, num_out, num_in, has_values, processors, memory)
            assert cut.defines in compiled
            blocks, split = cut.grid(num_out)
            assert cut.STAGES >= 2 and cut.shared_bytes(20) + 256 * cut.ENTRY * has_values + STATIC <= memory
            assert blocks % 2 == 0 and blocks * cuts.MANY_OUTS * 8 * cut.NT >= num_out * num_rows
            if split > 1:
                assert blocks <= 4 * processors and num_in // (128 * split) >= 4
                assert blocks * split * cuts.MANY_OUTS * 8 * cut.NT <= cuts.num_sums(processors)


def test_many_rows_leave_few_processors_idle() -> None:
    """Of Llama-8B, on an H200."""
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    found = {rows: [cuts.many(rows, *shape, False, *HOPPER) for shape in shapes] for rows in (64, 128, 256)}
    assert {rows: [(cut.NT, cut.SPLIT) for cut in all_cuts] for rows, all_cuts in found.items()} == {
        64: [(8, 2), (8, 4), (8, 1), (8, 4)],
        128: [(16, 2), (8, 2), (16, 1), (16, 4)],
        256: [(32, 2), (16, 2), (32, 1), (32, 4)],
    }


def test_no_rows_are_no_launch() -> None:
    weight = torch.zeros(32, 128, dtype=torch.bfloat16)
    few_rows.multiply(weight[:0], weight, torch.empty(0, 32))
    numbers = weight.to(torch.int8)
    few_rows.multiply_int8(numbers[:0], torch.empty(0), numbers, torch.ones(32), torch.empty(0, 32))
