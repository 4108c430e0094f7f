"""Seeded mutations of config.json: a model is built from them, or they are refused with one line that says why."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import torch
import transformers

from pelton.config import GIB, DeviceFacts, EngineArgs, Environment, ModelFacts, resolve
from pelton.errors import ConfigError, ModelFormatError
from pelton.layers.rope import context_length
from pelton.models import find_model
from pelton.weights.dummy import DummyCheckpoint
from pelton.weights.fields import parse_json_object
from pelton.weights.files import text_config

MUTATIONS = 3000
MAX_WEIGHTS = 1 << 16  # larger networks are parsed, but not built
MACHINE = DeviceFacts("cpu", "a CPU", free_bytes=16 * GIB, has_fast_bf16=True, num_cores=1)
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 5, 7, 64, 4096, 1 << 16, 1 << 31, 1 << 63, 10**30, 10**400, -0.5, 0.0, 0.5, 1.0,
    1e-30, 1e30, 1e308, float("inf"), float("nan"), "", "x", "8", "\ud800", "torch.float16", "float64", "silu", "yarn",
    "linear", "llama3", [], [1], ["x"], [None], ["sliding_attention"] * 3, [[]], {}, {"x": 1}, {"rope_type": "linear"},
    {"rope_type": "yarn", "factor": "x"}, {"rope_type": "yarn", "factor": 2.0}, {"full_attention": {}},
    {"quant_method": "fp8"},
]
# Fields that transformers' files may lack: older names, and what shapes the attention.
MORE = ["rope_scaling", "rope_theta", "rope_parameters", "rope_freq_factors", "rope_local_base_freq", "torch_dtype",
        "dtype", "text_config", "quantization_config", "partial_rotary_factor", "use_bidirectional_attention",
        "sliding_window_pattern", "layer_types", "head_dim", "num_attention_heads", "num_key_value_heads",
        "hidden_size", "max_position_embeddings"]
ROPE = ["rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast", "beta_slow",
        "truncate", "attention_factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"]


def mutate(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One to three fields are dropped, set to something odd, or take another field's value."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice([1, 1, 2, 3])):
        place, names = config, [*config, *MORE]
        if rng.random() < 0.3:
            place = config.setdefault(rng.choice(["rope_scaling", "rope_parameters"]), {})
            if not isinstance(place, dict):
                continue
            names = [*place, *ROPE]
            if isinstance(inner := place.get("full_attention"), dict) and rng.random() < 0.5:
                place = inner
        name = rng.choice(names)
        if rng.random() < 0.2:
            place.pop(name, None)
        elif rng.random() < 0.1:
            place[name] = copy.deepcopy(config.get(rng.choice(list(config))))
        else:
            place[name] = copy.deepcopy(rng.choice(ODD))
    return config


def build(data: bytes) -> bool:
    """All that becomes of a config.json before weights are read, and the model where it is small."""
    config = text_config(parse_json_object(data, "config.json"))
    architecture: Any = find_model(config)
    kv_layers = architecture.kv_layers(config)
    facts = ModelFacts(config["torch_dtype"], context_length(config), kv_layers, {"float32": 0, "bfloat16": 0,
                                                                                  "float16": 0})
    resolve(EngineArgs(), facts, MACHINE, Environment())
    shape = architecture.parse(config)
    width = max(shape.d_hidden, shape.attention[0].head_size * shape.attention[0].num_heads)
    if shape.d_model * (shape.vocab_size + len(kv_layers) * width) > MAX_WEIGHTS:
        return False
    architecture.load(DummyCheckpoint(config, torch.float32, torch.device("cpu")))
    return True


def seeds(cases: dict[str, tuple[str, dict[str, Any]]], small: dict[str, Any]) -> list[dict[str, Any]]:
    """The config.json of each case, as transformers writes it today, and with the names of older files."""
    found = []
    for config_class, fields in cases.values():
        name = config_class.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
        tiny = {"vocab_size": 16, "hidden_size": 12, "intermediate_size": 16, "head_dim": 4}
        config = getattr(transformers, config_class)(**{**small, **fields, **tiny}, architectures=[name]).to_dict()
        older = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
        rope = config["rope_parameters"]
        found += [config, {**older, "rope_scaling": rope if "rope_type" in rope else None, "torch_dtype": "float16"}]
    return found


def test_mutated_configs(cases: dict[str, Any], small_config: dict[str, Any]) -> None:
    configs = seeds(cases, small_config)
    assert all(build(json.dumps(config).encode()) for config in configs)
    num_built = 0
    for number in range(MUTATIONS):
        rng = random.Random(number)
        config = mutate(rng.choice(configs), rng)
        try:
            num_built += build(json.dumps(config).encode())
        except (ModelFormatError, ConfigError) as error:
            assert "\n" not in str(error) and len(str(error)) < 300, f"mutation {number}: {error}"
        except Exception as error:
            pytest.fail(f"mutation {number}: {type(error).__name__}: {error}")
    assert MUTATIONS / 10 < num_built < MUTATIONS * 0.9
