"""Fixtures for all tests: the two real models, and reproducible randomness."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import hypothesis
import pytest

from pelton.weights import hub

hypothesis.settings.register_profile("pelton", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("pelton")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: a GGUF file with a byte-level BPE tokenizer and a chat template."""
    return hub.resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma-3-270M (base), Q4_K_M: a GGUF file with a SentencePiece tokenizer and no chat template."""
    return hub.resolve("gemma-3-270m")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every run; torch is seeded only where it is loaded anyway."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
