"""Random weights, and how many a model has."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pelton.models import find_model
from pelton.weights.dummy import DummyCheckpoint

CONFIG = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
}  # fmt: skip
COUNT = """
import json, sys, torch
from pelton.models import find_model
from pelton.weights.dummy import DummyCheckpoint
config = json.loads(sys.argv[1])
checkpoint = DummyCheckpoint(config, torch.float32, torch.device("meta"))
find_model(config).load(checkpoint)
print(checkpoint.num_weights, [name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_weights_are_counted_without_torchs_compiler(architecture: str) -> None:
    """As many as are made; and what takes seconds to import is not."""
    config = {"architectures": [architecture], **CONFIG}
    made = DummyCheckpoint(config, torch.float32, torch.device("cpu"))
    find_model(config).load(made)
    told = subprocess.run([sys.executable, "-c", COUNT, json.dumps(config)], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == f"{made.num_weights} []"
