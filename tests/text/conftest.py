"""Tokenizers shared by the text tests: the two real ones, loaded once, and two tiny ones made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pelton.text.byte_alphabet import BYTE_TO_CHAR
from pelton.text.tokenizer import Tokenizer, load_tokenizer
from pelton.weights.files import ModelFiles, open_model


@pytest.fixture(scope="session")
def smollm2_files(smollm2_path: Path) -> ModelFiles:
    return open_model(smollm2_path)


@pytest.fixture(scope="session")
def gemma3_files(gemma3_path: Path) -> ModelFiles:
    return open_model(gemma3_path)


@pytest.fixture(scope="session")
def smollm2(smollm2_files: ModelFiles) -> Tokenizer:
    return load_tokenizer(smollm2_files)


@pytest.fixture(scope="session")
def gemma3(gemma3_files: ModelFiles) -> Tokenizer:
    return load_tokenizer(gemma3_files)


@pytest.fixture(scope="session")
def transformers_tokenizer() -> Callable[[Path], Any]:
    """transformers' tokenizer of a GGUF file; building one takes seconds, so each is built once."""
    transformers = pytest.importorskip("transformers")
    return lru_cache(lambda path: transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


@pytest.fixture
def byte_level_metadata() -> dict[str, Any]:
    """A byte-level vocabulary: control and user-defined tokens, the bytes, and a few merges."""
    tokens = ["<|end|>", "<|user|>", "<think>", "</think>", *BYTE_TO_CHAR, "he", "ll", "hell", "hello", "Ġhello"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4, 4] + [1] * (len(tokens) - 4),
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "Ġ hello"],
        "tokenizer.ggml.eos_token_id": 0,
    }


@pytest.fixture
def sentencepiece_metadata() -> dict[str, Any]:
    """A vocabulary as Llama 2 has it: byte tokens, scores, a space put before a text, a token for its beginning."""
    pieces = ["▁", "h", "e", "l", "o", "t", "he", "ll", "▁he", "▁hell", "▁hello", "▁t", "中"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def gguf_files(metadata: dict[str, Any], **fields: Any) -> ModelFiles:
    """The files of a model whose GGUF file has this metadata, and no tensors."""
    gguf: Any = SimpleNamespace(metadata=metadata)
    return ModelFiles(**{"root": Path(), "weights": (), "format": "gguf", "config": {}, "generation_config": {},
                         "gguf": gguf, **fields})


@pytest.fixture
def files_of() -> Callable[..., ModelFiles]:
    return gguf_files


@pytest.fixture
def tiny(byte_level_metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(gguf_files(byte_level_metadata))


@pytest.fixture
def tiny_spm(sentencepiece_metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(gguf_files(sentencepiece_metadata))
