"""Runs a StepPlan: batch, forward, sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from pelton.config import FEW_TOKENS, EngineConfig
from pelton.engine.step import Chunk, Started, StepPlan, StepResult, TokenLogprobs
from pelton.errors import DeviceError
from pelton.layers.batch import select
from pelton.models import Model
from pelton.ops import gpu
from pelton.ops.native import native
from pelton.ops.parallel import ALONE, Ranks
from pelton.ops.prompts import are_prompts, of_prompts
from pelton.ops.recording import NotRecordable
from pelton.runner.batch import BatchBuffers, Previous
from pelton.runner.device import first_line, guard, is_out_of_memory
from pelton.runner.grammar import Grammars
from pelton.runner.graph import (
    Captured,
    Decodes,
    Graphs,
    Programs,
    Prompts,
    decode_sizes,
    fitting,
    prompt_batch,
    prompt_sizes,
)
from pelton.runner.kv_cache import KVCache
from pelton.runner.logprobs import NON_FINITE, token_logprobs
from pelton.runner.parallel import Follower, Leader
from pelton.runner.requests import RequestState, RequestTable
from pelton.runner.sampler import Sample, Sampler

IN_A_STEP = "in a step", "lower --gpu-memory-utilization, which leaves more to steps, or --max-num-batched-tokens"
SCORED = 65  # rows of prompt logits that kernels are compiled for: more than products of few rows take
LONG_PROMPT = 1024  # tokens on average, from which whole prompts are worth a call for each
LOGITS_ROWS = 256  # rows of prompt logits made at once: 256 x 262,144 float32 are 268 MB
POWERS = [1 << i for i in range(9)]  # up to LOGITS_ROWS: kernels are made for powers of two

_Part = tuple[bool, Sequence[Chunk], Sequence[RequestState]]
"""What is computed together: whether it is known to be prompts alone, chunks, and their requests."""
_Begun = tuple[Sequence[Chunk], Sequence[RequestState], Tensor, Callable[[], list[Sample | str]]]
"""Chunks that are sampled and their requests, the samples on the device, and what waits for them."""


class ModelRunner:
    """A model, its KV cache and its sampler on one device. Implements `engine.core.Runner`."""

    def __init__(
        self, model: Model, kv: KVCache, config: EngineConfig, grammars: Grammars | None = None, ranks: Ranks = ALONE
    ) -> None:
        """ranks: those that compute the model together, of which this one samples if it is the first."""
        self.model = model
        self.kv = kv
        self.device = kv.device
        self.ranks = ranks
        self.requests = RequestTable(len(kv.groups))
        self.sampler: Sampler | Leader | Follower = Sampler(config.device.seed, grammars)
        if ranks.size > 1:
            self.sampler = Leader(self.sampler, ranks) if ranks.rank == 0 else Follower(ranks)
        self.on_prompt_logits: Callable[[Tensor], None] | None = None  # sees the logits [n, V] of scored prompt tokens
        limits = config.scheduler
        max_blocks = -(-limits.max_model_len // kv.block_size)
        self.buffers = BatchBuffers(kv, limits.max_num_batched_tokens, limits.max_num_seqs, max_blocks)
        self.graph: Captured | None = None
        self.prompts: Prompts | None = None
        # Where steps are captured, eager ones are filled up like these: kernels are chosen by the number of rows.
        self._decode_sizes: list[int] = []
        self._prompt_sizes: list[int] = []
        if kv.device.type == "cuda" and not gpu.why_not():
            self._decode_sizes = decode_sizes(min(limits.max_num_seqs, limits.max_num_batched_tokens))
            self._prompt_sizes = prompt_sizes(limits.max_num_batched_tokens)
        self._apart = config.device.apart
        self._has_prompt_attention = kv.device.type == "cuda" and not config.device.deterministic
        self._newest: tuple[Tensor, dict[int, int]]  # samples of the newest step, on the device, and their requests
        self.why_eager = ""  # a line for a person, where steps run eagerly but need not have
        if not config.device.enforce_eager:
            self._capture(config.device.lazy_capture)

    @torch.inference_mode()
    def _capture(self, lazily: bool) -> None:
        if self.device.type == "cuda":
            if not gpu.why_not():
                try:
                    prompts, decodes = self._compile()
                    decodes.note_order()
                    with of_prompts(self._apart):
                        prompts.capture(lazily)
                    decodes.capture(lazily)
                    self.prompts, self.graph = prompts, decodes
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    why = f"steps could not be captured as CUDA graphs ({first_line(error)}); use --enforce-eager"
                    raise DeviceError(why) from error
        elif native is not None:
            try:
                self.graph = Programs(self.model, self.buffers)
            except NotRecordable as error:
                self.why_eager = f"steps run eagerly: {error}"

    def _compile(self) -> tuple[Prompts, Decodes]:
        """What is to be captured; what that and other steps launch is compiled, at once, and not when the first request
        waits for it. Prompts come first: theirs takes longest."""
        from pelton.ops.cuda.launch import only_compiling  # its kernels need Triton

        buffers, pool = self.buffers, torch.cuda.graph_pool_handle()
        with only_compiling():
            with of_prompts(self._apart):
                prompts = Prompts(self.model, buffers, pool)
                self._launch([SCORED], POWERS if self._apart else [SCORED])
            if self._apart:
                self._launch([16, 32, SCORED], [SCORED])
            return prompts, Decodes(self.model, self.kv, buffers.max_requests, buffers.max_blocks, pool)

    def _launch(self, num_tokens: Sequence[int], num_scored: Sequence[int]) -> None:
        """What steps launch that are not captured, of so many tokens; and logits of so many."""
        buffers, most = self.buffers, self.buffers.max_requests
        for num in num_tokens:
            num = min(num, buffers.max_tokens)
            # Of any number of requests; with as many as tokens they would be decodes.
            hidden = self.model.forward(buffers.batch(num, most if most != num else 1, num_wanted=1))
        for num in num_scored:
            self.model.logits(hidden.new_empty(num, hidden.shape[1]))

    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's chunks. Safe to repeat: it writes the same slots and the same tokens again.

        OutOfMemoryError if fewer chunks may fit, DeviceLostError if nothing will run again.
        """
        return guard(lambda: self._run(plan), *IN_A_STEP)

    def start(self, plan: StepPlan) -> Started | None:
        """Begin a plan on a GPU, perhaps while the one before still runs. None where its result is needed at once.
        Raises what `run` does."""
        return guard(lambda: self._start(plan), *IN_A_STEP)

    def can_start(self, plan: StepPlan) -> bool:
        """Whether `start` is of use: what other ranks are told before it is called."""
        if not isinstance(self.graph, Decodes):
            return False
        needing = {request.request_id for request in plan.new if request.needs_results}
        states = self.requests.states
        return not any(
            chunk.request_id in needing or (chunk.request_id in states and states[chunk.request_id].needs_results)
            for chunk in plan.chunks
        )

    @property
    def place(self) -> int:
        """How often ranks have met in what they computed so far: those that have met as often are in step."""
        graphs = [graph for graph in (self.prompts, self.graph) if isinstance(graph, Graphs)]
        return self.ranks.num_collectives + sum(graph.num_replays for graph in graphs)

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        result = StepResult(plan.step_id)
        for alone, chunks, states in self._parts(plan.chunks, self.requests.update(plan)):
            with of_prompts(alone):
                self._run_part(chunks, states, result)
        return result

    def _parts(self, chunks: Sequence[Chunk], states: Sequence[RequestState]) -> list[_Part]:
        """All of a step; or decodes, and chunks as short as those, and then prompts."""
        if not self._apart:
            return [(False, chunks, states)] if chunks else []
        few = [i for i, chunk in enumerate(chunks) if chunk.num_tokens <= FEW_TOKENS]
        many = [i for i, chunk in enumerate(chunks) if chunk.num_tokens > FEW_TOKENS]
        return [
            (part is many, [chunks[i] for i in part], [states[i] for i in part]) for part in (few, many) if part
        ]

    def _run_part(self, chunks: Sequence[Chunk], states: Sequence[RequestState], result: StepResult) -> None:
        graph = self.graph if self.graph is not None and self.graph.takes(chunks) else None
        buffers = self.buffers if graph is None else graph.buffers
        num_tokens, starts = buffers.fill(chunks, states)
        sampled = [i for i, chunk in enumerate(chunks) if chunk.sample]
        scored = [
            i for i, (chunk, state) in enumerate(zip(chunks, states, strict=True))
            if state.request.params.prompt_logprobs is not None and chunk.start < state.num_prompt
        ]
        if graph is not None:
            hidden, logits = graph.run(num_tokens, len(sampled))
        else:
            hidden, logits = self._forward(chunks, starts, len(sampled), needs_all=bool(scored))
        for i in scored:
            self._score_prompt(hidden[starts[i] : starts[i + 1]], chunks[i], states[i], result)
        if sampled:
            sampled_states = [states[i] for i in sampled]
            samples = self.sampler(sampled_states, logits)
            _note(samples, [chunks[i] for i in sampled], sampled_states, result)

    @torch.inference_mode()
    def _start(self, plan: StepPlan) -> Started | None:
        if not isinstance(self.graph, Decodes):
            return None
        all_states = self.requests.update(plan)
        if any(state.needs_results for state in all_states):
            return None
        begun: list[_Begun] = []
        for alone, chunks, states in self._parts(plan.chunks, all_states):
            with of_prompts(alone):
                begun += self._start_part(self.graph, chunks, states)
        if not begun:
            return _Started(plan.step_id, [], [], lambda: [])
        chunks_of, states_of, token_ids, waits = zip(*begun, strict=True)
        chunks, states = [*chain(*chunks_of)], [*chain(*states_of)]
        all_ids = token_ids[0] if len(begun) == 1 else torch.cat(token_ids)
        self._newest = all_ids, {chunk.request_id: i for i, chunk in enumerate(chunks)}
        return _Started(plan.step_id, chunks, states, lambda: [*chain(*(wait() for wait in waits))])

    def _start_part(
        self, graph: Decodes, chunks: Sequence[Chunk], states: Sequence[RequestState]
    ) -> list[_Begun]:
        """Nothing, if no chunk is sampled."""
        is_captured = graph.takes(chunks)
        buffers = graph.buffers if is_captured else self.buffers
        previous = self._claim_tokens(chunks, states)
        num_tokens, starts = buffers.fill(chunks, states)
        sampled = [i for i, chunk in enumerate(chunks) if chunk.sample]
        token_ids = None
        if is_captured:
            draws = self.sampler.draws(states, graph.logits)
            _, logits = graph.run(num_tokens, num_tokens, previous, draws)
            token_ids = graph.token_ids[:num_tokens] if draws is not None else None
        else:
            _, logits = self._forward(chunks, starts, len(sampled), previous)
        if not sampled:
            return []
        chunks, states = [chunks[i] for i in sampled], [states[i] for i in sampled]
        return [(chunks, states, *self.sampler.start(states, logits, token_ids))]

    def _claim_tokens(
        self, chunks: Sequence[Chunk], states: Sequence[RequestState]
    ) -> Previous | None:
        """Where tokens are not known yet: the samples of the step that runs, on the device, and which of them each
        chunk begins with (-1: none)."""
        unknown = [len(state.token_ids) == chunk.start for chunk, state in zip(chunks, states, strict=True)]
        if not any(unknown):
            return None
        token_ids, rows = self._newest
        for state, is_unknown in zip(states, unknown, strict=True):
            if is_unknown:
                state.token_ids.append(0)  # stands for it; what is counted is right
        return token_ids, [rows[chunk.request_id] if unknown[i] else -1 for i, chunk in enumerate(chunks)]

    def _forward(
        self, chunks: Sequence[Chunk], starts: Sequence[int], num_sampled: int, previous: Previous | None = None,
        needs_all: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The logits [M, V] of the sampled rows of what was filled in; and, if all are needed, its hidden states
        [T, d_model]."""
        num_tokens, are_decodes = starts[-1], starts[-1] == len(chunks)
        is_filled_up = not needs_all and (are_prompts() or not self._apart)
        sizes = self._decode_sizes if are_decodes else self._prompt_sizes if is_filled_up else []
        size = fitting(sizes, num_tokens)
        if size is not None:
            self.buffers.clear_slots(num_tokens, size)
        self.buffers.upload(len(chunks), previous)
        num_wanted = None if needs_all or are_decodes else max(num_sampled, 1)
        if size is None:
            are_whole = num_tokens >= LONG_PROMPT * len(chunks) and all(chunk.start == 0 for chunk in chunks)
            prompts = list(pairwise(starts)) if are_whole and self._has_prompt_attention else ()
            hidden = self.model.forward(self.buffers.batch(num_tokens, len(chunks), num_wanted, prompts))
        elif are_decodes:
            hidden = self.model.forward(self.buffers.batch(size, size))
        elif self.prompts is None:
            hidden = self.model.forward(prompt_batch(self.buffers, size))
        else:
            hidden = self.prompts.forward(size)
        if num_sampled == 0:
            return hidden, hidden[:0]
        if num_wanted is None and num_sampled < num_tokens:
            sampled = select(hidden, self.buffers.device.sampled_rows[:num_sampled])
        else:  # as in a captured step, decodes have logits of what fills them up, too
            sampled = hidden if are_decodes else hidden[:num_sampled]
        return hidden, self.model.logits(sampled)[:num_sampled]

    def _score_prompt(self, hidden: Tensor, chunk: Chunk, state: RequestState, result: StepResult) -> None:
        """Log-probabilities of the prompt's tokens that the chunk's hidden states predict."""
        params = state.request.params
        targets = state.token_ids[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, state.num_prompt)]
        entries: list[TokenLogprobs] = []
        for begin in range(0, len(targets), LOGITS_ROWS):
            rows = slice(begin, min(begin + LOGITS_ROWS, len(targets)))
            logits = self.model.logits(hidden[rows])
            if self.on_prompt_logits is not None:
                self.on_prompt_logits(logits)
            scored = token_logprobs(logits, targets[rows], params.prompt_logprobs or 0)
            if scored is None:
                result.errors[chunk.request_id] = NON_FINITE
                return
            entries += scored
        result.prompt_logprobs[chunk.request_id] = entries


class _Started:
    """A step that runs on a GPU."""

    def __init__(
        self, step_id: int, chunks: Sequence[Chunk], states: Sequence[RequestState],
        wait: Callable[[], list[Sample | str]],
    ) -> None:
        """chunks: those that are sampled."""
        self._step_id = step_id
        self._chunks = chunks
        self._states = states
        self._wait = wait

    def finish(self) -> StepResult:
        """Wait for its result. Raises what `ModelRunner.run` does."""
        result = StepResult(self._step_id)
        _note(guard(self._wait, *IN_A_STEP), self._chunks, self._states, result)
        return result


def _note(
    samples: Sequence[Sample | str], chunks: Sequence[Chunk], states: Sequence[RequestState], result: StepResult
) -> None:
    """Add what was sampled to the requests' tokens and to the result, but of requests that have failed."""
    for chunk, state, sample in zip(chunks, states, samples, strict=True):
        if chunk.request_id in result.errors:
            continue
        if isinstance(sample, str):
            result.errors[chunk.request_id] = sample
            continue
        token_id, logprobs = sample
        state.append(chunk, token_id)
        result.token_ids[chunk.request_id] = token_id
        if logprobs is not None:
            result.logprobs[chunk.request_id] = logprobs
