"""The door's way in: text, token ids or messages become engine requests, or are refused here with a RequestError."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pelton.engine.step import EngineRequest
from pelton.errors import ModelFormatError, PromptTooLongError, RequestError
from pelton.text.chat_template import ChatTemplate
from pelton.text.grammar import compile_grammar
from pelton.text.messages import SpecialTokenShield, normalise_messages, plain_data
from pelton.text.tokenizer import Tokenizer
from pelton.types import Prompt, SamplingParams

_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's own sampling defaults, under the names of SamplingParams' fields.

    `SamplingParams.from_optional(**defaults | what_the_caller_set)` applies them.
    """
    defaults = {
        name: generation_config[key] for key, name in _DEFAULTS.items() if generation_config.get(key) is not None
    }
    try:
        SamplingParams.from_optional(**defaults)
    except RequestError as error:
        raise ModelFormatError(f"generation_config.json: {error}; use --generation-config vllm to ignore it") from None
    return defaults


class Prompts:
    """Turns what a client sends into what the engine takes, for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        max_model_len: int,
        generation_defaults: Mapping[str, Any] | None = None,
        *,
        vocab_size: int | None = None,
        max_logprobs: int = 20,
    ) -> None:
        """max_model_len: tokens of prompt and completion together. vocab_size: rows of the model's embedding, if it
        is not the tokenizer's vocabulary. max_logprobs: -1 for no limit."""
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.max_model_len = max_model_len
        self.generation_defaults = dict(generation_defaults or {})
        self.vocab_size = vocab_size or tokenizer.vocab_size
        self.max_logprobs = max_logprobs
        self._shield = SpecialTokenShield(tokenizer)

    # --- to token ids ---------------------------------------------------------------------------------------------

    def encode(
        self, prompt: Prompt, params: SamplingParams | None = None, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a prompt in any of its forms, cut as `params.truncate_prompt_tokens` says."""
        text, token_ids = self._parse(prompt)
        if token_ids is None:
            token_ids = self.tokenizer.encode(text or "", add_special_tokens)
        return self._truncate(token_ids, params)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> list[int]:
        """Token ids of messages; options as for `chat_prompt`."""
        return self._truncate(self.chat_prompt(messages, **options)[1], params)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """(text, token ids) of messages put through the chat template (or `chat_template`, the source of another).

        Special tokens inside the messages are encoded as the text they are.
        """
        shield = self._shield.apply
        variables = plain_data(dict(template_kwargs or {}), "chat_template_kwargs")
        for name in ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"):
            if name in variables:
                raise RequestError(f"{name} is a field of its own, leave it out of chat_template_kwargs", name)
        text = self._template(chat_template).render(
            shield(normalise_messages(messages)),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=shield(plain_data(tools, "tools")) or None,
            documents=shield(plain_data(documents, "documents")),
            **shield(variables),
        )
        return self._shield.remove(text), self.tokenizer.encode(text, add_special_tokens)

    def _template(self, source: str | None) -> ChatTemplate:
        if source is not None:
            try:
                return ChatTemplate(source, self.tokenizer.named_tokens)
            except ModelFormatError as error:
                raise RequestError(str(error), "chat_template") from None
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template: start with --chat-template FILE, or use completions instead of chat",
                "messages",
            )
        return self.chat_template

    def _parse(self, prompt: Prompt) -> tuple[str | None, list[int] | None]:
        text: Any = None
        token_ids: Any = None
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, Mapping):
            if prompt.get("multi_modal_data"):
                raise RequestError("this model takes text only; leave multi_modal_data out", "prompt")
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        else:
            token_ids = prompt
        if token_ids is None and isinstance(text, str):
            return text, None
        is_ids = isinstance(token_ids, Sequence) and not isinstance(token_ids, (str, bytes))
        if not is_ids or not all(type(token_id) is int for token_id in token_ids):
            raise RequestError("a prompt must be text, a list of token ids, or a dict with one of them", "prompt")
        return text if isinstance(text, str) else None, list(token_ids)

    def _truncate(self, token_ids: list[int], params: SamplingParams | None) -> list[int]:
        keep = params.truncate_prompt_tokens if params else None
        if params is None or keep is None:
            return token_ids
        if keep > self.max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens ({keep}) exceeds the context of {self.max_model_len} tokens; use -1",
                "truncate_prompt_tokens",
            )
        if keep == -1:  # as much as fits
            max_tokens = 1 if params.max_tokens is None else params.max_tokens
            keep = max(1, self.max_model_len - max_tokens)
        return token_ids[-keep:]

    # --- to engine requests ---------------------------------------------------------------------------------------

    def requests(
        self,
        new_id: Callable[[], int],
        token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        clip: bool = False,
    ) -> list[EngineRequest]:
        """The engine requests of one prompt: n of them, or best_of. Sample i gets seed + i.

        clip: shorten a completion that does not fit the context (as LLM does) instead of raising PromptTooLongError.
        """
        count = max(params.n, params.best_of or 1)
        if count > params.n and not params.wants_logprobs:
            params = params.clone(logprobs=0)  # to compare the samples
        first = self.request(new_id(), token_ids, params, priority, cache_salt, clip=clip)
        return [first, *(_sample(first, new_id(), i) for i in range(1, count))]

    def request(
        self,
        request_id: int,
        token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        *,
        clip: bool = False,
    ) -> EngineRequest:
        """One engine request, checked against the model: lengths, ids, and what this version can do."""
        self._check_prompt(token_ids)
        self._check_params(params)
        max_tokens = self._max_tokens(len(token_ids), params.max_tokens, clip)
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params.clone(
                n=1,
                best_of=None,
                max_tokens=max_tokens,
                min_tokens=min(params.min_tokens, max_tokens) if clip else params.min_tokens,
            ),
            eos_token_ids=self.tokenizer.eos_token_ids,
            bad_words_token_ids=self._bad_words(params.bad_words or []),
            grammar=None if params.structured_outputs is None else compile_grammar(params.structured_outputs),
            think_token_ids=None if params.thinking_token_budget is None else self._think_ids(),
            priority=priority,
            cache_salt=cache_salt,
            arrival_time=time.monotonic(),
        )

    def _max_tokens(self, num_prompt_tokens: int, asked: int | None, clip: bool) -> int:
        """Tokens to generate at most. Raises PromptTooLongError, in the words clients of vLLM look for."""
        room = self.max_model_len - num_prompt_tokens
        wanted = asked
        if wanted is None:
            wanted = max(room, 1)
        elif clip and wanted > 0:
            wanted = max(min(wanted, room), 1)
        if wanted > room:
            raise PromptTooLongError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the messages, {wanted} in the "
                "completion). Please reduce the length of the messages or completion.",
                "messages",
            )
        return wanted

    def _check_prompt(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise RequestError(
                f"token id {wrong} is out of vocabulary; this model's ids are 0 to {self.vocab_size - 1}", "prompt"
            )

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
            wrong = [token_id for token_id in getattr(params, name) or () if token_id >= self.vocab_size]
            if wrong:
                raise RequestError(
                    f"{name} holds {wrong[0]}, but this model's ids are 0 to {self.vocab_size - 1}", name
                )
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            count = self.vocab_size if asked == -1 else asked
            if count is not None and self.max_logprobs != -1 and count > self.max_logprobs:
                raise RequestError(
                    f"{name} of {count} is more than --max-logprobs allows ({self.max_logprobs}); ask for fewer", name
                )

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it stands at the beginning of a text and after a space."""
        banned: list[tuple[int, ...]] = []
        for word in words:
            start = tuple(self.tokenizer.encode(word.lstrip(), add_special_tokens=False))
            inside = tuple(self.tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
            banned.append(start)
            if inside[-len(start) :] != start:  # else banning `start` bans it too
                banned.append(inside)
        return tuple(banned)

    def _think_ids(self) -> tuple[int, int]:
        start, end = self.tokenizer.token_id("<think>"), self.tokenizer.token_id("</think>")
        if start is None or end is None:
            raise RequestError(
                "thinking_token_budget needs a model that marks its thinking with <think> and </think>; leave it out",
                "thinking_token_budget",
            )
        return start, end


def _sample(first: EngineRequest, request_id: int, index: int) -> EngineRequest:
    """Sample `index` of the prompt that `first` is sample 0 of; it draws other random numbers."""
    seed = first.params.seed
    params = first.params if seed is None else first.params.clone(seed=(seed + index) % (1 << 64))
    return replace(first, request_id=request_id, params=params)
