"""Tiny random models written by transformers, one a case, and the same checkpoint read by pelton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pelton.models import Model, find_model
from pelton.weights.checkpoint import open_checkpoint
from pelton.weights.files import open_model

SMALL: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}
GEMMA = {"sliding_window": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 24, "num_hidden_layers": 4}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA3_ROPE = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
               "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}

# name -> (class of transformers' configuration, its fields). A new architecture is one row here.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-biased": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("LlamaConfig", {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn-rope": ("LlamaConfig", {"rope_parameters": YARN_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "gemma3-rope": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE}),
}


@dataclass
class Pair:
    """The same weights in both libraries, float32."""

    name: str
    config: dict[str, Any]  # as pelton reads it
    reference: Any  # transformers' model
    model: Model


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            made[name] = _make_pair(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture
def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    return CASES


@pytest.fixture
def small_config() -> dict[str, Any]:
    return SMALL


@pytest.fixture(params=sorted(CASES))
def pair(request: pytest.FixtureRequest, make_pair: Callable[[str], Pair]) -> Pair:
    return make_pair(request.param)


def _make_pair(name: str, folder: Path) -> Pair:
    config_class, fields = CASES[name]
    config = getattr(transformers, config_class)(**{**SMALL, **fields})
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if "norm" in key or "bias" in key:  # transformers starts these at 0 or 1, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    reference.save_pretrained(folder)
    files = open_model(folder)
    checkpoint = open_checkpoint(files, torch.float32, torch.device("cpu"))
    model = find_model(files.config).load(checkpoint)
    checkpoint.finish()
    return Pair(name, dict(files.config), reference, model)
