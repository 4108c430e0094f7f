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


def fuse(parts: Sequence[LinearWeight]) -> LinearWeight:
    """One weight that does the work of `parts` (all of the same K) at once: outputs side by side."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Dense) for part in parts):
        return Dense(torch.cat([part.dequantize() for part in parts]))
    return Stack(parts)
