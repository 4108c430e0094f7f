"""The records that cross between the engine (policy) and the runner (tensors), and between a door and the engine.

    door --EngineRequest--> engine --StepPlan--> runner --StepResult--> engine --Update--> door

All are plain data. Positions count tokens of one request from 0: prompt first, then what was generated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from pelton.types import SamplingParams


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt to continue once; a door turns text into this and asks for n copies where n > 1."""

    request_id: int  # never used twice by one engine; given by the door
    prompt_token_ids: list[int]  # at least one
    params: SamplingParams  # max_tokens is set; text-level fields (stop, detokenize, n) are the door's business
    eos_token_ids: tuple[int, ...] = ()  # the model's end-of-text ids; see Request.finish_reason
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words as tokens
    think_token_ids: tuple[int, int] | None = None  # (start, end of thinking), for thinking_token_budget
    grammar: str | None = None  # params.structured_outputs as one grammar
    priority: int = 0  # lower goes first
    cache_salt: str = ""  # requests share cached prefixes only within one salt
    arrival_time: float = 0.0  # seconds, time.monotonic()

    @property
    def is_constrained(self) -> bool:
        """Whether what its next token is held to changes from token to token."""
        params = self.params
        return bool(
            self.grammar is not None or self.bad_words_token_ids or params.min_tokens or params.logits_processors
            or params.thinking_token_budget is not None
        )

    @property
    def needs_results(self) -> bool:
        """Whether a token must be known before work for the next can be prepared."""
        params = self.params
        penalises = params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
        return bool(self.is_constrained or penalises or params.prompt_logprobs is not None)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of one request that one step computes: tokens at positions start .. start + num_tokens - 1.

    `blocks` holds, for each KV group, the block ids that stand in the request's table from `table_start` on;
    what stood there before is replaced, so applying a chunk twice changes nothing. Block 0 is the null block:
    it stands for blocks that have left a sliding window. Entries before `table_start` that have left one since they
    were sent are not sent again: what no query of the chunk sees is not to be read.
    """

    request_id: int
    start: int
    num_tokens: int
    table_start: int
    blocks: tuple[tuple[int, ...], ...]
    sample: bool  # the last token's logits are sampled: the chunk reaches the end of what is known


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the runner is to do in one step. Filled by Scheduler.schedule()."""

    step_id: int
    new: tuple[EngineRequest, ...]  # requests the runner sees for the first time
    chunks: tuple[Chunk, ...]
    gone: tuple[int, ...]  # requests that ended since the last plan: the runner drops their state

    @property
    def num_tokens(self) -> int:
        """How many tokens it computes."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position. Entry 0 is the token that was chosen (or stood in the prompt)."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1 = most likely


@dataclass(slots=True)
class StepResult:
    """What came out of a StepPlan, by request id. Filled by the runner."""

    step_id: int
    token_ids: dict[int, int] = field(default_factory=dict)  # for each chunk with `sample` and no error
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # where params.wants_logprobs
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """For a chunk of the prompt at positions s..e-1, the entries of prompt positions s+1..min(e, P-1)."""
    errors: dict[int, str] = field(default_factory=dict)  # this request cannot go on; one line why


class Started(Protocol):
    """A step that a runner has begun."""

    def finish(self) -> StepResult:
        """Wait for its result."""


@dataclass(slots=True)
class Update:
    """What happened to one request in one step, for the door that submitted it. Filled by Scheduler.commit()."""

    request_id: int
    token_ids: list[int] = field(default_factory=list)  # new ones
    logprobs: list[TokenLogprobs] | None = None  # one for each new token, if asked
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # all of them, once, when the prompt is done
    finish_reason: str | None = None  # "stop", "length", "abort", "repetition", "error"
    stop_reason: int | None = None  # the stop token id; None for end-of-text
    error: str | None = None  # with finish_reason "error"
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    scheduled_time: float | None = None  # seconds, when first scheduled; sent with the first update
