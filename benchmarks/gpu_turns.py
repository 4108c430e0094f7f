"""Compares the captured steps of two trees of this repository on one GPU, in turn, with random weights.

    python benchmarks/gpu_turns.py CONFIG_DIR --other TREE [--requests 1,32] [--contexts 128,384,2000] [--options JSON]

An engine of each tree lives in a process of its own. Told how many requests with how many tokens each there are, it
replays its captured step for a while; the other waits. So what warms the card, or lets it rest, does the same to both,
and differences of 0.3 % show, which those between processes, cards and hours hide. Prints ms a step of both, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from gpu_engine import OPTIONS, fill_as_vllm, with_tokenizer

HERE = Path(__file__).parent
BURST_MS = 60  # of replays
TURNS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--other", type=Path, metavar="TREE", help="a checkout of another commit")
    parser.add_argument("--requests", default="1", metavar="N,...")
    parser.add_argument("--contexts", default="128,384,2000", metavar="TOKENS,...")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="arguments of LLM")
    parser.add_argument("--replays", type=Path, help=argparse.SUPPRESS)  # of a tree: this is one of the two processes
    args = parser.parse_args()
    requests, contexts = ([int(n) for n in text.split(",")] for text in (args.requests, args.contexts))
    if args.replays is not None:
        replay_when_told(args.replays, args.config, max(requests), args.options)
        return
    if args.other is None or not (args.other / "pelton").is_dir():
        parser.error("--other: give a folder that holds a checkout of this repository")
    trees = {"this": HERE.parent, "other": args.other}
    engines = {name: start(tree) for name, tree in trees.items()}
    for engine in engines.values():
        expect(engine, "ready")
    print(f"{'requests':>8} {'context':>8} {'this, ms':>9} {'other, ms':>9}  this / other")
    for num in requests:
        for context in contexts:
            found = in_turn(engines, num, context)
            ratio = statistics.median(a / b for a, b in zip(found["this"], found["other"], strict=True))
            this, other = (statistics.median(found[name]) for name in ("this", "other"))
            print(f"{num:8} {context:8} {this:9.4f} {other:9.4f}  {ratio:.4f}", flush=True)
    for engine in engines.values():
        engine.stdin.close()
        engine.wait()


def start(tree: Path) -> Any:
    """The process of a tree's engine."""
    tree = tree.resolve()
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, *sys.argv[1:], "--replays", str(tree)]
    return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def expect(engine: Any, start: str) -> str:
    """What follows `start` in the engine's next line that begins with it."""
    for line in engine.stdout:
        if line.startswith(start):
            return line[len(start) :].strip()
    sys.exit("an engine ended; what it wrote is above")


def in_turn(engines: dict[str, Any], num_requests: int, context: int) -> dict[str, list[float]]:
    """ms a step in each turn; who begins changes."""
    found: dict[str, list[float]] = defaultdict(list)
    names = list(engines)
    for turn in range(-1, TURNS):  # the first warms up
        for name in names if turn % 2 else names[::-1]:
            print(num_requests, context, file=engines[name].stdin, flush=True)
            ms = float(expect(engines[name], "ms"))
            if turn >= 0:
                found[name].append(ms)
    return found


def replay_when_told(tree: Path, config: Path, max_requests: int, options: dict[str, Any]) -> None:
    """Build an engine; then replay its step for each line "requests context", and answer with ms a step."""
    import pelton

    if not Path(pelton.__file__).is_relative_to(tree):
        sys.exit(f"pelton is {pelton.__file__}, not that of {tree}: run this where it is not installed with pip -e")
    fill_as_vllm()
    given = {**OPTIONS["pelton"], "max_num_seqs": max_requests, "gpu_memory_utilization": 0.4, **options}
    llm = pelton.LLM(str(with_tokenizer(config)), **given)
    runner = llm._core.runner
    print("ready", flush=True)
    for line in sys.stdin:
        num_requests, context = map(int, line.split())
        fill(runner, num_requests, context)
        graphs = runner.graph._captured
        graph = graphs[min(size for size in graphs if size >= num_requests)]
        num = max(4, int(BURST_MS / milliseconds(graph, 4)))
        print("ms", milliseconds(graph, num), flush=True)


@torch.inference_mode()
def fill(runner: Any, num_requests: int, context: int) -> None:
    """Have the step's inputs say that requests have so many tokens, each in blocks of its own if there are so many."""
    inputs, size = runner.graph.buffers.device, runner.kv.block_size
    num_blocks = -(-context // size)
    some = torch.arange(num_requests * num_blocks, device=runner.device) % (runner.kv.layers[0].key.shape[0] - 1)
    table = 1 + some.view(num_requests, num_blocks)
    inputs.query_starts[: num_requests + 1] = torch.arange(num_requests + 1, device=runner.device)
    inputs.query_starts[num_requests + 1 :] = num_requests
    inputs.context_lens[:num_requests] = context
    inputs.positions[:num_requests] = context - 1
    for group in inputs.groups:
        group.slots.zero_()
        group.slots[:num_requests] = table[:, -1] * size + (context - 1) % size
        group.block_table[:num_requests, :num_blocks] = table


def milliseconds(graph: torch.cuda.CUDAGraph, num: int) -> float:
    """Of one of so many replays."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(num):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / num


if __name__ == "__main__":
    main()
