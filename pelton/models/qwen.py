"""Qwen 2 / 2.5 (arXiv:2407.10671, biases on q, k, v) and Qwen 3 (2505.09388, normalised queries and keys)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pelton.layers.attention import GLOBAL, LOCAL
from pelton.models.llama import Llama, LlamaConfig
from pelton.weights.fields import Fields


class Qwen2(Llama):
    """Llama with biases on q, k and v, and a sliding window on the upper layers if config.json turns it on."""

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Llama's fields; the biases are part of the architecture."""
        return LlamaConfig.parse(config, qkv_bias=True, out_bias=False, windows=_windows(config))


class Qwen3(Llama):
    """Llama with RMS-normalised queries and keys."""

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Llama's fields; head_dim is independent of the model's width."""
        return LlamaConfig.parse(
            config, qk_norm=True, head_size=Fields(config).int("head_dim", 128, low=1), windows=_windows(config)
        )


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on see `sliding_window` tokens, or those `layer_types` names."""
    fields = Fields(config)
    num_layers = fields.int("num_hidden_layers", low=1)
    window = fields.optional_int("sliding_window", low=1)
    if window is None or not fields.bool("use_sliding_window", False):
        return (None,) * num_layers
    first = fields.int("max_window_layers", num_layers, low=0)
    default = [LOCAL if i >= first else GLOBAL for i in range(num_layers)]
    layer_types = fields.str_list("layer_types", default, length=num_layers, known=(LOCAL, GLOBAL))
    return tuple(window if kind == LOCAL else None for kind in layer_types)
