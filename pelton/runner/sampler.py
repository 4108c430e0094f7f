"""From logits to the next token of each request.

The steps, in vLLM's order: forbidden tokens are masked (grammar, allowed ids, bad words, min_tokens), biases and
penalties added, a spent thinking budget ends the thinking, then temperature, min_p, top_k and top_p, then one draw.
A draw depends on the request's seed and on how many tokens it has, and on nothing else: not on the batch, not on
preemption.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from pelton.engine.step import EngineRequest, TokenLogprobs
from pelton.runner.grammar import GrammarError, Grammars
from pelton.runner.logprobs import NON_FINITE, token_logprobs
from pelton.runner.requests import RequestState
from pelton.types import LogitsProcessor, SamplingParams

Sample = tuple[int, TokenLogprobs | None]

NO_TOKEN_LEFT = (
    "no token is left to choose: allowed_token_ids, bad_words, min_tokens and logits processors exclude all of them"
)
FIRST_TOP = 1024  # candidates sorted first for top_p; nearly always they hold its mass, and a full sort is avoided


class Sampler:
    """Chooses the next tokens. `seed` is the engine's, for requests that bring none."""

    def __init__(self, seed: int, grammars: Grammars | None = None) -> None:
        self.seed = seed
        self.grammars = grammars

    def __call__(self, states: Sequence[RequestState], logits: Tensor) -> list[Sample | str]:
        """For each request's logits [M, V]: the token and the logprobs asked for, or why there is none."""
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        raw = logits.clone() if any(state.request.params.wants_logprobs for state in states) else logits
        faults = [self._prepare_(row, state) for row, state in zip(logits, states, strict=True)]
        best, tokens = (t.tolist() for t in logits.max(dim=-1))
        samples: list[Sample | str] = []
        for i, state in enumerate(states):
            params = state.request.params
            fault = faults[i] if finite[i] else NON_FINITE
            if fault is None and best[i] == -float("inf"):
                fault = NO_TOKEN_LEFT
            if fault is not None:
                samples.append(fault)
                continue
            token_id = tokens[i] if params.is_greedy else self._draw(logits[i], state)
            logprobs = None
            if params.wants_logprobs:
                logprobs = token_logprobs(raw[i : i + 1], [token_id], params.logprobs or 0, params.logprob_token_ids)[0]
            samples.append((token_id, logprobs))
        return samples

    def _prepare_(self, logits: Tensor, state: RequestState) -> str | None:
        """Apply what the request asks for to logits [V]; returns why that cannot be done, if so."""
        try:
            self._constrain_(logits, state)
        except GrammarError as error:
            return str(error)
        _adjust_(logits, state)
        return None

    def _constrain_(self, logits: Tensor, state: RequestState) -> None:
        """Forbid what the request's grammar does not allow next."""
        if state.request.grammar is None:
            return
        if state.grammar is None:
            if self.grammars is None:
                raise RuntimeError("this engine was built without grammars")
            state.grammar = self.grammars.start(state.request.grammar, len(logits))
        state.grammar.mask_(logits, state.output_ids)

    def _draw(self, logits: Tensor, state: RequestState) -> int:
        """One token from adjusted logits [V]."""
        params = state.request.params
        token_ids, probs = _candidates(logits / params.temperature, params)
        cumulative = probs.double().cumsum(dim=0)
        seed = params.seed if params.seed is not None else _mix(self.seed, state.request.request_id)
        threshold = uniform(seed, len(state.token_ids) - state.num_prompt) * float(cumulative[-1])
        index = int(torch.searchsorted(cumulative, threshold, right=True))
        return int(token_ids[min(index, len(token_ids) - 1)])


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Token ids and probabilities that top_k, top_p and min_p leave of tempered logits [V]."""
    probs = torch.softmax(logits, dim=-1)
    token_ids = torch.arange(len(probs), device=probs.device)
    if params.min_p > 0.0:
        token_ids = token_ids[probs >= params.min_p * probs.max()]
        probs = probs[token_ids]
    if 0 < params.top_k < len(probs):
        probs, order = torch.topk(probs, params.top_k)
        token_ids = token_ids[order]
    if params.top_p < 1.0:
        probs = probs / probs.sum()  # top_p is a share of what top_k and min_p left
        top, order = torch.topk(probs, min(FIRST_TOP, len(probs)))
        if float(top.sum()) < params.top_p:
            top, order = torch.sort(probs, descending=True)
        keep = top.cumsum(dim=0) - top < params.top_p  # by the mass of the more likely ones
        keep[0] = True  # also where top_p is below what float32 can hold
        token_ids, probs = token_ids[order[keep]], top[keep]
    return token_ids, probs


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from a counter-based generator (SplitMix64, Steele et al., OOPSLA 2014)."""
    return (_mix(seed, index) >> 11) / (1 << 53)


