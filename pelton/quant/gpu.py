"""Weights on a GPU: numbers, or codes in tiles. Few rows are multiplied at the speed of reading the weight. For more,
on Hopper, codes are opened where they are multiplied; for many they are opened into numbers, which costs little beside
the product. Deterministic weights are multiplied in one order of sums, whatever the number of rows, or one for prompts
and one for all else: a row's result does not depend on the others.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from pelton import ops
from pelton.ops.cuda import blas, few_rows, gated_rows, int8, many_rows, rows, same_rows
from pelton.ops.cuda.program import is_compiling
from pelton.ops.cuda.tiles import HALVES, open_tiles
from pelton.ops.tiles import COLUMNS, ROWS, Tiles
from pelton.quant import CODED
from pelton.quant.codes import Codes
from pelton.quant.layout import W8A8, Blocks, Codebook4, Dense, Float8, Int, LinearWeight, Stack
from pelton.quant.tiled import group_size, make_tiles

MAX_DENSE_ROWS = 4  # more are multiplied as fast by torch


class OnGPU(LinearWeight):
    """A weight on a GPU: what it computes, it writes."""

    def matmul(self, x: Tensor, bias: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
        out = x.new_empty(x.shape[0], self.shape[0]) if add_to is None else add_to
        self.write(x, out, bias, accumulate=add_to is not None)
        return out

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = x.new_empty(x.shape[0], self.shape[0], dtype=torch.float32)
        self.write(x, out, None, accumulate=False)
        return out

    @abstractmethod
    def write(self, x: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool) -> None:
        """matmul into `out` [T, N], whose rows may be part of longer ones."""


class Whole(OnGPU):
    """A weight in one layout."""

    operand: Tensor | Tiles  # what is multiplied with
    deterministic: bool
    then: Tensor | Tiles | None = None  # what is multiplied with after it in a step

    def gated(self, x: Tensor, bias: Tensor | None, gate: str) -> Tensor | None:
        if _noted() is not None:
            return None
        weight, size = self.operand, (x.shape[0], self.shape[0] // 2)
        if self.deterministic:
            if not same_rows.accepts_gated(x, weight):
                return None
            out = x.new_empty(size)
            same_rows.multiply(x, weight, out, bias, gate=gate, then=self.then)
            return out
        if isinstance(weight, Tiles) and many_rows.accepts_gated(x, weight):
            out = x.new_empty(size)
            many_rows.multiply(x, weight, out, bias, gate=gate)
            if not is_compiling():
                return out
            self.write(x, x.new_empty(x.shape[0], self.shape[0]), bias, accumulate=False)  # as where order is noted
        elif self._is_for_few(x) and few_rows.accepts_gated(x, weight):
            out = x.new_empty(size)
            few_rows.multiply(x, weight, out, bias, gate=gate, then=self.then)
            return out
        if not gated_rows.accepts(x, weight):
            return None
        out = x.new_empty(size)
        gated_rows.multiply(x, self._numbers(x.dtype), out, bias, gate)
        return out

    def write(self, x: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool) -> None:
        weight, noted = self.operand, _noted()
        if noted is not None:
            noted.append(self)
        if self.deterministic:
            same_rows.multiply(x, weight, out, bias, accumulate, then=self.then)
            return
        if isinstance(weight, Tiles) and many_rows.accepts(x, weight, out):
            many_rows.multiply(x, weight, out, bias, accumulate)
            if not is_compiling():  # else for even more rows too
                return
        elif self._is_for_few(x) and few_rows.accepts(x, weight):
            few_rows.multiply(x, weight, out, bias, accumulate, then=self.then)
            return
        numbers = self._numbers(x.dtype)
        with blas.for_rows(x.shape[0], x.device):
            _multiply(x, numbers, out, bias, accumulate)

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        return open_tiles(self.operand, dtype) if isinstance(self.operand, Tiles) else self.operand

    def _is_for_few(self, x: Tensor) -> bool:
        """Whether x has so few rows that torch is not as fast."""
        return isinstance(self.operand, Tiles) or x.shape[0] <= MAX_DENSE_ROWS


def _multiply(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool) -> None:
    """out = x W^T (+ bias), or added to out, by torch."""
    if accumulate:
        out.addmm_(x, weight.T)
    elif out.dtype != x.dtype:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
        return
    else:
        torch.mm(x, weight.T, out=out)
    if bias is not None:
        out.add_(bias)


_thread = threading.local()


def _noted() -> list[Whole] | None:
    """The weights that this thread has multiplied with since it began to note them, if it does."""
    return getattr(_thread, "noted", None)


@contextmanager
def noting_order() -> Iterator[None]:
    """A step runs in this context: its weights note which is multiplied after which. (A gate is not fused in it.)"""
    noted: list[Whole] = []
    _thread.noted = noted
    try:
        yield
    finally:
        _thread.noted = None
    for weight, then in pairwise([*noted, *noted[:1]]):
        weight.then = then.operand


class Numbers(Whole):
    """A weight in the compute dtype."""

    def __init__(self, weight: Tensor, deterministic: bool = False) -> None:
        self.operand = self.weight = weight  # [N, K]
        self.deterministic = deterministic
        self.shape = (weight.shape[0], weight.shape[1])

    def dequantize(self) -> Tensor:
        return self.weight

    def rows(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        return rows.embed(ids, self.weight, scale)


class Tiled(Whole):
    """A quantised weight, at file precision."""

    def __init__(self, tiles: Tiles, dtype: torch.dtype, deterministic: bool = False) -> None:
        """dtype: what the weight is opened to."""
        self.operand = self.tiles = tiles
        self.deterministic = deterministic
        self.shape = tiles.shape
        self.dtype = dtype

    def dequantize(self) -> Tensor:
        return open_tiles(self.tiles, self.dtype)

    def rows(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        return open_tiles(self.tiles, self.dtype, ids, scale)


class Int8(OnGPU):
    """An int8 weight whose input is rounded to int8: whichever kernel multiplies, a row's bits are the same."""

    def __init__(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """weight: int8 [N, K]; scales: float32 [N]; dtype: the compute dtype."""
        self.weight = weight
        self.scales = scales
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = dtype

    def write(self, x: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool) -> None:
        numbers, x_scales = ops.quantize_rows(x)
        multiply = few_rows.multiply_int8 if few_rows.accepts_int8(numbers, out, bias) else int8.multiply
        multiply(numbers, x_scales, self.weight, self.scales, out, bias, accumulate)

    def dequantize(self) -> Tensor:
        return (self.weight * self.scales[:, None]).to(self.dtype)


class Ordered(OnGPU):
    """A weight whose column k belongs to input order[k] (GPTQ's act-order)."""

    def __init__(self, weight: OnGPU, order: Tensor) -> None:
        self.weight = weight
        self.order = order
        self.shape = weight.shape

    def write(self, x: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool) -> None:
        self.weight.write(x.index_select(1, self.order), out, bias, accumulate)

    def gated(self, x: Tensor, bias: Tensor | None, gate: str) -> Tensor | None:
        return self.weight.gated(x.index_select(1, self.order), bias, gate)

    def dequantize(self) -> Tensor:
        weight = self.weight.dequantize()
        return torch.empty_like(weight).index_copy_(1, self.order, weight)


class Column(OnGPU):
    """Weights one below the other, each in a layout of its own: each writes its columns of the output."""

    def __init__(self, parts: Sequence[OnGPU]) -> None:
        self.parts = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    def write(self, x: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool) -> None:
        start = 0
        for part in self.parts:
            columns = slice(start, start + part.shape[0])
            part.write(x, out[:, columns], None if bias is None else bias[columns], accumulate)
            start += part.shape[0]

    def dequantize(self) -> Tensor:
        return torch.cat([part.dequantize() for part in self.parts])


def pack(weight: LinearWeight, dtype: torch.dtype, deterministic: bool = False) -> LinearWeight:
    """`weight`, on a GPU, in the layout that is multiplied fastest there."""
    if isinstance(weight, Stack):
        runs = [list(run) for _, run in groupby(weight.parts, key=_kind)]
        parts = [part for run in runs for part in _join(run, dtype, deterministic)]
        return parts[0] if len(parts) == 1 else Column(parts)
    return _join([weight], dtype, deterministic)[0]


def _join(parts: Sequence[LinearWeight], dtype: torch.dtype, deterministic: bool) -> list[OnGPU]:
    """Parts of one kind as one weight, or each alone where tiles do not fit together."""
    first = parts[0]
    if isinstance(first, Int) and first.order is not None:  # alone: `_kind` puts it with no other
        unordered = Int(first.bits, first.codes, first.scales, first.zeros)
        return [Ordered(_join([unordered], dtype, deterministic)[0], first.order)]
    if isinstance(first, W8A8):
        return [Int8((first.codes - 128).view(torch.int8).contiguous(), first.scales.flatten(), dtype)]
    if len(parts) > 1 and any(part.shape[0] % ROWS for part in parts[:-1]):
        return [joined for part in parts for joined in _join([part], dtype, deterministic)]
    if not (isinstance(first, Dense) or first.shape[1] % COLUMNS or dtype not in HALVES):
        codes = _concatenate([_codes(part) for part in parts])
        if group_size(codes) is not None:
            return [Tiled(make_tiles(codes), dtype, deterministic)]
    return [Numbers(torch.cat([part.dequantize().to(dtype) for part in parts]), deterministic)]


def _kind(weight: LinearWeight) -> object:
    """Weights of one kind, one below the other, are one weight."""
    if isinstance(weight, Blocks):
        return weight.type.name
    if isinstance(weight, Float8):
        return Float8, weight.group
    if isinstance(weight, Codebook4):
        return Codebook4, weight.group, tuple(weight.values.tolist())
    if type(weight) is Int and weight.order is None:
        return Int, weight.bits, weight.group, None if isinstance(weight.zeros, Tensor) else weight.zeros
    return id(weight)


def _codes(weight: LinearWeight) -> Codes:
    """The parts of a quantised weight, by rows."""
    if isinstance(weight, Blocks):
        data = weight.data if weight.row_ids is None else weight.data[weight.row_ids]
        blocks = CODED[weight.type.name](data.reshape(-1, weight.type.block_bytes))
        return _rows(blocks, weight.shape[0])
    if isinstance(weight, Codebook4):
        return Codes(4, weight.codes, weight.scales, values=tuple(weight.values.tolist()))
    if isinstance(weight, Float8):
        # Kernels take codes that are no numbers for some: then the group's scale is none.
        broken = (weight.codes & 127 == 127).view(*weight.scales.shape, -1).any(-1)
        return Codes(8, weight.codes, weight.scales.masked_fill(broken, torch.nan), float8=True)
    if not isinstance(weight, Int):
        raise TypeError(f"{type(weight).__name__} has no codes")
    scales, zeros = weight.scales.float(), weight.zeros
    if isinstance(zeros, Tensor):
        return Codes(weight.bits, weight.codes, scales, zeros=zeros.float())
    return Codes(weight.bits, weight.codes, scales, zero=zeros)


TENSORS = ("codes", "scales", "mins", "zeros", "supers", "super_mins")


def _rows(blocks: Codes, num_rows: int) -> Codes:
    """Blocks as the rows of a weight."""
    parts: dict[str, Any] = {name: part.reshape(num_rows, -1) for name, part in _tensors(blocks).items()}
    return replace(blocks, **parts)


def _concatenate(weights: Sequence[Codes]) -> Codes:
    """Weights one below the other as one."""
    all_parts = [_tensors(weight) for weight in weights]
    joined: dict[str, Any] = {name: torch.cat([parts[name] for parts in all_parts]) for name in all_parts[0]}
    return replace(weights[0], **joined)


def _tensors(codes: Codes) -> dict[str, Tensor]:
    return {name: part for name in TENSORS if (part := getattr(codes, name)) is not None}
