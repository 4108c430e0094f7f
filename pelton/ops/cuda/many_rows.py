"""Products of many rows with codes on Hopper, at the speed of multiplying (many_rows.cu)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pelton.ops.cuda import cuts
from pelton.ops.cuda.launch import has_wgmma, num_processors, shared_memory
from pelton.ops.cuda.program import is_compiling
from pelton.ops.cuda.tiles import HALVES, function, has_values, is_aligned, layout, piece_bytes, pointers, say_product
from pelton.ops.tiles import COLUMNS, ROWS, Tiles

MIN_ROWS = 33  # fewer are multiplied faster by more_rows.cu
MAX_ROWS = 1024  # for more it costs less to open codes in memory than what cuBLAS gains; there is room for their sums
MAX_WHOLE_ROWS = 4096  # at a time where neither matters: of prompts, if no two blocks share columns


class _LayOut(ctypes.Structure):
    """Args of lay_out.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "x")),
        *((name, ctypes.c_int) for name in ("M", "K", "x_stride", "NT")),
    ]


def accepts(x: Tensor, weight: Tiles, out: Tensor) -> bool:
    """Whether `multiply` takes x [M, K], a weight [N, K] and an output."""
    return MIN_ROWS <= x.shape[0] <= MAX_ROWS and accepts_same(x, weight, out)


def accepts_gated(x: Tensor, weight: Tiles) -> bool:
    """Whether `multiply` takes a gate too, and an output of its own."""
    return accepts(x, weight, x) and weight.shape[0] % (2 * ROWS) == 0


def accepts_same(x: Tensor, weight: Tiles, out: Tensor) -> bool:
    """Whether `multiply_same` takes x [M, K], a weight [N, K] and an output, whatever M is."""
    num_out, num_in = weight.shape
    return (
        x.dtype in HALVES and has_wgmma(x.device) and num_in % COLUMNS == 0 and num_out % ROWS == 0
        and is_aligned(x) and is_aligned(out)
    )


def multiply(
    x: Tensor, weight: Tiles, out: Tensor, bias: Tensor | None = None, accumulate: bool = False, gate: str = ""
) -> None:
    """out = x W^T (+ bias), or added to out: see few_rows.multiply."""
    _multiply(x, weight, out, bias, accumulate, gate)


def multiply_same(
    x: Tensor, weight: Tiles, out: Tensor, bias: Tensor | None = None, accumulate: bool = False, gate: str = ""
) -> None:
    """The same, where a row has the same bits whatever the number of rows."""
    split = cuts.same_split(*weight.shape, num_processors(x.device))
    most = MAX_WHOLE_ROWS if split == 1 else MAX_ROWS
    for begin in range(0, x.shape[0], most):
        rows = slice(begin, begin + most)
        _multiply(x[rows], weight, out[rows], bias, accumulate, gate, split, most)


def _multiply(
    x: Tensor, weight: Tiles, out: Tensor, bias: Tensor | None, accumulate: bool, gate: str, split: int | None = None,
    most: int = MAX_ROWS,
) -> None:
    """split: the blocks that share columns, if they are given. most: rows that x may have another time."""
    (num_rows, num_in), num_out, device = x.shape, weight.shape[0], x.device
    if num_rows == 0:
        return
    shape = num_out, num_in, has_values(weight), num_processors(device), shared_memory(device), split
    defines = {**layout(weight, x.dtype, gate), "OUT32": int(out.dtype == torch.float32)}
    if is_compiling():
        for cut in cuts.all_many(most, *shape):
            function(cut.kernel, {**defines, **cut.defines}, device)
    cut = cuts.many(num_rows, *shape)
    args, laid_out = pointers(weight), lay_out(x, cut.NT, weight.group == 16)
    say_product(args, num_rows, weight, out, bias, accumulate)
    args.x = laid_out.data_ptr()
    kernel = function(cut.kernel, {**defines, **cut.defines}, device)
    kernel.launch(cut.grid(num_out), cut.num_threads, args, cut.shared_bytes(piece_bytes(weight)))


def lay_out(x: Tensor, row_tiles: int, group_of_16: bool) -> Tensor:
    """x [M, K] in the order in which many_rows.cu copies it: [M / (8 n), K / 128, 8 n, 128] for n row tiles."""
    (num_rows, num_in), rows = x.shape, 8 * row_tiles
    shape = -(-num_rows // rows), -(-num_in // (2 * COLUMNS)), rows, 2 * COLUMNS
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    args = _LayOut(out.data_ptr(), x.data_ptr(), num_rows, num_in, x.stride(0), row_tiles)
    num_warps = shape[0] * shape[1] * row_tiles
    function("lay_out", {"GROUP_16": int(group_of_16)}, x.device).launch((num_warps // 8, 1), 256, args)
    return out
