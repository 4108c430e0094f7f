"""The door's way out: what the engine says about the samples of one prompt becomes vLLM's RequestOutput."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pelton.engine.step import EngineRequest, TokenLogprobs, Update
from pelton.text.detokenizer import Detokenizer
from pelton.text.tokenizer import Tokenizer
from pelton.types import (
    CompletionOutput,
    FlatLogprobs,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)


@dataclass(slots=True, eq=False)
class _Sample:
    """One completion in the making: what was not given out yet (DELTA), or all of it."""

    detokenizer: Detokenizer
    logprobs: list[PositionLogprobs] | FlatLogprobs
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_new_tokens: int = 0  # since the last output
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    given: bool = False  # an output has held it


class RequestAssembler:
    """Collects the updates of the n (or best_of) engine requests of one prompt into RequestOutput objects.

    After each push, `take_aborts()` names the engine requests that need no more work: a stop string ended them.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        tokenizer: Tokenizer,
        requests: Sequence[EngineRequest],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """requests: sample i's engine request; they share one prompt. params: as the caller gave them."""
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = requests[0].prompt_token_ids
        self.params = params
        self.error: str | None = None
        self._tokenizer = tokenizer
        self._clock = clock
        self._samples = {
            request.request_id: _Sample(Detokenizer(tokenizer, params, self.prompt_token_ids), self._new_logprobs())
            for request in requests
        }
        self._prompt_logprobs: list[PositionLogprobs | None] | FlatLogprobs | None = None
        self._given_prompt_logprobs = False
        self._num_cached_tokens = 0
        self._metrics = RequestMetrics(requests[0].arrival_time)
        self._aborts: list[int] = []
        self._picks_best = params.best_of is not None and params.best_of > params.n

    @property
    def finished(self) -> bool:
        """Whether all samples have ended."""
        return all(sample.finish_reason is not None for sample in self._samples.values())

    @property
    def request_ids(self) -> list[int]:
        """Ids of the engine requests that still run."""
        return [request_id for request_id, sample in self._samples.items() if sample.finish_reason is None]

    def take_aborts(self) -> list[int]:
        """Engine requests to abort since the last call."""
        aborts, self._aborts = self._aborts, []
        return aborts

    def push(self, update: Update) -> RequestOutput | None:
        """Take in an update; returns what the caller should see now, if anything."""
        sample = self._samples[update.request_id]
        if sample.finish_reason is not None:  # it ended with a stop string, what the engine adds is not part of it
            return None
        self._note(update)
        self._extend(sample, update)
        if sample.finish_reason is not None and update.finish_reason is None:
            self._aborts.append(update.request_id)
        if self.finished:
            self._metrics.finished_time = self._clock()
        return self._output(sample)

    def fail(self, message: str) -> RequestOutput:
        """End all samples with an error, for example because the engine is gone."""
        self.error = message
        for sample in self._samples.values():
            if sample.finish_reason is None:
                sample.finish_reason = "error"
        self._metrics.finished_time = self._clock()
        return self._build(self._best())

    # --- taking in ------------------------------------------------------------------------------------------------

    def _note(self, update: Update) -> None:
        """What concerns the prompt and the clock."""
        if update.error is not None:
            self.error = update.error
        if update.scheduled_time is not None and self._metrics.first_scheduled_time is None:
            self._metrics.first_scheduled_time = update.scheduled_time
        self._num_cached_tokens = max(self._num_cached_tokens, update.num_cached_tokens)
        if update.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = FlatLogprobs() if self.params.flat_logprobs else []
            for entry in update.prompt_logprobs:
                self._prompt_logprobs.append(None if entry is None else self._position(entry))
        if update.token_ids:
            self._metrics.last_token_time = self._clock()
            if self._metrics.first_token_time is None:
                self._metrics.first_token_time = self._metrics.last_token_time

    def _extend(self, sample: _Sample, update: Update) -> None:
        token_ids, reason = update.token_ids, update.finish_reason
        delta = sample.detokenizer.push(token_ids, finished=reason is not None, hide_last=reason == "stop")
        sample.token_ids += token_ids[: delta.num_tokens]
        sample.num_new_tokens += min(delta.num_tokens, len(token_ids))
        sample.text.append(delta.text)
        for entry in (update.logprobs or [])[: min(delta.num_tokens, len(token_ids))]:
            sample.cumulative_logprob += entry.logprobs[0]
            if self.params.wants_logprobs:
                sample.logprobs.append(self._position(entry))
        if delta.stop is not None:
            sample.finish_reason, sample.stop_reason = "stop", delta.stop
        elif reason is not None:
            sample.finish_reason, sample.stop_reason = reason, update.stop_reason

    def _new_logprobs(self) -> list[PositionLogprobs] | FlatLogprobs:
        return FlatLogprobs() if self.params.flat_logprobs else []

    def _position(self, entry: TokenLogprobs) -> PositionLogprobs:
        """Token id -> Logprob; the chosen token first, then the most likely ones or those asked for."""
        position: PositionLogprobs = {}
        for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True):
            if token_id not in position:
                text = self._tokenizer.token_text(token_id) if self.params.detokenize else None
                position[token_id] = Logprob(logprob, rank, text)
        return position

    # --- giving out -----------------------------------------------------------------------------------------------

    def _output(self, sample: _Sample) -> RequestOutput | None:
        """The output after a change of `sample`: with best_of and FINAL_ONLY, only when everything has ended."""
        if self._picks_best or self.params.output_kind == RequestOutputKind.FINAL_ONLY:
            return self._build(self._best()) if self.finished else None
        if sample.finish_reason is None:
            wanted = self.params.stream_interval if sample.given else 1
            if sample.num_new_tokens < wanted and (self._prompt_logprobs is None or sample.given):
                return None
        is_delta = self.params.output_kind == RequestOutputKind.DELTA
        return self._build([sample] if is_delta else list(self._samples.values()))

    def _best(self) -> list[_Sample]:
        """The n samples with the highest probability, best first; all, in order, without best_of."""
        samples = list(self._samples.values())
        if not self._picks_best:
            return samples
        return sorted(samples, key=lambda sample: sample.cumulative_logprob, reverse=True)[: self.params.n]

    def _build(self, samples: list[_Sample]) -> RequestOutput:
        order = self._best()
        outputs = [self._completion(order.index(sample), sample) for sample in samples]
        prompt_logprobs = self._prompt_logprobs
        if self.params.output_kind == RequestOutputKind.DELTA:
            prompt_logprobs = None if self._given_prompt_logprobs else prompt_logprobs
            self._given_prompt_logprobs = self._prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            metrics=self._metrics,
            error=self.error,
        )

    def _completion(self, index: int, sample: _Sample) -> CompletionOutput:
        has_logprobs = self.params.wants_logprobs
        sample.text = ["".join(sample.text)]
        completion = CompletionOutput(
            index=index,
            text=sample.text[0],
            token_ids=list(sample.token_ids),
            cumulative_logprob=sample.cumulative_logprob if has_logprobs or self._picks_best else None,
            logprobs=sample.logprobs[:] if has_logprobs else None,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
        )
        sample.given, sample.num_new_tokens = True, 0
        if self.params.output_kind == RequestOutputKind.DELTA:
            sample.text, sample.token_ids, sample.logprobs = [], [], self._new_logprobs()
        return completion
