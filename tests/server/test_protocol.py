"""Requests to SamplingParams."""

from __future__ import annotations

from typing import Any

import pytest

from pelton.errors import RequestError
from pelton.server.protocol import ChatRequest, CompletionRequest
from pelton.server.settings import Limits
from pelton.types import RequestOutputKind

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
LIMITS = Limits()


def chat(**fields: Any) -> Any:
    return ChatRequest.parse({**CHAT, **fields}, LIMITS).to_sampling_params({})


def complete(**fields: Any) -> Any:
    return CompletionRequest.parse({"prompt": "hi", **fields}, LIMITS).to_sampling_params({})


SAME_NAME = {
    "n": 3, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "temperature": 0.3,
    "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 11, "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": True,
    "min_tokens": 2, "prompt_logprobs": 2, "logprob_token_ids": [1, 2], "skip_special_tokens": False,
    "spaces_between_special_tokens": False, "include_stop_str_in_output": True, "allowed_token_ids": [1, 2],
    "bad_words": ["x"], "thinking_token_budget": 9, "best_of": 4, "truncate_prompt_tokens": 8, "max_tokens": 33,
}  # fmt: skip


@pytest.mark.parametrize("make", [chat, complete])
def test_fields_of_the_same_name(make: Any) -> None:
    params = make(**SAME_NAME)
    assert {name: getattr(params, name) for name in SAME_NAME} == SAME_NAME


def test_fields_of_another_name() -> None:
    assert chat(max_completion_tokens=5, max_tokens=9).max_tokens == 5
    assert chat().max_tokens is None
    assert complete().max_tokens == 16
    assert complete(max_tokens=0).max_tokens == 0
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).logprobs == 3
    assert complete(logprobs=2).logprobs == 2
    assert complete(logprobs=2).prompt_logprobs is None
    assert complete(logprobs=2, echo=True).prompt_logprobs == 2
    assert complete(logprob_token_ids=[1], echo=True).prompt_logprobs == 0
    assert chat(logit_bias={"5": -200}).logit_bias == {5: -100.0}
    assert chat(stop="end").stop == ["end"]
    assert chat(repetition_detection={"max_pattern_size": 3, "min_count": 2}).repetition_detection.min_count == 2
    assert chat(stream=True).output_kind == RequestOutputKind.DELTA
    assert chat().output_kind == RequestOutputKind.FINAL_ONLY


def test_null_means_not_given() -> None:
    params = complete(temperature=None, n=None, stop=None, max_tokens=None, seed=None, top_k=None)
    assert (params.temperature, params.n, params.max_tokens) == (1.0, 1, 16)


def test_the_models_defaults_apply_where_nothing_is_given() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.8, "max_tokens": 7, "unknown": 1}
    params = ChatRequest.parse({**CHAT, "top_p": 0.5}, LIMITS).to_sampling_params(defaults)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.6, 0.5, 7)
    for fields in ({"max_tokens": 9}, {"max_completion_tokens": 9}):
        request = ChatRequest.parse({**CHAT, **fields}, LIMITS)
        assert request.to_sampling_params(defaults).max_tokens == 9 and request.sets_max_tokens
    for fields, most in (({}, 7), ({"max_tokens": None}, 7), ({"max_tokens": 9}, 9)):
        completion = CompletionRequest.parse({"prompt": "hi", **fields}, LIMITS)
        assert completion.to_sampling_params(defaults).max_tokens == most
        assert completion.sets_max_tokens is (most == 9)


def test_without_a_limit_all_logprobs_may_be_asked_for() -> None:
    """As in Python: -1 stands for the whole vocabulary, if --max-logprobs is -1."""
    free = Limits(num_logprobs=-1)
    for number in (-1, 0, 10**5):
        fields = {"logprobs": number, "prompt_logprobs": number}
        params = CompletionRequest.parse({"prompt": "hi", **fields}, free).to_sampling_params({})
        assert (params.logprobs, params.prompt_logprobs) == (number, number)
        request = ChatRequest.parse({**CHAT, "logprobs": True, "top_logprobs": number}, free)
        assert request.to_sampling_params({}).logprobs == number
        with pytest.raises(RequestError):
            CompletionRequest.parse({"prompt": "hi", "logprobs": -2}, free)
    with pytest.raises(RequestError, match=r"in \[0, 20\]"):
        CompletionRequest.parse({"prompt": "hi", "logprobs": -1}, LIMITS)


