"""How a weight is held in memory to be multiplied. A weight is something that multiplies.

Here each layout is defined in plain torch, by `dequantize()`. On a CPU quant/native.py puts it into the order that the
kernels stream.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelton import ops
from pelton.errors import ConfigError, ModelFormatError
from pelton.quant import FORMATS
from pelton.weights.stored import BlockType


class LinearWeight(ABC):
    """A weight W of N output and K input features, in whatever layout."""

    shape: tuple[int, int]  # (N, K)

    @abstractmethod
    def dequantize(self) -> Tensor:
        """W as [N, K]: the definition of the layout, to which `matmul` and `rows` are held."""

    def matmul(self, x: Tensor, bias: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
        """x W^T (+ bias [N]): [T, K] -> [T, N]; with `add_to` [T, N] added to that, which is returned."""
        y = F.linear(x, self.dequantize().to(x.dtype), bias)
        return y if add_to is None else add_to.add_(y)

    def gated(self, x: Tensor, bias: Tensor | None, gate: str) -> Tensor | None:
        """gate(a) * b for x W^T + bias = [a | b], where that is one step: [T, K] -> [T, N / 2]; else None.
        gate: "silu" or "gelu_tanh"."""
        return None

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T in float32: [T, K] -> [T, N], written to `out` if that is given."""
        y = self.matmul(x).float()
        return y if out is None else out.copy_(y)

    def part(self, rows: range, columns: range) -> LinearWeight:
        """Some adjacent rows and columns of W, in the same layout, with memory of their own. ConfigError if the columns
        cut what can only be kept whole. For weights that are not packed yet."""
        raise NotImplementedError(f"{type(self).__name__} is packed")

    def rows(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        """Some rows of W (an embedding's look-up), times scale: [T] -> [T, K]."""
        rows = F.embedding(ids, self.dequantize())
        return rows if scale == 1.0 else rows * scale


class Dense(LinearWeight):
    """Every number of the weight, in the compute dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # [N, K]
        self.shape = (weight.shape[0], weight.shape[1])

    def dequantize(self) -> Tensor:
        return self.weight

    def part(self, rows: range, columns: range) -> LinearWeight:
        return Dense(_cut(self.weight, rows, columns))


class Blocks(LinearWeight):
    """Rows of a file's blocks, as they lie there."""

    def __init__(self, type: BlockType, data: Tensor, shape: tuple[int, int], row_ids: Tensor | None = None) -> None:
        """data: uint8, N rows of whole blocks. row_ids: row i of the weight is row row_ids[i] of the data."""
        self.type = type
        self.data = data.view(shape[0], -1)  # uint8 [N, bytes of a row]
        self.shape = shape
        self.row_ids = row_ids

    def dequantize(self) -> Tensor:
        data = self.data if self.row_ids is None else self.data[self.row_ids]
        return FORMATS[self.type.name](data.reshape(-1, self.type.block_bytes)).view(self.shape)

    def part(self, rows: range, columns: range) -> LinearWeight:
        where = self.type.bytes_of(columns, f"a weight {list(self.shape)}")
        data = self.data if self.row_ids is None else self.data[self.row_ids]
        return Blocks(self.type, _cut(data, rows, where), (len(rows), len(columns)))


class Int(LinearWeight):
    """Unsigned codes of 4 or 8 bits; each group of columns has a scale and a zero point: w = scale (code - zero).

    GPTQ, AWQ and compressed-tensors are lowered to this. `order` (GPTQ's act-order): column k of the codes belongs to
    input order[k].
    """

    def __init__(
        self, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor | int, order: Tensor | None = None
    ) -> None:
        """codes: uint8 [N, K]; scales: float32 [N, K / group]; zeros: float32 like scales, or one for all."""
        self.bits = bits
        self.codes = codes
        self.scales = scales
        self.zeros = zeros
        self.order = order
        self.shape = (codes.shape[0], codes.shape[1])
        self.group = _group_size(codes, scales)

    def dequantize(self) -> Tensor:
        zeros = self.zeros
        if isinstance(zeros, Tensor):
            zeros = zeros.repeat_interleave(self.group, dim=1)
        weights = (self.codes.float() - zeros) * self.scales.repeat_interleave(self.group, dim=1)
        if self.order is None:
            return weights
        return torch.empty_like(weights).index_copy_(1, self.order, weights)

    def part(self, rows: range, columns: range) -> LinearWeight:
        if self.order is not None and len(columns) < self.shape[1]:
            raise ConfigError(
                "the groups of this checkpoint are not of adjacent columns (GPTQ's act-order), so that ranks cannot "
                "share them; use --tensor-parallel-size 1, or a checkpoint without desc_act"
            )
        groups = _groups(columns, self.group, self.shape)
        zeros = self.zeros if isinstance(self.zeros, int) else _cut(self.zeros, rows, groups)
        return Int(self.bits, _cut(self.codes, rows, columns), _cut(self.scales, rows, groups), zeros, self.order)


class W8A8(Int):
    """Int8 with a scale for each row, whose input is rounded to int8 too, with a scale for each token.

    compressed-tensors' int8 with dynamic activations is lowered to this. Sums of integers are exact: no row of the
    result depends on others. A packed weight on a CPU rounds its input as all weights do there, in blocks of 32 or not.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        """codes: uint8 [N, K], int8 plus 128; scales: float32 [N, 1]."""
        super().__init__(8, codes, scales, 128)

    def matmul(self, x: Tensor, bias: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
        numbers, x_scales = ops.quantize_rows(x)
        sums = numbers.double() @ (self.codes.double() - 128).T  # exact, as in int32
        y = sums.float() * x_scales[:, None] * self.scales[:, 0]
        y = (y if bias is None else y + bias).to(x.dtype)
        return y if add_to is None else add_to.add_(y)

    def part(self, rows: range, columns: range) -> LinearWeight:
        """Of some columns: their input is rounded with a scale of its own, which is no coarser than that of all."""
        return W8A8(_cut(self.codes, rows, columns), _cut(self.scales, rows, range(1)))


class Float8(LinearWeight):
    """Codes of float8_e4m3fn (arXiv:2209.05433), with a scale for each group of columns: w = scale number(code)."""

    def __init__(self, codes: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
        """codes: uint8 [N, K], the bits; scales: float32, one for each block of so many rows and columns, by rows:
        (N, K) is one scale for all, (1, K) one for each row, (128, 128) what published checkpoints have."""
        num_out, num_in = self.shape = (codes.shape[0], codes.shape[1])
        num_rows, num_columns = block
        if num_columns < num_in:  # groups of one size, where the last block has fewer columns
            self.group = math.gcd(num_columns, num_in)
            scales = scales.repeat_interleave(num_columns // self.group, dim=1)[:, : num_in // self.group]
        else:
            self.group = num_in
        self.codes = codes
        self.scales = scales.repeat_interleave(num_rows, dim=0)[:num_out]  # [N, K / group]

    def dequantize(self) -> Tensor:
        numbers = self.codes.view(torch.float8_e4m3fn).float()
        return numbers * self.scales.repeat_interleave(self.group, dim=1)

    def part(self, rows: range, columns: range) -> LinearWeight:
        groups = _groups(columns, self.group, self.shape)
        return Float8(_cut(self.codes, rows, columns), _cut(self.scales, rows, groups), (1, self.group))


class Codebook4(LinearWeight):
    """4-bit codes of 16 values, with a scale for each group of columns: w = scale value[code].

    bitsandbytes' nf4 and fp4 (arXiv:2305.14314) are lowered to this.
    """

    def __init__(self, codes: Tensor, scales: Tensor, values: Tensor) -> None:
        """codes: uint8 [N, K]; scales: float32 [N, K / group]; values: float32 [16]."""
        self.codes = codes
        self.scales = scales
        self.values = values
        self.shape = (codes.shape[0], codes.shape[1])
        self.group = _group_size(codes, scales)

    def dequantize(self) -> Tensor:
        return self.values[self.codes.long()] * self.scales.repeat_interleave(self.group, dim=1)

    def part(self, rows: range, columns: range) -> LinearWeight:
        groups = _groups(columns, self.group, self.shape)
        return Codebook4(_cut(self.codes, rows, columns), _cut(self.scales, rows, groups), self.values)


class Stack(LinearWeight):
    """Several weights of the same K one below the other, each in a layout of its own."""

    def __init__(self, parts: Sequence[LinearWeight]) -> None:
        self.parts = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    def dequantize(self) -> Tensor:
        return torch.cat([part.dequantize() for part in self.parts])


def _cut(x: Tensor, rows: range, columns: range | slice) -> Tensor:
    """A copy: what is left can be freed."""
    return x[rows.start : rows.stop, columns.start : columns.stop].clone()


def _group_size(codes: Tensor, scales: Tensor) -> int:
    """Columns of each group, of codes [N, K] and scales [N, groups]. ModelFormatError if not all can have as many: how
    many the last one has does not follow from shapes, and who reads a file with a shorter one is to make groups of one
    size, as Float8 does."""
    num_in, num_groups = codes.shape[1], scales.shape[1]
    if num_in % num_groups:
        raise ModelFormatError(
            f"a weight {list(codes.shape)} has {num_groups} groups of columns, which cannot all be as large; use a "
            f"checkpoint with a group size that divides {num_in}"
        )
    return num_in // num_groups


def _groups(columns: range, group: int, shape: tuple[int, int]) -> range:
    """The groups of `group` columns that some columns of a weight [N, K] are. ConfigError if they cut one."""
    if group >= shape[1]:
        return range(1)
    if columns.start % group or columns.stop % group:
        raise ConfigError(
            f"a weight {list(shape)} has groups of {group} columns, which would be cut at {columns.start} and "
            f"{columns.stop}; use a smaller --tensor-parallel-size"
        )
    return range(columns.start // group, columns.stop // group)


def fuse(parts: Sequence[LinearWeight]) -> LinearWeight:
    """One weight that does the work of `parts` (all of the same K) at once: outputs side by side."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Dense) for part in parts):
        return Dense(torch.cat([part.dequantize() for part in parts]))
    if all(isinstance(part, W8A8) for part in parts):  # so that the input is rounded once
        codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
        return W8A8(codes, scales)
    return Stack(parts)
