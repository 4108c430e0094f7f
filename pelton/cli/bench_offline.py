"""`pelton bench latency` and `throughput`: the engine in this process, with random prompts of one length."""

from __future__ import annotations

import argparse
import random
import time
from typing import TYPE_CHECKING, Any

from pelton.cli.bench import add_workload, positive, summarize
from pelton.cli.flags import add_engine_flags, engine_args
from pelton.cli.parser import Parser
from pelton.errors import RequestFailedError
from pelton.types import SamplingParams, TokensPrompt

if TYPE_CHECKING:
    from pelton.llm import LLM


def add_arguments(parser: Parser, kind: str) -> None:
    """How many prompts, how often."""
    add_workload(parser)
    if kind == "latency":
        parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="prompts at once [1]")
        parser.add_argument("--num-iters", type=positive, default=5, metavar="N", help="measured runs [5]")
        parser.add_argument("--num-iters-warmup", type=int, default=1, metavar="N", help="runs before those [1]")
    else:
        parser.add_argument("--num-prompts", type=positive, default=32, metavar="N", help="prompts in all [32]")
    add_engine_flags(parser, skip=("seed",))


def measure(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Load the model, then run `kind`; greedy, and always --output-len tokens."""
    args = engine_args(options)
    from pelton.cli.loading import load

    llm = load(args)
    workload = Workload(llm, options)
    figures = _latency(workload, options) if kind == "latency" else _throughput(workload, options)
    lengths = {"input_len": options.input_len, "output_len": options.output_len}
    return {"model": args.model, **lengths, **figures}


class Workload:
    """Batches of random prompts, no two alike, so that the prefix cache never helps."""

    def __init__(self, llm: LLM, options: argparse.Namespace) -> None:
        self._llm = llm
        self._rng = random.Random(options.bench_seed)
        self._input_len = options.input_len
        self._params = SamplingParams(temperature=0, max_tokens=options.output_len, ignore_eos=True)
        self._vocab_size = llm.get_tokenizer().vocab_size

    def seconds(self, batch_size: int) -> float:
        """Time to complete `batch_size` prompts; RequestFailedError if one cannot be."""
        prompts = [
            TokensPrompt(prompt_token_ids=[self._rng.randrange(self._vocab_size) for _ in range(self._input_len)])
            for _ in range(batch_size)
        ]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        if errors := [output.error for output in outputs if output.error is not None]:
            raise RequestFailedError(f"nothing was measured: {errors[0]}")
        return elapsed


def _latency(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    for _ in range(options.num_iters_warmup):
        workload.seconds(options.batch_size)
    seconds = [workload.seconds(options.batch_size) for _ in range(options.num_iters)]
    per_second = options.batch_size * options.output_len / summarize(seconds)["p50"]
    return {"batch_size": options.batch_size, "num_iters": options.num_iters, "output_tokens_per_s": per_second,
            "latency_s": summarize(seconds)}


def _throughput(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    workload.seconds(1)  # warm up
    seconds = workload.seconds(options.num_prompts)
    return {
        "num_prompts": options.num_prompts,
        "seconds": seconds,
        "requests_per_s": options.num_prompts / seconds,
        "output_tokens_per_s": options.num_prompts * options.output_len / seconds,
        "total_tokens_per_s": options.num_prompts * (options.input_len + options.output_len) / seconds,
    }
