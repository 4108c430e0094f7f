"""Weights in the order that the CPU's kernels stream them, at the precision they are stored in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from pelton.ops import cpu
from pelton.ops.native import native
from pelton.ops.recording import empty
from pelton.quant.layout import Blocks, Codebook4, Dense, Float8, Int, LinearWeight, Stack

BLOCK = 32  # columns that are multiplied at once: groups have whole blocks
TILE = 16  # rows of a tile: weights are joined where both have whole tiles
NUMBERS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Packed(LinearWeight):
    """A weight of the extension module. Products take float32 rows and give float32 rows."""

    def __init__(self, weight: object, shape: tuple[int, int], activations: str) -> None:
        """weight: a native Weight. activations: "int8", "bf16" or "fp32", what x is rounded to where it pays."""
        self.weight = weight
        self.shape = shape
        self.activations = activations

    def matmul(self, x: Tensor, bias: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
        out = empty(x.shape[0], self.shape[0]) if add_to is None else add_to
        self.write(x, out, bias, accumulate=add_to is not None)
        return out

    def write(self, x: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool) -> None:
        """matmul into `out` [T, N], whose rows may be part of longer ones."""
        cpu.linear(x, self.weight, out, self.activations, bias, accumulate)

    def rows(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        return cpu.embed(ids, self.weight, self.shape[1], scale)

    def dequantize(self) -> Tensor:
        return self.rows(torch.arange(self.shape[0]))


class PackedStack(Stack):
    """Packed weights one below the other: each writes its columns of the output."""

    parts: tuple[Packed, ...]

    def matmul(self, x: Tensor, bias: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
        out = empty(x.shape[0], self.shape[0]) if add_to is None else add_to
        start = 0
        for part in self.parts:
            columns = slice(start, start + part.shape[0])
            part.write(x, out[:, columns], None if bias is None else bias[columns], accumulate=add_to is not None)
            start += part.shape[0]
        return out


class Table(LinearWeight):
    """Numbers of which only rows are looked up: they stay where they lie, in a mapped file."""

    def __init__(self, weight: Blocks) -> None:
        """weight: in one of the formats of NUMBERS, its rows in order."""
        self.weight = weight
        self.shape = weight.shape
        self.dtype = next(dtype for dtype, name in NUMBERS.items() if name == weight.type.name)

    def rows(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        return cpu.look_up(ids, self.weight.data.data_ptr(), self.dtype, self.shape[1], self.shape[1], scale)

    def dequantize(self) -> Tensor:
        return self.weight.dequantize()


def pack(weight: LinearWeight, activations: str, dtype: torch.dtype = torch.float32) -> LinearWeight:
    """`weight` packed; as it is where the extension module has no layout for it, or is missing. What has a layout only
    as numbers becomes numbers of `dtype`."""
    if native is None:
        return weight
    if isinstance(weight, Float8):
        return pack(Dense(weight.dequantize().to(dtype)), activations)
    if isinstance(weight, Stack):
        as_numbers = [Dense(p.dequantize().to(dtype)) if isinstance(p, Float8) else p for p in weight.parts]
        runs = [list(run) for _, run in groupby(as_numbers, key=_kind)]
        parts = [part for run in runs for part in _join(run, activations)]
        if not all(isinstance(part, Packed) for part in parts):
            return weight
        return parts[0] if len(parts) == 1 else PackedStack(parts)
    return _join([weight], activations)[0]


def _kind(weight: LinearWeight) -> object:
    """Weights of one kind, one below the other, are one weight."""
    if isinstance(weight, Blocks):
        return weight.type.name
    return NUMBERS.get(weight.weight.dtype) if isinstance(weight, Dense) else weight


def _join(parts: Sequence[LinearWeight], activations: str) -> list[LinearWeight]:
    """Parts of one kind as one packed weight, or each alone where tiles do not fit together."""
    if len(parts) > 1 and any(part.shape[0] % TILE for part in parts[:-1]):
        return [packed for part in parts for packed in _join([part], activations)]
    first, num_out, num_in = parts[0], sum(part.shape[0] for part in parts), parts[0].shape[1]
    if isinstance(first, Int | Codebook4):
        group = _round_up(first.group) if first.scales.shape[1] == 1 else first.group
        if group % BLOCK:
            return list(parts)
        return [Packed(_pack_codes(first, group), first.shape, activations)]
    kind = _kind(first)
    if kind not in native.packed_formats():  # type: ignore[union-attr]
        return list(parts)
    weight = native.Weight(kind, num_out, num_in)  # type: ignore[union-attr]
    start = 0
    for part in parts:
        data, row_ids = _bytes(part)
        order = [] if row_ids is None else row_ids.tolist()
        weight.fill(start, data.data_ptr(), data.numel() * data.element_size(), order)
        start += part.shape[0]
    return [Packed(weight, (num_out, num_in), activations)]


def _bytes(weight: LinearWeight) -> tuple[Tensor, Tensor | None]:
    """The rows of a weight as they are packed from, and their order."""
    if isinstance(weight, Blocks):
        return weight.data, weight.row_ids
    return weight.dequantize().contiguous(), None


def _round_up(columns: int) -> int:
    return -(-columns // BLOCK) * BLOCK


def _pack_codes(weight: Int | Codebook4, group: int) -> object:
    num_out, num_in = weight.shape
    codes, scales = weight.codes.contiguous(), weight.scales.float().contiguous()
    mins = None
    if isinstance(weight, Codebook4):
        packed = native.Weight.lookup(weight.values.tolist(), group, num_out, num_in)  # type: ignore[union-attr]
    else:
        zeros = weight.zeros
        if isinstance(zeros, Tensor):
            mins = (-zeros.float() * scales).contiguous()
        packed = native.Weight.codes(  # type: ignore[union-attr]
            weight.bits, group, mins is not None, 0 if mins is not None else int(zeros), num_out, num_in
        )
        if weight.order is not None:
            packed.set_order(weight.order.tolist())
    packed.fill_codes(0, num_out, codes.data_ptr(), scales.data_ptr(), 0 if mins is None else mins.data_ptr())
    return packed
