"""From logits to the next token of each request: what a request asks for, in the terms of the op `sample`.

Most of it is said once, in a SampleRow; what changes from token to token (grammar, bad words, min_tokens, thinking
budget, logits processors) is said in a Constraint, and only for requests that ask for such things.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from pelton.engine.step import TokenLogprobs
from pelton.ops.sampling import NO_TOKEN_LEFT, NOT_FINITE, Constraint, Draws, SampleRow, Scores, adjust, mix, sample
from pelton.runner.grammar import GrammarError, Grammars
from pelton.runner.logprobs import NON_FINITE
from pelton.runner.mailbox import Mailbox
from pelton.runner.requests import RequestState
from pelton.types import LogitsProcessor, SamplingParams

Sample = tuple[int, TokenLogprobs | None]

NO_CHOICE = (
    "no token is left to choose: allowed_token_ids, bad_words, min_tokens and logits processors exclude all of them"
)
NOT_NUMBERS = "a logits processor returned values that are not numbers"
MAX_TEMPERATURE = 1e30  # beyond it, as at it, all tokens are equally likely


class ConstraintError(Exception):
    """A request cannot be held to what it asks for. One line why."""


class Sampler:
    """Chooses the next tokens. `seed` is the engine's, for requests that bring none."""

    def __init__(self, seed: int, grammars: Grammars | None = None) -> None:
        self.seed = seed
        self.grammars = grammars
        self._mailbox = Mailbox()

    def __call__(self, states: Sequence[RequestState], logits: Tensor) -> list[Sample | str]:
        """For each request's logits [M, V] float32: the token and the logprobs asked for, or why there is none."""
        rows, constraints, faults = self._prepare(states, logits)
        return _samples(*sample(logits, rows, constraints), faults)

    def draws(self, states: Sequence[RequestState], logits: Tensor) -> Draws | None:
        """What a captured step with logits [M, V] samples the requests by. None: one asks for more than it does."""
        from pelton.ops.cuda.sampling import draws_of  # its kernels need Triton

        if any(state.is_constrained for state in states):
            return None
        return draws_of([state.row or self._start(state, logits.shape[1]) for state in states], logits)

    def start(
        self, states: Sequence[RequestState], logits: Tensor, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], list[Sample | str]]]:
        """The same on a GPU, without waiting: the token ids there (or codes in their place), and a function that waits
        for what is returned else. token_ids: what a captured step has sampled by `draws`."""
        from pelton.ops.cuda.sampling import start_sample

        if token_ids is not None:
            fetch = self._mailbox.send(token_ids)
            return token_ids, lambda: _samples(fetch(), {}, {})
        rows, constraints, faults = self._prepare(states, logits)
        pending = start_sample(logits, rows, constraints)
        return pending.token_ids_on_device, lambda: _samples(*pending.fetch(), faults)

    def _prepare(
        self, states: Sequence[RequestState], logits: Tensor
    ) -> tuple[list[SampleRow], dict[int, Constraint], dict[int, str]]:
        """What the op is given, and the requests that cannot be held to what they ask for."""
        rows = [state.row or self._start(state, logits.shape[1]) for state in states]
        constraints: dict[int, Constraint] = {}
        faults: dict[int, str] = {}
        for i, state in enumerate(states):
            if state.is_constrained:
                try:
                    constraints[i] = self._constrain(state, rows[i], logits[i])
                except (GrammarError, ConstraintError) as error:
                    faults[i] = str(error)
        return rows, constraints, faults

    def _start(self, state: RequestState, vocab_size: int) -> SampleRow:
        """What a request's tokens are chosen by, noted at its first."""
        params = state.request.params
        state.row = SampleRow(
            token_ids=state.token_ids,
            num_prompt=state.num_prompt,
            temperature=0.0 if params.is_greedy else min(params.temperature, MAX_TEMPERATURE),
            top_k=min(params.top_k, vocab_size),
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed if params.seed is not None else mix(self.seed, state.request.request_id),
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            allowed_ids=params.allowed_token_ids or (),
            bias=params.logit_bias or {},
            num_top=_num_top(params, vocab_size),
            score_ids=params.logprob_token_ids or (),
        )
        return state.row

    def _constrain(self, state: RequestState, row: SampleRow, logits: Tensor) -> Constraint:
        """What the request's next token, of logits [V], is held to. GrammarError, ConstraintError: it cannot be."""
        constraint = Constraint(mask=self._mask(state, len(logits)))
        constraint.forbidden_ids += _ends_of_bad_words(state)
        constraint.forbidden_ids += _ends_too_early(state)
        processors = state.request.params.logits_processors
        if processors:
            constraint.adjusted = _process(processors, state, adjust(logits, row, constraint))
        constraint.forced_id = _end_of_thinking(state)
        return constraint

    def _mask(self, state: RequestState, vocab_size: int) -> bytes | None:
        """The tokens that the request's grammar allows next."""
        if state.request.grammar is None:
            return None
        if state.grammar is None:
            if self.grammars is None:
                raise RuntimeError("this engine was built without grammars")
            state.grammar = self.grammars.start(state.request.grammar, vocab_size)
        return state.grammar.mask(state.output_ids)


