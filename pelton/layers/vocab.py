"""From token ids to vectors and from vectors to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pelton import ops
from pelton.ops.parallel import ALONE, Ranks
from pelton.quant.layout import LinearWeight
from pelton.weights.checkpoint import Checkpoint


class Embedding:
    """One vector for each token id, times `scale` (Gemma: sqrt(d_model))."""

    def __init__(self, weight: LinearWeight, scale: float = 1.0) -> None:
        self.weight = weight
        self.scale = scale

    @classmethod
    def load(cls, ckpt: Checkpoint, vocab_size: int, d_model: int, tied: bool, scale: float = 1.0) -> Embedding:
        """Read `weight` [vocab_size, d_model], on every rank; `tied`: it is multiplied with too."""
        # The factor is rounded to the compute dtype first, as the models were trained.
        rounded = float(torch.tensor(scale, dtype=ckpt.dtype))
        shape = (vocab_size, d_model)
        is_multiplied = tied and not _is_shared(ckpt, vocab_size)
        weight = ckpt.packed(ckpt.linear("weight", shape)) if is_multiplied else ckpt.table("weight", shape)
        return cls(weight, rounded)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, d_model]."""
        return self.weight.rows(token_ids, self.scale)


class LMHead:
    """Logits of each token of the vocabulary, in float32."""

    def __init__(self, weight: LinearWeight, softcap: float | None = None, gathered: Ranks = ALONE) -> None:
        """gathered: the ranks that have the other rows."""
        self.weight = weight
        self.softcap = softcap
        self.gathered = gathered

    @classmethod
    def load(cls, ckpt: Checkpoint, embedding: Embedding, tied: bool, softcap: float | None = None) -> LMHead:
        """Read `lm_head.weight` [V, d_model], or share the embedding's where `tied`. Ranks share its rows if these
        divide; else each has all of them."""
        shape = embedding.weight.shape
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        if _is_shared(ckpt, shape[0]):
            rows = ckpt.ranks.share(shape[0], what=name)
            return cls(ckpt.packed(ckpt.linear(name, shape, rows)), softcap, ckpt.ranks)
        return cls(embedding.weight if tied else ckpt.packed(ckpt.linear(name, shape)), softcap)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[M, d_model] -> [M, V] float32, written to `out` if that is given."""
        logits = self.weight.logits(x, out if self.gathered.size == 1 else None)
        if self.softcap is not None:
            ops.softcap_(logits, self.softcap)
        if self.gathered.size == 1:
            return logits
        logits = self.gathered.all_gather(logits)
        return logits if out is None else out.copy_(logits)


def _is_shared(ckpt: Checkpoint, vocab_size: int) -> bool:
    """Whether each rank computes the logits of some tokens only."""
    return ckpt.ranks.size > 1 and vocab_size % ckpt.ranks.size == 0
