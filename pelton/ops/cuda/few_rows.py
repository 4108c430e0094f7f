"""Products of few rows with a weight on a GPU: read the weight once, at memory speed (few_rows.cu, dense_rows.cu,
more_rows.cu)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pelton.ops.cuda import cuts
from pelton.ops.cuda.cuts import MAX_ROWS, MMA_ROWS, Cut
from pelton.ops.cuda.launch import has_tma, has_wgmma, num_processors, shared_memory
from pelton.ops.cuda.tiles import (
    HALVES,
    Args,
    function,
    has_values,
    is_aligned,
    layout,
    piece_bytes,
    pointers,
    say_product,
)
from pelton.ops.tiles import COLUMNS, ROWS, Tiles

MAX_INT8_ROWS = 16
PREFETCHED = 4 << 20  # bytes of the next weight, as many as memory gives in a pause


def accepts(x: Tensor, weight: Tensor | Tiles) -> bool:
    """Whether the product of x [M, K] and a weight is this kernel's."""
    same = not isinstance(weight, Tensor) or weight.dtype == x.dtype
    return x.shape[0] <= MAX_ROWS and x.dtype in HALVES and same and is_aligned(x) and weight.shape[1] % COLUMNS == 0


def accepts_gated(x: Tensor, weight: Tensor | Tiles) -> bool:
    """Whether `multiply` takes a gate too."""
    return accepts(x, weight) and weight.shape[0] % (2 * ROWS) == 0


def multiply(
    x: Tensor, weight: Tensor | Tiles, out: Tensor, bias: Tensor | None = None, accumulate: bool = False,
    gate: str = "", then: Tensor | Tiles | None = None, same: bool = False, parts: int | None = None,
) -> None:
    """out = x W^T (+ bias), or added to out. x [M, K]; weight: W [N, K] in x's dtype, or tiles; out [M, N] in x's dtype
    or float32; bias in x's dtype. With a gate ("silu", "gelu_tanh") W is [gate | up]: out [M, N / 2] = gate(..) up.
    `then`: the weight that is multiplied after tiles; its first bytes are brought into the cache meanwhile. With
    `same`, a row has the same bits whatever the number of rows; so it has with `parts` of a sum, if `accepts_parts`."""
    cut = _cut(x, weight, bool(gate), same) if parts is None else _cut_in_parts(x, weight, parts)
    if cut is None:
        raise ValueError(f"no kernel multiplies {x.shape[0]} rows by {list(weight.shape)} in {parts} parts")
    defines = layout(weight, x.dtype, gate)
    args = pointers(weight)
    if then is not None:
        codes = then if isinstance(then, Tensor) else then.codes
        args.next, args.next_bytes = codes.data_ptr(), min(codes.nbytes, PREFETCHED)
    _launch(x, weight, out, bias, accumulate, cut, defines, args)


def _cut(x: Tensor, weight: Tensor | Tiles, is_gated: bool, same: bool) -> Cut:
    """The kernel and how it cuts the work."""
    num_rows, (num_out, num_in), is_dense = x.shape[0], weight.shape, isinstance(weight, Tensor)
    given = num_rows, num_out, num_in, is_gated
    processors, memory = num_processors(x.device), shared_memory(x.device)
    dense = _cut_dense(x, weight) if is_dense and not same else None
    if dense is not None:
        return dense
    if cuts.is_few(num_rows, num_out, num_in, processors, same):
        cut = cuts.few(*given, is_dense, processors, same)
        return cuts.with_table(cut, num_out, processors, memory) if has_values(weight) else cut
    num_bytes, has_min = piece_bytes(weight), isinstance(weight, Tiles) and weight.has_min
    parts = cuts.same_parts(num_out, num_in, processors) if same else None
    if parts is not None and num_rows <= MMA_ROWS:
        more = cuts.same_of_few(num_out, num_bytes, has_values(weight), parts, processors, memory)
    elif has_wgmma(x.device):
        more = cuts.more_on_hopper(*given, num_bytes, has_min, processors, memory, parts)
    else:
        more = cuts.more(*given, num_bytes, processors, memory, parts)
    return cuts.with_more_table(more, num_bytes, memory) if has_values(weight) else more


def _cut_dense(x: Tensor, weight: Tensor | Tiles) -> Cut | None:
    """How dense_rows.cu cuts the work, if it can."""
    if not has_tma(x.device):
        return None
    return cuts.dense(x.shape[0], *weight.shape, num_processors(x.device), shared_memory(x.device))


def accepts_parts(x: Tensor, weight: Tensor, parts: int) -> bool:
    """Whether `multiply` takes a weight in numbers with so many parts of a sum. Each is a chain of products of 16
    columns, whose bits on Hopper are those of wgmma."""
    is_whole = weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return accepts(x, weight) and is_whole and has_wgmma(x.device) and _cut_in_parts(x, weight, parts) is not None


def _cut_in_parts(x: Tensor, weight: Tensor | Tiles, parts: int) -> Cut | None:
    return cuts.dense_in_parts(x.shape[0], *weight.shape, parts, num_processors(x.device), shared_memory(x.device))


def accepts_int8(x: Tensor, out: Tensor, bias: Tensor | None) -> bool:
    """Whether `multiply_int8` takes x [M, K] and such a bias."""
    return x.shape[0] <= MAX_INT8_ROWS and x.shape[1] % (2 * COLUMNS) == 0 and (bias is None or out.dtype in HALVES)


def multiply_int8(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, out: Tensor, bias: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out = x W^T, times the scales of both rows (+ bias), or added to out; sums are exact. x int8 [M, K], its scales
    float32 [M]; W int8 [N, K], its scales float32 [N]; out [M, N] in a half precision or float32; bias in the former.
    """
    x, weight = x.view(torch.int16), weight.view(torch.int16)  # pairs lie where the kernel has numbers
    cut = _cut_dense(x, weight) or cuts.few(x.shape[0], *weight.shape, False, True, num_processors(x.device))
    defines = {**layout(weight, out.dtype), "INT8": 1}
    args = pointers(weight)
    args.scales, args.x_scales = scales.data_ptr(), x_scales.data_ptr()
    _launch(x, weight, out, bias, accumulate, cut, defines, args)


def _launch(
    x: Tensor, weight: Tensor | Tiles, out: Tensor, bias: Tensor | None, accumulate: bool, cut: Cut,
    compiled_in: Mapping[str, int], args: Args,
) -> None:
    """`args`: those of the weight, and all bytes that are to be brought into the cache."""
    if x.shape[0] == 0:
        return  # kernels read the last row in place of rows that are not there
    defines = {**compiled_in, "OUT32": int(out.dtype == torch.float32), **cut.defines}
    say_product(args, x.shape[0], weight, out, bias, accumulate)
    args.x, args.x_stride = x.data_ptr(), x.stride(0)
    grid = cut.grid(weight.shape[0])
    args.next_bytes = args.next_bytes // (grid[0] * grid[1]) // 16 * 16
    kernel = function(cut.kernel, defines, x.device)
    kernel.launch(grid, cut.num_threads, args, cut.shared_bytes(piece_bytes(weight)))
