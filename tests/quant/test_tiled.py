"""Tiles hold what they were made from, read as the kernel reads them: lane by lane, word by word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pelton.ops.tiles import Tiles
from pelton.quant.codes import Codes
from pelton.quant.tiled import make_tiles


def read(tiles: Tiles) -> Tensor:
    """W [N, K], element by element, as few_rows.cu finds it."""
    num_out, num_in = tiles.shape
    num_blocks, bits = -(-num_in // 64), tiles.bits
    plane_bits = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}[bits]
    planes = [plane.view(-1).tolist() for plane in (tiles.codes, tiles.more)]
    per_tile, per_group = max(1, 64 // tiles.group), 1 + tiles.has_min
    dtype = {8: torch.uint8 if tiles.has_min else torch.int8, 16: torch.float16, 32: torch.float32}[tiles.scale_bits]
    scales, supers = tiles.scales.view(dtype).float(), tiles.supers.view(torch.uint8).view(torch.float16).float()
    out = torch.zeros(num_out, num_in)
    for n in range(num_out):
        for k in range(num_in):
            tile, r, g, block, column = n // 16, n % 16 // 8, n % 8, k // 64, k % 64
            if tiles.group == 16:
                s, t = column // 16, column % 16 // 4
            else:
                s, t = 2 * (column // 32) + column % 8 // 4, column % 32 // 8
            j, e = r + 2 * (column % 4 // 2), column % 2
            lane = (tile * num_blocks + block) * 32 + 4 * g + t
            u, shift = 0, 0
            for plane, width in zip(planes, plane_bits, strict=False):
                if width == 8:
                    u = plane[lane * 32 + 8 * s + 4 * (j // 2) + 2 * (j % 2) + e]
                    break
                if tiles.values.numel():
                    u = plane[lane * 16 + 4 * s + j] >> (4 * e) & 15
                    break
                per_word = 16 // width
                index, field = divmod(4 * s + j, per_word)
                at = 4 * (lane * (16 // per_word) + index)
                word = int.from_bytes(bytes(plane[at : at + 4]), "little")
                u |= (word >> (width * field + 16 * e) & ((1 << width) - 1)) << shift
                shift += width
            groups = -(-num_in // tiles.group) if tiles.group >= 64 else num_blocks
            unit = k // tiles.group if tiles.group >= 64 else block
            at = (((tile * groups + unit) * 8 + g) * 2 + r) * per_tile + (column // tiles.group if per_tile > 1 else 0)
            d = [float(scales[at * per_group + i]) for i in range(per_group)]
            if tiles.scale_bits == 8:
                at = ((tile * (num_in // 256) + k // 256) * 8 + g) * 2 + r
                d = [d[i] * float(supers[at * per_group + i]) for i in range(per_group)]
            q = float(tiles.values[u]) if tiles.values.numel() else u - tiles.zero
            if tiles.float8:
                q = spread(u, half=k % 2 == 0)
            if tiles.has_zeros:
                d[1] *= d[0]
            out[n, k] = d[0] * q - (d[1] if tiles.has_min else 0)
    return out


def spread(code: int, half: bool) -> float:
    """The number of a float8's bits, as few_rows.cu makes it: in float16, or in bfloat16."""
    extended = (code - 256 if code & 128 else code) & 0xFFFF
    bits = (extended << 7) & 0xBF80 if half else (extended << 4) & 0x87F0
    number = torch.tensor([bits], dtype=torch.uint16).view(torch.float16 if half else torch.bfloat16)
    return float(number.float() * 2.0 ** (8 if half else 120))


def float8(num_in: int, group: int) -> Codes:
    numbers = (torch.randn(24, num_in) * torch.logspace(-3, 2, num_in)).to(torch.float8_e4m3fn)
    return Codes(8, numbers.view(torch.uint8), torch.rand(24, num_in // group), float8=True)


def codes(bits: int, group: int, num_in: int = 256, **options: Any) -> Codes:
    u = torch.randint(0, 1 << bits, (24, num_in), dtype=torch.uint8)
    return Codes(bits, u, torch.rand(24, -(-num_in // group)).half().float(), **options)


def k_quant(bits: int, group: int, minima: bool) -> Codes:
    u = torch.randint(0, 1 << bits, (24, 256), dtype=torch.uint8)
    sub = torch.randint(0, 64, (24, 256 // group), dtype=torch.uint8)
    d = torch.rand(24, 1).half().float()
    if minima:
        return Codes(bits, u, sub, sub.flip(0), supers=d, super_mins=d.flip(0))
    return Codes(bits, u, sub.view(torch.int8) - 32, zero=1 << (bits - 1), supers=d)


@pytest.mark.parametrize(
    "parts",
    [
        codes(4, 32, zero=8), codes(4, 128, zero=8), codes(5, 32, zero=16), codes(8, 32, zero=128),
        codes(8, 100, num_in=100, zero=128), codes(4, 64, values=tuple(map(float, range(16)))),
        Codes(4, codes(4, 64).codes, torch.rand(24, 4), torch.rand(24, 4)),
        codes(4, 128, zeros=torch.randint(0, 16, (24, 2)).float()), codes(3, 16, zeros=torch.full((24, 16), 5.0)),
        float8(256, 128), float8(192, 192),
        k_quant(2, 16, True), k_quant(3, 16, False), k_quant(4, 32, True), k_quant(5, 32, True), k_quant(6, 16, False),
    ],
    ids=lambda parts: f"{parts.bits}-{parts.scales.shape[1]}-{parts.mins is not None}-{parts.zeros is not None}",
)
def test_tiles_hold_the_codes(parts: Codes) -> None:
    torch.testing.assert_close(read(make_tiles(parts)), parts.weights(), rtol=1e-6, atol=1e-6)


def test_zero_points_take_no_more_than_their_scales() -> None:
    """They times scales are no halves."""
    tiles = make_tiles(codes(4, 128, zeros=torch.randint(0, 16, (24, 2)).float()))
    assert tiles.scale_bits == 16 and tiles.scales.nbytes == 32 * 2 * 2 * 2  # rows, groups, (d, z), bytes


@pytest.mark.parametrize("half", [False, True])
def test_every_float8(half: bool) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert all(spread(code, half) == float(numbers[code]) for code in range(256) if code & 127 != 127)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 groups of 192 columns do not fit"):
        make_tiles(codes(4, 96, num_in=192))


def test_groups_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        make_tiles(codes(4, 128, num_in=576))
