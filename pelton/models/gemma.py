"""Gemma 2 (arXiv:2408.00118) and the text part of Gemma 3 (2503.19786).

Both: norms before and after each half of a block, weights of norms stored as differences from 1, embeddings times
sqrt(d_model), GeGLU, local layers (sliding window) between global ones. Gemma 2 caps scores and logits; Gemma 3
normalises queries and keys instead and gives local layers a rotary base of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pelton.layers.attention import GLOBAL, LOCAL, Attention, AttentionShape
from pelton.layers.batch import Batch, select
from pelton.layers.mlp import GatedMLP
from pelton.layers.norm import RMSNorm
from pelton.layers.rope import Angles, Rope
from pelton.layers.vocab import Embedding, LMHead
from pelton.models import Model
from pelton.weights.checkpoint import Checkpoint
from pelton.weights.fields import Fields


@dataclass(frozen=True)
class GemmaConfig:
    """The part of config.json that shapes the network."""

    vocab_size: int
    d_model: int
    d_hidden: int
    attention: tuple[AttentionShape, ...]  # one for each layer
    activation: str
    eps: float
    tied: bool
    logit_softcap: float | None
    qk_norm: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], *, qk_norm: bool, global_every: int) -> GemmaConfig:
        """Read config.json. Layer i is global if `layer_types` says so, else every `global_every`th."""
        fields = Fields(config)
        num_layers = fields.int("num_hidden_layers", low=1)
        every = fields.int("sliding_window_pattern", global_every, low=1)
        default = [LOCAL if (i + 1) % every else GLOBAL for i in range(num_layers)]
        layer_types = fields.str_list("layer_types", default, length=num_layers, known=(LOCAL, GLOBAL))
        if fields.bool("use_bidirectional_attention", False):
            raise fields.error("use_bidirectional_attention", "is true: not supported; pelton runs causal models")
        window = fields.int("sliding_window", 4096, low=1)
        bias = fields.bool("attention_bias", False)
        shapes = [
            AttentionShape(
                d_model=fields.int("hidden_size", low=1),
                num_heads=fields.int("num_attention_heads", 8, low=1),
                num_kv_heads=fields.int("num_key_value_heads", 4, low=1),
                head_size=fields.int("head_dim", 256, low=1),
                scale=fields.float("query_pre_attn_scalar", 256.0, low=1e-6) ** -0.5,
                window=window if kind == LOCAL else None,
                softcap=fields.optional_float("attn_logit_softcapping", low=1e-6),
                qkv_bias=bias,
                out_bias=bias,
            )
            for kind in layer_types
        ]
        return cls(
            vocab_size=fields.int("vocab_size", 262208, low=1),
            d_model=shapes[0].d_model,
            d_hidden=fields.int("intermediate_size", low=1),
            attention=tuple(shapes),
            activation=fields.str("hidden_activation", "gelu_pytorch_tanh"),
            eps=fields.float("rms_norm_eps", 1e-6, low=0.0),
            tied=fields.bool("tie_word_embeddings", True),
            logit_softcap=fields.optional_float("final_logit_softcapping", low=1e-6),
            qk_norm=qk_norm,
        )


class Block:
    """Attention, then feed-forward, each normalised before and after, and added to the residual stream."""

    def __init__(self, ckpt: Checkpoint, config: GemmaConfig, layer_id: int) -> None:
        c, load_norm = config, partial(RMSNorm.load, eps=config.eps, offset=1.0)
        self.is_local = c.attention[layer_id].window is not None
        self.attn_norm = load_norm(ckpt.at("input_layernorm"), c.d_model)
        self.attn = Attention(
            ckpt.at("self_attn"), c.attention[layer_id], layer_id, load_norm if c.qk_norm else None
        )
        self.attn_post_norm = load_norm(ckpt.at("post_attention_layernorm"), c.d_model)
        self.mlp_norm = load_norm(ckpt.at("pre_feedforward_layernorm"), c.d_model)
        self.mlp = GatedMLP.load(ckpt.at("mlp"), c.d_model, c.d_hidden, c.activation)
        self.mlp_post_norm = load_norm(ckpt.at("post_feedforward_layernorm"), c.d_model)

    def __call__(
        self, x: Tensor, y: Tensor, angles: Angles, batch: Batch, next_norm: RMSNorm, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x [T, d_model], changed in place, and y, which is `attn_norm` of it: after the block, and
        `next_norm` of it; or `wanted` [M] rows of both."""
        attended, x = self.attn(y, angles, batch, wanted=wanted), select(x, wanted)
        y = self.attn_post_norm.add_to(x, attended, then=self.mlp_norm)
        return x, self.mlp_post_norm.add_to(x, self.mlp(y), then=next_norm)


class Gemma2(Model):
    """The whole decoder."""

    def __init__(self, ckpt: Checkpoint, config: GemmaConfig) -> None:
        c, model = config, ckpt.at("model")
        self.embed = Embedding.load(model.at("embed_tokens"), c.vocab_size, c.d_model, c.tied, c.d_model**0.5)
        self.global_rope, self.local_rope = self.load_ropes(ckpt, c.attention[0].head_size)
        self.blocks = [Block(model.at(f"layers.{i}"), c, i) for i in range(len(c.attention))]
        self.norm = RMSNorm.load(model.at("norm"), c.d_model, c.eps, offset=1.0)
        self.lm_head = LMHead.load(ckpt, self.embed, c.tied, c.logit_softcap)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> GemmaConfig:
        """The network that a config.json describes."""
        return GemmaConfig.parse(config, qk_norm=False, global_every=2)

    @classmethod
    def load_ropes(cls, ckpt: Checkpoint, head_size: int) -> tuple[Rope, Rope]:
        """The rotary embeddings of global and local layers."""
        rope = Rope.parse(ckpt.config, head_size, ckpt.device)
        return rope, rope

    def forward(self, batch: Batch) -> Tensor:
        """See Model."""
        x = self.embed(batch.token_ids)
        global_angles, local_angles = self.global_rope(batch.positions), self.local_rope(batch.positions)
        next_norms = [*(block.attn_norm for block in self.blocks[1:]), self.norm]
        y = self.blocks[0].attn_norm(x)
        for block, next_norm in zip(self.blocks, next_norms, strict=True):
            wanted = batch.wanted if next_norm is self.norm else None
            x, y = block(x, y, local_angles if block.is_local else global_angles, batch, next_norm, wanted)
        return y


class Gemma3(Gemma2):
    """Gemma 2 with normalised queries and keys, one global layer in six, and two rotary bases."""

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> GemmaConfig:
        """The network that a config.json describes."""
        return GemmaConfig.parse(config, qk_norm=True, global_every=6)

    @classmethod
    def load_ropes(cls, ckpt: Checkpoint, head_size: int) -> tuple[Rope, Rope]:
        """Scaling applies to the global layers; the local ones turn with `rope_local_base_freq`.

        Newer config files hold both under `rope_parameters`, an entry for each kind of layer.
        """
        config, fields = ckpt.config, Fields(ckpt.config)
        by_kind = fields.optional_object("rope_parameters")

        def load(kind: str, theta: float, scaling: Any) -> Rope:
            parameters = scaling if by_kind is None else by_kind.object(kind).values
            own = {"rope_theta": theta, "rope_scaling": parameters, "rope_parameters": None}
            return Rope.parse({**config, **own}, head_size, ckpt.device)

        return (
            load(GLOBAL, fields.float("rope_theta", 1e6), config.get("rope_scaling")),
            load(LOCAL, fields.float("rope_local_base_freq", 1e4), None),
        )
