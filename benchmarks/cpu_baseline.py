"""Times pelton on the CPU with the default model; one JSON file with the machine's description.

    python benchmarks/cpu_baseline.py [--model NAME] [--out benchmarks/results/NAME.json]

decode_1: tokens/s of one request (128 in, 128 out); prefill_512: tokens/s of one prompt of 512; decode_16: tokens/s of
16 requests together; ready_s: from `pelton serve` to a green /health/ready, files warm; import_s: `import pelton`.
All are medians of five, the serve and import times of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from pelton import LLM, SamplingParams

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = engine_figures(args.model, args.dtype)  # first, so that pelton is who loads torch
    result: dict[str, object] = {"model": args.model, "machine": machine(), **figures}
    result["ready_s"] = median(lambda: serve_ready(args.model))
    result["import_s"] = median(import_time)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def machine() -> dict[str, object]:
    import torch

    from pelton.runner.device import probe_device

    device = probe_device("cpu")
    return {"cpu": device.name, "cores": device.num_cores, "memory_gib": round(device.free_bytes / 2**30, 1),
            "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}


def median(measure: Callable[[], float]) -> float:
    return round(statistics.median(measure() for _ in range(REPEATS)), 3)


def engine_figures(model: str, dtype: str) -> dict[str, float]:
    llm = LLM(model=model, dtype=dtype, max_model_len=2048, enable_prefix_caching=False)
    rng = random.Random(0)

    def seconds(num_requests: int, num_prompt: int, num_new: int) -> float:
        prompts = [[rng.randrange(100, 40000) for _ in range(num_prompt)] for _ in range(num_requests)]
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    seconds(2, 32, 8)  # warm up
    return {
        "decode_1": median(lambda: 128 / (seconds(1, 128, 129) - seconds(1, 128, 1))),
        "prefill_512": median(lambda: 512 / seconds(1, 512, 1)),
        "decode_16": median(lambda: 16 * 64 / (seconds(16, 128, 65) - seconds(16, 128, 1))),
    }


def serve_ready(model: str) -> float:
    """Seconds from starting `pelton serve` until /health/ready answers 200."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-m", "pelton", "serve", model, "--port", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    try:
        while time.perf_counter() - start < 120:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2) as reply:
                    if reply.status == 200:
                        return time.perf_counter() - start
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.02)
        raise TimeoutError("the server was not ready after 120 s")
    finally:
        server.terminate()
        server.wait(30)


def import_time() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import pelton"], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
