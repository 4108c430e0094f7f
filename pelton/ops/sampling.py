"""The op that chooses tokens: from logits to the next token of each request.

The steps, in vLLM's order: tokens are forbidden, biases and penalties added, then temperature, min_p, top_k and top_p
leave some of them, then one draw. A draw depends on the request's seed and the number of its tokens, and on nothing
else. "More likely" always means a larger logit or, between equal ones, a lower token id.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pelton.ops import op

NOT_FINITE = -1
"""In place of a token: the logits are not finite."""
NO_TOKEN_LEFT = -2
"""In place of a token: every token is forbidden."""

FIRST_TOP = 1024  # candidates sorted first for top_p; nearly always they hold its mass, and a full sort is avoided

Scores = tuple[list[int], list[float], list[int]]
"""Token ids, the logarithms of their probabilities, their ranks (1 = most likely)."""

Draws = tuple[NDArray[np.int64], NDArray[np.float64]]
"""What kernels are told of G rows that draw: each one's number, its slot among adjusted logits (-1: they are as they
came) and top_k, [G, 3]; 1 / temperature, log(min_p), top_p and the uniform number, [G, 4]."""


@dataclass(kw_only=True, eq=False, slots=True)
class SampleRow:
    """How the tokens of one request are chosen. Nothing here changes, but `token_ids` grows."""

    token_ids: list[int]  # of the request: its prompt, then its output
    num_prompt: int
    temperature: float = 0.0  # 0: the most likely token; else from 1e-30 to 1e30
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # below 2^64
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    allowed_ids: Sequence[int] = ()  # none: all are
    bias: Mapping[int, float] = field(default_factory=dict)
    num_top: int = -1  # most likely tokens to score besides the chosen one; -1: score nothing
    score_ids: Sequence[int] = ()  # tokens to score besides these
    native: Any = None  # what a kernel made of this record when it saw it first

    @property
    def is_changed(self) -> bool:
        """Whether logits are adjusted in every step."""
        changes = self.allowed_ids or self.bias or self.frequency_penalty or self.presence_penalty
        return self.repetition_penalty != 1.0 or bool(changes)

    @property
    def is_plain(self) -> bool:
        """Whether the largest of the logits, as they are, decides."""
        return self.temperature == 0.0 and not self.is_changed


@dataclass(kw_only=True, eq=False, slots=True)
class Constraint:
    """What one row is held to in one step, besides its SampleRow."""

    mask: bytes | None = None  # bit i % 8 of byte i / 8: whether token i is allowed
    forbidden_ids: list[int] = field(default_factory=list)
    forced_id: int = -1  # the token to take, whatever the logits; -1: none
    adjusted: Tensor | None = None  # logits [V] to choose from: what `adjust` made, and perhaps others changed


@op
def sample(
    logits: Tensor, rows: Sequence[SampleRow], constraints: Mapping[int, Constraint]
) -> tuple[list[int], dict[int, Scores]]:
    """The next token of each row of logits [M, V] float32; some rows, by number, have constraints.

    Returns the token ids, NOT_FINITE or NO_TOKEN_LEFT in place of some, and for each row that wants them the scores
    of the chosen token and others. Scores come from the logits as they are, ranks go by larger logits alone.
    """
    finite = torch.isfinite(logits).all(dim=-1).tolist()
    token_ids: list[int] = logits.argmax(dim=-1).tolist()  # of equals the first
    scores = {}
    for i, (raw, row) in enumerate(zip(logits, rows, strict=True)):
        if not finite[i]:
            token_ids[i] = NOT_FINITE
        elif i in constraints or not row.is_plain:
            token_ids[i] = _choose(raw, row, constraints.get(i) or Constraint())
        if token_ids[i] >= 0 and row.num_top >= 0:
            scores[i] = _score(raw, token_ids[i], row)
    return token_ids, scores


def _choose(raw: Tensor, row: SampleRow, constraint: Constraint) -> int:
    """The token of one row, or why there is none."""
    if constraint.forced_id >= 0:
        return constraint.forced_id
    logits = adjust(raw, row, constraint) if constraint.adjusted is None else constraint.adjusted
    token_id = int(logits.argmax())
    best = float(logits[token_id])
    if best == -math.inf:
        return NO_TOKEN_LEFT
    if row.temperature == 0.0 or best == math.inf:
        return token_id
    token_ids, weights = _candidates(logits, best, row)
    cumulative = weights.double().cumsum(dim=0)
    mass = uniform(row.seed, len(row.token_ids) - row.num_prompt) * float(cumulative[-1])
    return int(token_ids[torch.searchsorted(cumulative, mass, right=True)])  # the first above the mass


def _candidates(logits: Tensor, best: float, row: SampleRow) -> tuple[Tensor, Tensor]:
    """Token ids and weights that min_p, top_k and top_p leave of adjusted logits [V].

    They come from the most to the least likely where top_k or top_p applies, else in the order of their ids.
    """
    powers = (logits - best) * (1.0 / row.temperature)
    weights = powers.exp()
    if row.min_p > 0.0:
        weights.masked_fill_(powers < math.log(row.min_p), 0.0)
    has_top_k = 0 < row.top_k < len(logits)
    if not has_top_k and row.top_p >= 1.0:
        return torch.arange(len(logits), device=logits.device), weights
    token_ids = _most_likely(logits, row.top_k if has_top_k else FIRST_TOP)
    if row.top_p < 1.0:
        total = float((weights[token_ids] if has_top_k else weights).double().sum())  # what top_k and min_p leave
        if not has_top_k and float(weights[token_ids].double().sum()) < row.top_p * total:
            token_ids = _most_likely(logits, len(logits))
        top = weights[token_ids].double()
        keep = top.cumsum(dim=0) - top < row.top_p * total  # by the weight of the more likely ones
        keep[0] = True  # also where top_p is almost nothing
        token_ids = token_ids[keep]
    return token_ids, weights[token_ids]


def _most_likely(logits: Tensor, k: int) -> Tensor:
    """The ids of the k largest of logits [V], or of all, the largest first, of equals the lower id first."""
    k = min(k, len(logits))
    enough = (logits >= logits.topk(k).values[-1]).nonzero().flatten()
    return enough[logits[enough].sort(descending=True, stable=True).indices[:k]]


def adjust(raw: Tensor, row: SampleRow, constraint: Constraint) -> Tensor:
    """A copy of logits [V] with all that changes them before temperature; `forced_id` and `adjusted` play no part."""
    logits = raw.clone()
    if row.allowed_ids:
        allowed = _index(row.allowed_ids, raw)
        logits.fill_(-torch.inf)
        logits[allowed] = raw[allowed]
    if constraint.mask is not None:
        bits = np.unpackbits(np.frombuffer(constraint.mask, dtype=np.uint8), count=len(raw), bitorder="little")
        logits.masked_fill_(torch.from_numpy(bits).to(raw.device) == 0, -torch.inf)
    if constraint.forbidden_ids:
        logits[_index(constraint.forbidden_ids, raw)] = -torch.inf
    if row.bias:
        logits[_index(row.bias, raw)] += torch.tensor(list(row.bias.values()), device=raw.device)
    _penalise_(logits, row)
    return logits


def _penalise_(logits: Tensor, row: SampleRow) -> None:
    """Repetition penalty (arXiv:1909.05858) over prompt and output; OpenAI's frequency and presence over output."""
    if row.repetition_penalty != 1.0:
        seen = _index(set(row.token_ids), logits)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / row.repetition_penalty, values * row.repetition_penalty)
    if row.frequency_penalty or row.presence_penalty:
        output = _index(row.token_ids[row.num_prompt :], logits)
        token_ids, counts = torch.unique(output, return_counts=True)
        logits[token_ids] -= row.frequency_penalty * counts + row.presence_penalty


