"""The rotary part of a config.json: what it makes of a model's context, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pelton.errors import ModelFormatError
from pelton.layers.rope import Rope, context_length

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LINEAR = {"type": "linear", "factor": 2.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}


def parse(config: dict[str, Any]) -> Rope:
    return Rope.parse({"max_position_embeddings": 1024, **config}, 8, torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 1024),
        ({"rope_scaling": None}, 1024),
        ({"rope_scaling": YARN}, 4096),
        ({"rope_parameters": YARN}, 4096),
        ({"rope_scaling": LINEAR}, 2560),
        ({"rope_scaling": LLAMA3}, 1024),
        ({"rope_scaling": LINEAR, "model_type": "gemma3_text"}, 1024),  # these say their length as it is scaled
    ],
)
def test_context_length(config: dict[str, Any], expected: int) -> None:
    assert context_length({"max_position_embeddings": 1024, **config}) == expected


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_theta_is_read_in_both_places(place: str) -> None:
    inv_freq = parse({"rope_theta": 16.0, place: {"rope_type": "default"}}).inv_freq
    torch.testing.assert_close(inv_freq, torch.tensor([1.0, 16**-0.25, 16**-0.5, 16**-0.75]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": []}, "rope_scaling must be an object"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_parameters": [YARN]}, "rope_parameters must be an object"),
        ({"rope_scaling": {**YARN, "factor": "x"}}, "factor must be a number"),
        ({"rope_scaling": {**YARN, "factor": 1e300}}, "factor must be at most"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type must be a string"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope': not supported"),
        ({"rope_scaling": {**YARN, "beta_fast": 0}}, "beta_fast must be at least"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "high_freq_factor 4.0 must"),
        ({"rope_theta": 1.0}, "rope_theta must be at least"),
        ({"rope_theta": 1e308}, "rope_theta must be at most"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
    ],
)
def test_wrong_fields(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=rf"config\.json.*: field {message}"):
        context_length({"max_position_embeddings": 1024, **config})
        parse(config)
