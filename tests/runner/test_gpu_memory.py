"""Memory over thousands of requests, and what happens where it runs out: on a GPU, and on the CPU what is the same."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from pelton.build import build_engine
from pelton.config import EngineArgs
from pelton.engine.core import EngineCore
from pelton.engine.step import EngineRequest, StepPlan
from pelton.types import SamplingParams

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
VOCAB_SIZE = 512
MOST_KEPT = 8192  # bytes on the GPU: the samples of the newest step
MOST_GROWTH = 64 << 20  # bytes of host memory, over all requests


def make_core(folder: Path, kind: str, **options: Any) -> EngineCore:
    """The engine of a model with random weights, on a GPU of wide feed-forward layers: what a step holds is for the
    most part theirs."""
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 256,
        "intermediate_size": 8192 if kind == "cuda" else 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }))  # fmt: skip
    options = {"max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 26} | options
    args = EngineArgs(str(folder), load_format="dummy", device=kind, dtype="float32", **options)
    return build_engine(args).core


def make_params(rng: Random) -> SamplingParams:
    """What keeps tensors, or costs memory, for one request: some of it."""
    some = {
        "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": rng.randint(0, 5), "prompt_logprobs": 1,
        "seed": rng.randint(0, 99), "allowed_token_ids": rng.sample(range(VOCAB_SIZE), 40), "top_k": 20, "top_p": 0.9,
        "temperature": 0.0, "logit_bias": {3: 1.5}, "min_tokens": 2,
    }  # fmt: skip
    chosen = rng.sample(sorted(some), rng.choice([0, 0, 1, 2, 3]))
    return SamplingParams(max_tokens=rng.randint(2, 10), ignore_eos=True, **{name: some[name] for name in chosen})


def play(core: EngineCore, request_ids: Iterator[int], num_requests: int, rng: Random) -> Counter[str | None]:
    """Requests as they come, about 50 at a time, of which 30 % are aborted after some steps; how they ended."""
    ends: Counter[str | None] = Counter()
    alive: dict[int, int] = {}  # the steps until each is aborted
    while num_requests or alive:
        while num_requests and len(alive) < 50:
            num_requests -= 1
            request_id = next(request_ids)
            prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
            core.submit(EngineRequest(request_id, prompt, make_params(rng)))
            alive[request_id] = rng.randint(0, 8) if rng.random() < 0.3 else 1000
        for request_id in alive:
            alive[request_id] -= 1
            if alive[request_id] < 0:
                core.abort(request_id)
        for update in core.step():
            if update.finish_reason is not None:
                ends[update.finish_reason] += 1
                del alive[update.request_id]
    core.step()  # tells the runner who is gone
    core.step()
    return ends


def memory_now() -> tuple[int, int]:
    """Bytes of tensors on the GPU, and of the process on the host."""
    gc.collect()
    on_gpu = 0
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        on_gpu = torch.cuda.memory_allocated()
    return on_gpu, int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("kind", "num_requests"), [("cpu", 400), pytest.param("cuda", 10_000, marks=GPU)])
def test_nothing_is_left_of_requests(tmp_path: Path, kind: str, num_requests: int) -> None:
    core, rng, request_ids = make_core(tmp_path, kind), Random(0), count()
    play(core, request_ids, 200, rng)  # what is made once is there after it
    before = memory_now()
    ends = play(core, request_ids, num_requests, rng)
    after = memory_now()
    assert ends.keys() == {"length", "abort"} and ends.total() == num_requests
    assert 0.1 * num_requests < ends["abort"] < 0.35 * num_requests
    assert abs(after[0] - before[0]) < MOST_KEPT
    assert after[1] - before[1] < MOST_GROWTH
    assert core.scheduler.stats().kv_usage == 0.0 and not core.runner.requests.states
    core.scheduler.check()


FREE: list[dict[str, Any]] = [{}, {"allowed_token_ids": [*range(9)]}, {"logprobs": 2}, {"temperature": 0.0}]
PENALISED: list[dict[str, Any]] = [{}, {"presence_penalty": 1.0, "allowed_token_ids": [*range(9)]}]


def run(
    core: EngineCore, prompts: list[list[int]], kinds: list[dict[str, Any]], request_ids: Iterator[int]
) -> list[list[int]]:
    """The tokens of each prompt's request."""
    places = {}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(seed=i, max_tokens=5 + 3 * i, ignore_eos=True, **kinds[i % len(kinds)])
        places[request_id := next(request_ids)] = i
        core.submit(EngineRequest(request_id, prompt, params))
    tokens: list[list[int]] = [[] for _ in prompts]
    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            tokens[places[update.request_id]] += update.token_ids
        core.scheduler.check()
    return tokens