def _mix(seed: int, index: int) -> int:
    """64 well-mixed bits of (seed, index)."""
    mask = (1 << 64) - 1
    z = (_finalise(seed & mask) + (index + 1) * 0x9E3779B97F4A7C15) & mask
    return _finalise(z)


def _finalise(z: int) -> int:
    mask = (1 << 64) - 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


# --- what changes the logits of one request, in place ---------------------------------------------------------------


def _adjust_(logits: Tensor, state: RequestState) -> None:
    """Apply everything but temperature and truncation to logits [V]."""
    params, request = state.request.params, state.request
    if params.allowed_token_ids is not None:
        keep = _index(params.allowed_token_ids, logits)
        values = logits[keep]
        logits.fill_(-torch.inf)
        logits[keep] = values
    _mask_bad_words_(logits, request.bad_words_token_ids, state.token_ids, state.num_prompt)
    grammar_has_ended = state.grammar is not None and state.grammar.has_ended
    if len(state.token_ids) - state.num_prompt < params.min_tokens and not grammar_has_ended:
        logits[_index([*request.eos_token_ids, *(params.stop_token_ids or [])], logits)] = -torch.inf
    if params.logit_bias:
        logits[_index(list(params.logit_bias), logits)] += torch.tensor(
            list(params.logit_bias.values()), device=logits.device
        )
    _penalise_(logits, params, state)
    for processor in params.logits_processors or []:
        logits.copy_(_apply_processor(processor, state, logits))
    if params.thinking_token_budget is not None:
        _end_thinking_(logits, request, state.token_ids, params.thinking_token_budget)


def _index(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)


def _penalise_(logits: Tensor, params: SamplingParams, state: RequestState) -> None:
    """Repetition penalty (arXiv:1909.05858) over prompt and output; OpenAI's frequency and presence over output."""
    if params.repetition_penalty != 1.0:
        seen = _index(sorted(set(state.token_ids)), logits)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if params.frequency_penalty or params.presence_penalty:
        token_ids, counts = torch.unique(_index(state.output_ids, logits), return_counts=True)
        logits[token_ids] -= params.frequency_penalty * counts + params.presence_penalty


def _mask_bad_words_(
    logits: Tensor, bad_words: Sequence[tuple[int, ...]], token_ids: Sequence[int], num_prompt: int
) -> None:
    """Forbid a word's last token where its other tokens have just been generated."""
    for word in bad_words:
        start = len(token_ids) - (len(word) - 1)
        if start >= num_prompt and tuple(token_ids[start:]) == word[:-1]:
            logits[word[-1]] = -torch.inf


def _apply_processor(processor: LogitsProcessor, state: RequestState, logits: Tensor) -> Tensor:
    """Call a user's processor in whichever of vLLM 0.9's two signatures it has."""
    if len(inspect.signature(processor).parameters) == 3:
        return processor(list(state.request.prompt_token_ids), state.output_ids, logits)  # type: ignore[no-any-return]
    return processor(state.output_ids, logits)  # type: ignore[no-any-return]


def _end_thinking_(logits: Tensor, request: EngineRequest, token_ids: Sequence[int], budget: int) -> None:
    """Force the end-of-thinking token once `budget` tokens have been thought."""
    if request.think_token_ids is None:
        return
    start_id, end_id = request.think_token_ids
    thought = 0
    for token_id in reversed(token_ids):
        if token_id == end_id:
            return
        if token_id == start_id:
            break
        thought += 1
    else:
        return
    if thought >= budget:
        logits.fill_(-torch.inf)
        logits[end_id] = 0.0
