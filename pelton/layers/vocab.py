"""From token ids to vectors and from vectors to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pelton import ops
from pelton.quant.layout import LinearWeight
from pelton.weights.checkpoint import Checkpoint


class Embedding:
    """One vector for each token id, times `scale` (Gemma: sqrt(d_model))."""

    def __init__(self, weight: LinearWeight, scale: float = 1.0) -> None:
        self.weight = weight
        self.scale = scale

    @classmethod
    def load(cls, ckpt: Checkpoint, vocab_size: int, d_model: int, tied: bool, scale: float = 1.0) -> Embedding:
        """Read `weight` [vocab_size, d_model]; `tied`: it is multiplied with too."""
        # The factor is rounded to the compute dtype first, as the models were trained.
        rounded = float(torch.tensor(scale, dtype=ckpt.dtype))
        shape = (vocab_size, d_model)
        return cls(ckpt.packed(ckpt.linear("weight", shape)) if tied else ckpt.table("weight", shape), rounded)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, d_model]."""
        return self.weight.rows(token_ids, self.scale)


class LMHead:
    """Logits of each token of the vocabulary, in float32."""

    def __init__(self, weight: LinearWeight, softcap: float | None = None) -> None:
        self.weight = weight
        self.softcap = softcap

    @classmethod
    def load(cls, ckpt: Checkpoint, embedding: Embedding, tied: bool, softcap: float | None = None) -> LMHead:
        """Read `lm_head.weight` [V, d_model], or share the embedding's where `tied`."""
        if tied:
            return cls(embedding.weight, softcap)
        return cls(ckpt.packed(ckpt.linear("lm_head.weight", embedding.weight.shape)), softcap)

    def __call__(self, x: Tensor) -> Tensor:
        """[M, d_model] -> [M, V] float32."""
        logits = self.weight.logits(x)
        if self.softcap is not None:
            ops.softcap_(logits, self.softcap)
        return logits
