"""Steps that are begun while the one before runs, as on a GPU, with the whole runner but its kernels on a CPU.

In small random worlds requests share prefixes, arrive, are aborted and preempted, and steps fail while they begin or
when they are waited for. Each request gets what it gets alone from an engine that begins nothing ahead.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pelton.build import build_engine
from pelton.config import FEW_TOKENS, EngineArgs
from pelton.engine.core import EngineCore
from pelton.engine.scheduler import Scheduler
from pelton.engine.step import EngineRequest, StepPlan, Update
from pelton.layers.batch import Batch
from pelton.ops.native import native, reason
from pelton.ops.prompts import are_prompts
from pelton.ops.sampling import Draws, SampleRow, uniform
from pelton.runner.graph import Decodes, Graphs, Prompts, decode_sizes, fitting, prompt_sizes
from pelton.runner.model_runner import ModelRunner
from pelton.runner.requests import RequestState
from pelton.runner.sampler import Sample, Sampler
from pelton.types import SamplingParams

pytestmark = pytest.mark.skipif(native is None, reason=reason)

NUM_WORLDS = 30
VOCAB_SIZE, MAX_MODEL_LEN = 64, 96
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "max_position_embeddings": MAX_MODEL_LEN, "torch_dtype": "float32",
}  # fmt: skip
MODELS = {
    "llama": SIZES | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
    },
    "gemma3": SIZES | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 3,
        "rms_norm_eps": 1e-6, "sliding_window": 9, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip
FREE: list[dict[str, Any]] = [{}, {}, {"temperature": 0.0}, {"logprobs": 2}, {"allowed_token_ids": [*range(9)]}]
NEEDING: list[dict[str, Any]] = [{"frequency_penalty": 0.7}, {"prompt_logprobs": 1}, {"min_tokens": 2}]


class Eager(Graphs):
    """Computes what CUDA graphs would."""

    on_capture: Callable[[int], None] = staticmethod(lambda size: None)

    def _capture(self, size: int) -> Any:
        self._compute(size)
        self.on_capture(size)
        return SimpleNamespace(replay=lambda: self._compute(size))


class EagerPrompts(Eager, Prompts):
    pass


class EagerDecodes(Eager, Decodes):
    pass


class FlakySampler(Sampler):
    """Begins as a GPU's does. Sometimes a request's logits are not finite."""

    fails: Callable[[], bool]
    failed: set[int]
    num_captured = 0

    def __call__(self, states: Sequence[RequestState], logits: Tensor) -> list[Sample | str]:
        return self._spoil(states, super().__call__(states, logits))

    def _spoil(self, states: Sequence[RequestState], samples: list[Sample | str]) -> list[Sample | str]:
        for i, state in enumerate(states):
            if self.fails():
                self.failed.add(state.request.request_id)
                samples[i] = "not finite"
        return samples

    def start(
        self, states: Sequence[RequestState], logits: Tensor, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], list[Sample | str]]]:
        if token_ids is None:
            token_ids, samples = torch.empty(len(states), dtype=torch.int64), self(states, logits)
        else:
            self.num_captured += 1
            samples = self._spoil(states, [(token_id, None) for token_id in token_ids.tolist()])
        token_ids.copy_(torch.tensor([-1 if isinstance(sample, str) else sample[0] for sample in samples]))
        return token_ids, lambda: samples


def draws_of(rows: Sequence[SampleRow], logits: Tensor) -> Draws | None:
    """`ops.cuda.sampling.draws_of`, where there is nothing but temperature."""
    if any(row.is_changed or row.num_top >= 0 for row in rows):
        return None
    drawn = [(i, row) for i, row in enumerate(rows) if row.temperature]
    factors = [(1 / row.temperature, uniform(row.seed, len(row.token_ids) - row.num_prompt)) for _, row in drawn]
    return (
        np.array([(i, -1, 0) for i, _ in drawn], dtype=np.int64).reshape(-1, 3),
        np.array([(scale, -np.inf, 1.0, chance) for scale, chance in factors]).reshape(-1, 4),
    )


def choose_(tokens: Tensor, logits: Tensor, wholes: Tensor, factors: Tensor) -> None:
    """`ops.cuda.sampling.choose_`, of such rows."""
    tokens.copy_(logits.argmax(dim=-1))
    for row, (scale, _, _, chance) in zip(wholes[:, 0].tolist(), factors.tolist(), strict=True):
        if row >= 0:
            cumulative = ((logits[row] - logits[row].max()) * scale).exp().double().cumsum(dim=0)
            tokens[row] = torch.searchsorted(cumulative, chance * float(cumulative[-1]), right=True)


def fill_in_(token_ids: Tensor, starts: Tensor, rows: Tensor, sampled: Tensor) -> None:
    """`ops.cuda.rows.fill_in_`."""
    for start, row in zip(starts.tolist(), rows.tolist(), strict=False):
        if row >= 0:
            token_ids[start] = max(int(sampled[row]), 0)


@pytest.fixture
def make_core(tmp_path: Path) -> Callable[..., EngineCore]:
    for name, config in MODELS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    def make(model: str, **options: Any) -> EngineCore:
        args = EngineArgs(
            str(tmp_path / model), load_format="dummy", device="cpu", dtype="float32", enforce_eager=True, **options
        )
        return build_engine(args).core

    return make


class World:
    """One seed's engine and its requests."""

    def __init__(self, seed: int, make_core: Callable[..., EngineCore]) -> None:
        self.rng = rng = Random(seed)
        model = rng.choice(sorted(MODELS))
        block_size = rng.choice([16, 16, 32])  # for which attention has a kernel: bits do not depend on company
        deterministic = rng.random() < 0.3
        self.least = 17 if deterministic else 1  # tokens of a step that always fits
        self.core = make_core(
            model, block_size=block_size, max_num_seqs=rng.randint(1, 8), enable_prefix_caching=rng.random() < 0.8,
            max_num_batched_tokens=max(self.least, rng.choice([rng.randint(2, 12), rng.randint(12, 60)])),
            enable_chunked_prefill=rng.random() < 0.85,
            num_gpu_blocks_override=(6 if model == "gemma3" else 2) * (MAX_MODEL_LEN // block_size + 1) + 1,
        )  # fmt: skip
        if deterministic:
            config = replace(self.core.scheduler._config, deterministic=True)
            self.core.scheduler = Scheduler(config, self.core.scheduler._cache)
            self._compute_apart(self.core.runner)
        self.alone = make_core(model, block_size=block_size, max_num_seqs=1, enable_prefix_caching=False)
        self.counts: Counter[str] = Counter()
        self.failed: set[int] = set()
        self._begin_ahead(self.core.runner)
        self.prefixes = [self._tokens(rng.randint(1, MAX_MODEL_LEN // 2)) for _ in range(2)]
        self.kinds = FREE + rng.choice([[], [], NEEDING])
        self.arrivals = sorted(rng.randint(0, 25) for _ in range(rng.randint(6, 14)))

    def run(self) -> Counter[str]:
        rng, requests = self.rng, list[EngineRequest]()
        told: list[list[Update]] = []
        aborted: set[int] = set()
        now = 0
        while self.arrivals or self.core.has_work():
            while self.arrivals and self.arrivals[0] <= now:
                self.arrivals.pop(0)
                requests.append(self._request(len(requests)))
                told.append([])
                self.core.submit(requests[-1])
            if requests and rng.random() < 0.02:
                victim = rng.randrange(len(requests))
                aborted.add(victim)
                self.core.abort(victim)
            for update in self.core.step():
                told[update.request_id].append(update)
            self.core.scheduler.check()
            now += 1
        self.core.step()
        self.core.step()  # the runner has been told who is gone
        assert not self.core.runner.requests.states
        stats = self.core.scheduler.stats()
        captured, prompts = self.core.runner.sampler.num_captured, self.core.runner.prompts.num_replays
        self.counts.update(captured=captured, prompts=prompts)
        self.counts.update(preempted=stats.num_preemptions, hits=stats.num_prefix_hits)
        for request, updates in zip(requests, told, strict=True):
            self.counts[end := updates[-1].finish_reason] += 1
            assert [update.finish_reason for update in updates[:-1]] == [None] * (len(updates) - 1)
            found, expected = facts(updates), facts(self._play_alone(request))
            if end in ("abort", "error"):
                assert request.request_id in (aborted if end == "abort" else self.failed), updates[-1].error
                assert found[0] == expected[0][: len(found[0])]
            else:
                assert found == expected, request
        return self.counts

    def _tokens(self, length: int) -> list[int]:
        return [self.rng.randrange(VOCAB_SIZE) for _ in range(length)]

    def _request(self, request_id: int) -> EngineRequest:
        rng = self.rng
        prefix = rng.choice(self.prefixes)
        prompt = prefix[: rng.choice([0, len(prefix), rng.randint(0, len(prefix))])] + self._tokens(rng.randint(1, 8))
        params = SamplingParams(
            max_tokens=rng.choice([0, rng.randint(2, 6), rng.randint(2, MAX_MODEL_LEN)]), seed=rng.randint(0, 5)
        )
        for name, value in rng.choice(self.kinds).items():
            if name != "min_tokens" or params.max_tokens:
                setattr(params, name, value)
        return EngineRequest(request_id, prompt, params, eos_token_ids=(3, 11), priority=rng.choice([0, 0, 1]))

    def _compute_apart(self, runner: ModelRunner) -> None:
        """Let a step's prompts be computed alone; check that they are."""
        forward, runner._apart = runner.model.forward, True

        def checked(batch: Batch) -> Tensor:
            lengths = batch.query_starts.diff()
            assert (lengths[lengths > 0] > FEW_TOKENS if are_prompts() else lengths <= FEW_TOKENS).all(), lengths
            return forward(batch)

        runner.model.forward = checked  # type: ignore[method-assign]

    def _begin_ahead(self, runner: ModelRunner) -> None:
        """Let steps be begun; let them fail, while they begin or later."""
        rng = self.rng
        most, max_blocks = runner.buffers.max_requests, runner.buffers.max_blocks
        runner.graph = EagerDecodes(runner.model, runner.kv, most, max_blocks, None)
        runner.prompts = EagerPrompts(runner.model, runner.buffers, None)
        runner._decode_sizes = decode_sizes(min(most, runner.buffers.max_tokens))
        runner._prompt_sizes = prompt_sizes(runner.buffers.max_tokens)
        for graphs, least in ((runner.graph, 1), (runner.prompts, fitting(runner._prompt_sizes, self.least))):
            graphs.capture(lazily=rng.random() < 0.5)
            graphs.on_capture = partial(self._on_capture, least)
        runner.sampler = FlakySampler(0)
        share = rng.choice([0.0, 0.0, 0.01])
        runner.sampler.fails, runner.sampler.failed = lambda: rng.random() < share, self.failed
        failing = rng.choice([0.0, 0.02, 0.15])

        def fail(plan: StepPlan) -> Any:
            if len(plan.chunks) == 1 or rng.random() < 0.6:
                self.counts["out of memory"] += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.counts["kernel failed"] += 1
            raise RuntimeError("a kernel failed")

        def flaky(compute: Callable[[StepPlan], Any]) -> Callable[[StepPlan], Any]:
            def step(plan: StepPlan) -> Any:
                fails = [plan.num_tokens > self.least and rng.random() < failing for _ in range(3)]
                if fails[0]:
                    runner.requests.update(plan)
                    fail(plan)
                result = compute(plan)
                if fails[1]:
                    fail(plan)
                if hasattr(result, "_wait"):
                    self.counts["begun"] += 1
                    self.counts["begun in two parts"] += len(runner._parts(plan.chunks, plan.chunks)) > 1
                    self.counts["begun with a prompt"] += any(chunk.num_tokens > 1 for chunk in plan.chunks)
                    if fails[2]:
                        result._wait = lambda: fail(plan)
                return result

            return step

        runner._run, runner._start = flaky(runner._run), flaky(runner._start)  # type: ignore[method-assign]

    def _on_capture(self, least: int, size: int) -> None:
        """Of a size that is captured by the step that needs it. least: one that always fits."""
        self.counts["captured late"] += 1
        if size > least and self.rng.random() < 0.3:
            self.counts["capture failed"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def _play_alone(self, request: EngineRequest) -> list[Update]:
        self.alone.submit(request)
        updates = []
        while self.alone.has_work():
            updates += self.alone.step()
        return updates


def facts(updates: list[Update]) -> tuple[Any, ...]:
    """What a request is told, in all."""
    return (
        [token_id for update in updates for token_id in update.token_ids],
        [entry for update in updates for entry in update.logprobs or []],
        [update.prompt_logprobs for update in updates if update.prompt_logprobs],
        (updates[-1].finish_reason, updates[-1].stop_reason),
    )


def test_what_is_begun_ahead_changes_nothing(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pelton.ops.cuda.rows", SimpleNamespace(fill_in_=fill_in_))
    sampling = SimpleNamespace(draws_of=draws_of, choose_=choose_, start_sample=None)
    monkeypatch.setitem(sys.modules, "pelton.ops.cuda.sampling", sampling)
    monkeypatch.setitem(sys.modules, "pelton.quant.gpu", SimpleNamespace(noting_order=nullcontext))
    monkeypatch.setattr("pelton.runner.graph.CAPTURED_TOKENS", 32)  # some steps with prompts are larger
    monkeypatch.setattr("pelton.engine.scheduler.CALM_STEPS", 3)  # steps are soon large enough to fail again
    for module in ("core", "scheduler"):  # they report each injected failure
        monkeypatch.setattr(logging.getLogger(f"pelton.engine.{module}"), "disabled", True)
    counts: Counter[str] = Counter()
    for seed in range(NUM_WORLDS):
        try:
            counts += World(seed, make_core).run()
        except Exception as error:
            raise AssertionError(f"the failing seed is {seed}: {error}") from error
    for event in ("begun", "begun with a prompt", "begun in two parts", "captured", "prompts", "captured late",
                  "capture failed", "out of memory", "kernel failed", "preempted", "hits", "abort", "error", "stop",
                  "length"):
        assert counts[event] > 0, f"the worlds no longer lead to {event}"
