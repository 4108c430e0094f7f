"""The block formats of GGUF (ggml/src/ggml-common.h and ggml-quants.c of llama.cpp define them).

A row of K weights is cut into blocks of 32 (the older formats) or 256 (the "K" formats and IQ4_XS). Each function
here takes blocks as bytes, uint8 [B, bytes of a block], and returns their weights, float32 [B, weights of a block].
Multi-byte numbers are little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The 16 values a 4-bit code stands for in the non-linear formats.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


# --- numbers as they are ------------------------------------------------------------------------------------------


def f32(blocks: Tensor) -> Tensor:
    """float32."""
    return _as(blocks, torch.float32)


def f16(blocks: Tensor) -> Tensor:
    """IEEE half precision."""
    return _as(blocks, torch.float16).float()


def bf16(blocks: Tensor) -> Tensor:
    """bfloat16."""
    return _as(blocks, torch.bfloat16).float()


# --- 32 weights, one scale ----------------------------------------------------------------------------------------


def q4_0(blocks: Tensor) -> Tensor:
    """d (f16), 32 x 4 bits: w = d (q - 8)."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def q4_1(blocks: Tensor) -> Tensor:
    """d, m (f16), 32 x 4 bits: w = d q + m."""
    return (_half(blocks, 0) * _nibbles(blocks[:, 4:], 16).float()).add_(_half(blocks, 2))


def q5_0(blocks: Tensor) -> Tensor:
    """d (f16), 32 high bits, 32 x 4 low bits: w = d (q - 16)."""
    q = _nibbles(blocks[:, 6:], 16) | _bit_row(blocks[:, 2:6]) << 4
    return _half(blocks, 0) * (q.float() - 16)


def q5_1(blocks: Tensor) -> Tensor:
    """d, m (f16), 32 high bits, 32 x 4 low bits: w = d q + m."""
    q = _nibbles(blocks[:, 8:], 16) | _bit_row(blocks[:, 4:8]) << 4
    return (_half(blocks, 0) * q.float()).add_(_half(blocks, 2))


def q8_0(blocks: Tensor) -> Tensor:
    """d (f16), 32 x int8: w = d q."""
    return blocks[:, 2:].view(torch.int8) * _half(blocks, 0)


def iq4_nl(blocks: Tensor) -> Tensor:
    """d (f16), 32 x 4-bit codes: w = d value[code]."""
    return _half(blocks, 0) * _iq4(_nibbles(blocks[:, 2:], 16))


# --- 256 weights: scales of 8 or 16 sub-blocks are themselves quantised ------------------------------------------


def q2_k(blocks: Tensor) -> Tensor:
    """16 x (4-bit scale, 4-bit min), 256 x 2 bits, d, dmin (f16): w = (d sc) q - (dmin m), 16 sub-blocks."""
    scales = blocks[:, :16]
    d = _half(blocks, 80) * (scales & 15).float()
    m = _half(blocks, 82) * (scales >> 4).float()
    return _scaled(_fields(blocks[:, 16:80], 32, 2), d, m)


def q3_k(blocks: Tensor) -> Tensor:
    """256 high bits, 256 x 2 low bits, 16 x 6-bit scale, d (f16): w = d (sc - 32) (q - 4), 16 sub-blocks."""
    packed = blocks[:, 96:108]
    low, high = _fields(packed[:, :8], 8, 4), _fields(packed[:, 8:], 4, 2)
    d = _half(blocks, 108) * ((low | high << 4).float() - 32)
    q = _fields(blocks[:, 32:96], 32, 2) | _fields(blocks[:, :32], 32, 1) << 2
    return _scaled(q.view(torch.int8) - 4, d)


def q4_k(blocks: Tensor) -> Tensor:
    """d, dmin (f16), 8 x (6-bit scale, 6-bit min), 256 x 4 bits: w = (d sc) q - (dmin m), 8 sub-blocks."""
    d, m = _scales_and_mins(blocks)
    return _scaled(_nibbles(blocks[:, 16:], 32), d, m)


def q5_k(blocks: Tensor) -> Tensor:
    """As q4_k, with 256 high bits before the 4 low bits of each weight."""
    d, m = _scales_and_mins(blocks)
    return _scaled(_nibbles(blocks[:, 48:], 32) | _fields(blocks[:, 16:48], 32, 1) << 4, d, m)


def q6_k(blocks: Tensor) -> Tensor:
    """256 x 4 low bits, 256 x 2 high bits, 16 x int8 scale, d (f16): w = (d sc) (q - 32), 16 sub-blocks."""
    d = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    q = _nibbles(blocks[:, :128], 64) | _fields(blocks[:, 128:192], 32, 2) << 4
    return _scaled(q.view(torch.int8) - 32, d)


def iq4_xs(blocks: Tensor) -> Tensor:
    """d (f16), 8 x 6-bit scale (2 high bits, then 4 low), 256 x 4-bit codes: w = d (sc - 32) value[code]."""
    low = _fields(blocks[:, 4:8].unsqueeze(-1), 1, 4)
    high = _fields(blocks[:, 2:4].unsqueeze(-1), 1, 2)
    d = _half(blocks, 0) * ((low | high << 4).float() - 32)
    return _scaled(_iq4(_nibbles(blocks[:, 8:], 16)), d)


# --- bits ---------------------------------------------------------------------------------------------------------


def _as(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [B, n] as little-endian numbers [B, n / size]."""
    return blocks.contiguous().view(dtype)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The f16 at byte `start` of each block: float32 [B, 1]."""
    return _as(blocks[:, start : start + 2], torch.float16).float()


def _fields(packed: Tensor, run: int, bits: int) -> Tensor:
    """Unpack bytes that hold 8 / bits fields each: the lowest fields of `run` bytes, then their next fields, and so on.

    uint8 [B, n] -> uint8 [B, 8 / bits * n].
    """
    groups = packed.reshape(packed.shape[0], -1, 1, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    return (groups >> shifts).bitwise_and_((1 << bits) - 1).flatten(1)


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """Unpack 4-bit numbers: the low halves of `run` bytes, then their high halves, and so on."""
    return _fields(packed, run, 4)


def _bit_row(packed: Tensor) -> Tensor:
    """The bits of each byte in order, lowest first: uint8 [B, n] -> [B, 8 n]."""
    return _fields(packed.unsqueeze(-1), 1, 1)


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales d sc and minima dmin m of q4_k and q5_k: two float32 [B, 8].

    Of the 12 bytes at 4, the low 6 bits of 0-3 are scales 0-3, of 4-7 mins 0-3; bytes 8-11 hold the low 4 bits of
    scales (low half) and mins (high half) 4-7, whose 2 high bits top the bytes 0-3 and 4-7.
    """
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([a & 63, c & 15 | a >> 6 << 4], dim=1)
    mins = torch.cat([b & 63, c >> 4 | b >> 6 << 4], dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * mins.float()


def _scaled(q: Tensor, d: Tensor, m: Tensor | None = None) -> Tensor:
    """d q - m for each sub-block: q [B, n], d and m [B, sub-blocks] -> float32 [B, n]."""
    w = q.view(q.shape[0], d.shape[1], -1).float() * d.unsqueeze(-1)
    return (w if m is None else w.sub_(m.unsqueeze(-1))).flatten(1)


def _iq4(codes: Tensor) -> Tensor:
    """4-bit codes to the values they stand for, float32."""
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)[codes.int()]
