"""SamplingParams accepts what both generations of vLLM accept, and names the field that is wrong."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from pelton.errors import RequestError
from pelton.types import (
    FlatLogprobs,
    GuidedDecodingParams,
    Logprob,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert params.stop == [] and params.stop_token_ids == [] and not params.is_greedy


def test_other_spellings_are_normalised() -> None:
    assert SamplingParams(stop="x").stop == ["x"]
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(output_kind=1).output_kind is RequestOutputKind.DELTA  # type: ignore[arg-type]
    assert SamplingParams(temperature=1e-7).is_greedy and not SamplingParams(temperature=1e-3).is_greedy
    assert SamplingParams(logit_bias={"5": 200.0}).logit_bias == {5: 100.0}  # type: ignore[dict-item]
    assert SamplingParams.from_optional(temperature=None, top_p=0.5, max_tokens=None) == SamplingParams(
        top_p=0.5, max_tokens=None
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(f, v) for f in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
                           "repetition_penalty") for v in (math.nan, math.inf, -math.inf, "1", True)],
        ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0.0),
        ("n", 0), ("n", 1.5), ("n", True), ("top_k", -2), ("max_tokens", -1), ("min_tokens", -1), ("min_tokens", 17),
        ("seed", -2), ("seed", 1 << 64), ("logprobs", -2), ("logprobs", True), ("prompt_logprobs", -2),
        ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("best_of", 0),
        ("stop", ""), ("stop", ["a", ""]), ("stop", 5), ("bad_words", [" "]), ("bad_words", "x"),
        ("stop_token_ids", [-1]), ("stop_token_ids", [1.0]), ("allowed_token_ids", []),
        ("logprob_token_ids", list(range(129))), ("logit_bias", {"x": 1.0}), ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}), ("thinking_token_budget", -1), ("stream_interval", 0),
        ("logit_bias", [1]), ("structured_outputs", "[0-9]"), ("structured_outputs", {"regexp": "[0-9]"}),
        *[(f.name, v) for f in fields(SamplingParams) if f.type == "bool" for v in (None, 1, "no")],
        ("output_kind", 3), ("output_kind", True), ("output_kind", "delta"), ("repetition_detection", 3),
        ("repetition_detection", {"max_pattern_size": 1, "min_count": "2"}),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_both_names_of_structured_outputs() -> None:
    old = SamplingParams(guided_decoding=GuidedDecodingParams(choice=["a", "b"]))
    assert old.structured_outputs is old.guided_decoding
    assert old.clone(n=2).structured_outputs is old.guided_decoding
    with pytest.raises(RequestError, match="not both"):
        SamplingParams(
            guided_decoding=GuidedDecodingParams(regex="a"), structured_outputs=StructuredOutputsParams(regex="b")
        )
    with pytest.raises(RequestError, match="exactly one"):
        StructuredOutputsParams(regex="a", choice=["b"])


def test_records_may_be_mappings() -> None:
    """As in a line of JSON: what is not a record would else reach the engine, and end it."""
    params = SamplingParams(structured_outputs={"regex": "[0-9]"},  # type: ignore[arg-type]
                            repetition_detection={"max_pattern_size": 2, "min_count": 3})  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputsParams(regex="[0-9]")
    assert params.repetition_detection == RepetitionDetectionParams(max_pattern_size=2, min_count=3)


def test_who_wants_logprobs() -> None:
    assert SamplingParams(logprobs=0).wants_logprobs and SamplingParams(logprob_token_ids=[3]).wants_logprobs
    assert not SamplingParams(prompt_logprobs=1).wants_logprobs


def test_flat_logprobs_are_a_sequence_of_positions() -> None:
    positions = [{5: Logprob(-1.0, 2, "a"), 3: Logprob(-0.5, 1, "b")}, {7: Logprob(-2.0)}, {5: Logprob(-3.0, 9, "a")}]
    flat = FlatLogprobs()
    flat.append(None)
    for position in positions:
        flat.append(position)
    assert len(flat) == 4 and list(flat) == [{}, *positions] and flat[-1] == positions[-1] and positions[0] in flat
    assert flat.start_indices == [0, 0, 2, 3] and flat.end_indices == [0, 2, 3, 4] and flat.token_ids == [5, 3, 7, 5]
    assert flat.ranks == [2, 1, None, 9] and flat.decoded_tokens == ["a", "b", None, "a"]
    assert isinstance(flat[1:3], FlatLogprobs) and list(flat[1:3]) == positions[:2] and flat[:] == flat
    with pytest.raises(IndexError):
        flat[4]


def test_clone_checks_again() -> None:
    assert SamplingParams(seed=3).clone(n=2) == SamplingParams(seed=3, n=2)
    with pytest.raises(RequestError):
        SamplingParams().clone(top_p=2.0)
