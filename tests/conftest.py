"""Fixtures for all tests: the two real models, and reproducible randomness."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pytest
import tokenizers
from safetensors.numpy import save_file

from pelton.text.byte_alphabet import BYTE_TO_CHAR
from pelton.weights import hub

if "PYTEST_XDIST_WORKER" in os.environ:  # torch's threads would wait for their turn beside those of other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture(params=["generic", "avx2", "avx512_vnni", "avx512_bf16", "neon", "neon_i8mm"])
def cpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The extension module, switched to each instruction set in turn."""
    from pelton.ops.native import native, reason

    if native is None:
        pytest.skip(reason)
    if request.param not in native.supported_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    native.set_threads(2)
    yield native
    native.set_isa(before)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama to be loaded with load_format="dummy": its tokens are bytes, its weights random."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(BYTE_TO_CHAR)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<|end|>",
        "chat_template": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>"
                         "{% endif %}",
    }))  # fmt: skip
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float32",
        "eos_token_id": 256,
    }))  # fmt: skip
    save_file({"lm_head.weight": numpy.zeros((1, 1), numpy.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def in_ranks(tmp_path: Path) -> Callable[[int, Callable[[Any], Any]], list[Any]]:
    """Calls a function once for each of so many connected Ranks, each in a thread of its own, and returns what comes of
    it."""
    from pelton.ops.parallel import Ranks

    def call(size: int, function: Callable[[Any], Any]) -> list[Any]:
        folder = tmp_path / f"ranks-{size}"
        folder.mkdir()

        def one(rank: int) -> Any:
            ranks = Ranks(rank, size)
            ranks.connect(folder, "cpu")
            return function(ranks)

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, range(size)))

    return call
