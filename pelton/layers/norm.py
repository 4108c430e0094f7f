"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from pelton import ops
from pelton.weights.checkpoint import Checkpoint


class RMSNorm:
    """x / rms(x) * weight; the weight is kept in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    @classmethod
    def load(cls, ckpt: Checkpoint, size: int, eps: float, offset: float = 0.0) -> RMSNorm:
        """Read `weight` [size]. Gemma stores its weights as differences from 1: offset=1.0."""
        return cls(ckpt.tensor("weight", (size,), torch.float32) + offset, eps)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add_to(self, out: Tensor, x: Tensor, then: RMSNorm) -> Tensor:
        """out += norm(x); returns `then`, a norm of the same eps, of that: [T, size]."""
        return ops.rms_norm_add_norm_(out, x, self.weight, then.weight, self.eps)
