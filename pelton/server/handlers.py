"""POST /v1/chat/completions, /v1/completions, /tokenize, /detokenize: a request in, a Generation or an answer out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pelton.errors import RequestError
from pelton.server.backend import Backend
from pelton.server.generation import Generation, new_id, respond
from pelton.server.logprobs import TokenNames
from pelton.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
    validate,
)
from pelton.server.replies import ChatReply, CompletionReply, EncodedPrompt
from pelton.server.service import Service
from pelton.types import SamplingParams


async def chat_completions(http: Request) -> Response:
    """POST /v1/chat/completions"""
    service: Service = http.app.state.service
    llm = service.backend()
    request = ChatRequest.parse(http.state.json, service.settings.limits)
    model = service.check_model(request.model)
    params = request.to_sampling_params(llm.prompts.generation_defaults)
    token_ids = await _encode_chat(service, llm, request, params)
    reply = ChatReply(
        _token_names(service, llm, request),
        n=params.n,
        role=_role(service, request),
        logprobs=params.wants_logprobs,
        num_top=_num_top(params),
        echo=_last_text(request) if request.echo else "",
    )
    prompts = [EncodedPrompt(token_ids)]
    generation = Generation(new_id("chatcmpl"), model, prompts, params, reply, **_options(http, request))
    return await respond(service, generation, request.stream)


async def completions(http: Request) -> Response:
    """POST /v1/completions"""
    service: Service = http.app.state.service
    llm = service.backend()
    request = CompletionRequest.parse(http.state.json, service.settings.limits)
    model = service.check_model(request.model)
    params = request.to_sampling_params(llm.prompts.generation_defaults)
    prompts = await _encode(llm, request, params, request.prompts(service.settings.limits))
    reply = CompletionReply(
        _token_names(service, llm, request),
        prompts,
        n=params.n,
        logprobs=params.wants_logprobs,
        prompt_logprobs=request.prompt_logprobs is not None,
        echo=request.echo,
        skip_special_tokens=params.skip_special_tokens,
    )
    generation = Generation(new_id("cmpl"), model, prompts, params, reply, **_options(http, request))
    return await respond(service, generation, request.stream)


async def tokenize(http: Request) -> Response:
    """POST /tokenize"""
    service: Service = http.app.state.service
    llm = service.backend()
    request = validate(TokenizeRequest, http.state.json)
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give prompt or messages", "prompt")
    if request.messages is not None:
        token_ids = await _encode_chat(service, llm, request)
    else:
        special = request.add_special_tokens is not False
        token_ids = await asyncio.to_thread(
            llm.prompts.encode, request.prompt or "", add_special_tokens=special
        )
    reply = {"count": len(token_ids), "max_model_len": llm.info.max_model_len, "tokens": token_ids}
    if request.return_token_strs:
        reply["token_strs"] = [llm.tokenizer.token_text(token_id) for token_id in token_ids]
    return JSONResponse(reply)


async def detokenize(http: Request) -> Response:
    """POST /detokenize"""
    service: Service = http.app.state.service
    llm = service.backend()
    request = validate(DetokenizeRequest, http.state.json)
    service.check_model(request.model)
    largest = llm.tokenizer.vocab_size - 1
    if not all(0 <= token_id <= largest for token_id in request.tokens):
        raise RequestError(f"tokens must be in [0, {largest}]", "tokens")
    text = await asyncio.to_thread(llm.tokenizer.decode, request.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})


def _options(http: Request, request: GenerateRequest) -> dict[str, Any]:
    """What a Generation takes from a request as it stands. Prefixes are shared only between callers with the same
    key, where there are several, and the same salt. Usage is streamed only if `stream_options` is there."""
    key_id, salt = getattr(http.state, "key_id", ""), request.cache_salt or ""
    usage = request.stream_options
    return {
        "priority": request.priority,
        "cache_salt": f"{key_id}:{salt}" if key_id else salt,
        "clip": not request.sets_max_tokens,
        "include_usage": usage is not None and usage.include_usage,
        "continuous_usage": usage is not None and usage.include_usage and usage.continuous_usage_stats,
    }


async def _encode_chat(
    service: Service, llm: Backend, request: ChatRequest | TokenizeRequest, params: SamplingParams | None = None
) -> list[int]:
    if request.chat_template is not None and not service.settings.trust_request_chat_template:
        raise RequestError(
            "chat_template from a client is refused; the server allows it with --trust-request-chat-template",
            "chat_template",
        )
    options: dict[str, Any] = {
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
        "tools": request.tools,
        "documents": request.documents if isinstance(request, ChatRequest) else None,
        "chat_template": request.chat_template,
        "add_special_tokens": bool(request.add_special_tokens),
        "template_kwargs": dict(request.chat_template_kwargs),
    }
    effort = (request.model_extra or {}).get("reasoning_effort")
    if isinstance(effort, str):
        options["template_kwargs"].setdefault("reasoning_effort", effort)
    return await asyncio.to_thread(llm.prompts.encode_chat, request.messages or [], params, **options)


async def _encode(
    llm: Backend, request: CompletionRequest, params: SamplingParams, prompts: Sequence[str | list[int]]
) -> list[EncodedPrompt]:
    special = request.add_special_tokens is not False

    def encode_all() -> list[EncodedPrompt]:
        return [
            EncodedPrompt(
                llm.prompts.encode(prompt, params, add_special_tokens=special),
                prompt if isinstance(prompt, str) and params.truncate_prompt_tokens is None else None,
            )
            for prompt in prompts
        ]

    return await asyncio.to_thread(encode_all)


def _token_names(service: Service, llm: Backend, request: GenerateRequest) -> TokenNames:
    as_ids = request.return_tokens_as_token_ids
    return TokenNames(llm.tokenizer, service.settings.return_tokens_as_token_ids if as_ids is None else as_ids)


def _num_top(params: SamplingParams) -> int | None:
    """How many of a position's log-probabilities a chat shows; None: all, as they were asked for one by one."""
    return None if params.logprob_token_ids is not None or params.logprobs == -1 else params.logprobs or 0


def _role(service: Service, request: ChatRequest) -> str:
    """Who speaks: the server's role, or the one whose message is being continued."""
    if request.add_generation_prompt:
        return service.settings.response_role
    role = request.messages[-1].get("role")
    return role if isinstance(role, str) else service.settings.response_role


def _last_text(request: ChatRequest) -> str:
    """The last message's text, if it is of the role that speaks: vLLM's `echo` puts it before the answer."""
    last = request.messages[-1]
    content = last.get("content")
    return content if last.get("role") == "assistant" and isinstance(content, str) else ""