def _index(token_ids: Iterable[int], logits: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)


def _score(raw: Tensor, token_id: int, row: SampleRow) -> Scores:
    """The chosen token, then the most likely ones, then those asked for by id; none of them twice the chosen one."""
    top = [i for i in _most_likely(raw, row.num_top).tolist() if i != token_id] if row.num_top else []
    others = [i for i in row.score_ids if i != token_id]
    rank, *ranks = (int((raw > raw[i]).sum()) + 1 for i in (token_id, *others))
    beside = [i for i in range(1, len(top) + 2) if i != rank][: len(top)]  # 1, 2, ... without the chosen one's
    token_ids = [token_id, *top, *others]
    logprobs = torch.log_softmax(raw, dim=-1)[token_ids]
    return token_ids, logprobs.tolist(), [rank, *beside, *ranks]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from a counter-based generator (SplitMix64, Steele et al., OOPSLA 2014)."""
    return (mix(seed, index) >> 11) / (1 << 53)


def mix(seed: int, index: int) -> int:
    """64 well-mixed bits of (seed, index)."""
    mask = (1 << 64) - 1
    z = (_finalise(seed & mask) + (index + 1) * 0x9E3779B97F4A7C15) & mask
    return _finalise(z)


def _finalise(z: int) -> int:
    mask = (1 << 64) - 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)