def _samples(token_ids: list[int], scores: dict[int, Scores], faults: dict[int, str]) -> list[Sample | str]:
    samples: list[Sample | str] = []
    for i, token_id in enumerate(token_ids):
        if token_id == NOT_FINITE:
            samples.append(NON_FINITE)
        elif token_id == NO_TOKEN_LEFT or i in faults:
            samples.append(faults.get(i, NO_CHOICE))
        else:
            samples.append((token_id, TokenLogprobs(*scores[i]) if i in scores else None))
    return samples


def _num_top(params: SamplingParams, vocab_size: int) -> int:
    """How many of the most likely tokens are scored with the chosen one; -1 if even that is not."""
    if not params.wants_logprobs:
        return -1
    if params.logprobs is None or params.logprob_token_ids is not None:
        return 0
    return vocab_size if params.logprobs == -1 else params.logprobs


def _ends_of_bad_words(state: RequestState) -> Iterator[int]:
    """A word's last token where its other tokens have just been generated."""
    for word in state.request.bad_words_token_ids:
        start = len(state.token_ids) - (len(word) - 1)
        if start >= state.num_prompt and tuple(state.token_ids[start:]) == word[:-1]:
            yield word[-1]


def _ends_too_early(state: RequestState) -> Sequence[int]:
    """The tokens that end the request, while there are fewer than min_tokens and its grammar has not ended."""
    params = state.request.params
    if len(state.token_ids) - state.num_prompt >= params.min_tokens:
        return ()
    if state.grammar is not None and state.grammar.has_ended:
        return ()
    return [*state.request.eos_token_ids, *(params.stop_token_ids or [])]


def _process(processors: Sequence[LogitsProcessor], state: RequestState, logits: Tensor) -> Tensor:
    """What a user's processors, each in either of vLLM 0.9's two signatures, make of adjusted logits [V]."""
    prompt_ids = list(state.request.prompt_token_ids)
    for processor in processors:
        takes_prompt = len(inspect.signature(processor).parameters) == 3
        given = (prompt_ids, state.output_ids) if takes_prompt else (state.output_ids,)
        logits.copy_(processor(*given, logits))
    if bool(logits.isnan().any()):
        raise ConstraintError(NOT_NUMBERS)
    return logits


def _end_of_thinking(state: RequestState) -> int:
    """The token that ends the thinking, once its budget has been thought; else -1."""
    request, budget = state.request, state.request.params.thinking_token_budget
    if budget is None or request.think_token_ids is None:
        return -1
    start_id, end_id = request.think_token_ids
    for thought, token_id in enumerate(reversed(state.token_ids)):
        if token_id in (start_id, end_id):
            return end_id if token_id == start_id and thought >= budget else -1
    return -1
