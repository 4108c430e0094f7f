"""Products of few rows with a weight on a GPU: read the weight once, at memory speed (few_rows.cu, more_rows.cu)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pelton.ops.cuda.launch import counters, has_wgmma, num_processors, shared_memory
from pelton.ops.cuda.program import Function, load
from pelton.ops.tiles import COLUMNS, ROWS, Tiles

MAX_ROWS = 64
MAX_INT8_ROWS = 16
TABLE_BYTES = 10 << 10  # of a block's shared memory: what is not counted, and more_rows.cu's table of values
FEW_TABLE_BYTES = 32 << 10  # few_rows.cu's
MAX_SHARING = 4  # blocks for each multiprocessor, of those that share columns with others; so many are counted
PREFETCHED = 4 << 20  # bytes of the next weight, as many as memory gives in a pause
GATES = {"": 0, "silu": 1, "gelu_tanh": 2}
HALVES = (torch.bfloat16, torch.float16)


class _Args(ctypes.Structure):
    """As in tiles.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "out", "x", "codes", "more", "scales", "supers", "values", "bias", "partial", "arrived", "ids", "next")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "out_stride", "x_stride", "accumulate", "next_bytes")),
        ("factor", ctypes.c_float), ("x_scales", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class _Few:
    """How few_rows.cu cuts the work: the most rows of x (1, 2, or a multiple of 8), tiles of 16 weight rows of a block,
    its warps, and how many pieces a warp asks for ahead."""

    ROWS: int
    MT: int
    WARPS: int
    AHEAD: int

    TEAMS, SPLIT = 1, 1  # a block has all columns
    kernel = "few_rows"

    def shared_bytes(self, piece_bytes: int) -> int:
        return 4 * self.WARPS * 16 * self.MT * (max(8, self.ROWS) + 1)

    def blocks(self, num_out: int) -> int:
        """Blocks beside each other."""
        return -(-num_out // (ROWS * self.MT))


@dataclass(frozen=True)
class _More:
    """How more_rows.cu cuts the work: rows of x / 8, tiles of 16 weight rows of a warp, warps of a team, blocks that
    share columns, chunks in memory, and blocks of a multiprocessor. On Hopper a block may have several teams."""

    NT: int
    MT: int
    WARPS: int
    SPLIT: int
    STAGES: int
    BLOCKS: int
    TEAMS: int = 1
    WGMMA: int = 0

    kernel = "more_rows"

    def shared_bytes(self, piece_bytes: int) -> int:
        chunks, columns = (2, 128) if self.WGMMA else (self.STAGES, 128 + 32)  # of x
        weights = self.STAGES * self.WARPS * 2 * self.MT * 32 * piece_bytes
        return self.TEAMS * (weights + chunks * 2 * 8 * self.NT * columns)

    def blocks(self, num_out: int) -> int:
        """Blocks beside each other."""
        return -(-num_out // (ROWS * self.MT * self.WARPS))


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
    gate: str = "", then: Tensor | Tiles | None = None, same: bool = False,
) -> None:
    """out = x W^T (+ bias), or added to out. x [M, K]; weight: W [N, K] in x's dtype, or tiles; out [M, N] in x's dtype
    or float32; bias in x's dtype. With a gate ("silu", "gelu_tanh") W is [gate | up]: out [M, N / 2] = gate(..) up.
    `then`: the weight that is multiplied after this one; its first bytes are brought into the cache meanwhile. With
    `same`, a row has the same bits whatever the number of rows."""
    num_rows, (num_out, num_in) = x.shape[0], weight.shape
    given = num_rows, num_out, num_in, bool(gate)
    cut: _Few | _More
    if _is_few(num_rows, num_out, num_in, num_processors(x.device), same):
        cut = _cut(*given, isinstance(weight, Tensor), num_processors(x.device), same)
    elif has_wgmma(x.device):
        has_min = isinstance(weight, Tiles) and weight.has_min
        limits = num_processors(x.device), shared_memory(x.device)
        cut = _cut_hopper(*given, _piece_bytes(weight), has_min, *limits, same)
    else:
        cut = _cut_more(*given, _piece_bytes(weight), num_processors(x.device), shared_memory(x.device), same)
    defines = {**_layout(weight), "HALF": int(x.dtype == torch.float16), "GATE": GATES[gate]}
    args = _pointers(weight)
    if then is not None:
        codes = then if isinstance(then, Tensor) else then.codes
        args.next, args.next_bytes = codes.data_ptr(), min(codes.nbytes, PREFETCHED)
    _launch(x, weight, out, bias, accumulate, cut, defines, args)


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
    cut = _cut(x.shape[0], *weight.shape, False, True, num_processors(x.device))
    defines = {**_layout(weight), "INT8": 1, "HALF": int(out.dtype == torch.float16), "GATE": 0}
    args = _pointers(weight)
    args.scales, args.x_scales = scales.data_ptr(), x_scales.data_ptr()
    _launch(x, weight, out, bias, accumulate, cut, defines, args)


def _launch(
    x: Tensor, weight: Tensor | Tiles, out: Tensor, bias: Tensor | None, accumulate: bool, cut: _Few | _More,
    layout: Mapping[str, int], args: _Args,
) -> None:
    """`args`: those of the weight, and all bytes that are to be brought into the cache."""
    if x.shape[0] == 0:
        return  # kernels read the last row in place of rows that are not there
    num_out, num_in = weight.shape
    defines = {**layout, "OUT32": int(out.dtype == torch.float32), **vars(cut)}
    args.out, args.x, args.bias = out.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr()
    args.partial, args.arrived = _scratch(x.device).data_ptr(), counters(x.device).data_ptr()
    args.M, args.N, args.K = x.shape[0], num_out, num_in
    args.out_stride, args.x_stride, args.accumulate = out.stride(0), x.stride(0), int(accumulate)
    blocks = cut.blocks(num_out)  # with a gate too, where each has a tile of either half
    args.next_bytes = args.next_bytes // (blocks * cut.SPLIT) // 16 * 16
    shared_bytes = cut.shared_bytes(_piece_bytes(weight))
    function = _function(cut.kernel, tuple(sorted(defines.items())), x.device)
    function.launch((blocks, cut.SPLIT), 32 * cut.WARPS * cut.TEAMS, args, x.device, shared_bytes)


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
    _function("open_codes", tuple(sorted(defines.items())), device).launch(grid, 256, args, device)
    return out


def _is_few(num_rows: int, num_out: int, num_in: int, processors: int, same: bool) -> bool:
    """Whether few_rows.cu is faster: to join sums through memory takes longer than a small weight. With `same`, for one
    kernel for any number of rows."""
    return (num_rows <= 8 and not same) or (num_out <= 4 * ROWS * processors and num_in < 8192)


def _row_tiles(num_rows: int) -> int:
    """Rows of x / 8 that kernels are compiled for: a power of two."""
    return max(8, 1 << (num_rows - 1).bit_length()) // 8


@cache
def _cut(
    num_rows: int, num_out: int, num_in: int, is_gated: bool, is_dense: bool, processors: int, same: bool = False
) -> _Few:
    """Enough warps to keep the memory busy, as measured on an H100 and an H200. With `same`, as many for any number of
    rows: nothing else changes the order of a sum."""
    rows = num_rows if num_rows <= 2 and not (is_dense or same) else 8 * _row_tiles(num_rows)
    tiles = -(-num_out // ROWS)
    few, wide = tiles <= 2 * processors, tiles > 4 * processors
    if is_dense:
        mt = 2 if is_gated or (rows == 8 and not wide) else 1
        return _Few(rows, mt, 8, 4 if few or is_gated else 2)
    if rows <= 16:
        mt, warps = (1 if rows <= 2 else 2, 16) if few else (2, 4) if wide else (1, 8)
    else:
        mt, warps = (2, 8 if few else 4) if rows == 32 else (1, 8)
    mt = 2 if is_gated else mt
    if same:
        return _Few(rows, mt, 8, 4 if rows == 8 else 3 if rows <= 32 else 2)
    return _Few(rows, mt, warps, 4 if rows < 8 else 3 if rows <= 32 else 2)


@cache
def _cut_more(
    num_rows: int, num_out: int, num_in: int, is_gated: bool, piece_bytes: int, processors: int, shared_memory: int,
    same: bool = False,
) -> _More:
    """As many warps as two stages have memory for, two blocks of a multiprocessor if they can be, and all
    multiprocessors with as much to do as others. With `same`, the columns are split as for the most rows: nothing else
    changes the order of a sum."""
    nt = _row_tiles(num_rows)
    mt = 2 if is_gated or (nt <= 4 and piece_bytes < 64) else 1
    num_warps, num_chunks = -(-num_out // (ROWS * mt)), -(-num_in // (2 * COLUMNS))

    def stage_bytes(warps: int) -> int:
        return _More(nt, mt, warps, 1, 1, 1).shared_bytes(piece_bytes)

    def cost(cut: tuple[int, int]) -> tuple[float, int]:
        warps, split = cut
        rounds = -(-(-(-num_warps // warps) * split) // processors)
        return rounds * warps / split * (1.0 if rounds > 1 else 1.2), split

    splits: tuple[int, ...] = 1, 2, 3, 4, 6, 8
    if same:
        splits = (_cut_more(MAX_ROWS, num_out, num_in, False, piece_bytes, processors, shared_memory).SPLIT,)
    most = max(warps for warps in range(1, 9) if 2 * stage_bytes(warps) <= shared_memory - TABLE_BYTES)
    cuts = [
        (warps, split) for warps in range(most, min(most, 4) - 1, -1) for split in splits
        if split == 1 or (num_chunks >= 4 * split and -(-num_warps // warps) * split <= MAX_SHARING * processors)
    ]
    warps, split = min(cuts, key=cost)
    blocks = 2 if nt * mt <= 8 and shared_memory // 2 - TABLE_BYTES >= 3 * stage_bytes(warps) else 1
    stages = min(4, (shared_memory // blocks - TABLE_BYTES) // stage_bytes(warps))
    return _More(nt, mt, warps, split, stages, blocks)


@cache
def _cut_hopper(
    num_rows: int, num_out: int, num_in: int, is_gated: bool, piece_bytes: int, has_min: bool, processors: int,
    shared_memory: int, same: bool = False,
) -> _More:
    """The same for Hopper: one block of a multiprocessor, with two teams of eight warps where registers allow it. With
    `same`, the columns are split by the weight alone."""
    nt = _row_tiles(num_rows)
    num_chunks = -(-num_in // (2 * COLUMNS))

    def cut(mt: int, split: int) -> _More:
        most_teams = 2 if nt <= 4 and nt * mt * (4 if has_min else 1) <= 8 and not same else 1
        for warps, teams in ((8, most_teams), (8, 1), (4, 1)):
            found = _More(nt, mt, warps, split, 0, 1, teams, 1)
            free = shared_memory - TABLE_BYTES - found.shared_bytes(piece_bytes)
            stage_bytes = teams * warps * 2 * mt * 32 * piece_bytes
            if free >= 2 * stage_bytes:
                break
        return replace(found, STAGES=min(3, free // stage_bytes))

    def cost(cut: _More) -> tuple[float, int]:
        """By the chunks that a multiprocessor multiplies, what it takes to begin, and sums that go through memory."""
        rounds = -(-cut.blocks(num_out) * cut.SPLIT // processors)
        chunks = -(-num_chunks // (cut.SPLIT * cut.TEAMS)) * cut.TEAMS
        joins = 0.4 * cut.SPLIT * cut.MT if cut.SPLIT > 1 else 0.0
        return rounds * (3 + chunks * cut.WARPS * (1 + 2 * cut.MT) / 40) + joins, cut.SPLIT

    def cuts(mt: int) -> list[_More]:
        found = [cut(mt, split) for split in range(1, 9)]
        return [
            cut for cut in found
            if cut.SPLIT == 1 or (num_chunks >= 2 * cut.SPLIT and cut.SPLIT * cut.blocks(num_out) <= processors)
        ]

    if same:
        return cut(2 if is_gated else 1, min(cuts(1), key=cost).SPLIT)
    return min(cuts(2) if is_gated or has_min else [*cuts(1), *cuts(2)], key=cost)


def _piece_bytes(weight: Tensor | Tiles) -> int:
    """What a lane needs of 16 rows and 64 columns: PIECE_BYTES of tiles.cuh."""
    if isinstance(weight, Tensor):
        return 64
    per_group = 1 + weight.has_min
    supers = 4 * per_group if weight.scale_bits == 8 else 0
    return weight.bits * 4 + 2 * max(1, COLUMNS // weight.group) * per_group * weight.scale_bits // 8 + supers


def _has_values(weight: Tensor | Tiles) -> bool:
    return isinstance(weight, Tiles) and weight.values.numel() > 0


def _layout(weight: Tensor | Tiles) -> Mapping[str, int]:
    if isinstance(weight, Tensor):
        return {"NUMBERS": 1, "BITS": 16, "GROUP": 64, "SCALE": 16, "MIN": 0, "ZERO": 0, "LOOKUP": 0, "FLOAT8": 0,
                "INT8": 0}
    return {
        "NUMBERS": 0, "BITS": weight.bits, "GROUP": weight.group, "SCALE": weight.scale_bits,
        "MIN": int(weight.has_min), "ZERO": weight.zero, "LOOKUP": int(_has_values(weight)),
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
def _function(name: str, defines: tuple[tuple[str, int], ...], device: torch.device) -> Function:
    return load(f"{name}.cu", name, dict(defines), device)


@cache
def _scratch(device: torch.device) -> Tensor:
    """Sums of blocks that share columns, for one product at a time."""
    return torch.empty(MAX_SHARING * num_processors(device) * 8 * 2 * ROWS * MAX_ROWS, device=device)