CONSTRAINTS = [
    ({"guided_json": {"type": "object"}}, "json", {"type": "object"}),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
    ({"guided_grammar": "root ::= x"}, "grammar", "root ::= x"),
    ({"guided_json_object": True}, "json_object", True),
    ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
    ({"structured_outputs": {"json": {"type": "object"}, "regex": None}}, "json", {"type": "object"}),
    ({"response_format": {"type": "json_object"}}, "json_object", True),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}}, "json",
     {"type": "array"}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "kind", "value"), CONSTRAINTS)
def test_every_dialect_of_constraint(fields: dict[str, Any], kind: str, value: Any) -> None:
    for make in (chat, complete):
        assert getattr(make(**fields).structured_outputs, kind) == value


def test_no_constraint() -> None:
    assert chat(response_format={"type": "text"}, guided_json_object=False).structured_outputs is None


BAD = [
    {"temperature": "1"}, {"temperature": True}, {"temperature": -1}, {"n": 65}, {"n": 1.0}, {"n": "1"}, {"n": []},
    {"stop": ["x"] * 17}, {"stop": "x" * 257}, {"stop": [""]}, {"stop": [1]}, {"stop": {}},
    {"logit_bias": {str(i): 1 for i in range(1025)}}, {"logit_bias": {"x": 1}}, {"bad_words": ["x"] * 129},
    {"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": 1, "stream": True},
    {"stream_options": {"include_usage": True}}, {"stream": 1}, {"seed": 1 << 64}, {"model": 5},
    {"guided_regex": "a", "guided_json": {}}, {"guided_regex": "a", "response_format": {"type": "json_object"}},
    {"structured_outputs": {"rexeg": "a"}}, {"structured_outputs": {}}, {"structured_outputs": {"choice": 5}},
    {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
    {"repetition_detection": {"size": 3}}, {"suffix": "x"}, {"use_beam_search": True}, {"vllm_xargs": {"a": 1}},
    {"logits_processors": ["x"]}, {"kv_transfer_params": {"a": 1}}, {"cache_salt": "x" * 513}, {"user": "x" * 513},
    {"prompt_cache_key": 7}, {"min_tokens": 5, "max_tokens": 4}, {"truncate_prompt_tokens": 0}, {"best_of": 65},
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: "-".join(fields))
def test_refused_by_both(fields: dict[str, Any]) -> None:
    for make in (chat, complete):
        with pytest.raises(RequestError) as caught:
            make(**fields)
        assert len(str(caught.value)) < 400
        assert caught.value.param


@pytest.mark.parametrize("fields", [
    {"messages": []}, {"messages": "hi"}, {"messages": [1]}, {"top_logprobs": 2}, {"logprobs": 2},
    {"logprobs": True, "top_logprobs": 21}, {"tool_choice": "auto"}, {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"tools": [{}] * 129},
    {"add_generation_prompt": True, "continue_final_message": True}, {"functions": [{"name": "f"}]},
], ids=str)  # fmt: skip
def test_refused_in_a_chat(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        chat(**fields)


@pytest.mark.parametrize("prompt", [None, [], {}, 5, True, [1, "a"], [[]], [[1], "a", None], [1.5], ["x"] * 129])
def test_refused_prompts(prompt: Any) -> None:
    with pytest.raises(RequestError):
        CompletionRequest.parse({"prompt": prompt}, LIMITS).prompts(LIMITS)


@pytest.mark.parametrize(("prompt", "parsed"), [
    ("a", ["a"]), ("", [""]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]]),
    (["a", [2]], ["a", [2]]),
])  # fmt: skip
def test_accepted_prompts(prompt: Any, parsed: Any) -> None:
    assert CompletionRequest.parse({"prompt": prompt}, LIMITS).prompts(LIMITS) == parsed


def test_unknown_fields_are_accepted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        chat(made_up=1, user="me", suffix="")
    assert "made_up" in caplog.text
    assert "user" not in caplog.text
