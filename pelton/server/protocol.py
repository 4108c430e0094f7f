"""What a client may ask for: the request models, and the one way from each to SamplingParams.

A field is honoured, or refused with a 4xx, or known to change nothing; a field nobody knows is accepted and logged.
null means "not given", as in OpenAI's interface. Types are strict: "1", true and 1.0 are no integers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pelton.errors import RequestError
from pelton.server.constraints import GUIDED, ResponseFormat, Strings, StructuredOutputs, guided, only_one
from pelton.server.settings import Limits
from pelton.types import RepetitionDetectionParams, RequestOutputKind, SamplingParams, StructuredOutputsParams

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=BaseModel)

TokenIds = Annotated[list[int], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]

# Fields of SamplingParams that a request gives under the same name.
SAMPLING_FIELDS = (
    "n", "max_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k",
    "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "prompt_logprobs", "logprob_token_ids",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "logit_bias",
    "allowed_token_ids", "bad_words", "thinking_token_budget", "best_of", "truncate_prompt_tokens",
)  # fmt: skip
# Fields that would change the output in ways this server does not offer; the value on the right changes nothing.
REFUSED: dict[str, Any] = {
    "suffix": "", "use_beam_search": False, "prompt_embeds": [], "logits_processors": [], "vllm_xargs": {},
    "kv_transfer_params": {}, "mm_processor_kwargs": {}, "media_io_kwargs": {}, "functions": [],
    "function_call": "none", "audio": {}, "web_search_options": {}, "lora_request": {}, "modalities": ["text"],
}  # fmt: skip
LABELS = ("user", "cache_salt", "request_id", "safety_identifier", "prompt_cache_key")
TOOL_CHOICE_UNAVAILABLE = (
    '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set; '
    'this version offers neither: leave tool_choice out, or send "none"'
)


class StreamOptions(BaseModel):
    """What a stream reports beside its text."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool = True
    continuous_usage_stats: bool = False


