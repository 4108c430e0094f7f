"""Quantised weights as kernels of a GPU read them (cuda/tiles.cuh). quant/tiled.py packs them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ROWS, COLUMNS = 16, 64  # of a tile


@dataclass(frozen=True)
class Tiles:
    """Packed codes [N, K]."""

    shape: tuple[int, int]
    bits: int
    group: int  # columns that share a scale: 16, 32, or a multiple of 64
    zero: int
    scale_bits: int  # 16 or 32: floats; 8: multiples of `supers`
    has_min: bool
    has_zeros: bool  # minima are given as zero points z: they are z d
    codes: Tensor  # uint8: 4 bits (or 8, or the lower 2) of each code
    more: Tensor  # uint8: the higher bits
    scales: Tensor  # uint8: [N / 16, tiles or larger groups, 8 rows, (row, row + 8), groups of a tile, (d, m or z)]
    supers: Tensor  # float16, likewise for every 256 columns; or empty
    values: Tensor  # float32 [16], where codes are indices; or empty
    float8: bool  # codes of 8 bits are those of float8_e4m3fn
