"""A captured step gives the same bits as the same step computed op by op, and a request the same in any company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pelton import LLM, SamplingParams
from pelton.ops.native import native, reason
from pelton.types import RequestOutput

pytestmark = pytest.mark.skipif(native is None, reason=reason)

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3)


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), max_model_len=512, kv_cache_memory_bytes=1 << 26, **options)


def facts(outputs: Sequence[RequestOutput]) -> list[Any]:
    """Token ids and log-probabilities, to the last bit."""
    completions = [output.outputs[0] for output in outputs]
    return [
        (list(c.token_ids), [{i: entry.logprob for i, entry in step.items()} for step in c.logprobs or []])
        for c in completions
    ]


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    """32 prompts of 1 to 150 tokens."""
    return [[(7 * i + 13 * k) % 40000 + 100 for k in range(1 + (i * 37) % 150)] for i in range(32)]


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    """The default model as most people run it: int8 products, bfloat16 keys and values, captured steps."""
    yield load(smollm2_path)


@pytest.fixture(scope="module")
def alone(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    """What each prompt gives by itself."""
    return [facts(llm.generate(prompt, PARAMS, use_tqdm=False))[0] for prompt in prompts]


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_company_changes_nothing(llm: LLM, prompts: list[list[int]], alone: list[Any], size: int) -> None:
    for start in range(0, 32 - size + 1, max(size, 8)):
        together = facts(llm.generate(prompts[start : start + size], PARAMS, use_tqdm=False))
        assert together == alone[start : start + size]


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": True}, {"max_num_batched_tokens": 33}, {"enable_prefix_caching": False}, {"num_threads": 1}],
    ids=str,
)
def test_how_the_work_is_cut_changes_nothing(
    smollm2_path: Path, prompts: list[list[int]], alone: list[Any], options: dict[str, Any]
) -> None:
    llm = load(smollm2_path, **options)
    assert not llm.info.warnings
    assert facts(llm.generate(prompts[:9], PARAMS, use_tqdm=False)) == alone[:9]
    assert facts(llm.generate(prompts[:9], PARAMS, use_tqdm=False)) == alone[:9]  # now with prefix hits


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_keys_and_values_in_other_types(
    smollm2_path: Path, prompts: list[list[int]], alone: list[Any], dtype: str
) -> None:
    """Log-probabilities of the first token stay close to those with bfloat16."""
    llm = load(smollm2_path, kv_cache_dtype=dtype)
    for got, expected in zip(facts(llm.generate(prompts[:6], PARAMS, use_tqdm=False)), alone, strict=False):
        assert got[1][0].keys() & expected[1][0].keys()
        for token_id in got[1][0].keys() & expected[1][0].keys():
            assert abs(got[1][0][token_id] - expected[1][0][token_id]) < 0.35


def test_a_block_the_kernels_cannot_read_is_computed_eagerly(tiny_model_path: Path) -> None:
    """Blocks of 4 slots: attention in plain torch, and the answer is the same."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    texts = []
    for block_size in (16, 4):
        llm = LLM(str(tiny_model_path), load_format="dummy", dtype="float32", block_size=block_size)
        assert bool(llm.info.warnings) == (block_size == 4)
        texts.append(list(llm.generate("abc", params, use_tqdm=False)[0].outputs[0].token_ids))
    assert texts[0] == texts[1]
