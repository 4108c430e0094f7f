"""Times an engine with vLLM's Python interface on the CPU; prints one line of JSON.

    python benchmarks/engine_figures.py {pelton,vllm} MODEL FIGURE ... [--repeats N] [--new N] [--options JSON]

prefill_P: tokens/s of one prompt of P tokens; decode_R: tokens/s of R requests together, `--new` tokens each after a
prompt of 128. Each is the median of `--repeats`. Besides: import_s and load_s of the engine, its version, and
peak_bytes of memory when all is done. cpu_peers.py starts this in a fresh process for each measurement.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
Seconds = Callable[[int, int, int], float]  # for (requests, tokens of each prompt, tokens to generate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("pelton", "vllm"))
    parser.add_argument("model")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help="prefill_P or decode_R")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--new", type=int, default=128, metavar="N", help="tokens that a decode figure counts")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="arguments of LLM")
    args = parser.parse_args()

    start = time.perf_counter()
    engine = import_engine(args.engine)
    imported = time.perf_counter()
    llm = engine.LLM(model=args.model, max_model_len=1024, enable_prefix_caching=False, **args.options)
    result = {"import_s": imported - start, "load_s": time.perf_counter() - imported}
    seconds = timer(engine, llm)
    seconds(1, 32, 8)  # warm up
    for name in args.figures:
        result[name] = statistics.median(figure(name, seconds, args.new) for _ in range(args.repeats))
    result["peak_bytes"] = peak_bytes()
    print(json.dumps({**result, "version": getattr(engine, "__version__", "")}))


def figure(name: str, seconds: Seconds, num_new: int) -> float:
    """Tokens/s. The first token of a completion comes with the prompt, so decoding is what the others take."""
    kind, _, number = name.partition("_")
    if kind == "prefill":
        return int(number) / seconds(1, int(number), 1)
    return int(number) * num_new / (seconds(int(number), 128, 1 + num_new) - seconds(int(number), 128, 1))


def import_engine(name: str) -> Any:
    """The engine's module, with all that it would import while a model loads."""
    if name == "pelton":
        from pelton.door import BUILDER
        from pelton.engine.host import load_builder

        load_builder(BUILDER)
    else:
        os.environ.update(VLLM_ENVIRONMENT)
    engine = importlib.import_module(name)
    _ = engine.LLM  # both engines import it when it is first named
    return engine


def timer(engine: Any, llm: Any, most: int = 40_000, **options: Any) -> Seconds:
    """Times completions of random prompts, no two alike, of token ids below `most`. options: of SamplingParams."""
    rng = random.Random(0)

    def seconds(num_requests: int, num_prompt: int, num_new: int) -> float:
        prompts = [{"prompt_token_ids": [rng.randrange(100, most) for _ in range(num_prompt)]}
                   for _ in range(num_requests)]
        params = engine.SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, **options)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != num_new for output in outputs):
            raise RuntimeError(f"not every request got its {num_new} tokens")
        return elapsed

    return seconds


def peak_bytes() -> int:
    """The most memory this process has had at once, pages of mapped files among it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) * 1024


if __name__ == "__main__":
    main()
