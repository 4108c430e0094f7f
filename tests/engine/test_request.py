"""Request: when it ends, and how prompt_logprobs are put together."""

from __future__ import annotations

from typing import Any

import pytest

from pelton.config import CacheConfig, KVGroup
from pelton.engine.block_pool import BlockPool
from pelton.engine.kv_tables import KVTables
from pelton.engine.request import Request
from pelton.engine.step import EngineRequest, TokenLogprobs
from pelton.types import RepetitionDetectionParams, SamplingParams

EOS, STOP = 1, 2


def make_request(
    output: list[int], max_model_len: int = 100, grammar: str | None = None, **params: object
) -> Request:
    """A request with a prompt of three tokens that has generated `output`."""
    sampling = SamplingParams(**{"max_tokens": 50, "stop_token_ids": [STOP], **params})
    kv = KVTables(BlockPool(4), CacheConfig(16, 4, (KVGroup(None, (0,)),), True))
    spec = EngineRequest(0, [5, 5, 5], sampling, (EOS,), grammar=grammar)
    request = Request(spec, (0, 0), kv, sampling.max_tokens or 0, max_model_len)
    request.token_ids += output
    return request


@pytest.mark.parametrize(("output", "params", "expected"), [
    ([7], {}, (None, None)),
    ([EOS], {}, ("stop", None)),
    ([STOP], {}, ("stop", STOP)),
    ([EOS], {"ignore_eos": True}, (None, None)),
    ([EOS], {"ignore_eos": True, "stop_token_ids": [EOS]}, ("stop", EOS)),
    ([EOS], {"min_tokens": 2}, (None, None)),
    ([7, EOS], {"min_tokens": 2}, ("stop", None)),
    ([STOP], {"min_tokens": 2}, (None, None)),
    ([EOS], {"ignore_eos": True, "grammar": "g"}, ("stop", None)),  # after the end of a grammar nothing can come
    ([EOS], {"min_tokens": 2, "grammar": "g"}, ("stop", None)),
    ([STOP], {"min_tokens": 2, "grammar": "g"}, (None, None)),
    ([7, 7], {"max_tokens": 2}, ("length", None)),
    ([7, EOS], {"max_tokens": 2}, ("stop", None)),
    ([7] * 6, {"max_model_len": 9}, ("length", None)),
    ([7] * 6, {"max_model_len": 9, "min_tokens": 20}, ("length", None)),
    ([], {"max_tokens": 0}, ("length", None)),
])
def test_finish_reason(output: list[int], params: dict[str, Any], expected: tuple[str | None, int | None]) -> None:
    assert make_request(output, **params).finish_reason() == expected


@pytest.mark.parametrize(("output", "sizes", "count", "repeats"), [
    ([8, 9, 8, 9, 8, 9], (1, 4), 3, True),
    ([8, 9, 8, 9, 8, 9], (3, 4), 2, False),
    ([9, 8, 9, 8, 9], (1, 4), 3, False),
    ([8, 8, 8], (0, 1), 3, True),
    ([8, 8], (0, 1), 3, False),
    ([5], (1, 1), 2, False),  # the prompt does not count
    ([8, 9, 9, 8, 9, 9], (1, 3), 2, True),
    ([8, 8, 8, 8], (0, 0), 2, False),
])
def test_repetition(output: list[int], sizes: tuple[int, int], count: int, repeats: bool) -> None:
    rule = RepetitionDetectionParams(max_pattern_size=sizes[1], min_pattern_size=sizes[0], min_count=count)
    reason, _ = make_request(output, repetition_detection=rule).finish_reason()
    assert reason == ("repetition" if repeats else None)


def test_prompt_logprobs_of_a_chunk_computed_again_are_not_doubled() -> None:
    one, two = TokenLogprobs([5], [-1.0], [1]), TokenLogprobs([5], [-2.0], [1])
    request = make_request([], prompt_logprobs=0)
    assert request.max_prefix == 0
    request.add_prompt_logprobs(0, [one])
    assert request.take_prompt_logprobs() is None
    assert request.max_prefix == 1
    request.add_prompt_logprobs(0, [one, two])
    assert request.take_prompt_logprobs() == [None, one, two]
    assert request.take_prompt_logprobs() is None
    assert request.max_prefix == 2


@pytest.mark.parametrize(
    ("params", "needs"),
    [({}, False), ({"temperature": 1.0, "top_p": 0.9}, False), ({"presence_penalty": 0.5}, True),
     ({"min_tokens": 2}, True), ({"repetition_penalty": 1.2}, True), ({"prompt_logprobs": 1}, True)],
)
def test_what_must_be_known_before_the_next_step(params: dict[str, Any], needs: bool) -> None:
    assert make_request([1], **params).spec.needs_results is needs