class GenerateRequest(BaseModel):
    """The fields that chat and completions share."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())
    ignored: ClassVar[frozenset[str]] = frozenset({
        "service_tier", "store", "metadata", "guided_decoding_backend", "verbosity", "prediction",
        "length_penalty", "early_stopping", "prompt_cache_retention", "reasoning_effort", "include_reasoning",
        *LABELS, *REFUSED,
    })  # fmt: skip

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Strings | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    logprob_token_ids: TokenIds | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Strings | None = None
    thinking_token_budget: int | None = None
    repetition_detection: dict[str, int] | None = None
    best_of: int | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool = False
    priority: int = 0
    user: str | None = None
    cache_salt: str | None = None
    request_id: str | None = None

    @classmethod
    def parse(cls, body: Any, limits: Limits) -> Self:
        """A valid request from parsed JSON; RequestError names the field that is wrong."""
        request = validate(cls, body)
        extra = request.model_extra or {}
        for name, neutral in REFUSED.items():
            if name in extra and extra[name] != neutral:
                raise RequestError(f"{name} is not offered by this server", name)
        unknown = sorted(set(extra) - cls.ignored)
        if unknown:
            logger.info("fields that change nothing were ignored: %s", ", ".join(unknown)[:200])
        if request.stream_options is not None and not request.stream:
            raise RequestError("Stream options can only be defined when `stream=True`.", "stream_options")
        if request.stream and request.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs are not available when stream=True", "prompt_logprobs")
        request.check_limits(limits)
        return request

    def check_limits(self, limits: Limits) -> None:
        """Hold each field against the operator's limits."""
        extra = self.model_extra or {}
        for name in LABELS:
            label = extra.get(name, getattr(self, name, None))
            if label is not None and (not isinstance(label, str) or len(label) > limits.label_chars):
                raise RequestError(f"{name} must be text of at most {limits.label_chars} characters", name)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        sizes = (
            ("n", self.n, limits.n),
            ("best_of", self.best_of or 0, limits.n),
            ("stop", len(stops), limits.num_stop),
            ("stop", max(map(len, stops), default=0), limits.stop_chars),
            ("stop_token_ids", len(self.stop_token_ids or ()), limits.num_logit_bias),
            ("logit_bias", len(self.logit_bias or ()), limits.num_logit_bias),
            ("bad_words", len(self.bad_words or ()), limits.num_bad_words),
            ("bad_words", max(map(len, self.bad_words or ()), default=0), limits.stop_chars),
        )
        for name, size, limit in sizes:
            if size > limit:
                raise RequestError(f"{name} exceeds this server's limit: {size} > {limit}", name)
        check_num_logprobs("prompt_logprobs", self.prompt_logprobs, limits)

    @property
    def sets_max_tokens(self) -> bool:
        """Whether the client says how long the answer may be; else one that does not fit the context is cut."""
        return not self.model_fields_set.isdisjoint(("max_tokens", "max_completion_tokens"))

    def constraint(self) -> StructuredOutputsParams | None:
        """The one constraint on the text, whichever of the four dialects it came in."""
        found = [self.response_format.constraint()] if self.response_format else []
        if self.structured_outputs is not None:
            found.append(self.structured_outputs.constraint())
        found.append(guided({kind: getattr(self, f"guided_{kind}") for kind in GUIDED}, self.guided_whitespace_pattern))
        return only_one(found)

    def _sampling_params(self, defaults: Mapping[str, Any], **fields: Any) -> SamplingParams:
        """What was given, else the model's own sampling defaults, else SamplingParams' defaults (for max_tokens, this
        request's)."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if name in self.model_fields_set}
        known = {name: value for name, value in defaults.items() if name in SAMPLING_FIELDS and value is not None}
        if self.repetition_detection is not None:
            fields["repetition_detection"] = _repetition_detection(self.repetition_detection)
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        fields = {"max_tokens": self.max_tokens, **known, **given, **fields}
        return SamplingParams(**fields, output_kind=kind, structured_outputs=self.constraint())


class ChatRequest(GenerateRequest):
    """POST /v1/chat/completions"""

    messages: Objects
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: Objects | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def check_limits(self, limits: Limits) -> None:
        """Also what only chat has."""
        super().check_limits(limits)
        if not 1 <= len(self.messages) <= limits.num_messages:
            raise RequestError(f"messages must hold 1 to {limits.num_messages} messages", "messages")
        if len(self.tools or ()) > limits.num_tools:
            raise RequestError(f"tools exceeds this server's limit: {len(self.tools or ())} > {limits.num_tools}",
                               "tools")
        if self.tool_choice not in (None, "none"):
            raise RequestError(TOOL_CHOICE_UNAVAILABLE, "tool_choice")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        check_num_logprobs("top_logprobs", self.top_logprobs, limits)
        if self.add_generation_prompt and self.continue_final_message:
            if "add_generation_prompt" in self.model_fields_set:
                raise RequestError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                                   "continue_final_message")
            self.add_generation_prompt = False

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """As asked; without a limit the answer may fill the context."""
        fields: dict[str, Any] = {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        return self._sampling_params(defaults, **fields)


class CompletionRequest(GenerateRequest):
    """POST /v1/completions"""

    prompt: Any = None
    max_tokens: int | None = 16
    logprobs: int | None = None

    def check_limits(self, limits: Limits) -> None:
        """Also what only completions have."""
        super().check_limits(limits)
        check_num_logprobs("logprobs", self.logprobs, limits)

    def prompts(self, limits: Limits) -> list[str | list[int]]:
        """`prompt` is a text, a list of token ids, or a list of either."""
        prompt = self.prompt
        if isinstance(prompt, str) or _is_token_ids(prompt):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise RequestError("prompt must be text, token ids, or a list of either", "prompt")
        if len(prompt) > limits.num_prompts:
            raise RequestError(f"prompt exceeds this server's limit: {len(prompt)} > {limits.num_prompts} prompts",
                               "prompt")
        if not all(isinstance(one, str) or _is_token_ids(one) for one in prompt):
            raise RequestError("prompt must be text, token ids, or a list of either", "prompt")
        return prompt

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """As asked. An echo with logprobs scores the prompt, too."""
        fields: dict[str, Any] = {"logprobs": self.logprobs}
        wants_logprobs = self.logprobs is not None or self.logprob_token_ids is not None
        if self.echo and wants_logprobs and self.prompt_logprobs is None:
            fields["prompt_logprobs"] = self.logprobs or 0
        return self._sampling_params(defaults, **fields)


class TokenizeRequest(BaseModel):
    """POST /tokenize: a `prompt`, or `messages` as in a chat."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tools: Objects | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize"""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    tokens: TokenIds


def validate(model: type[Model], body: Any) -> Model:
    """`body` as a `model`; RequestError names the first field that is wrong, without repeating its value."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return model.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"])
        raise RequestError(f"{where}: {first['msg']}"[:300], where.partition(".")[0] or None) from None


def check_num_logprobs(name: str, number: int | None, limits: Limits) -> None:
    """Between none and the operator's limit; where there is no limit, -1 asks for the whole vocabulary."""
    most = limits.num_logprobs
    if number is not None and most != -1 and not 0 <= number <= most:
        raise RequestError(f"{name} must be in [0, {most}], got {number}", name)
    if number is not None and number < -1:
        raise RequestError(f"{name} must be at least 0, or -1 for the whole vocabulary, got {number}", name)


def _repetition_detection(fields: dict[str, int]) -> RepetitionDetectionParams:
    unknown = set(fields) - {"max_pattern_size", "min_pattern_size", "min_count"}
    if unknown:
        raise RequestError(f"repetition_detection has no member {min(unknown)[:64]!r}", "repetition_detection")
    return RepetitionDetectionParams(**fields)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
