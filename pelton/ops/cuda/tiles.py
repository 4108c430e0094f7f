"""What kernels in CUDA C++ are given of a weight, in numbers or in tiles (tiles.cuh), and the weight itself."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from pelton.ops.cuda.cuts import num_sums
from pelton.ops.cuda.launch import counters, num_processors
from pelton.ops.cuda.program import Function, load
from pelton.ops.tiles import COLUMNS, ROWS, Tiles

GATES = {"": 0, "silu": 1, "gelu_tanh": 2}
HALVES = (torch.bfloat16, torch.float16)


class Args(ctypes.Structure):
    """As in tiles.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "out", "x", "codes", "more", "scales", "supers", "values", "bias", "partial", "arrived", "ids", "next")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "out_stride", "x_stride", "accumulate", "next_bytes")),
        ("factor", ctypes.c_float), ("x_scales", ctypes.c_void_p),
    ]


def is_aligned(x: Tensor) -> bool:
    """Whether rows of x begin where kernels read and write 16 bytes at a time."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def pointers(weight: Tensor | Tiles) -> Args:
    """Arguments that say where a weight lies."""
    args = Args()
    if isinstance(weight, Tensor):
        args.codes = weight.data_ptr()
    else:
        for name in ("codes", "more", "scales", "supers", "values"):
            setattr(args, name, getattr(weight, name).data_ptr())
    return args


def say_product(
    args: Args, num_rows: int, weight: Tensor | Tiles, out: Tensor, bias: Tensor | None, accumulate: bool
) -> None:
    """Arguments that all products have, but their input."""
    args.out, args.bias = out.data_ptr(), 0 if bias is None else bias.data_ptr()
    args.partial, args.arrived = scratch(out.device).data_ptr(), counters(out.device).data_ptr()
    (args.N, args.K), args.M = weight.shape, num_rows
    args.out_stride, args.accumulate = out.stride(0), int(accumulate)


def layout(weight: Tensor | Tiles, dtype: torch.dtype, gate: str = "") -> dict[str, int]:
    """What is compiled in of a weight, a half precision and a gate."""
    common = {"HALF": int(dtype == torch.float16), "GATE": GATES[gate], "INT8": 0}
    if isinstance(weight, Tensor):
        return {**common, "NUMBERS": 1, "BITS": 16, "GROUP": 64, "SCALE": 16, "MIN": 0, "ZEROS": 0, "ZERO": 0,
                "LOOKUP": 0, "FLOAT8": 0}
    return {
        **common, "NUMBERS": 0, "BITS": weight.bits, "GROUP": weight.group, "SCALE": weight.scale_bits,
        "MIN": int(weight.has_min), "ZEROS": int(weight.has_zeros), "ZERO": weight.zero,
        "LOOKUP": int(has_values(weight)), "FLOAT8": int(weight.float8),
    }


def has_values(weight: Tensor | Tiles) -> bool:
    return isinstance(weight, Tiles) and weight.values.numel() > 0


def piece_bytes(weight: Tensor | Tiles) -> int:
    """What a lane needs of 16 rows and 64 columns: PIECE_BYTES of tiles.cuh."""
    if isinstance(weight, Tensor):
        return 64
    per_group = 1 + weight.has_min
    supers = 4 * per_group if weight.scale_bits == 8 else 0
    return weight.bits * 4 + 2 * max(1, COLUMNS // weight.group) * per_group * weight.scale_bits // 8 + supers


def function(name: str, defines: Mapping[str, int], device: torch.device) -> Function:
    """The kernel of that name, in a source file of that name."""
    return _function(name, tuple(sorted(defines.items())), device)


@cache
def _function(name: str, defines: tuple[tuple[str, int], ...], device: torch.device) -> Function:
    return load(f"{name}.cu", name, dict(defines), device)


@cache
def scratch(device: torch.device) -> Tensor:
    """Where blocks that share the columns of a product leave their sums."""
    return torch.empty(num_sums(num_processors(device)), device=device)


def open_tiles(tiles: Tiles, dtype: torch.dtype, ids: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """The weights [N, K], or rows `ids` int64 [T] of them, times a factor, in a half precision."""
    num_out, num_in = tiles.shape
    device = tiles.codes.device
    out = torch.empty(num_out if ids is None else len(ids), num_in, dtype=dtype, device=device)
    args = pointers(tiles)
    args.out, args.N, args.K, args.out_stride = out.data_ptr(), num_out, num_in, num_in
    args.ids, args.factor = None if ids is None else ids.data_ptr(), factor
    grid = -(-num_out // ROWS) if ids is None else len(ids), -(-num_in // (8 * COLUMNS))
    function("open_codes", {**layout(tiles, dtype), "OUT32": 0}, device).launch(grid, 256, args)
    return out
