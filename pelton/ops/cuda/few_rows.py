"""Products of few rows with a weight on a GPU: reads the weight once, at memory speed (few_rows.cu)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pelton.ops.cuda.launch import num_processors
from pelton.ops.cuda.program import Function, load
from pelton.ops.tiles import COLUMNS, ROWS, Tiles

MAX_ROWS = 64
MAX_SPLIT = 8
MAX_GATED_ROWS = 16
MAX_INT8_ROWS = 16
GATES = {"": 0, "silu": 1, "gelu_tanh": 2}
HALVES = (torch.bfloat16, torch.float16)


class _Args(ctypes.Structure):
    """As in few_rows.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "out", "x", "codes", "more", "scales", "supers", "values", "bias", "partial", "arrived", "ids")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "out_stride", "x_stride", "accumulate")),
        ("factor", ctypes.c_float), ("x_scales", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class _Shape:
    """How work is cut: rows of x / 8, tiles of 16 weight rows of a warp, warps of a block, blocks that share columns;
    and how many pieces a warp asks for ahead."""

    NT: int
    MT: int
    WARPS: int
    SPLIT: int
    AHEAD: int

    @property
    def shared_bytes(self) -> int:
        return 4 * self.WARPS * 16 * self.MT * (8 * self.NT + 1)


def accepts(x: Tensor, weight: Tensor | Tiles) -> bool:
    """Whether the product of x [M, K] and a weight is this kernel's."""
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    same = not isinstance(weight, Tensor) or weight.dtype == x.dtype
    return x.shape[0] <= MAX_ROWS and x.dtype in HALVES and same and aligned and weight.shape[1] % COLUMNS == 0


def accepts_gated(x: Tensor, weight: Tensor | Tiles) -> bool:
    """Whether `multiply` takes a gate too."""
    return accepts(x, weight) and x.shape[0] <= MAX_GATED_ROWS and weight.shape[0] % (2 * ROWS) == 0


def multiply(
    x: Tensor, weight: Tensor | Tiles, out: Tensor, bias: Tensor | None = None, accumulate: bool = False, gate: str = ""
) -> None:
    """out = x W^T (+ bias), or added to out. x [M, K]; weight: W [N, K] in x's dtype, or tiles; out [M, N] in x's dtype
    or float32; bias in x's dtype. With a gate ("silu", "gelu_tanh") W is [gate | up]: out [M, N / 2] = gate(..) up."""
    shape = _cut(x.shape[0], *weight.shape, isinstance(weight, Tensor), num_processors(x.device))
    if gate:
        shape = replace(shape, MT=2, SPLIT=1)
    defines = {**_layout(weight), "HALF": int(x.dtype == torch.float16), "GATE": GATES[gate]}
    _launch(x, weight.shape, out, bias, accumulate, shape, defines, _pointers(weight))


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
    shape = _cut(x.shape[0], *weight.shape, True, num_processors(x.device))
    defines = {**_layout(weight), "INT8": 1, "HALF": int(out.dtype == torch.float16), "GATE": 0}
    args = _pointers(weight)
    args.scales, args.x_scales = scales.data_ptr(), x_scales.data_ptr()
    _launch(x, weight.shape, out, bias, accumulate, shape, defines, args)


def _launch(
    x: Tensor, weight_shape: Sequence[int], out: Tensor, bias: Tensor | None, accumulate: bool, shape: _Shape,
    layout: Mapping[str, int], args: _Args,
) -> None:
    """`args`: those of the weight."""
    num_out, num_in = weight_shape
    defines = {**layout, "OUT32": int(out.dtype == torch.float32), **vars(shape)}
    partial, arrived = _scratch(x.device)
    args.out, args.x, args.bias = out.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr()
    args.partial, args.arrived = partial.data_ptr(), arrived.data_ptr()
    args.M, args.N, args.K = x.shape[0], num_out, num_in
    args.out_stride, args.x_stride, args.accumulate = out.stride(0), x.stride(0), int(accumulate)
    blocks = -(-num_out // (ROWS * shape.MT))  # with a gate too: a block has a tile of either half
    _function("few_rows", tuple(sorted(defines.items())), shape.shared_bytes, x.device).launch(
        (blocks, shape.SPLIT), 32 * shape.WARPS, args, x.device
    )


def open_tiles(tiles: Tiles, dtype: torch.dtype, ids: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """The weights [N, K], or rows `ids` int64 [T] of them, times a factor, in a half precision."""
    num_out, num_in = tiles.shape
    device = tiles.codes.device
    out = torch.empty(num_out if ids is None else len(ids), num_in, dtype=dtype, device=device)
    args = _pointers(tiles)
    args.out, args.N, args.K, args.out_stride = out.data_ptr(), num_out, num_in, num_in
    args.ids, args.factor = None if ids is None else ids.data_ptr(), factor
    defines = {**_layout(tiles), "HALF": int(dtype == torch.float16), "OUT32": 0, "GATE": 0}
    defines |= vars(_Shape(1, 1, 8, 1, 1))
    grid = -(-num_out // ROWS) if ids is None else len(ids), -(-num_in // (8 * COLUMNS))
    _function("open_codes", tuple(sorted(defines.items())), 0, device).launch(grid, 256, args, device)
    return out


@cache
def _cut(num_rows: int, num_out: int, num_in: int, is_dense: bool, processors: int) -> _Shape:
    """Enough warps to keep the memory busy: measured on an H200. More rows of the weight a warp where there are many,
    as it reads x for each tile."""
    nt = 1 << max(0, -(-num_rows // 8) - 1).bit_length()
    tiles = -(-num_out // ROWS)
    few, wide, deep = tiles <= 2 * processors, tiles > 4 * processors, num_in >= 8192
    if is_dense:
        warps, mt, ahead, split = 8, 1, 4 if few else 2, 1
    elif nt <= 2:
        warps, mt, ahead, split = (16, 2, 3, 1) if few else (4, 2, 3, 1) if wide else (8, 1, 3, 1)
    elif nt == 4:
        warps, mt, ahead, split = (8, 2, 3, 1) if few and not deep else (4 if wide else 8, 4, 2, 2 if few else 1)
    else:
        warps, mt, ahead, split = (4, 2, 2, 2 if few and deep else 1)
    return _Shape(nt, mt, warps, split, ahead)


def _layout(weight: Tensor | Tiles) -> Mapping[str, int]:
    if isinstance(weight, Tensor):
        return {"NUMBERS": 1, "BITS": 16, "GROUP": 64, "SCALE": 16, "MIN": 0, "ZERO": 0, "LOOKUP": 0, "FLOAT8": 0,
                "INT8": 0}
    return {
        "NUMBERS": 0, "BITS": weight.bits, "GROUP": weight.group, "SCALE": weight.scale_bits,
        "MIN": int(weight.has_min), "ZERO": weight.zero, "LOOKUP": int(weight.values.numel() > 0),
        "FLOAT8": int(weight.float8), "INT8": 0,
    }


def _pointers(weight: Tensor | Tiles) -> _Args:
    args = _Args()
    if isinstance(weight, Tensor):
        args.codes = weight.data_ptr()
    else:
        for name in ("codes", "more", "scales", "supers", "values"):
            setattr(args, name, getattr(weight, name).data_ptr())
    return args


@cache
def _function(name: str, defines: tuple[tuple[str, int], ...], shared_bytes: int, device: torch.device) -> Function:
    return load("few_rows.cu", name, dict(defines), shared_bytes, device)


@cache
def _scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of blocks that share columns, and how many of them are there: for one product at a time."""
    most = 4 * num_processors(device) * ROWS * 4 * MAX_ROWS
    return torch.empty(most, device=device), torch.zeros(4096, dtype=torch.int32, device=device)
