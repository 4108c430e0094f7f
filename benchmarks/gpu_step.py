"""Shows what a step of an engine on a GPU is made of, with random weights: of requests that have one token each.

    python benchmarks/gpu_step.py CONFIG_DIR [--requests 32] [--prompt 128] [--new 128] [--options JSON]

Prints ms a step; then, of steps in the middle of a run, for each kernel how often it is launched in a step, for how
many microseconds it alone keeps the step waiting (from the end of all before it to its own), and for how many nothing
runs before it; and the GPU's clock and power meanwhile, where pynvml is installed. CONFIG_DIR holds a config.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gpu_engine import OPTIONS, with_tokenizer
from torch.profiler import ProfilerActivity, profile

import pelton

Kernel = tuple[int, int, str]
"""When it began and ended, in ns, and its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each")
    parser.add_argument("--new", type=int, default=128, help="tokens that each generates")
    parser.add_argument("--profiled", type=int, default=8, help="steps")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="arguments of LLM")
    args = parser.parse_args()

    folder = with_tokenizer(args.config)
    llm = pelton.LLM(str(folder), **{**OPTIONS["pelton"], **args.options})
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    prompts = torch.randint(100, vocab_size - 100, (args.requests, args.prompt)).tolist()
    params = pelton.SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True, detokenize=False)

    llm.generate(prompts, params, use_tqdm=False)  # all that is compiled or captured late is
    times = []
    with watching() as samples:
        for _ in steps_of(llm, prompts, params):
            times.append(time.perf_counter())
    whole = times[-args.new // 2 : -args.new // 8]  # all requests have one token a step here
    print(f"{1e3 * statistics.median(b - a for a, b in zip(whole, whole[1:], strict=False)):.3f} ms a step", flush=True)
    if samples:
        clock, power = (statistics.mean(values) for values in zip(*samples[len(samples) // 2 :], strict=True))
        print(f"{clock:.0f} MHz, {power:.0f} W in the second half of the run")

    steps = steps_of(llm, prompts, params)
    deque(islice(steps, args.new // 2), maxlen=0)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        deque(islice(steps, args.profiled + 2), maxlen=0)
    report(kernels_of(profiler), args.profiled)


def steps_of(llm: Any, prompts: Sequence[Sequence[int]], params: Any) -> Iterator[None]:
    """After each step that every request has had a token in."""
    outputs = llm.generate(prompts, params, use_tqdm=False, stream=True)
    for i, _ in enumerate(outputs, start=1):
        if i % len(prompts) == 0:
            yield


@contextmanager
def watching() -> Iterator[list[tuple[float, float]]]:
    """Fills a list with the GPU's clock in MHz and power in W meanwhile."""
    samples: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        with suppress(ImportError):
            import pynvml

            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            while not done.wait(0.02):
                clock = pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)
                samples.append((clock, pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def kernels_of(profiler: Any) -> list[Kernel]:
    """What ran on the GPU, in order of time."""
    found = [e for e in profiler.profiler.kineto_results.events() if "CUDA" in str(e.device_type()) and e.duration_ns()]
    return sorted((e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in found)


def report(kernels: Sequence[Kernel], num_steps: int) -> None:
    """Of steps, each of which ends with the kernel that sends its tokens to the host."""
    ends = [i + 1 for i, (_, _, name) in enumerate(kernels) if name == "_send_kernel"]
    num_steps = min(num_steps, len(ends) - 1)
    if num_steps < 1:
        sys.exit(f"the profiler saw the ends of {len(ends)} steps, {len(kernels)} kernels in all")
    counts: dict[str, int] = defaultdict(int)
    alone, idle = defaultdict(float), defaultdict(float)
    end = kernels[ends[0] - 1][1]
    for begin, until, name in kernels[ends[0] : ends[num_steps]]:
        counts[name] += 1
        idle[name] += max(0, begin - end) / 1e3
        alone[name] += max(0, until - max(begin, end)) / 1e3
        end = max(end, until)
    print("launches  us alone  us each   us idle before  kernel")
    for name in sorted(counts, key=lambda name: -alone[name] - idle[name]):
        launches, busy, gap = (x / num_steps for x in (counts[name], alone[name], idle[name]))
        print(f"{launches:8.1f} {busy:9.1f} {busy / launches:8.2f} {gap:12.1f}      {name[:80]}")
    print(f"{'':8} {sum(alone.values()) / num_steps:9.1f} {'':8} {sum(idle.values()) / num_steps:12.1f}      in all")


if __name__ == "__main__":
    main()
