"""One request on its way through the engine: its tokens, its blocks, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from pelton.engine.kv_tables import KVTables
from pelton.engine.step import EngineRequest, TokenLogprobs
from pelton.types import RepetitionDetectionParams


@dataclass(slots=True, eq=False)
class Request:
    """What the scheduler knows of a request. `rank` orders all requests: the smaller one goes first."""

    spec: EngineRequest
    rank: tuple[int, int]  # (priority, order of arrival)
    kv: KVTables
    max_tokens: int
    max_model_len: int
    token_ids: list[int] = field(init=False)  # prompt, then generated
    num_computed: int = 0  # tokens whose keys and values are in the cache
    is_running: bool = False  # else it waits, and holds no blocks
    has_table: bool = True  # the runner knows its blocks, while it runs
    scheduled_time: float | None = None  # None until first scheduled; from then on the runner knows the request
    num_cached: int = 0  # prompt tokens that came from the prefix cache when first scheduled
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # entries so far; None if not asked, or sent
    has_reported: bool = False  # an update has been sent

    def __post_init__(self) -> None:
        self.token_ids = list(self.spec.prompt_token_ids)
        if self.spec.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def request_id(self) -> int:
        return self.spec.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.spec.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Known tokens that are still to be computed."""
        return len(self.token_ids) - self.num_computed

    def ends_at(self, num_tokens: int) -> bool:
        """Whether the request has ended, whatever its tokens are, when it has so many."""
        return num_tokens - self.num_prompt >= self.max_tokens or num_tokens >= self.max_model_len

    @property
    def max_prefix(self) -> int:
        """Tokens that may come from the prefix cache: one at least is computed, and so is each prompt position
        before an entry of `prompt_logprobs` that is still to come."""
        if self.prompt_logprobs is None:
            return len(self.token_ids) - 1
        return min(len(self.token_ids), len(self.prompt_logprobs)) - 1

    def add_prompt_logprobs(self, start: int, entries: list[TokenLogprobs]) -> None:
        """Take the entries of prompt positions start + 1 ..; those had before a preemption are kept."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs.extend(entries[len(self.prompt_logprobs) - start - 1 :])

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """All entries, once, when the last one is there."""
        if self.prompt_logprobs is None or len(self.prompt_logprobs) < self.num_prompt:
            return None
        entries, self.prompt_logprobs = self.prompt_logprobs, None
        return entries

    def finish_reason(self) -> tuple[str | None, int | None]:
        """(finish_reason, stop_reason) after the newest token; (None, None) to go on. In vLLM's order."""
        params = self.spec.params
        if self.num_output and self.token_ids[-1] in self.spec.eos_token_ids and self._may_end:
            return "stop", None
        if self.num_output >= max(1, params.min_tokens):
            newest = self.token_ids[-1]
            if newest in (params.stop_token_ids or ()):
                return "stop", newest
        if self.ends_at(len(self.token_ids)):
            return "length", None
        if params.repetition_detection and self.num_output >= params.min_tokens and self._repeats():
            return "repetition", None
        return None, None

    @property
    def _may_end(self) -> bool:
        """Whether an end-of-text token ends the request. With a grammar it always does: nothing may follow it, and
        before `min_tokens` it is sampled only where the grammar allows nothing else."""
        params = self.spec.params
        return self.spec.grammar is not None or (not params.ignore_eos and self.num_output >= params.min_tokens)

    def _repeats(self) -> bool:
        """Whether the generated tokens end in one pattern, repeated as often as `repetition_detection` says."""
        rule = self.spec.params.repetition_detection or RepetitionDetectionParams()
        tokens, num_output = self.token_ids, self.num_output
        for size in range(max(1, rule.min_pattern_size), rule.max_pattern_size + 1):
            span = size * rule.min_count
            if span > num_output:
                return False
            if tokens[-1] == tokens[-1 - size] and tokens[-span:-size] == tokens[size - span :]:
                return True
        return False

    def check(self) -> None:
        """Assert what holds between steps."""
        assert self.is_running or self.num_computed == 0, "a waiting request has computed tokens"
        assert self.is_running or not any(self.kv.held()), "a waiting request holds blocks"
        assert 0 <= self.num_computed < len(self.token_ids), "a live request has nothing left to compute"
        assert len(self.token_ids) <= self.max_model_len, "a live request is longer than the context"
        self.kv.check(self.token_ids, self.num_computed)
