"""Products of int8 rows with an int8 weight. Sums are exact, so how they are cut changes nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pelton.ops.cuda.launch import OVERLAP, num_processors, place_in_band, shared_memory, wait_for_inputs

COLUMNS = 128  # of both, multiplied at once
BAND = 8  # blocks of rows that are multiplied with the same rows of the weight one after the other: they stay in caches


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    out_ptr, x_ptr, x_scales_ptr, weight_ptr, scales_ptr, bias_ptr, num_rows, num_out, num_in, out_stride,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, WHOLE: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr,
    OUT: tl.constexpr, COLUMNS: tl.constexpr,
):
    """ROWS x OUT numbers of the result a program. WHOLE: num_in is a multiple of COLUMNS."""
    wait_for_inputs()
    down, across = place_in_band(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(num_out, OUT), BAND)
    row, n = down * ROWS + tl.arange(0, ROWS), across * OUT + tl.arange(0, OUT)
    column = tl.arange(0, COLUMNS)
    # What lies behind the last row is read as that row, and not written.
    x = x_ptr + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * num_in + column[None, :]
    weight = weight_ptr + tl.minimum(n, num_out - 1).to(tl.int64)[None, :] * num_in + column[:, None]
    sums = tl.zeros([ROWS, OUT], tl.int32)
    for start in range(0, num_in, COLUMNS):
        if WHOLE:
            sums = tl.dot(tl.load(x + start), tl.load(weight + start), sums, out_dtype=tl.int32)
        else:
            inside = start + column < num_in
            numbers = tl.load(x + start, mask=inside[None, :], other=0)
            others = tl.load(weight + start, mask=inside[:, None], other=0)
            sums = tl.dot(numbers, others, sums, out_dtype=tl.int32)
    x_scales = tl.load(x_scales_ptr + row, mask=row < num_rows, other=0.0)
    scales = tl.load(scales_ptr + n, mask=n < num_out, other=0.0)
    y = sums.to(tl.float32) * x_scales[:, None] * scales[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < num_out, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row.to(tl.int64)[:, None] * out_stride + n[None, :]
    inside = (row < num_rows)[:, None] & (n < num_out)[None, :]
    if ACCUMULATE:
        y = tl.load(out, mask=inside, other=0.0).to(tl.float32) + y
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, out: Tensor, bias: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out = x W^T, times the scales of both rows (+ bias), or added to out. x int8 [M, K], its scales float32 [M];
    W int8 [N, K], its scales float32 [N]; bias [N]; out [M, N], both of any dtype of activations."""
    num_rows, num_in = x.shape
    num_out = weight.shape[0]
    rows, outs, warps = _cut(num_rows, num_out, num_processors(x.device))
    stages = min(4, shared_memory(x.device) // ((rows + outs) * COLUMNS))
    grid = triton.cdiv(num_rows, rows) * triton.cdiv(num_out, outs)
    if grid:
        _matmul_kernel[(grid,)](
            out, x, x_scales, weight, scales, bias, num_rows, num_out, num_in, out.stride(0), HAS_BIAS=bias is not None,
            ACCUMULATE=accumulate, WHOLE=num_in % COLUMNS == 0, BAND=BAND, ROWS=rows, OUT=outs, COLUMNS=COLUMNS,
            num_warps=warps, num_stages=stages, enable_fp_fusion=False, **OVERLAP,  # rounds as few_rows.cu does
        )


def _cut(num_rows: int, num_out: int, processors: int) -> tuple[int, int, int]:
    """Rows of x and of the weight for one program, and its warps: as many as leave work for all processors."""
    if num_rows <= 64:
        return 64, 64, 4
    for rows, outs, warps in ((128, 256, 8), (128, 128, 8)):
        if triton.cdiv(num_rows, rows) * triton.cdiv(num_out, outs) >= processors:
            return rows, outs, warps
    return 64, 128, 4
