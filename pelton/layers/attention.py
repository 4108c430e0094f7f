"""Causal self-attention with grouped queries over the paged KV cache.

Shapes: T tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from pelton import ops
from pelton.config import KVLayer
from pelton.errors import ConfigError, ModelFormatError
from pelton.layers.batch import Batch, select
from pelton.layers.linear import Linear
from pelton.layers.norm import RMSNorm
from pelton.layers.rope import Angles
from pelton.ops.parallel import Ranks
from pelton.weights.checkpoint import Checkpoint

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # config.json's words in layer_types
MAX_HEAD_SIZE = 1024  # twice that of any model there is


@dataclass(frozen=True)
class AttentionShape:
    """What one attention layer is made of. ModelFormatError, in config.json's words, for what cannot be."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float  # of scores
    window: int | None = None  # tokens that a token sees, itself included; None: all before it
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelFormatError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_size % 2 or self.head_size > MAX_HEAD_SIZE:
            raise ModelFormatError(
                f"head_dim {self.head_size} (if not given, hidden_size / num_attention_heads) is not supported; "
                f"it must be even and at most {MAX_HEAD_SIZE}"
            )

    def share(self, ranks: Ranks) -> AttentionShape:
        """What one rank computes: whole heads. Several ranks keep the same key and value head where there are fewer
        of these. ConfigError if heads cannot be shared evenly."""
        if not self._can_share(ranks.size):
            sizes = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self._can_share(n))
            raise ConfigError(
                f"--tensor-parallel-size {ranks.size}: the model's {self.num_heads} heads and {self.num_kv_heads} key "
                f"and value heads cannot be shared evenly; use one of {sizes}"
            )
        num_heads, num_kv_heads = self.num_heads // ranks.size, max(1, self.num_kv_heads // ranks.size)
        return replace(self, num_heads=num_heads, num_kv_heads=num_kv_heads)

    def _can_share(self, size: int) -> bool:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)

    @property
    def kv_layer(self) -> KVLayer:
        """What the layer keeps in the KV cache."""
        return KVLayer(self.window, self.num_kv_heads, self.head_size)


class Attention:
    """softmax(q k^T * scale) v, projected back to d_model."""

    def __init__(
        self, ckpt: Checkpoint, shape: AttentionShape, layer_id: int,
        load_head_norm: Callable[[Checkpoint, int], RMSNorm] | None = None,
    ) -> None:
        """Read q_proj, k_proj, v_proj, o_proj and, with `load_head_norm`, q_norm and k_norm over each head."""
        s, self.shape = shape, shape.share(ckpt.ranks)
        self.layer_id = layer_id
        q_size, kv_size = s.num_heads * s.head_size, s.num_kv_heads * s.head_size
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = Linear.load(ckpt, parts, s.d_model, s.qkv_bias, split="out", unit=s.head_size)
        self.out = Linear.load(ckpt, {"o_proj": s.d_model}, q_size, s.out_bias, split="in", unit=s.head_size)
        self.head_norms: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0)
        if load_head_norm is not None:
            q_norm, k_norm = (load_head_norm(ckpt.at(name), s.head_size) for name in ("q_norm", "k_norm"))
            self.head_norms = q_norm.weight, k_norm.weight, q_norm.eps

    def __call__(
        self, x: Tensor, angles: Angles, batch: Batch, add_to: Tensor | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """[T, d_model] -> [T, d_model], or of `wanted` [M] rows [M, d_model], with `add_to` added to that; writes the
        new tokens to the cache."""
        s = self.shape
        cache, group = batch.kv[self.layer_id]
        qkv = self.qkv(x)  # [T, (H + 2G) D]
        q_norm, k_norm, eps = self.head_norms
        longest = max((end - begin for begin, end in batch.prompts), default=0)
        if batch.prompts and s.softcap is None and (s.window is None or longest <= s.window):
            ops.rope_and_store_(qkv, *angles, cache, group.slots, q_norm, k_norm, eps)
            out = ops.prompt_attention(*ops.split_heads(qkv, cache), batch.prompts, s.scale)
        else:
            out = ops.rope_and_attend_(
                qkv, *angles, cache, group.slots, q_norm, k_norm, eps,
                group.block_table, batch.query_starts, batch.context_lens, s.scale, s.window, s.softcap,
            )
        out = select(out.flatten(1), wanted)
        return self.out(out, add_to)  # [T, H * D] -> [T, d_model]
