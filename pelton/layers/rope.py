"""Rotary position embedding and its scalings for long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pelton import ops
from pelton.weights.fields import Fields, shorten

Angles = tuple[Tensor, Tensor]
"""cos and sin of each token's angles: two [T, D/2] float32."""


class Rope:
    """The angles of positions: position * inv_freq, cos and sin times `magnitude`."""

    def __init__(self, inv_freq: Tensor, magnitude: float = 1.0) -> None:
        self.inv_freq = inv_freq  # [D/2] float32
        self.magnitude = magnitude

    @classmethod
    def parse(cls, config: Mapping[str, Any], head_size: int, device: torch.device) -> Rope:
        """Read the rotary part of a config.json."""
        fields, kind = _rope_fields(config)
        theta = fields.float("rope_theta", 10000.0, low=2.0)
        if fields.float("partial_rotary_factor", 1.0) != 1.0:
            raise fields.error("partial_rotary_factor", "is not 1: not supported; pelton turns whole heads")
        inv_freq = theta ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        magnitude = 1.0
        if kind == "linear":
            inv_freq = inv_freq / _factor(fields)
        elif kind == "llama3":
            inv_freq = _llama3(inv_freq, fields)
        elif kind == "yarn":
            inv_freq, magnitude = _yarn(inv_freq, fields, theta, _trained_len(config))
        elif kind != "default":
            raise fields.error("rope_type", f"is {shorten(kind)}: not supported; known are linear, llama3 and yarn")
        factors = config.get("rope_freq_factors")  # GGUF keeps Llama 3's scaling as a tensor of divisors
        if factors is not None:
            inv_freq = inv_freq / torch.tensor(factors, dtype=torch.float32)
        return cls(inv_freq.to(device), magnitude)

    def __call__(self, positions: Tensor) -> Angles:
        """[T] -> cos, sin [T, D/2]."""
        return ops.rope_angles(positions, self.inv_freq, self.magnitude)


def context_length(config: Mapping[str, Any]) -> int:
    """The tokens a model was made for: those it was trained on, as far as scaling stretches them."""
    trained = _trained_len(config)
    fields, kind = _rope_fields(config)
    says_it_scaled = Fields(config).str("model_type", "").startswith("gemma3")
    if kind not in ("linear", "yarn") or says_it_scaled:
        return trained
    return max(trained, int(fields.int("original_max_position_embeddings", trained, low=1) * _factor(fields)))


def _rope_fields(config: Mapping[str, Any]) -> tuple[Fields, str]:
    """The fields about rotary positions, and the type of scaling: from `rope_parameters`, or, in older files, from
    `rope_scaling` and beside it."""
    fields = Fields(config)
    values = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.optional_object(name)
        values.update({} if part is None else {key: value for key, value in part.values.items() if value is not None})
    fields = Fields(values, "config.json: rope_parameters")
    return fields, fields.str("rope_type", fields.str("type", "default"))


def _trained_len(config: Mapping[str, Any]) -> int:
    return Fields(config).int("max_position_embeddings", 2048, low=1)


def _factor(fields: Fields, low: float = 1e-6) -> float:
    return fields.float("factor", low=low, high=1e6)


def _llama3(inv_freq: Tensor, fields: Fields) -> Tensor:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, blend between (its released config and code)."""
    factor = _factor(fields, low=1.0)
    low = fields.float("low_freq_factor", low=1e-6)
    high = fields.float("high_freq_factor", low=1e-6)
    original = fields.int("original_max_position_embeddings", low=1)
    if high <= low:
        raise fields.error("high_freq_factor", f"{high} must exceed low_freq_factor {low}")
    turns = original * inv_freq / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq / factor * (1 - keep) + inv_freq * keep


def _yarn(inv_freq: Tensor, fields: Fields, theta: float, max_len: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv:2309.00071): blend by number of turns, and scale the attention's temperature."""
    factor = _factor(fields, low=1.0)
    original = fields.int("original_max_position_embeddings", max_len, low=1)
    size = 2 * inv_freq.shape[0]

    def dimension(turns: float) -> float:  # the dimension that makes so many turns in the original context
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(fields.float("beta_fast", 32.0, low=1e-6))
    high = dimension(fields.float("beta_slow", 1.0, low=1e-6))
    if fields.bool("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    magnitude = fields.float("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), magnitude
