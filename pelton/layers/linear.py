"""Matrix products whose weight comes from a checkpoint, several checkpoint tensors fused into one product."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pelton.quant.layout import LinearWeight, fuse
from pelton.weights.checkpoint import Checkpoint


class Linear:
    """y = x W^T + b."""

    def __init__(self, weight: LinearWeight, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    def load(cls, ckpt: Checkpoint, parts: Mapping[str, int], d_in: int, bias: bool = False) -> Linear:
        """Read each part's `.weight` [N, d_in] (and `.bias` [N]) and stack them: y = [part | part | ...]."""
        weight = ckpt.packed(fuse([ckpt.linear(f"{name}.weight", (d_out, d_in)) for name, d_out in parts.items()]))
        if not bias:
            return cls(weight)
        biases = [ckpt.tensor(f"{name}.bias", (d_out,), ckpt.activation_dtype) for name, d_out in parts.items()]
        return cls(weight, torch.cat(biases))

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]; with `add_to` [T, N] (the residual stream) added to that, in place."""
        return self.weight.matmul(x, self.bias, add_to)
