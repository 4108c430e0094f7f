"""Llama (arXiv:2302.13971, 2407.21783) and Mistral (2310.06825): pre-norm decoder, rotary positions, grouped
queries, SwiGLU. Qwen 2 and 3 differ by constructor arguments (qwen.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pelton.layers.attention import Attention, AttentionShape
from pelton.layers.batch import Batch, select
from pelton.layers.mlp import GatedMLP
from pelton.layers.norm import RMSNorm
from pelton.layers.rope import Angles, Rope
from pelton.layers.vocab import Embedding, LMHead
from pelton.models import Model
from pelton.weights.checkpoint import Checkpoint
from pelton.weights.fields import Fields


@dataclass(frozen=True)
class LlamaConfig:
    """The part of config.json that shapes the network."""

    vocab_size: int
    d_model: int
    d_hidden: int
    attention: tuple[AttentionShape, ...]  # one for each layer
    activation: str
    eps: float
    tied: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def parse(
        cls, config: Mapping[str, Any], *, windows: tuple[int | None, ...] | None = None,
        qkv_bias: bool | None = None, out_bias: bool | None = None, head_size: int | None = None,
        qk_norm: bool = False,
    ) -> LlamaConfig:
        """Read config.json; the keywords are what an architecture sets itself instead of its config.json."""
        fields = Fields(config)
        d_model = fields.int("hidden_size", low=1)
        num_heads = fields.int("num_attention_heads", low=1)
        num_layers = fields.int("num_hidden_layers", low=1)
        head_size = head_size or fields.optional_int("head_dim", low=1)
        if head_size is None and d_model % num_heads:
            raise fields.error("hidden_size", f"{d_model} is not a multiple of num_attention_heads {num_heads}")
        head_size = head_size or d_model // num_heads
        bias = fields.bool("attention_bias", False)
        shapes = [
            AttentionShape(
                d_model=d_model,
                num_heads=num_heads,
                num_kv_heads=fields.int("num_key_value_heads", num_heads, low=1),
                head_size=head_size,
                scale=head_size**-0.5,
                window=window,
                qkv_bias=bias if qkv_bias is None else qkv_bias,
                out_bias=bias if out_bias is None else out_bias,
            )
            for window in windows or (None,) * num_layers
        ]
        return cls(
            vocab_size=fields.int("vocab_size", low=1),
            d_model=d_model,
            d_hidden=fields.int("intermediate_size", low=1),
            attention=tuple(shapes),
            activation=fields.str("hidden_act", "silu"),
            eps=fields.float("rms_norm_eps", 1e-6, low=0.0),
            tied=fields.bool("tie_word_embeddings", False),
            mlp_bias=fields.bool("mlp_bias", False),
            qk_norm=qk_norm,
        )


class Block:
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, ckpt: Checkpoint, config: LlamaConfig, layer_id: int) -> None:
        c, load_norm = config, partial(RMSNorm.load, eps=config.eps)
        self.attn_norm = load_norm(ckpt.at("input_layernorm"), c.d_model)
        self.attn = Attention(
            ckpt.at("self_attn"), c.attention[layer_id], layer_id, load_norm if c.qk_norm else None
        )
        self.mlp_norm = load_norm(ckpt.at("post_attention_layernorm"), c.d_model)
        self.mlp = GatedMLP.load(ckpt.at("mlp"), c.d_model, c.d_hidden, c.activation, c.mlp_bias)

    def __call__(self, x: Tensor, angles: Angles, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """The residual stream [T, d_model], changed in place; or `wanted` [M] rows of it."""
        x = self.attn(self.attn_norm(x), angles, batch, select(x, wanted), wanted)
        return self.mlp(self.mlp_norm(x), add_to=x)


class Llama(Model):
    """The whole decoder."""

    def __init__(self, ckpt: Checkpoint, config: LlamaConfig) -> None:
        c, model = config, ckpt.at("model")
        self.embed = Embedding.load(model.at("embed_tokens"), c.vocab_size, c.d_model, c.tied)
        self.rope = Rope.parse(ckpt.config, c.attention[0].head_size, ckpt.device)
        self.blocks = [Block(model.at(f"layers.{i}"), c, i) for i in range(len(c.attention))]
        self.norm = RMSNorm.load(model.at("norm"), c.d_model, c.eps)
        self.lm_head = LMHead.load(ckpt, self.embed, c.tied)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """The network that a config.json describes; the one method a relative of Llama overrides."""
        return LlamaConfig.parse(config)

    def forward(self, batch: Batch) -> Tensor:
        """See Model."""
        x = self.embed(batch.token_ids)
        angles = self.rope(batch.positions)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, angles, batch)
        return self.norm(last(x, angles, batch, batch.wanted))


class Mistral(Llama):
    """Llama with a sliding window on every layer (where config.json sets one)."""

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Llama's fields and `sliding_window`."""
        fields = Fields(config)
        window = fields.optional_int("sliding_window", low=1)
        return LlamaConfig.parse(config, windows=(window,) * fields.int("num_hidden_layers", low=1))