@pytest.mark.parametrize("share", [0.05, 0.4])
@pytest.mark.parametrize("kinds", [FREE, PENALISED], ids=["free", "penalised"])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=GPU)])
def test_memory_that_runs_out_at_random_changes_nothing(
    tmp_path: Path, kind: str, kinds: list[dict[str, Any]], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether steps are run, begun ahead (not where there are penalties) or waited for."""
    monkeypatch.setattr("pelton.engine.scheduler.CALM_STEPS", 2)  # soon large enough to fail again
    core, rng = make_core(tmp_path, kind), Random(1)
    runner = core.runner
    prompts = [[(37 * i + 11 * k * k) % VOCAB_SIZE for k in range(3 + 13 * i)] for i in range(12)]
    expected = run(make_core(tmp_path, kind), prompts, kinds, count())

    def flaky(compute: Any) -> Any:
        def step(plan: StepPlan) -> Any:
            result = compute(plan)
            if plan.num_tokens > 1 and rng.random() < share:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if hasattr(result, "_wait") and plan.num_tokens > 1 and rng.random() < share:
                result._wait = fail
            return result

        return step

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    runner._run, runner._start = flaky(runner._run), flaky(runner._start)
    assert run(core, prompts, kinds, count()) == expected
    assert core.scheduler.stats().num_preemptions > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_is_too_large_for_the_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Torch may take 96 MiB more than it has; 4096 tokens need 256 MiB for one layer's halves alone."""
    core, request_ids = make_core(tmp_path, "cuda", max_num_batched_tokens=4096, enable_prefix_caching=False), count()
    prompts = [[(37 * i + 11 * k * k) % VOCAB_SIZE for k in range(1000)] for i in range(4)]
    expected = run(core, prompts, [{"temperature": 0.0}], request_ids)
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved() + (96 << 20)
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.mem_get_info()[1])
    try:
        found = run(core, prompts, [{"temperature": 0.0}], request_ids)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == expected
    assert "did not fit the memory" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_engines_share_a_gpu(tmp_path: Path) -> None:
    """Each takes a share of what is free when it starts, and computes what it computes alone."""
    prompts = [[(37 * i + k) % VOCAB_SIZE for k in range(20 + i)] for i in range(8)]
    alone = run(make_core(tmp_path, "cuda"), prompts, FREE, count())
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.empty(torch.cuda.mem_get_info()[0] - (6 << 30), dtype=torch.uint8, device="cuda")
    share = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.4, "max_num_seqs": 256, "enforce_eager": True}
    cores = [make_core(tmp_path, "cuda", **share) for _ in range(2)]
    first, second = (core.runner.kv.layers[0].key.nbytes for core in cores)  # a quarter of all keys and values
    assert 0 < second < first < 0.1 * (6 << 30)
    del others
    for _ in range(2):
        assert [run(core, prompts, FREE, count()) for core in cores] == [alone, alone]


LOSE_THE_GPU = """
import torch
from pelton.runner.device import guard

def compute():
    torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")].tolist()

try:
    guard(compute, "in a step", "lower it")
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_failed_kernel_loses_the_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", LOSE_THE_GPU], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DeviceLostError"]
