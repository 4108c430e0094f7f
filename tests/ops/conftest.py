"""What the op `sample` is asked for: tables that the tests of all its kernels share."""

from __future__ import annotations

from typing import Any

import pytest

CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 7.0},
    "extremely-hot": {"temperature": 1e30},
    "extremely-cold": {"temperature": 1e-5},
    "top_k": {"temperature": 1.0, "top_k": 20},
    "top_k-1": {"temperature": 1.0, "top_k": 1},
    "top_k-large": {"temperature": 5.0, "top_k": 800},
    "top_k-all": {"temperature": 1.0, "top_k": 100_000},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_p-flat": {"temperature": 20.0, "top_p": 0.95},
    "top_p-tiny": {"temperature": 1.0, "top_p": 1e-320},
    "top_p-nearly-1": {"temperature": 1.0, "top_p": 1 - 1e-12},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "min_p-1": {"temperature": 1.0, "min_p": 1.0},
    "top_k-top_p": {"temperature": 1.2, "top_k": 50, "top_p": 0.8},
    "min_p-top_p": {"temperature": 1.2, "min_p": 0.01, "top_p": 0.8},
    "min_p-top_k": {"temperature": 1.2, "min_p": 0.2, "top_k": 50},
    "all-three": {"temperature": 1.5, "min_p": 0.02, "top_k": 90, "top_p": 0.95},
}
CHANGES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": -1.3},
    "penalties": {"repetition_penalty": 0.6, "frequency_penalty": -0.4, "presence_penalty": 0.9},
    "bias": {"bias": {3: 2.5, 0: -100.0, 5: 0.1}},
    "allowed": {"allowed_ids": [6, 1, 2, 5, 1]},
    "everything": {"allowed_ids": range(2, 7), "bias": {3: 1.0}, "repetition_penalty": 1.2, "presence_penalty": 0.5},
}


@pytest.fixture
def choices() -> dict[str, dict[str, Any]]:
    """Ways to choose a token, as fields of a SampleRow, by name."""
    return CHOICES


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each of them."""
    return CHOICES[request.param]


@pytest.fixture
def changes() -> dict[str, dict[str, Any]]:
    """What changes logits before that."""
    return CHANGES
