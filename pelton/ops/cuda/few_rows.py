"""Products of few rows with a weight on a GPU: read the weight once, at memory speed (few_rows.cu, more_rows.cu)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pelton.ops.cuda.launch import num_processors
from pelton.ops.cuda.program import Function, load
from pelton.ops.tiles import COLUMNS, ROWS, Tiles

MAX_ROWS = 64
MAX_SPLIT = 8
PREFETCHED = 8 << 20  # bytes of the next weight, as many as memory gives in a pause
GATES = {"": 0, "silu": 1, "gelu_tanh": 2}
HALVES = (torch.bfloat16, torch.float16)


class _Args(ctypes.Structure):
    """As in few_rows.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "out", "x", "codes", "more", "scales", "supers", "values", "bias", "partial", "arrived", "ids", "next")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "out_stride", "x_stride", "accumulate", "next_bytes")),
        ("factor", ctypes.c_float),
    ]


@dataclass(frozen=True)
class _Shape:
    """How work is cut: rows of x / 8, tiles of 16 weight rows of a warp, warps of a block, blocks that share columns;
    and how many pieces a warp asks for ahead. With `shares_x` it is more_rows.cu's, else few_rows.cu's."""

    NT: int
    MT: int
    WARPS: int
    SPLIT: int
    AHEAD: int
    shares_x: bool = False

    @property
    def kernel(self) -> str:
        return "more_rows" if self.shares_x else "few_rows"

    @property
    def shared_bytes(self) -> int:
        if self.shares_x:  # four stages of 128 columns, and the sums of at most eight groups
            return 8 * self.NT * (4 * 2 * (128 + 32) + 2 * 8 * 4)
        return 4 * self.WARPS * 16 * self.MT * (8 * self.NT + 1)

    def blocks(self, num_out: int) -> int:
        """Blocks beside each other."""
        return -(-num_out // (ROWS * self.MT * (self.WARPS if self.shares_x else 1)))

    def defines(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("NT", "MT", "WARPS", "SPLIT", "AHEAD")}


def accepts(x: Tensor, weight: Tensor | Tiles) -> bool:
    """Whether the product of x [M, K] and a weight is this kernel's."""
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    same = not isinstance(weight, Tensor) or weight.dtype == x.dtype
    return x.shape[0] <= MAX_ROWS and x.dtype in HALVES and same and aligned and weight.shape[1] % COLUMNS == 0


def accepts_gated(x: Tensor, weight: Tensor | Tiles) -> bool:
    """Whether `multiply` takes a gate too."""
    return accepts(x, weight) and weight.shape[0] % (2 * ROWS) == 0


def multiply(
    x: Tensor, weight: Tensor | Tiles, out: Tensor, bias: Tensor | None = None, accumulate: bool = False,
    gate: str = "", then: Tensor | Tiles | None = None,
) -> None:
    """out = x W^T (+ bias), or added to out. x [M, K]; weight: W [N, K] in x's dtype, or tiles; out [M, N] in x's dtype
    or float32; bias in x's dtype. With a gate ("silu", "gelu_tanh") W is [gate | up]: out [M, N / 2] = gate(..) up.
    `then`: the weight that is multiplied after this one. Its first bytes are brought into the cache meanwhile."""
    num_out, num_in = weight.shape
    shape = _cut(x.shape[0], num_out, num_in, isinstance(weight, Tensor), num_processors(x.device))
    if gate:
        shape = replace(shape, MT=2, SPLIT=shape.SPLIT if shape.shares_x else 1)
    defines = {**_layout(weight), "HALF": int(x.dtype == torch.float16), "OUT32": int(out.dtype == torch.float32),
               "GATE": GATES[gate], **shape.defines()}
    partial, arrived = _scratch(x.device)
    args = _pointers(weight)
    args.out, args.x, args.bias = out.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr()
    args.partial, args.arrived = partial.data_ptr(), arrived.data_ptr()
    args.M, args.N, args.K = x.shape[0], num_out, num_in
    args.out_stride, args.x_stride, args.accumulate = out.stride(0), x.stride(0), int(accumulate)
    blocks = shape.blocks(num_out)  # with a gate too: a warp has a tile of either half
    if then is not None:
        codes = then if isinstance(then, Tensor) else then.codes
        args.next = codes.data_ptr()
        args.next_bytes = min(codes.nbytes, PREFETCHED) // (blocks * shape.SPLIT) // 16 * 16
    _function(shape.kernel, tuple(sorted(defines.items())), shape.shared_bytes, x.device).launch(
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
    grid = -(-num_out // ROWS) if ids is None else len(ids), -(-num_in // (8 * COLUMNS))
    _function("open_codes", tuple(sorted(defines.items())), 0, device).launch(grid, 256, args, device)
    return out


@cache
def _cut(num_rows: int, num_out: int, num_in: int, is_dense: bool, processors: int) -> _Shape:
    """Enough warps to keep the memory busy: measured on an H200."""
    nt = 1 << max(0, -(-num_rows // 8) - 1).bit_length()
    tiles = -(-num_out // ROWS)
    few, wide = tiles <= 2 * processors, tiles > 4 * processors
    if nt == 1 and is_dense:
        return _Shape(nt, 1, 8, 1, 4 if few else 2)
    if nt == 1:
        return _Shape(nt, *((2, 16, 1, 3) if few else (2, 4, 1, 3) if wide else (1, 8, 1, 3)))
    mt = 1 if is_dense else 2
    warps, split = _balance(-(-tiles // mt), num_in // COLUMNS, processors)
    return _Shape(nt, mt, warps, split, 2, shares_x=True)


def _balance(num_warps: int, num_pieces: int, processors: int) -> tuple[int, int]:
    """Warps of a block, and blocks that share columns: so that processors have as much to do as others, and at least
    two blocks each."""
    def cost(cut: tuple[int, int]) -> tuple[float, int]:
        warps, split = cut
        rounds = -(-(-(-num_warps // warps) * split) // processors)
        return rounds * warps / split * (1.0 if rounds > 1 else 1.2), split

    cuts = [(warps, split) for warps in (8, 7, 6, 5, 4) for split in (1, 2, 3, 4, 6, 8) if num_pieces >= 8 * split]
    return min(cuts, key=cost) if cuts else (4, 1)


def _layout(weight: Tensor | Tiles) -> Mapping[str, int]:
    if isinstance(weight, Tensor):
        return {"NUMBERS": 1, "BITS": 16, "GROUP": 64, "SCALE": 16, "MIN": 0, "ZERO": 0, "LOOKUP": 0}
    return {
        "NUMBERS": 0, "BITS": weight.bits, "GROUP": weight.group, "SCALE": weight.scale_bits,
        "MIN": int(weight.has_min), "ZERO": weight.zero, "LOOKUP": int(weight.values.numel() > 0),
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
    return load(f"{name}.cu", name, dict(defines), shared_bytes, device)


@cache
def _scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of blocks that share columns, and how many of them are there: for one product at a time."""
    most = 4 * num_processors(device) * ROWS * 8 * MAX_ROWS
    return torch.empty(most, device=device), torch.zeros(4096, dtype=torch.int32, device=device)
