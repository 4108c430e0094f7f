"""Matrix products whose weight comes from a checkpoint, several checkpoint tensors fused into one product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pelton.ops.parallel import Ranks
from pelton.quant.layout import LinearWeight, fuse
from pelton.weights.checkpoint import Checkpoint


class Linear:
    """y = x W^T + b."""

    def __init__(self, weight: LinearWeight, bias: Tensor | None = None, summed: Ranks | None = None) -> None:
        """summed: the ranks that have other inputs of the same product."""
        self.weight = weight
        self.bias = bias
        self.summed = summed

    @classmethod
    def load(
        cls, ckpt: Checkpoint, parts: Mapping[str, int], d_in: int, bias: bool = False,
        split: Literal["out", "in"] | None = None, unit: int = 1,
    ) -> Linear:
        """Read each part's `.weight` [N, d_in] (and `.bias` [N]) and stack them: y = [part | part | ...].

        split: what ranks share, in whole units of so many features: the outputs of each part (of which some ranks have
        the same where there are fewer units than ranks), or the inputs. ConfigError if they cannot.
        """
        ranks, names = ckpt.ranks, ", ".join(map(ckpt.full_name, parts))
        rows = {name: range(d_out) for name, d_out in parts.items()}
        columns = range(d_in)
        if split == "in":
            columns = ranks.share(d_in, unit, what=f"the inputs of {names}")
        elif split == "out":
            what = f"the outputs of {names}"
            rows = {name: ranks.share(d_out, unit, what=what, or_same=True) for name, d_out in parts.items()}
        weights = [ckpt.linear(f"{name}.weight", (d_out, d_in), rows[name], columns) for name, d_out in parts.items()]
        layer = cls(ckpt.packed(fuse(weights)), summed=ranks if split == "in" and ranks.size > 1 else None)
        if bias:
            biases = {name: ckpt.tensor(f"{name}.bias", (n,), ckpt.activation_dtype) for name, n in parts.items()}
            if layer.summed is None or ranks.rank == 0:  # a sum has it once
                layer.bias = torch.cat([biases[name][part.start : part.stop] for name, part in rows.items()])
        return layer

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]; with `add_to` [T, N] (the residual stream) added to that, in place where it can be: what is
        returned is the stream."""
        if self.summed is None:
            return self.weight.matmul(x, self.bias, add_to)
        is_first = self.summed.rank == 0  # the sum has the stream, too, once
        return self.summed.all_reduce_(self.weight.matmul(x, self.bias, add_to if is_first else None))
