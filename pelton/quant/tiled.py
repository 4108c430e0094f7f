"""Weights on a GPU in the order that its kernels read them, at file precision.

Tiles of 16 rows and 64 columns. Lane 4 g + t of a warp has rows g and g + 8, and four columns for each of the tile's
four matrix products: all codes of a lane lie together, pairs of columns in the halves of 32-bit words, or in a byte
where codes are looked up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelton.ops.tiles import COLUMNS, ROWS, Tiles
from pelton.quant.codes import Codes

CHUNK = 1 << 24  # codes packed at once


def group_size(parts: Codes) -> int | None:
    """The columns of a group in tiles: 16, 32 or a multiple of 64, all as many, or all there are. None if groups do not
    fit."""
    num_in, num_groups = parts.codes.shape[1], parts.scales.shape[1]
    if num_groups == 1:
        return -(-num_in // COLUMNS) * COLUMNS
    group = num_in // num_groups
    return group if num_in % num_groups == 0 and (group in (16, 32) or group % COLUMNS == 0) else None


def make_tiles(parts: Codes) -> Tiles:
    """Pack. ValueError where `group_size` is None."""
    num_out, num_in = parts.codes.shape
    group = group_size(parts)
    if group is None:
        raise ValueError(f"{parts.scales.shape[1]} groups of {num_in} columns do not fit into tiles")
    step = max(ROWS, CHUNK // num_in // ROWS * ROWS)
    pack = _pack_pairs if parts.values is not None else _pack_codes
    packed = [pack(parts.codes[i : i + step], parts.bits, group == 16) for i in range(0, num_out, step)]
    codes, more = (torch.cat(planes) for planes in zip(*packed, strict=True))
    scale_bits, numbers = _scales(parts)
    return Tiles(
        (num_out, num_in), parts.bits, group, parts.zero, scale_bits, parts.mins is not None or parts.zeros is not None,
        parts.zeros is not None, codes, more,
        _by_lane(numbers, group, num_in),
        torch.empty(0, device=codes.device) if parts.supers is None else _by_lane(_supers(parts), 256, num_in),
        torch.tensor(parts.values or (), dtype=torch.float32, device=codes.device),
        parts.float8,
    )


def _scales(parts: Codes) -> tuple[int, Tensor]:
    """Their bits, and scales with minima or zero points [N, groups, 1 or 2]."""
    both = parts.scales, parts.mins, parts.zeros
    numbers = torch.stack([each for each in both if each is not None], dim=-1)
    if parts.supers is not None:
        return 8, numbers
    halves = numbers.half()
    return (16, halves) if torch.equal(halves.float(), numbers.float()) else (32, numbers.float())


def _supers(parts: Codes) -> Tensor:
    both = [parts.supers] if parts.super_mins is None else [parts.supers, parts.super_mins]
    return torch.stack([numbers for numbers in both if numbers is not None], dim=-1).half()


def _by_lane(numbers: Tensor, group: int, num_in: int) -> Tensor:
    """Numbers of groups [N, groups, n] as bytes in the order of lanes: groups of 64 columns lie together."""
    per_tile = max(1, COLUMNS // group)
    num_out, num_groups, n = numbers.shape
    padded = _pad(_pad(numbers, 0, ROWS), 1, per_tile)
    padded = padded.view(-1, 2, 8, padded.shape[1] // per_tile, per_tile, n)  # [N / 16, (g, g + 8), g, tiles, ...]
    return padded.permute(0, 3, 2, 1, 4, 5).contiguous().view(torch.uint8).flatten()


def _pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    missing = -x.shape[dim] % multiple
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)


def _places(group_of_16: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column in a tile of each code: [32 lanes, 4 products, 4 pairs, 2]."""
    lane, s, j, e = torch.meshgrid(*(torch.arange(n, device=device) for n in (32, 4, 4, 2)), indexing="ij")
    g, t = lane // 4, lane % 4
    first = 16 * s + 4 * t if group_of_16 else 32 * (s // 2) + 8 * t + 4 * (s % 2)
    return g + 8 * (j % 2), first + 2 * (j // 2) + e


def _by_product(codes: Tensor, group_of_16: bool) -> Tensor:
    """Codes [n, K] as they are multiplied: [N / 16, K / 64, 32 lanes, 4 products, 4 pairs, 2]."""
    padded = _pad(_pad(codes, 0, ROWS), 1, COLUMNS)
    tiles = padded.view(-1, ROWS, padded.shape[1] // COLUMNS, COLUMNS).transpose(1, 2)
    rows, columns = _places(group_of_16, codes.device)
    return tiles[:, :, rows, columns]


def _pack_codes(codes: Tensor, bits: int, group_of_16: bool) -> tuple[Tensor, Tensor]:
    """The lower and the higher bits of codes [n, K], each as bytes."""
    u = _by_product(codes, group_of_16)
    if bits == 8:
        return u.contiguous().view(-1), u.new_empty(0)  # j % 2 is the pair of bytes within a word
    planes = {4: (u & 15, None), 5: (u & 15, u >> 4), 6: (u & 15, u >> 4), 2: (u, None), 3: (u & 3, u >> 2)}
    low, high = planes[bits]
    return _words(low, 4 if bits >= 4 else 2), u.new_empty(0) if high is None else _words(high, 2 if bits == 6 else 1)


def _pack_pairs(codes: Tensor, bits: int, group_of_16: bool) -> tuple[Tensor, Tensor]:
    """Codes [n, K] of 4 bits that are looked up: a pair in each byte."""
    u = _by_product(codes, group_of_16)
    return (u[..., 0] | u[..., 1] << 4).contiguous().view(-1), u.new_empty(0)


def _words(u: Tensor, bits: int) -> Tensor:
    """Fields of a lane, [..., 4, 4, 2] of `bits` bits, as 32-bit words: the columns of a pair in their two halves."""
    fields = u.flatten(-3, -2).int()  # [..., 16 pairs, 2]
    per_word = 16 // bits
    fields = fields.view(*fields.shape[:-2], -1, per_word, 2)
    shifts = bits * torch.arange(per_word, device=u.device, dtype=torch.int32)
    halves = (fields << shifts[:, None]).sum(dim=-2, dtype=torch.int32)  # [..., words, 2]: below 2^16
    return (halves[..., 0] | halves[..., 1] << 16).contiguous().view(torch.uint8).flatten()
