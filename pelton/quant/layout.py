"""How a weight is held in memory to be multiplied. A weight is something that multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class LinearWeight(ABC):
    """A weight W of N output and K input features, in whatever layout."""

    shape: tuple[int, int]  # (N, K)

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """x W^T: [T, K] -> [T, N]."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of W (an embedding's look-up): [T] -> [T, K]."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """W as [N, K]: the definition of the layout, to which `matmul` and `rows` are held."""

    def packed(self) -> LinearWeight:
        """The same weight in the order that this device multiplies fastest, where there is one."""
        return self


class Dense(LinearWeight):
    """Every number of the weight, in the compute dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # [N, K]
        self.shape = (weight.shape[0], weight.shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)

    def rows(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.weight)

    def dequantize(self) -> Tensor:
        return self.weight

    def packed(self) -> LinearWeight:
        can_pack = self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16 and hasattr(
            torch.ops.mkldnn, "_reorder_linear_weight"
        )
        return OneDNNDense(self.weight) if can_pack else self


class OneDNNDense(LinearWeight):
    """Dense in oneDNN's own blocked order, as torch.compile packs it: torch would else repack at each product, and
    one token would take two to four times as long (3072 x 576 in bfloat16: 47 us instead of 212)."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)

    def matmul(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.blocks, None, "none", [], "")
        return y

    def rows(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.dequantize())

    def dequantize(self) -> Tensor:
        weight: Tensor = self.blocks.to_dense()
        return weight


class Stack(LinearWeight):
    """Several weights of the same K one below the other, each in a layout of its own."""

    def __init__(self, parts: Sequence[LinearWeight]) -> None:
        self.parts = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        return torch.cat([part.matmul(x) for part in self.parts], dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.dequantize())

    def dequantize(self) -> Tensor:
        return torch.cat([part.dequantize() for part in self.parts])

    def packed(self) -> LinearWeight:
        return Stack([part.packed() for part in self.parts])


def fuse(parts: Sequence[LinearWeight]) -> LinearWeight:
    """One weight that does the work of `parts` (all of the same K) at once: outputs side by side."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Dense) for part in parts):
        return Dense(torch.cat([part.dequantize() for part in parts]))
    return Stack(parts)
