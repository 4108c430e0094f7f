"""Whatever stands in a field of a request: an answer or a 4xx, never a 5xx, and the server goes on."""

from __future__ import annotations

from typing import Any

import pytest

NUMBERS = ("n", "best_of", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
           "frequency_penalty", "repetition_penalty", "seed", "prompt_logprobs", "logprobs", "top_logprobs",
           "truncate_prompt_tokens", "priority", "thinking_token_budget", "max_completion_tokens")  # fmt: skip
LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "logprob_token_ids", "bad_words", "guided_choice", "tools",
         "documents", "prompt", "messages", "logit_bias", "stream_options", "response_format", "structured_outputs",
         "chat_template_kwargs", "repetition_detection")  # fmt: skip
ODD_NUMBERS: list[Any] = [None, -1, 0, 1, 2, 20, 21, 64, 65, 2**31, 2**63, 2**64 - 1, -(2**63), 1e308, -0.0, 1e-320,
                          1.5, "1", "NaN", "", True, [], {}, [1], "x" * 2000]  # fmt: skip
ODD_LISTS: list[Any] = [None, [], {}, 1, "x", "", [1], ["x"], [""], [None], [[]], [{}], [-1], [2**63], [1.5], [True],
                        ["x"] * 17, ["x"] * 129, list(range(1025)), {"5": 1}, {"x": "y"}, {"type": "json_object"},
                        [1] * 100_000]  # fmt: skip
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("names", "values"), [(NUMBERS, ODD_NUMBERS), (LISTS, ODD_LISTS)], ids=["numbers", "lists"])
def test_no_value_of_a_field_is_the_servers_fault(live: Any, path: str, names: Any, values: Any) -> None:
    with live.http() as http:
        for name in names:
            for value in values:
                answer = http.post(path, json={**PATHS[path], name: value})
                assert answer.status_code in (200, 400), (name, str(value)[:80], answer.text[:300])
                if answer.status_code == 400:
                    assert len(answer.content) < 2000
        assert http.post(path, json=PATHS[path]).status_code == 200
    assert live.llm.num_running == 0


MESSAGES: list[Any] = [
    {}, {"role": "user"}, {"role": 1, "content": "x"}, {"role": "user", "content": 1},
    {"role": "user", "content": [{"type": "image_url"}]}, {"role": "user", "content": None},
    {"role": "assistant", "tool_calls": [{}]}, {"role": "assistant", "tool_calls": "x", "content": "y"},
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_no_message_is_the_servers_fault(live: Any, message: Any) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        assert live.post(path, {"messages": [message], "max_tokens": 1}).status_code in (200, 400)


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_is_said_before_a_stream_begins(live: Any, stream: bool) -> None:
    answer = live.post("/v1/completions", {"prompt": "x" * 600, "stream": stream})
    assert answer.status_code == 400
    assert "maximum context length is 512 tokens" in answer.json()["error"]["message"]
