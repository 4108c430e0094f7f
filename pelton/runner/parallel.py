"""Sampling where several ranks compute one model: rank 0 samples, and the others hear which tokens came of it.

So nothing has to be equal to the last bit, and what only rank 0 has (functions, grammars) is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from pelton.ops.parallel import Ranks
from pelton.ops.sampling import Draws
from pelton.runner.mailbox import Mailbox
from pelton.runner.requests import RequestState
from pelton.runner.sampler import Sample, Sampler

NO_TOKEN = -1  # the request has ended; any negative number stands for that
FAILED = -(1 << 40)  # no token could be sampled for any request


class Leader:
    """Rank 0's sampler."""

    def __init__(self, sampler: Sampler, ranks: Ranks) -> None:
        self._sampler = sampler
        self._ranks = ranks

    def __call__(self, states: Sequence[RequestState], logits: Tensor) -> list[Sample | str]:
        """See Sampler."""
        try:
            samples = self._sampler(states, logits)
        except Exception:
            self._tell([FAILED] * len(states), logits.device)
            raise
        self._tell([NO_TOKEN if isinstance(sample, str) else sample[0] for sample in samples], logits.device)
        return samples

    def draws(self, states: Sequence[RequestState], logits: Tensor) -> Draws | None:
        """See Sampler."""
        return self._sampler.draws(states, logits)

    def start(
        self, states: Sequence[RequestState], logits: Tensor, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], list[Sample | str]]]:
        """See Sampler. What it raises is raised when it is waited for: the others go on with the rest of the step."""
        try:
            token_ids, wait = self._sampler.start(states, logits, token_ids)
        except Exception as error:
            failed = self._tell([FAILED] * len(states), logits.device)
            return failed, partial(_raise, error.with_traceback(None))  # nor are tensors kept that the traceback holds
        return self._ranks.broadcast_(token_ids), wait

    def _tell(self, token_ids: Sequence[int], device: torch.device) -> Tensor:
        return self._ranks.broadcast_(torch.tensor(token_ids, dtype=torch.int64, device=device))


class Follower:
    """The sampler of all other ranks. What it returns in place of why a request ends is nobody's business there."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._mailbox = Mailbox()

    def __call__(self, states: Sequence[RequestState], logits: Tensor) -> list[Sample | str]:
        """What rank 0 sampled. Raises where that failed."""
        return _samples(self._hear(len(states), logits.device).tolist())

    def draws(self, states: Sequence[RequestState], logits: Tensor) -> Draws | None:
        """None: rank 0 samples."""
        return None

    def start(
        self, states: Sequence[RequestState], logits: Tensor, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], list[Sample | str]]]:
        """The same on a GPU, without waiting."""
        token_ids = self._hear(len(states), logits.device)
        fetch = self._mailbox.send(token_ids)
        return token_ids, lambda: _samples(fetch())

    def _hear(self, num: int, device: torch.device) -> Tensor:
        return self._ranks.broadcast_(torch.empty(num, dtype=torch.int64, device=device))


def _raise(error: Exception) -> NoReturn:
    raise error


def _samples(token_ids: Sequence[int]) -> list[Sample | str]:
    if FAILED in token_ids:
        raise RuntimeError("rank 0 could not sample")
    return ["it has ended" if token_id < 0 else (token_id, None) for token_id in token_ids]
