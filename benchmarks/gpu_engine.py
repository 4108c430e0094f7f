"""Times an engine with vLLM's Python interface on a GPU, with random weights; prints a line of JSON for each part.

    python benchmarks/gpu_engine.py CONFIG_DIR [--engine vllm] [--parts abdefc] [--options JSON]

a: one request, 128 tokens in, 256 out, ms a step   b: one prompt of 8,192, tokens/s
d: 32 requests, 128 in, 256 out, ms a step          c: 256 requests, 512 in, 256 out, tokens/s
e, f: one prompt of 128 or 1,024, ms to its token
CONFIG_DIR holds a config.json. Before these: seconds to import, to load, and to the first token.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from engine_figures import timer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
COMMON = {"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 8320, "max_num_seqs": 256,
          "enable_prefix_caching": False}  # fmt: skip
OPTIONS = {  # of LLM; vLLM's step is as large as it makes it on an H200 itself
    "pelton": {**COMMON, "max_num_batched_tokens": 8192},
    "vllm": {**COMMON, "max_num_batched_tokens": 16384, "skip_tokenizer_init": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--engine", choices=tuple(OPTIONS), default="pelton")
    parser.add_argument("--parts", default="abdc")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="arguments of LLM")
    args = parser.parse_args()

    if args.engine == "vllm":
        os.environ.update({name: value for name, value in VLLM_ENVIRONMENT.items() if name not in os.environ})
    start = time.perf_counter()
    engine = importlib.import_module(args.engine)
    if args.engine == "pelton" and args.options.get("tensor_parallel_size", 1) == 1:
        fill_as_vllm()  # in this process alone
    folder = args.config if args.engine == "vllm" else with_tokenizer(args.config)
    options = {**OPTIONS[args.engine], **args.options}
    imported = time.perf_counter()
    llm = engine.LLM(model=str(folder), **options)
    loaded = time.perf_counter()
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    seconds = timer(engine, llm, vocab_size - 100, detokenize=False)
    seconds(1, 16, 1)
    first = time.perf_counter()
    tell("start", import_s=imported - start, load_s=loaded - imported, to_first_token_s=first - start)

    def median(num: int, num_prompt: int, num_new: int) -> float:
        return statistics.median(seconds(num, num_prompt, num_new) for _ in range(args.repeats))

    for part in args.parts:
        if part in "ad":
            num = 1 if part == "a" else 32
            seconds(num, 128, 16)
            tell(part, ms_per_step=1e3 * (median(num, 128, 256) - median(num, 128, 1)) / 255)
        elif part == "b":
            seconds(1, 8192, 1)
            tell(part, prefill_tokens_per_s=8192 / median(1, 8192, 1))
        elif part in "ef":
            num_prompt = 128 if part == "e" else 1024
            seconds(1, num_prompt, 1)
            tell(part, ms_to_token=1e3 * median(1, num_prompt, 1))
        else:
            seconds(256, 512, 8)
            tell(part, output_tokens_per_s=256 * 256 / seconds(256, 512, 256))


def fill_as_vllm() -> None:
    """Have pelton's random numbers uniform within 0.001, norms too, as vLLM's are: how much power a GPU takes to
    multiply them, and so its clock, depends on the numbers (1% of 256 requests at once)."""
    import torch

    from pelton.weights.dummy import DummyCheckpoint

    def numbers(self: DummyCheckpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.rand(shape, generator=self._generator(name), device=self.device) - 0.5) * 0.002

    DummyCheckpoint.numbers = numbers


def tell(part: str, **figures: float) -> None:
    print(json.dumps({"part": part, **{name: round(value, 4) for name, value in figures.items()}}), flush=True)


def with_tokenizer(config: Path) -> Path:
    """A copy of the folder with the smallest tokenizer there is: prompts are given as token ids."""
    folder = Path(tempfile.mkdtemp())
    shutil.copy(config / "config.json", folder)
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": BYTES,
                 "post_processor": None, "decoder": BYTES,
                 "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads would keep the process
