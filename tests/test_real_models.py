"""The two real models against transformers, in float32: the same greedy text, the same log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from pelton import LLM, SamplingParams

NEW_TOKENS = 64
PROMPTS = [
    "The sky is blue because",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Die Hauptstadt von Frankreich ist",
    "1, 2, 3, 5, 8, 13,",
    "请用中文介绍一下长城。",
    "To make bread you need flour, water,",
    "Q: What is the boiling point of water?\nA:",
    "SELECT name, COUNT(*) FROM users",
    "Dear Sir or Madam,\n\nI am writing to",
]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, Any]]:
    path: Path = request.getfixturevalue(f"{request.param}_path")
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    yield LLM(model=str(path), dtype="float32", max_model_len=1024), reference.eval()


def test_greedy_text_and_logprobs(pair: tuple[LLM, Any]) -> None:
    """Given the same tokens before it, each token is the most likely one in transformers too: so its greedy
    continuation is the same, token by token."""
    llm, reference = pair
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=0)
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        completion, prompt_ids = output.outputs[0], output.prompt_token_ids
        assert len(completion.token_ids) == NEW_TOKENS
        token_ids = [*prompt_ids, *completion.token_ids]
        with torch.inference_mode():
            logprobs = torch.log_softmax(reference(torch.tensor([token_ids])).logits[0].float(), dim=-1)
        assert logprobs[len(prompt_ids) - 1 : -1].argmax(dim=-1).tolist() == list(completion.token_ids)
        assert completion.logprobs is not None and output.prompt_logprobs is not None
        positions = [*output.prompt_logprobs[1:], *completion.logprobs]
        for row, position in zip(logprobs[:-1], positions, strict=True):
            assert position is not None
            for token_id, entry in position.items():
                assert abs(entry.logprob - float(row[token_id])) < 1e-3


def test_sliding_window_prefix_and_chunks_change_nothing(pair: tuple[LLM, Any]) -> None:
    """A prompt longer than Gemma 3's window of 512, computed twice: the second time from the cache."""
    llm, reference = pair
    prompt_ids = llm.get_tokenizer().encode(" ".join(f"{i} squared is {i * i}." for i in range(80)))[:900]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    first, second = (llm.generate(prompt_ids, params, use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 0 and second.num_cached_tokens > 700
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    token_ids = [*prompt_ids, *first.outputs[0].token_ids]
    with torch.inference_mode():
        best = reference(torch.tensor([token_ids])).logits[0].argmax(dim=-1)
    assert best[len(prompt_ids) - 1 : -1].tolist() == list(first.outputs[0].token_ids)
