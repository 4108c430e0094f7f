"""Products whose rows have the same bits whatever stands beside them: each number of x W^T is one sum in one order.

The weight's rows are the first operand of every mma and x's rows the second, which only adds columns: on Hopper all
sizes of tiles multiply by wgmma.m64nNk16. A sum is cut into as many parts as the weight's shape asks for, so that few
rows keep the memory busy. Each part is summed alone, in order of columns, and parts are added in order: by one program
where there are many tiles, else by the last of those that summed a part each.

Of few rows dense_rows.cu adds up the same parts, on Hopper, where an mma of 16 columns has the bits of a wgmma's, in
whatever order these stand. Of quantised weights few_rows multiplies up to 64 rows at a time, by kernels that sum each
number in one order too. Prompts have another: many_rows multiplies them, on Hopper, if it takes the weight, else codes
are opened first. A token is always computed as part of a prompt or always as a decode (see Scheduler), and what is
multiplied together is of one kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from pelton.ops.cuda import cuts, few_rows, many_rows
from pelton.ops.cuda.launch import (
    OVERLAP,
    counters,
    has_tma,
    num_processors,
    place_in_band,
    shared_memory,
    wait_for_inputs,
)
from pelton.ops.cuda.tiles import open_tiles
from pelton.ops.prompts import are_prompts
from pelton.ops.tiles import Tiles

LINE = 128  # bytes of a row that are multiplied at a time
MAX_PARTS = 8
MIN_PART = 512  # columns
GROUP = tl.constexpr(8)  # tiles of x whose programs run together, so that they share the weight in the L2 cache


class Tile(NamedTuple):
    """What one program computes, and with what."""

    rows: int  # of x
    outs: int  # rows of the weight: a multiple of 64
    num_warps: int
    num_stages: int


# For up to so many rows of x: of a weight with less than 128 rows for each processor, and with more. No bit depends on
# them. The largest is for wgmma; if it adds parts it has more sums than registers, but moves them between parts only.
MEDIUM_TILE, LARGE_TILE = Tile(128, 128, 8, 3), Tile(256, 128, 8, 4)
HALF_TILES = {
    16: (Tile(16, 64, 4, 10), Tile(16, 64, 4, 10)),
    32: (Tile(32, 64, 4, 8), Tile(32, 64, 4, 8)),
    64: (Tile(64, 64, 4, 6), Tile(64, 128, 8, 4)),
    128: (Tile(128, 64, 4, 4), Tile(128, 128, 8, 3)),
    256: (MEDIUM_TILE, LARGE_TILE),
}
FLOAT_TILES = {16: (Tile(16, 64, 4, 4), Tile(16, 64, 4, 4))}
LARGE_FLOAT_TILE = Tile(64, 64, 8, 3)


def num_parts(num_out: int, num_in: int, processors: int) -> int:
    """Parts of a sum: as many as give nearly all processors work where x has few rows."""
    parts = 1
    while parts < MAX_PARTS and 8 * parts * -(-num_out // 64) < 7 * processors and num_in >= 2 * parts * MIN_PART:
        parts *= 2
    return parts


def choose_tile(num_rows: int, num_out: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """For rows of x and of the weight."""
    tiles, tile = (FLOAT_TILES, LARGE_FLOAT_TILE) if dtype == torch.float32 else (HALF_TILES, LARGE_TILE)
    for most, (narrow, wide) in tiles.items():
        if num_rows <= most:
            tile = wide if num_out >= 128 * num_processors(device) else narrow
            break
    return tile if tile is not LARGE_TILE or has_tma(device) else MEDIUM_TILE


def multiply(
    x: Tensor, weight: Tensor | Tiles, out: Tensor, bias: Tensor | None = None, accumulate: bool = False,
    gate: str = "", then: Tensor | Tiles | None = None,
) -> None:
    """out = x W^T (+ bias), or added to out. x [M, K]; weight: W [N, K] in x's dtype, or tiles; out [M, N] in x's dtype
    or float32; bias in x's dtype. `gate`, if `accepts_gated`, and `then`, of few rows: see few_rows.multiply."""
    (num_rows, num_in), num_out = x.shape, weight.shape[0]
    if num_rows == 0:
        return
    if isinstance(weight, Tiles):
        x = _aligned(x)
        if not are_prompts():
            _multiply_few(x, weight, out, bias, accumulate, gate, then)
            return
        if many_rows.accepts_same(x, weight, out):
            many_rows.multiply_same(x, weight, out, bias, accumulate, gate)
            return
        if gate:
            raise ValueError("no kernel multiplies prompts by such a weight with its gate")
        weight = open_tiles(weight, x.dtype)
    processors = num_processors(x.device)
    columns = LINE // x.element_size()
    parts = num_parts(num_out, num_in, processors)
    if few_rows.accepts_parts(x, weight, parts):
        few_rows.multiply(x, weight, out, bias, accumulate, parts=parts)
        return
    tile = choose_tile(num_rows, num_out, x.dtype, x.device)
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_out, tile.outs)
    apart = parts > 1 and num_tiles * tile.num_warps <= 4 * processors  # less than a warp for each tensor core
    size = num_tiles * parts * tile.rows * tile.outs if apart else 0
    most_stages = (shared_memory(x.device) - (2 << 10)) // (LINE * (tile.rows + tile.outs))
    _kernel[(num_tiles, parts if apart else 1)](
        out, *_readable(x, tile.rows, columns), *_readable(weight, tile.outs, columns), bias,
        torch.empty(size, device=x.device), counters(x.device), num_rows, num_out, num_in, out.stride(0),
        ACCUMULATE=accumulate, PARTS=parts, APART=apart, ROWS=tile.rows, OUTS=tile.outs, COLUMNS=columns,
        num_warps=tile.num_warps, num_stages=min(tile.num_stages, most_stages), **OVERLAP,
    )


