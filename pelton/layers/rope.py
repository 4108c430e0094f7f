"""Rotary position embedding and its scalings for long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pelton.errors import ModelFormatError
from pelton.weights.fields import Fields

Angles = tuple[Tensor, Tensor]
"""cos and sin of each token's angles: two [T, D/2] float32."""


class Rope:
    """The angles of positions: position * inv_freq, cos and sin times `magnitude`."""

    def __init__(self, inv_freq: Tensor, magnitude: float = 1.0) -> None:
        self.inv_freq = inv_freq  # [D/2] float32
        self.magnitude = magnitude

    @classmethod
    def parse(cls, config: Mapping[str, Any], head_size: int, device: torch.device) -> Rope:
        """Read `rope_theta` and `rope_scaling` (or `rope_parameters`, which holds both) of a config.json."""
        parameters = {
            "rope_theta": config.get("rope_theta"),
            **(config.get("rope_scaling") or {}),
            **(config.get("rope_parameters") or {}),
        }
        fields = Fields(parameters)
        theta = fields.float("rope_theta", 10000.0, low=1.0)
        kind = fields.str("rope_type", fields.str("type", "default"))
        inv_freq = theta ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        magnitude = 1.0
        if kind == "linear":
            inv_freq = inv_freq / fields.float("factor", low=1e-6)
        elif kind == "llama3":
            inv_freq = _llama3(inv_freq, fields)
        elif kind == "yarn":
            max_len = Fields(config).int("max_position_embeddings", 2048, low=1)
            inv_freq, magnitude = _yarn(inv_freq, fields, theta, max_len)
        elif kind != "default":
            raise ModelFormatError(f"rope_scaling type {kind!r} is not supported; known: linear, llama3, yarn")
        factors = config.get("rope_freq_factors")  # GGUF keeps Llama 3's scaling as a tensor of divisors
        if factors is not None:
            inv_freq = inv_freq / torch.tensor(factors, dtype=torch.float32)
        return cls(inv_freq.to(device), magnitude)

    def __call__(self, positions: Tensor) -> Angles:
        """[T] -> cos, sin [T, D/2]."""
        angles = positions.float()[:, None] * self.inv_freq
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


def _llama3(inv_freq: Tensor, fields: Fields) -> Tensor:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, blend between (its released config and code)."""
    factor = fields.float("factor", low=1.0)
    low = fields.float("low_freq_factor", low=1e-6)
    high = fields.float("high_freq_factor", low=1e-6)
    original = fields.int("original_max_position_embeddings", low=1)
    if high <= low:
        raise ModelFormatError(f"rope_scaling: high_freq_factor {high} must exceed low_freq_factor {low}")
    turns = original * inv_freq / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq / factor * (1 - keep) + inv_freq * keep


def _yarn(inv_freq: Tensor, fields: Fields, theta: float, max_len: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv:2309.00071): blend by number of turns, and scale the attention's temperature."""
    factor = fields.float("factor", low=1.0)
    original = fields.int("original_max_position_embeddings", max_len, low=1)
    size = 2 * inv_freq.shape[0]

    def dimension(turns: float) -> float:  # the dimension that makes so many turns in the original context
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fields.float("beta_fast", 32.0)), dimension(fields.float("beta_slow", 1.0))
    if fields.bool("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    magnitude = fields.float("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), magnitude
