"""From token ids to vectors and from vectors to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pelton.quant.layout import LinearWeight
from pelton.weights.checkpoint import Checkpoint


class Embedding:
    """One vector for each token id, times `scale` (Gemma: sqrt(d_model))."""

    def __init__(self, weight: LinearWeight, scale: float = 1.0) -> None:
        self.weight = weight
        self.scale = scale

    @classmethod
    def load(cls, ckpt: Checkpoint, vocab_size: int, d_model: int, scale: float = 1.0) -> Embedding:
        """Read `weight` [vocab_size, d_model]."""
        return cls(ckpt.linear("weight", (vocab_size, d_model)), scale)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, d_model]."""
        x = self.weight.rows(token_ids)
        # The factor is rounded to the compute dtype first, as the models were trained.
        return x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)


class LMHead:
    """Logits of each token of the vocabulary, in float32."""

    def __init__(self, weight: LinearWeight, softcap: float | None = None) -> None:
        self.weight = weight
        self.softcap = softcap

    @classmethod
    def load(cls, ckpt: Checkpoint, embedding: Embedding, tied: bool, softcap: float | None = None) -> LMHead:
        """Read `lm_head.weight` [V, d_model], or share the embedding's where `tied`."""
        weight = embedding.weight if tied else ckpt.linear("lm_head.weight", embedding.weight.shape)
        return cls(weight.packed(), softcap)

    def __call__(self, x: Tensor) -> Tensor:
        """[M, d_model] -> [M, V] float32."""
        logits = self.weight.matmul(x).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
