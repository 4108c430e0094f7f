"""The nouns of vLLM's Python interface, both generations (0.9 and 0.33). They check their own ranges.

Standard library only: every other module may import this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, TypedDict, overload

from pelton.errors import RequestError

MAX_LOGPROB_TOKEN_IDS = 128
GREEDY_TEMPERATURE = 1e-5  # vLLM's threshold: below it sampling is greedy


class TextPrompt(TypedDict):
    """A prompt given as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt given as token ids."""

    prompt_token_ids: list[int]


Prompt = str | list[int] | TextPrompt | TokensPrompt

OnProgress = Callable[[int, int], None]
"""Is called with (bytes done, bytes in all) while a model is fetched or loaded."""


class RequestOutputKind(IntEnum):
    """What each RequestOutput of a stream holds: all so far, only what is new, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    """A constraint on the text to generate; exactly one of the first six is set."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        kinds = [self.json, self.regex, self.choice, self.grammar, self.json_object, self.structural_tag]
        if sum(kind is not None for kind in kinds) != 1:
            raise RequestError(
                "structured outputs take exactly one of json, regex, choice, grammar, json_object, structural_tag",
                "structured_outputs",
            )


@dataclass
class GuidedDecodingParams(StructuredOutputsParams):
    """The name vLLM 0.9 used for StructuredOutputsParams."""

    backend: str | None = None


@dataclass
class RepetitionDetectionParams:
    """Ends a request whose last tokens are one pattern of `min..max_pattern_size` tokens, `min_count` times."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            if type(getattr(self, name)) is not int:
                raise RequestError(f"{name} must be an integer, got {getattr(self, name)!r}", "repetition_detection")
        if self.max_pattern_size == 0:
            return
        if self.max_pattern_size < 0 or not 0 <= self.min_pattern_size <= self.max_pattern_size:
            raise RequestError("need 0 <= min_pattern_size <= max_pattern_size", "repetition_detection")
        if self.min_count < 2:
            raise RequestError("min_count must be at least 2", "repetition_detection")


LogitsProcessor = Callable[..., Any]
"""`(output_token_ids, logits) -> logits` or `(prompt_token_ids, output_token_ids, logits) -> logits`; [V] logits."""


@dataclass
class SamplingParams:
    """How to generate: the fields of vLLM 0.33 and, at the end, those that only 0.9 had.

    Raises RequestError (a ValueError) that names the field when a value is out of its range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int = 1
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None  # carried along for logits processors; nothing else reads it
    bad_words: list[str] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    # vLLM 0.9
    best_of: int | None = None
    logits_processors: list[LogitsProcessor] | None = None
    truncate_prompt_tokens: int | None = None
    guided_decoding: GuidedDecodingParams | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_kinds()
        self._check_floats()
        self._check_counts()
        self._check_lists()

    def _normalise(self) -> None:
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logprob_token_ids"):
            if not isinstance(getattr(self, name), (list, tuple, set, type(None))):
                raise RequestError(f"{name} must be a list, got {getattr(self, name)!r}", name)
        self.stop_token_ids = list(self.stop_token_ids or [])
        self.bad_words = list(self.bad_words or [])
        if self.seed == -1:
            self.seed = None
        if self.top_k == -1:
            self.top_k = 0
        if self.logprobs is True or self.prompt_logprobs is True:
            raise RequestError("logprobs and prompt_logprobs are numbers here, not true", "logprobs")
        if self.logit_bias is not None:
            self.logit_bias = _parse_logit_bias(self.logit_bias)
        for name, record in _RECORDS.items():
            setattr(self, name, _parse_record(name, getattr(self, name), record))
        if self.guided_decoding is not None:
            if self.structured_outputs is not None:
                raise RequestError("give structured_outputs or guided_decoding, not both", "guided_decoding")
            self.structured_outputs = self.guided_decoding

    def _check_kinds(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}", name)
        _check_int("output_kind", self.output_kind, 0)
        if self.output_kind not in list(RequestOutputKind):
            raise RequestError(f"output_kind must be a RequestOutputKind, got {self.output_kind}", "output_kind")
        self.output_kind = RequestOutputKind(self.output_kind)

    def _check_floats(self) -> None:
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)

    def _check_counts(self) -> None:
        _check_int("n", self.n, 1)
        _check_int("top_k", self.top_k, 0)
        _check_int("min_tokens", self.min_tokens, 0)
        _check_int("stream_interval", self.stream_interval, 1)
        for name, low in (("max_tokens", 0), ("best_of", 1), ("thinking_token_budget", 0), ("logprobs", -1),
                          ("prompt_logprobs", -1), ("truncate_prompt_tokens", -1), ("seed", 0)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), low)
        if self.seed is not None and self.seed >= 1 << 64:
            raise RequestError(f"seed must be below 2**64, got {self.seed}", "seed")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens must be positive, or -1 for the context's length",
                               "truncate_prompt_tokens")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of ({self.best_of}) must be at least n ({self.n})", "best_of")

    def _check_lists(self) -> None:
        if not all(isinstance(s, str) and s for s in self.stop or []):
            raise RequestError("stop strings must be non-empty text", "stop")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text: drop detokenize=False or use stop_token_ids", "stop")
        if not all(isinstance(s, str) and s.strip() for s in self.bad_words or []):
            raise RequestError("bad_words must be non-empty text", "bad_words")
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            ids = getattr(self, name) or []
            if not all(type(i) is int and i >= 0 for i in ids):
                raise RequestError(f"{name} must be a list of token ids (integers from 0)", name)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must not be empty", "allowed_token_ids")
        if len(self.logprob_token_ids or []) > MAX_LOGPROB_TOKEN_IDS:
            raise RequestError(f"logprob_token_ids holds at most {MAX_LOGPROB_TOKEN_IDS} ids", "logprob_token_ids")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE  # dividing by less would overflow

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of the completion are asked for."""
        return self.logprobs is not None or self.logprob_token_ids is not None

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy, with the named fields changed and everything checked again."""
        if "structured_outputs" not in changes and self.guided_decoding is not None:
            changes = {"structured_outputs": None, **changes}
        return replace(self, **changes)

    @staticmethod
    def from_optional(**fields: Any) -> SamplingParams:
        """Like the constructor, with None standing for a field's default (but not for max_tokens)."""
        return SamplingParams(**{k: v for k, v in fields.items() if v is not None or k == "max_tokens"})


