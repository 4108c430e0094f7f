"""Gated products of many rows on Hopper: what the weight's halves give is multiplied where it was summed and
never written (8,192 rows of Llama-8B, H200: 2.86 ms, where a product and its gate take 2.92)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pelton.ops.cuda.cuts import MAX_ROWS
from pelton.ops.cuda.launch import OVERLAPS, has_wgmma, num_processors, place_in_band
from pelton.ops.cuda.program import is_compiling
from pelton.ops.cuda.rows import LOG2_E, turn_of
from pelton.ops.cuda.tiles import HALVES, is_aligned
from pelton.ops.tiles import Tiles

ROWS, OUTS, COLUMNS = 128, 128, 64  # of a tile: of x, of each half of the weight, and what is multiplied at a time
FEW = 256  # rows
BAND = tl.constexpr(8)  # tiles of x whose programs run together, so that they share the weight in the L2 cache


def accepts(x: Tensor, weight: Tensor | Tiles) -> bool:
    """Whether `multiply` takes x [M, K] and [gate | up] [2N, K], or what is opened to that, which tensor maps must be
    able to describe, and is faster than torch. While kernels are compiled it takes any number of many rows."""
    num_rows, num_out = x.shape[0], weight.shape[0] // 2
    return (
        num_rows > MAX_ROWS and x.dtype in HALVES and has_wgmma(x.device)
        and (isinstance(weight, Tiles) or weight.dtype == x.dtype) and is_aligned(x)
        and all(size % 8 == 0 for size in (x.shape[1], num_out))
        and (is_compiling() or is_faster(num_rows, num_out, num_processors(x.device)))
    )


def is_faster(num_rows: int, num_out: int, processors: int) -> bool:
    """Whether few processors are idle, of which each multiplies a whole tile at a time: torch has smaller tiles. (As
    measured for Llama-8B and Gemma-12B; between 256 and 1,024 rows torch's divide best.)"""
    tiles = triton.cdiv(num_rows, ROWS) * triton.cdiv(num_out, OUTS)
    whole = triton.cdiv(tiles, processors) * processors * ROWS * OUTS
    return bool(num_rows * num_out >= (0.84 if num_rows <= FEW else 0.9) * whole)


def multiply(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, gate: str) -> None:
    """out [M, N] = gate(x G^T) * (x U^T), with a bias [2N] each, where [G | U] is the weight."""
    (num_rows, num_in), num_out = x.shape, weight.shape[0] // 2
    tiles = triton.cdiv(num_rows, ROWS) * triton.cdiv(num_out, OUTS)
    _kernel[(min(tiles, num_processors(x.device)),)](
        TensorDescriptor.from_tensor(out, [ROWS, OUTS]), TensorDescriptor.from_tensor(x, [ROWS, COLUMNS]),
        TensorDescriptor.from_tensor(weight.view(2, num_out, num_in), [2, OUTS, COLUMNS]), bias,
        num_rows, num_out, num_in, GELU=gate == "gelu_tanh", ROWS=ROWS, OUTS=OUTS, COLUMNS=COLUMNS,
        num_warps=8, num_stages=4 if num_rows <= FEW else 3,
    )


@triton.jit
def _sigmoid(x):
    """By two instructions that are right to 2^-22 and, as all of them would wait for it, no more."""
    if OVERLAPS:
        x = tl.inline_asm_elementwise(
            "{ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;}", "=f,f",
            [x * -LOG2_E], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        x = tl.sigmoid(x)
    return x


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    out, x, halves, bias, num_rows, num_out, num_in, GELU: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tiles [ROWS, OUTS] in turn; flattened loops bring the next one's numbers while one is stored. To wait for the
    kernel before in here, and not outside, costs 1%."""
    num_down, num_across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_out, OUTS)
    first, step = tl.program_id(0), tl.num_programs(0)
    for i in tl.range(tl.cdiv(num_down * num_across - first, step), flatten=True):
        m, n = place_in_band(first + i * step, num_down, num_across, BAND)
        m, n = m * ROWS, n * OUTS
        sums = tl.zeros([ROWS, 2 * OUTS], tl.float32)
        for k in range(tl.cdiv(num_in, COLUMNS)):
            left = x.load([m, k * COLUMNS])
            right = halves.load([0, n, k * COLUMNS]).reshape(2 * OUTS, COLUMNS)
            sums = tl.dot(left, right.T, sums)
        gate, up = sums.reshape(ROWS, 2, OUTS).permute(0, 2, 1).split()
        if bias is not None:
            column = n + tl.arange(0, OUTS)
            gate += tl.load(bias + column, mask=column < num_out, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + num_out + column, mask=column < num_out, other=0.0).to(tl.float32)[None, :]
        out.store([m, n], (gate * _sigmoid(turn_of(gate, GELU)) * up).to(out.dtype))
