"""The captured step. What is captured reads its inputs in the batch buffers, and is replayed in one call.

On a CPU a model's forward pass and its logits are recorded programs: recorded once, for as many rows as a step can
have, and replayed for any number of them, as every buffer has its rows outermost. On a GPU they are CUDA graphs of two
kinds. Decodes: steps in which every request has one token, for some numbers of requests; fewer are filled up with empty
ones. They end with the sampling that most requests ask for. Prompts: the forward pass of other steps, unless they are
large or prompts are scored, for some numbers of tokens; fewer are filled up with tokens of no request. Eager and
captured steps run the same kernels on the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pelton import ops
from pelton.config import CAPTURED_TOKENS
from pelton.engine.step import Chunk
from pelton.layers.batch import Batch
from pelton.models import Model
from pelton.ops.native import native
from pelton.ops.recording import Recorder
from pelton.ops.sampling import Draws
from pelton.runner.batch import BatchBuffers, Previous
from pelton.runner.kv_cache import KVCache
from pelton.runner.mailbox import Mailbox

DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, *range(48, 128, 16), *range(128, 1025, 32))  # requests of a graph of decodes
PROMPT_SIZES = (16, 32, *range(64, CAPTURED_TOKENS + 1, 64))  # tokens of a graph of prompts


def decode_sizes(max_requests: int) -> list[int]:
    """Requests of steps of decodes, rising: others are filled up to the next."""
    return _up_to(max_requests, DECODE_SIZES)


def prompt_sizes(max_tokens: int) -> list[int]:
    """Tokens of steps with prompts, likewise; of those that are captured."""
    return _up_to(min(CAPTURED_TOKENS, max_tokens), PROMPT_SIZES)


def _up_to(most: int, sizes: Sequence[int]) -> list[int]:
    return [*(size for size in sizes if size < most), most]


def fitting(sizes: Sequence[int], num: int) -> int | None:
    """The first that is not less; None if all are."""
    place = bisect_left(sizes, num)
    return sizes[place] if place < len(sizes) else None


class Captured(ABC):
    """A model's forward pass and logits over the buffers of batches."""

    buffers: BatchBuffers

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step of these chunks is captured."""
        return True

    @abstractmethod
    def run(self, num_tokens: int, num_sampled: int) -> tuple[Tensor, Tensor]:
        """Compute what was filled in: its hidden states [T, d_model], and the logits [M, V] of the sampled rows."""


class Programs(Captured):
    """On a CPU."""

    def __init__(self, model: Model, buffers: BatchBuffers) -> None:
        """Records; raises NotRecordable if the model does something that is no kernel call."""
        self.buffers = buffers
        with Recorder(buffers.max_tokens) as forward:
            self.hidden = model.forward(buffers.batch(buffers.max_tokens, buffers.max_requests))  # [T, d_model]
        with Recorder(buffers.max_requests) as logits:
            self.logits = model.logits(ops.select_rows(self.hidden, buffers.host.sampled_rows))  # [M, V]
        self._forward, self._logits = forward, logits  # they own the programs' memory

    def run(self, num_tokens: int, num_sampled: int) -> tuple[Tensor, Tensor]:
        parts = [(self._forward.program, num_tokens), (self._logits.program, num_sampled)]
        native.replay(parts)  # type: ignore[union-attr]
        return self.hidden[:num_tokens], self.logits[:num_sampled]


class Graphs(ABC):
    """CUDA graphs of steps of some sizes. They share their memory: what is of use after one is in none of it."""

    def __init__(self, sizes: Sequence[int], pool: Any) -> None:
        """sizes: rising; pool: the memory, which other graphs may share."""
        self._sizes = sizes
        self._pool = pool
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}
        self.num_replays = 0

    def capture(self, lazily: bool) -> None:
        """Before the first `_replay`. lazily: all graphs but one are captured by the steps that need them first."""
        first = self._sizes[-1:] if lazily else self._sizes[::-1]  # in any case the largest: all fit into its memory
        self._captured = {size: self._capture(size) for size in first}

    def _replay(self, size: int) -> None:
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        self._captured[size].replay()
        self.num_replays += 1

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """Also computes what the buffers hold: at start no request's tokens, else those that are computed again in
        the replay, which changes nothing."""
        self._compute(size)  # nothing is allocated or compiled for the first time in a capture
        graph = torch.cuda.CUDAGraph()
        # A capture that fails may leave its own stream as the current one; the outer context puts back what was.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
            self._compute(size)
        return graph

    @abstractmethod
    def _compute(self, size: int) -> None:
        """What is captured."""


class Prompts(Graphs):
    """The forward pass of steps with prompts, to the hidden states of rows that are sampled."""

    def __init__(self, model: Model, buffers: BatchBuffers, pool: Any) -> None:
        """Also launches what steps do, of whatever size: may be called in `ops.cuda.launch.only_compiling`."""
        super().__init__(prompt_sizes(buffers.max_tokens), pool)
        self._model = model
        self._buffers = buffers
        self._hidden = model.forward(prompt_batch(buffers, self._sizes[-1]))
        for size in self._sizes[:-1]:
            if size & (size - 1) == 0:  # kernels are made for powers of two
                self._compute(size)

    def forward(self, size: int) -> Tensor:
        """Of what was uploaded, filled up to one of the sizes. What is behind the sampled rows is of no use."""
        self._replay(size)
        return self._hidden

    def _compute(self, size: int) -> None:
        hidden = self._model.forward(prompt_batch(self._buffers, size))
        self._hidden[: len(hidden)].copy_(hidden)


def prompt_batch(buffers: BatchBuffers, size: int) -> Batch:
    """So many tokens, of as many requests as there can be; but not of as many as tokens: these would be decodes. Each
    may be sampled."""
    most = buffers.max_requests
    return buffers.batch(size, max(1, min(most, size - 1)), num_wanted=min(most, size))


class Decodes(Graphs, Captured):
    """Where no request asks for more than temperature, min_p, top_k and top_p, a step also leaves its samples (or codes
    in their place): `token_ids` [R] int64. Else they are to be sampled from `logits` [R, V]."""

    def __init__(self, model: Model, kv: KVCache, max_requests: int, max_blocks: int, pool: Any) -> None:
        """Also launches what steps do, of whatever size: may be called in `ops.cuda.launch.only_compiling`."""
        super().__init__(decode_sizes(max_requests), pool)
        self.buffers = BatchBuffers(kv, max_requests, max_requests, max_blocks)
        self._model = model
        # What reads a step's samples is enqueued before the next replay: one place is enough where two are begun.
        self.token_ids = torch.empty(max_requests, dtype=torch.int64, device=kv.device)
        # All graphs leave their results here: nothing of their own memory is kept, so that they share it.
        self._hidden = model.forward(self.buffers.batch(max_requests, max_requests))
        self.logits = model.logits(self._hidden)
        for size in self._sizes:
            if size & (size - 1) == 0 or size == max_requests:  # kernels are made for powers of two
                self._compute(size)
        self.buffers.upload(1, (self.token_ids, [-1]))  # and what stands around it
        Mailbox().send(self.token_ids)()  # waits: else what is sent may arrive where another has its memory by then

    def note_order(self) -> None:
        """Let weights know which is multiplied after which, before anything is captured."""
        from pelton.quant.gpu import noting_order  # its kernels need Triton

        with noting_order():
            self._compute(self._sizes[-1])

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        return all(chunk.num_tokens == 1 and chunk.sample for chunk in chunks)

    def run(
        self, num_tokens: int, num_sampled: int, previous: Previous | None = None, draws: Draws | None = None
    ) -> tuple[Tensor, Tensor]:
        """See Captured. draws: what `token_ids` are sampled by; without, they are of no use."""
        size = self._sizes[bisect_left(self._sizes, num_tokens)]
        self.buffers.clear_slots(num_tokens, size)
        self.buffers.fill_draws(draws, size)
        self.buffers.upload(num_tokens, previous)
        self._replay(size)
        return self._hidden[:num_tokens], self.logits[:num_sampled]

    def _compute(self, size: int) -> None:
        from pelton.ops.cuda.sampling import choose_  # its kernels need Triton

        hidden = self._model.forward(self.buffers.batch(size, size))
        self._hidden[:size].copy_(hidden)
        self._model.logits(hidden, self.logits[:size])
        inputs = self.buffers.device
        choose_(self.token_ids[:size], self.logits[:size], inputs.draw_wholes[:size], inputs.draw_factors[:size])
