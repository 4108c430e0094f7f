"""The OpenAI routes, with the official client and byte by byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import openai
import pytest

from pelton.server.settings import Limits

HI: Any = [{"role": "user", "content": "hi"}]


def prefix(reply: str, num_tokens: int) -> str:
    return reply.encode()[:num_tokens].decode("utf-8", "ignore")


# --- the official client ------------------------------------------------------------------------------------------


def test_chat(live: Any, reply: str) -> None:
    with live.client() as client:
        answer = client.chat.completions.create(model="fake", messages=HI, max_completion_tokens=30)
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", answer.id)
    assert (answer.object, answer.model) == ("chat.completion", "fake")
    choice = answer.choices[0]
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content == prefix(reply, 30)
    assert choice.logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 30, 33)


def test_chat_stream(live: Any, reply: str) -> None:
    with live.client() as client, client.chat.completions.create(
        model="alias", messages=HI, max_tokens=30, stream=True, n=2
    ) as stream:
        chunks = list(stream)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].model == "alias"
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert all(choice.delta.role is None for choice in mine[1:])
        assert "".join(choice.delta.content or "" for choice in mine) == prefix(reply, 30)
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]


async def _chat_async(url: str) -> str:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="fake", messages=HI, max_tokens=30, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_async_client(live: Any, reply: str) -> None:
    import asyncio

    assert asyncio.run(_chat_async(live.url)) == prefix(reply, 30)


def test_completion(live: Any, reply: str) -> None:
    with live.client() as client:
        answer = client.completions.create(model="fake", prompt=["a", "bc"], n=2)
        models = client.models.list()
        assert client.models.retrieve("alias").model_extra["max_model_len"] == 512
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/nope")
    assert re.fullmatch("cmpl-[0-9a-f]{32}", answer.id)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {prefix(reply, 16)}
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 + 3, 4 * 16)
    assert [model.id for model in models] == ["fake", "alias"]
    assert live.llm.seen[0][1].temperature == 0.6


def test_completion_stream_of_several_prompts(live: Any, reply: str) -> None:
    with live.client() as client, client.completions.create(
        model="fake", prompt=[[1, 2], [3]], n=2, stream=True, max_tokens=20
    ) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    for index in range(4):
        mine = [choice for choice in chunks if choice.index == index]
        assert "".join(choice.text for choice in mine) == prefix(reply, 20)
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]


def test_unknown_model(live: Any) -> None:
    with live.client() as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nope", messages=HI)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"] == "The model `nope` does not exist."
    assert caught.value.body["type"] == "NotFoundError"


def test_error_serves_both_generations_of_clients(live: Any) -> None:
    body = live.post("/v1/chat/completions", {"model": "nope", "messages": HI}).json()
    detail = {"message": "The model `nope` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
    assert body == {"error": detail, "object": "error", **detail}


# --- byte by byte -------------------------------------------------------------------------------------------------


def test_bytes_of_a_chat_stream(live: Any) -> None:
    response = live.post("/v1/chat/completions", {
        "messages": HI, "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
    })  # fmt: skip
    found = re.match(r'data: \{"id":"(chatcmpl-[0-9a-f]{32})","object":"chat.completion.chunk","created":(\d+)',
                     response.text)
    assert found
    head = f'data: {{"id":"{found[1]}","object":"chat.completion.chunk","created":{found[2]},"model":"fake","choices":'
    assert response.text == (
        head + '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        + head + '[{"index":0,"delta":{"content":"G"},"logprobs":null,"finish_reason":null}]}\n\n'
        + head + '[{"index":0,"delta":{"content":"r"},"logprobs":null,"finish_reason":null}]}\n\n'
        + head + '[{"index":0,"delta":{"content":"ü"},"logprobs":null,"finish_reason":"length","stop_reason":null}]}'
        + '\n\n'
        + head + '[],"usage":{"prompt_tokens":3,"total_tokens":7,"completion_tokens":4,"prompt_tokens_details":null}}'
        "\n\ndata: [DONE]\n\n"
    )  # fmt: skip


def test_bytes_of_a_completion_stream(live: Any) -> None:
    events = live.events("/v1/completions", {"prompt": "x", "max_tokens": 2, "stream": True, "stop": "r"})
    assert [json.loads(event)["choices"] for event in events[:-1]] == [
        [{"index": 0, "text": "G", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "r", "logprobs": None, "finish_reason": "stop", "stop_reason": "r"}],
    ]
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize(("options", "at_end", "in_each"), [
    (None, False, False),
    ({}, True, False),
    ({"include_usage": True}, True, False),
    ({"include_usage": False}, False, False),
    ({"include_usage": True, "continuous_usage_stats": True}, True, True),
])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_of_a_stream(live: Any, path: str, options: Any, at_end: bool, in_each: bool) -> None:
    ask = {"messages": HI} if "chat" in path else {"prompt": "hi"}
    events = live.events(path, {**ask, "max_tokens": 3, "stream": True, "stream_options": options})
    chunks = [json.loads(event) for event in events[:-1]]
    if at_end:
        last = chunks.pop()
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert all(chunk["choices"] and ("usage" in chunk) == in_each for chunk in chunks)


def test_cached_tokens_are_told_where_asked_for(start: Callable[..., Any]) -> None:
    live = start(enable_prompt_tokens_details=True)
    usage = live.post("/v1/completions", {"prompt": "abc"}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


# --- options of a chat --------------------------------------------------------------------------------------------


def test_what_the_template_is_given(live: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    live.post("/v1/chat/completions", {
        "messages": HI, "max_tokens": 1, "tools": tools, "tool_choice": "none", "documents": [{"text": "d"}],
        "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low",
    })  # fmt: skip
    given = live.llm.prompts.chats[0]
    assert (given["tools"], given["documents"]) == (tools, [{"text": "d"}])
    assert given["template_kwargs"] == {"enable_thinking": False, "reasoning_effort": "low"}
    assert (given["add_generation_prompt"], given["add_special_tokens"]) == (True, False)


def test_continuing_a_message_and_echo(live: Any, reply: str) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well: "}]
    ask = {"messages": messages, "max_tokens": 4, "continue_final_message": True, "echo": True}
    whole = live.post("/v1/chat/completions", ask).json()
    assert whole["choices"][0]["message"]["content"] == "Well: " + prefix(reply, 4)
    assert live.llm.prompts.chats[0]["add_generation_prompt"] is False
    events = live.events("/v1/chat/completions", {**ask, "stream": True})
    text = "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events[:-1])
    assert text == "Well: " + prefix(reply, 4)


def test_a_clients_chat_template(live: Any, start: Callable[..., Any]) -> None:
    ask = {"messages": HI, "chat_template": "{{ 1 }}", "max_tokens": 1}
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = live.post(path, ask)
        assert refused.status_code == 400
        assert "--trust-request-chat-template" in refused.json()["message"]
    assert start(trust_request_chat_template=True).post("/v1/chat/completions", ask).status_code == 200


def test_tool_choice_is_refused_in_vllms_words(live: Any) -> None:
    answer = live.post("/v1/chat/completions", {"messages": HI, "tool_choice": "auto"})
    assert answer.status_code == 400
    assert answer.json()["message"].startswith(
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    )


def test_priority_and_salt_reach_the_engine(live: Any) -> None:
    live.post("/v1/completions", {"prompt": "x", "priority": -3, "cache_salt": "s"})
    assert live.llm.seen[0][2:] == (-3, "s")


# --- log-probabilities --------------------------------------------------------------------------------------------


def test_chat_logprobs(live: Any) -> None:
    ask = {"messages": HI, "max_tokens": 3, "logprobs": True, "top_logprobs": 3}
    whole = live.post("/v1/chat/completions", ask).json()["choices"][0]["logprobs"]["content"]
    assert whole[0] == {
        "token": "G", "logprob": -1.0, "bytes": [71],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "G", "logprob": -1.0, "bytes": [71]},
            {"token": "J", "logprob": -9999.0, "bytes": [74]},
        ],
    }  # fmt: skip
    assert whole[2]["bytes"] == [0xC3]
    streamed = []
    for event in live.events("/v1/chat/completions", {**ask, "stream": True})[:-1]:
        streamed += (json.loads(event)["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == whole


def test_chat_logprobs_without_top(live: Any) -> None:
    ask = {"messages": HI, "max_tokens": 1, "logprobs": True, "return_tokens_as_token_ids": True}
    content = live.post("/v1/chat/completions", ask).json()["choices"][0]["logprobs"]["content"]
    assert content == [{"token": "token_id:71", "logprob": -1.0, "bytes": [71], "top_logprobs": []}]


def test_logprobs_of_given_tokens(live: Any) -> None:
    """All of them are shown, with `logprobs` or without."""
    for fields in ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 1}):
        ask = {"messages": HI, "max_tokens": 1, "logprob_token_ids": [65, 66], **fields}
        (content,) = live.post("/v1/chat/completions", ask).json()["choices"][0]["logprobs"]["content"]
        assert [(top["token"], top["logprob"]) for top in content["top_logprobs"]] == [("G", -1), ("A", -3), ("B", -3)]
    for fields in ({}, {"logprobs": 1}, {"echo": True}, {"stream": True}):
        ask = {"prompt": "x", "max_tokens": 1, "logprob_token_ids": [65, 66], **fields}
        answer = json.loads(live.events("/v1/completions", ask)[0]) if "stream" in ask else live.post(
            "/v1/completions", ask
        ).json()
        assert answer["choices"][0]["logprobs"]["top_logprobs"][-1] == {"G": -1.0, "A": -3.0, "B": -3.0}


def test_all_logprobs(start: Callable[..., Any]) -> None:
    live = start(limits=Limits(num_logprobs=-1))
    ask = {"messages": HI, "max_tokens": 1, "logprobs": True, "top_logprobs": -1}
    (content,) = live.post("/v1/chat/completions", ask).json()["choices"][0]["logprobs"]["content"]
    assert [top["token"] for top in content["top_logprobs"]] == ["G"]


def test_the_models_max_tokens_are_cut_to_the_context(start: Callable[..., Any], fake_llm: Any) -> None:
    live = start(fake_llm())
    live.llm.prompts.generation_defaults["max_tokens"] = 600
    answer = live.post("/v1/completions", {"prompt": "x" * 500}).json()
    assert answer["usage"]["completion_tokens"] == 512 - 501
    assert live.post("/v1/completions", {"prompt": "x" * 500, "max_tokens": 12}).status_code == 400


def test_completion_logprobs(live: Any) -> None:
    ask = {"prompt": "x", "max_tokens": 5, "logprobs": 1}
    whole = live.post("/v1/completions", ask).json()["choices"][0]["logprobs"]
    assert whole["token_logprobs"] == [-1.0] * 5
    assert whole["text_offset"] == [0, 1, 2, 2, 3]  # "ü" is two tokens
    assert whole["top_logprobs"][0] == {"G": -1.0, "H": -0.5}
    streamed: dict[str, list[Any]] = {key: [] for key in whole}
    for event in live.events("/v1/completions", {**ask, "stream": True})[:-1]:
        for key, values in json.loads(event)["choices"][0]["logprobs"].items():
            streamed[key] += values
    assert streamed == whole


@pytest.mark.parametrize("prompt", ["höt", [256, *"höt".encode()]], ids=["text", "ids"])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(live: Any, prompt: Any, stream: bool) -> None:
    ask = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 1}
    if stream:
        events = live.events("/v1/completions", {**ask, "stream": True})[:-1]
        choices = [json.loads(event)["choices"][0] for event in events]
    else:
        choices = live.post("/v1/completions", ask).json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    parts = [choice["logprobs"] for choice in choices]
    logprobs = {key: sum((part[key] for part in parts), []) for key in parts[0]}
    shown = "" if isinstance(prompt, str) else "<s>"
    assert text == shown + "hötG"
    start = len(shown)
    assert logprobs["tokens"] == ["<s>", "h", "\ufffd", "\ufffd", "t", "G"]
    assert logprobs["text_offset"] == [0, start, start + 1, start + 1, start + 2, start + 3]
    assert logprobs["token_logprobs"] == [None] + [-1.0] * 5
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][-1] == {"G": -1.0}


def test_scoring_a_prompt_without_generating(live: Any) -> None:
    ask = {"prompt": "hi", "echo": True, "logprobs": 1, "max_tokens": 0, "stream_options": None}
    answer = live.post("/v1/completions", ask).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "h", "i"]
    assert answer["usage"]["completion_tokens"] == 0
    events = [json.loads(event) for event in live.events("/v1/completions", {**ask, "stream": True})[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == "hi"


def test_prompt_logprobs(live: Any) -> None:
    chat = live.post("/v1/chat/completions", {"messages": HI, "prompt_logprobs": 1, "max_tokens": 1}).json()
    first, second, _ = chat["prompt_logprobs"]
    assert first is None
    assert second["104"] == {"logprob": -1.0, "rank": 2, "decoded_token": "h"}
    completion = live.post("/v1/completions", {"prompt": "hi", "prompt_logprobs": 0}).json()["choices"][0]
    assert completion["prompt_logprobs"][2] == {"105": {"logprob": -1.0, "rank": 2, "decoded_token": "i"}}
    assert completion["logprobs"] is None


# --- tokens -------------------------------------------------------------------------------------------------------


def test_tokenize_and_detokenize(live: Any) -> None:
    tokens = live.post("/tokenize", {"prompt": "hé"}).json()
    assert tokens == {"count": 4, "max_model_len": 512, "tokens": [256, 104, 195, 169]}
    assert live.post("/tokenize", {"prompt": "h", "add_special_tokens": False}).json()["tokens"] == [104]
    named = live.post("/tokenize", {"messages": HI, "return_token_strs": True}).json()
    assert named["token_strs"] == ["<turn>", "h", "i"]
    assert live.post("/detokenize", {"tokens": [256, 104, 195, 169]}).json() == {"prompt": "<s>hé"}
    for path, body in (
        ("/detokenize", {"tokens": [259]}), ("/detokenize", {"tokens": [-1]}), ("/detokenize", {}),
        ("/tokenize", {}), ("/tokenize", {"prompt": "x", "messages": HI}), ("/tokenize", {"prompt": "x", "model": "y"}),
    ):  # fmt: skip
        assert live.post(path, body).status_code in (400, 404)