@dataclass(slots=True)
class Logprob:
    """Natural-log probability of one token, its rank (1 = most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id -> Logprob at one position; the chosen token comes first."""


@dataclass(slots=True)
class FlatLogprobs(Sequence[PositionLogprobs]):
    """A list of PositionLogprobs kept as flat lists: for long outputs, far fewer objects.

    The entries of position i are those from start_indices[i] up to end_indices[i]; a position without any reads as {}.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, position: PositionLogprobs | None) -> None:
        """Add a position; None, for the first token of a prompt, is one without entries."""
        self.start_indices.append(len(self.token_ids))
        for token_id, entry in (position or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> PositionLogprobs: ...
    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...
    def __getitem__(self, index: int | slice) -> PositionLogprobs | FlatLogprobs:
        if isinstance(index, slice):
            part = FlatLogprobs()
            for i in range(*index.indices(len(self))):
                part.append(self[i])
            return part
        return {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i])
            for i in range(self.start_indices[index], self.end_indices[index])
        }


@dataclass
class CompletionOutput:
    """One completion of a prompt. `text` and `token_ids` hold what `output_kind` says."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | FlatLogprobs | None = None  # flat if `flat_logprobs` asks
    finish_reason: str | None = None  # "stop", "length", "abort", "repetition", "error"
    stop_reason: int | str | None = None  # the stop string or stop token id; None for end-of-text
    lora_request: Any = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times of one request in seconds on time.monotonic()'s clock."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """What came of a prompt so far. `prompt_logprobs[0]` is None ({} if flat): nothing comes before the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | FlatLogprobs | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    error: str | None = field(default=None)  # set when finish_reason is "error"


def _check_float(name: str, value: float, low: float, high: float, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, got {value!r}", name)
    if value < low or value > high or (low_open and value == low):
        raise RequestError(f"{name} must be in {'(' if low_open else '['}{low}, {high}], got {value}", name)


def _check_int(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise RequestError(f"{name} must be an integer of at least {low}, got {value!r}", name)


_SWITCHES = (  # fields of SamplingParams that are true or false
    "ignore_eos", "flat_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip
_RECORDS: dict[str, type] = {  # fields of SamplingParams that are records of their own
    "structured_outputs": StructuredOutputsParams,
    "guided_decoding": GuidedDecodingParams,
    "repetition_detection": RepetitionDetectionParams,
}


def _parse_record(name: str, value: Any, record: type) -> Any:
    """A record may be given as a mapping of its fields (JSON)."""
    if isinstance(value, Mapping):
        try:
            return record(**value)
        except TypeError as error:  # a field it has not
            raise RequestError(f"{name}: {error}", name) from None
    if value is not None and not isinstance(value, record):
        raise RequestError(f"{name} must be a {record.__name__}, got {value!r}", name)
    return value


def _parse_logit_bias(bias: dict[Any, float]) -> dict[int, float]:
    """Keys may be text (JSON); values are clamped to [-100, 100] as OpenAI documents."""
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {bias!r}", "logit_bias")
    parsed = {}
    for key, value in bias.items():
        try:
            token_id = int(key)
        except (TypeError, ValueError):
            raise RequestError(f"logit_bias keys must be token ids, got {key!r}", "logit_bias") from None
        _check_float("logit_bias", value, -math.inf, math.inf)
        if token_id < 0:
            raise RequestError(f"logit_bias keys must be token ids, got {key!r}", "logit_bias")
        parsed[token_id] = max(-100.0, min(100.0, float(value)))
    return parsed
