"""Builds engines with a fake runner, in this process or a child: "fake_engine:build". `args.model` says how it behaves.

    fake, slow     each step takes next to no time, or 10 ms
    broken, buggy  the build fails with a PeltonError, or with something unforeseen
    once:PATH      fails if PATH exists, which the first build makes

A prompt that begins with one of the tokens below makes the engine misbehave when it is computed.

"fake_engine:build_worker" makes the runner of a rank beside rank 0, to which `args.model` applies as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from pelton.config import CacheConfig, EngineArgs, KVGroup, SchedulerConfig
from pelton.engine.core import EngineCore
from pelton.engine.fake import FakeRunner
from pelton.engine.host import Engine
from pelton.engine.messages import EngineInfo
from pelton.engine.scheduler import Scheduler
from pelton.engine.step import StepPlan, StepResult
from pelton.errors import DeviceLostError, ModelFormatError, OutOfMemoryError
from pelton.types import OnProgress

CACHE = CacheConfig(block_size=16, num_blocks=1025, groups=(KVGroup(None, (0,)),), enable_prefix_caching=True)
HANG, CRASH, FAIL, LOST = 101, 102, 103, 104  # a step that lasts; an engine, a request, a device that fails
FULL = 105  # memory that runs out on all ranks but the first


class Runner(FakeRunner):
    step_s = 0.0

    def run(self, plan: StepPlan) -> StepResult:
        time.sleep(self.step_s)
        for request in plan.new:
            if request.prompt_token_ids[0] == HANG:
                time.sleep(60)
            if request.prompt_token_ids[0] == CRASH:
                return None  # type: ignore[return-value]
            if request.prompt_token_ids[0] == LOST:
                raise DeviceLostError("the GPU failed and does not answer")
            if request.prompt_token_ids[0] == FAIL:
                self.raises.add(request.request_id)
        return super().run(plan)


class WorkerRunner(Runner):
    """A prompt that begins with CRASH ends its process."""

    place = 0

    def run(self, plan: StepPlan) -> StepResult:
        for request in plan.new:
            if request.prompt_token_ids[0] == CRASH:
                os._exit(7)
            if request.prompt_token_ids[0] == FULL:
                raise OutOfMemoryError("no room; lower something")
        return super().run(plan)


def build(args: EngineArgs, on_progress: OnProgress) -> Engine:
    kind, _, path = args.model.partition(":")
    if kind == "broken":
        raise ModelFormatError("tensor x is missing")
    if kind == "buggy":
        raise KeyError("x")
    if kind == "once":
        if Path(path).exists():
            raise ModelFormatError("the file is gone")
        Path(path).touch()
    on_progress(1, 2)
    on_progress(2, 2)
    limits = SchedulerConfig(
        max_num_seqs=16, max_num_batched_tokens=256, max_waiting=args.max_waiting or 20, max_model_len=512,
        enable_chunked_prefill=True,
    )  # fmt: skip
    runner = Runner(CACHE, vocab_size=100)
    runner.step_s = 0.01 if kind == "slow" else 0.0
    info = EngineInfo(512, 16384, "no kernels", ("a note",), ("a warning",))
    return Engine(EngineCore(Scheduler(limits, CACHE), runner), info)


def build_worker(args: EngineArgs, rank: int, folder: Path, meet: Callable[[], None]) -> WorkerRunner:
    if args.model == "broken":
        raise ModelFormatError(f"tensor x is missing on rank {rank}")
    if args.model == "buggy":
        raise KeyError("x")
    (folder / str(rank)).touch()
    meet()
    return WorkerRunner(CACHE, vocab_size=100)
