"""The block formats of GGUF (ggml/src/ggml-common.h and ggml-quants.c of llama.cpp define them).

A row of K weights is cut into blocks of 32 (the older formats) or 256 (the "K" formats and IQ4_XS). Each function
here takes blocks as bytes, uint8 [B, bytes of a block]. Plain numbers are returned as the weights, float32 [B, weights
of a block]; of the other formats the parts of the blocks, whose `weights()` they are. Multi-byte numbers are
little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelton.quant.codes import Codes

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


def q4_0(blocks: Tensor) -> Codes:
    """d (f16), 32 x 4 bits: w = d (q - 8)."""
    return Codes(4, _nibbles(blocks[:, 2:], 16), _half(blocks, 0), zero=8)


def q4_1(blocks: Tensor) -> Codes:
    """d, m (f16), 32 x 4 bits: w = d q + m."""
    return Codes(4, _nibbles(blocks[:, 4:], 16), _half(blocks, 0), -_half(blocks, 2))


def q5_0(blocks: Tensor) -> Codes:
    """d (f16), 32 high bits, 32 x 4 low bits: w = d (q - 16)."""
    q = _nibbles(blocks[:, 6:], 16) | _bit_row(blocks[:, 2:6]) << 4
    return Codes(5, q, _half(blocks, 0), zero=16)


def q5_1(blocks: Tensor) -> Codes:
    """d, m (f16), 32 high bits, 32 x 4 low bits: w = d q + m."""
    q = _nibbles(blocks[:, 8:], 16) | _bit_row(blocks[:, 4:8]) << 4
    return Codes(5, q, _half(blocks, 0), -_half(blocks, 2))


def q8_0(blocks: Tensor) -> Codes:
    """d (f16), 32 x int8: w = d q."""
    return Codes(8, blocks[:, 2:] ^ 128, _half(blocks, 0), zero=128)


def iq4_nl(blocks: Tensor) -> Codes:
    """d (f16), 32 x 4-bit codes: w = d value[code]."""
    return Codes(4, _nibbles(blocks[:, 2:], 16), _half(blocks, 0), values=IQ4_VALUES)


# --- 256 weights: scales of 8 or 16 sub-blocks are themselves quantised ------------------------------------------


def q2_k(blocks: Tensor) -> Codes:
    """16 x (4-bit scale, 4-bit min), 256 x 2 bits, d, dmin (f16): w = (d sc) q - (dmin m), 16 sub-blocks."""
    scales = blocks[:, :16]
    q = _fields(blocks[:, 16:80], 32, 2)
    return Codes(2, q, scales & 15, scales >> 4, supers=_half(blocks, 80), super_mins=_half(blocks, 82))


def q3_k(blocks: Tensor) -> Codes:
    """256 high bits, 256 x 2 low bits, 16 x 6-bit scale, d (f16): w = d (sc - 32) (q - 4), 16 sub-blocks."""
    packed = blocks[:, 96:108]
    low, high = _fields(packed[:, :8], 8, 4), _fields(packed[:, 8:], 4, 2)
    q = _fields(blocks[:, 32:96], 32, 2) | _fields(blocks[:, :32], 32, 1) << 2
    return Codes(3, q, (low | high << 4).view(torch.int8) - 32, zero=4, supers=_half(blocks, 108))


def q4_k(blocks: Tensor) -> Codes:
    """d, dmin (f16), 8 x (6-bit scale, 6-bit min), 256 x 4 bits: w = (d sc) q - (dmin m), 8 sub-blocks."""
    return Codes(
        4, _nibbles(blocks[:, 16:], 32), *_scales_and_mins(blocks),
        supers=_half(blocks, 0), super_mins=_half(blocks, 2),
    )


def q5_k(blocks: Tensor) -> Codes:
    """As q4_k, with 256 high bits before the 4 low bits of each weight."""
    q = _nibbles(blocks[:, 48:], 32) | _fields(blocks[:, 16:48], 32, 1) << 4
    return Codes(5, q, *_scales_and_mins(blocks), supers=_half(blocks, 0), super_mins=_half(blocks, 2))


def q6_k(blocks: Tensor) -> Codes:
    """256 x 4 low bits, 256 x 2 high bits, 16 x int8 scale, d (f16): w = (d sc) (q - 32), 16 sub-blocks."""
    q = _nibbles(blocks[:, :128], 64) | _fields(blocks[:, 128:192], 32, 2) << 4
    return Codes(6, q, blocks[:, 192:208].view(torch.int8), zero=32, supers=_half(blocks, 208))


def iq4_xs(blocks: Tensor) -> Codes:
    """d (f16), 8 x 6-bit scale (2 high bits, then 4 low), 256 x 4-bit codes: w = d (sc - 32) value[code]."""
    low = _fields(blocks[:, 4:8].unsqueeze(-1), 1, 4)
    high = _fields(blocks[:, 2:4].unsqueeze(-1), 1, 2)
    scales = (low | high << 4).view(torch.int8) - 32
    return Codes(4, _nibbles(blocks[:, 8:], 16), scales, supers=_half(blocks, 0), values=IQ4_VALUES)


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
    """The scales and minima of q4_k and q5_k: two uint8 [B, 8].

    Of the 12 bytes at 4, the low 6 bits of 0-3 are scales 0-3, of 4-7 mins 0-3; bytes 8-11 hold the low 4 bits of
    scales (low half) and mins (high half) 4-7, whose 2 high bits top the bytes 0-3 and 4-7.
    """
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([a & 63, c & 15 | a >> 6 << 4], dim=1)
    mins = torch.cat([b & 63, c >> 4 | b >> 6 << 4], dim=1)
    return scales, mins