def accepts_gated(x: Tensor, weight: Tensor | Tiles) -> bool:
    """Whether `multiply` takes a gate, too, of a product of x [M, K] and a weight, whatever M is."""
    if not isinstance(weight, Tiles) or not few_rows.accepts_gated(x[:1], weight):
        return False
    return not are_prompts() or many_rows.accepts_same(x, weight, x)


def _multiply_few(
    x: Tensor, weight: Tiles, out: Tensor, bias: Tensor | None, accumulate: bool, gate: str, then: Tensor | Tiles | None
) -> None:
    """See `multiply`: as many rows at a time as few_rows takes."""
    num_rows, most = x.shape[0], cuts.MAX_ROWS
    for begin in range(0, num_rows, most):
        rows, following = slice(begin, begin + most), then if num_rows <= most else None
        few_rows.multiply(x[rows], weight, out[rows], bias, accumulate, gate, then=following, same=True)


def _aligned(x: Tensor) -> Tensor:
    """x [M, K], or a copy where rows do not begin at multiples of 16 bytes."""
    each = 16 // x.element_size()
    if x.stride(1) != 1 or x.stride(0) % each or x.data_ptr() % 16:
        x = F.pad(x, (0, -x.shape[1] % each)).clone(memory_format=torch.contiguous_format)
    return x


def _readable(x: Tensor, rows: int, columns: int) -> tuple[Any, int | None]:
    """x [M, K] for `_load`, with its stride."""
    x = _aligned(x)
    if has_tma(x.device):
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns]), None
    return x, x.stride(0)


@triton.jit
def _load(x, stride, row, k, num_rows, num_in, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers [ROWS, COLUMNS] from row and column k on, zeros where there are none; x is a descriptor, or a pointer
    with a stride."""
    if stride is None:
        numbers = x.load([row, k])
    else:
        row, k = row + tl.arange(0, ROWS), k + tl.arange(0, COLUMNS)
        place = x + row[:, None].to(tl.int64) * stride + k[None, :]
        numbers = tl.load(place, mask=(row < num_rows)[:, None] & (k < num_in)[None, :], other=0.0)
    return numbers


@triton.jit
def _sum(
    x, weight, x_stride, weight_stride, m, n, begin, end, num_rows, num_out, num_in, ROWS: tl.constexpr,
    OUTS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Products [OUTS, ROWS] of rows m.. of x and n.. of the weight, of columns begin to end."""
    sums = tl.zeros([OUTS, ROWS], tl.float32)
    for k in range(begin, tl.minimum(end, num_in), COLUMNS):
        left = _load(weight, weight_stride, n, k, num_out, num_in, OUTS, COLUMNS)
        right = _load(x, x_stride, m, k, num_rows, num_in, ROWS, COLUMNS)
        sums = tl.dot(left, right.T, sums, input_precision="ieee")
    return sums


@triton.jit
def _store(out, bias, sums, m, n, num_rows, num_out, out_stride, ACCUMULATE: tl.constexpr):
    """Sums [OUTS, ROWS] with a bias, to their place or added to what stands there."""
    row, column = m + tl.arange(0, sums.shape[1])[:, None], n + tl.arange(0, sums.shape[0])[None, :]
    inside = (row < num_rows) & (column < num_out)
    y = sums.T
    if bias is not None:
        y += tl.load(bias + column, mask=column < num_out, other=0.0).to(tl.float32)
    place = out + row.to(tl.int64) * out_stride + column
    if ACCUMULATE:
        y += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    out, x, x_stride, weight, weight_stride, bias, partial, arrived, num_rows, num_out, num_in, out_stride,
    ACCUMULATE: tl.constexpr, PARTS: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (tile, part) sums a part of a tile, or (tile, 0) all of it."""
    wait_for_inputs()
    tile = tl.program_id(0)
    m, n = place_in_band(tile, tl.cdiv(num_rows, ROWS), tl.cdiv(num_out, OUTS), GROUP)
    m, n = m * ROWS, n * OUTS
    length = tl.cdiv(num_in, PARTS * COLUMNS) * COLUMNS
    begin = tl.program_id(1) * length
    if APART or PARTS == 1:
        sums = _sum(
            x, weight, x_stride, weight_stride, m, n, begin, begin + length, num_rows, num_out, num_in, ROWS, OUTS,
            COLUMNS,
        )
    else:
        sums = tl.zeros([OUTS, ROWS], tl.float32)
        for begin in range(0, num_in, length):
            sums += _sum(
                x, weight, x_stride, weight_stride, m, n, begin, begin + length, num_rows, num_out, num_in, ROWS, OUTS,
                COLUMNS,
            )
    if not APART:
        _store(out, bias, sums, m, n, num_rows, num_out, out_stride, ACCUMULATE)
    else:
        place = tl.arange(0, OUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        place += partial + tile * (PARTS * OUTS * ROWS)
        tl.store(place + tl.program_id(1) * (OUTS * ROWS), sums)
        tl.debug_barrier()  # all of the part is there before it is told
        if tl.atomic_add(arrived + tile, 1) == PARTS - 1:
            total = tl.zeros([OUTS, ROWS], tl.float32)
            for part in range(PARTS):
                total += tl.load(place + part * (OUTS * ROWS), cache_modifier=".cg")
            _store(out, bias, total, m, n, num_rows, num_out, out_stride, ACCUMULATE)
            tl.store(arrived + tile, 0)
