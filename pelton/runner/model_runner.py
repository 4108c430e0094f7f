"""Runs a StepPlan: batch, forward, sample."""

from __future__ import annotations

import torch
from torch import Tensor

from pelton.config import EngineConfig
from pelton.engine.step import Chunk, StepPlan, StepResult, TokenLogprobs
from pelton.models import Model
from pelton.runner.batch import build_batch
from pelton.runner.grammar import Grammars
from pelton.runner.kv_cache import KVCache
from pelton.runner.logprobs import NON_FINITE, token_logprobs
from pelton.runner.requests import RequestState, RequestTable
from pelton.runner.sampler import Sampler

LOGITS_ROWS = 256  # rows of prompt logits made at once: 256 x 262,144 float32 are 268 MB


class ModelRunner:
    """A model, its KV cache and its sampler on one device. Implements `engine.core.Runner`."""

    def __init__(self, model: Model, kv: KVCache, config: EngineConfig, grammars: Grammars | None = None) -> None:
        self.model = model
        self.kv = kv
        self.device = kv.layers[0].device
        self.requests = RequestTable(len(kv.groups))
        self.sampler = Sampler(config.device.seed, grammars)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's chunks. Safe to repeat: it writes the same slots and the same tokens again."""
        states = self.requests.update(plan)
        result = StepResult(plan.step_id)
        if not plan.chunks:
            return result
        batch = build_batch(plan.chunks, states, self.kv, self.device)
        hidden = self.model.forward(batch)  # [T, d_model]
        for chunk, state, start in zip(plan.chunks, states, batch.query_starts, strict=False):
            if state.request.params.prompt_logprobs is not None and chunk.start < state.num_prompt:
                self._score_prompt(hidden[start : start + chunk.num_tokens], chunk, state, result)
        self._sample(hidden, plan.chunks, states, batch.query_starts, result)
        return result

    def _sample(
        self, hidden: Tensor, chunks: tuple[Chunk, ...], states: list[RequestState], query_starts: list[int],
        result: StepResult,
    ) -> None:
        """Sample the next token of each chunk that asks for it and has not failed."""
        wanted = [i for i, chunk in enumerate(chunks) if chunk.sample and chunk.request_id not in result.errors]
        if not wanted:
            return
        last_rows = torch.tensor([query_starts[i + 1] - 1 for i in wanted], device=hidden.device)
        logits = self.model.logits(hidden[last_rows])  # [M, V]
        for i, sample in zip(wanted, self.sampler([states[i] for i in wanted], logits), strict=True):
            request_id = chunks[i].request_id
            if isinstance(sample, str):
                result.errors[request_id] = sample
                continue
            token_id, logprobs = sample
            states[i].append(chunks[i], token_id)
            result.token_ids[request_id] = token_id
            if logprobs is not None:
                result.logprobs[request_id] = logprobs

    def _score_prompt(self, hidden: Tensor, chunk: Chunk, state: RequestState, result: StepResult) -> None:
        """Log-probabilities of the prompt's tokens that the chunk's hidden states predict."""
        params = state.request.params
        targets = state.token_ids[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, state.num_prompt)]
        entries: list[TokenLogprobs] = []
        for begin in range(0, len(targets), LOGITS_ROWS):
            rows = slice(begin, min(begin + LOGITS_ROWS, len(targets)))
            logits = self.model.logits(hidden[rows])
            if not bool(torch.isfinite(logits).all()):
                result.errors[chunk.request_id] = NON_FINITE
                return
            entries += token_logprobs(logits, targets[rows], params.prompt_logprobs or 0)
        result.prompt_logprobs[chunk.request_id] = entries
