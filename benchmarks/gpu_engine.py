"""Times pelton on a GPU with random weights: the four measurements of vLLM's side, and the time to the first token.

    python benchmarks/gpu_engine.py CONFIG_DIR [--parts abdc] [--options JSON]

a: one request, 128 tokens in, 256 out, ms a step   b: one prompt of 8,192, tokens/s
d: 32 requests, 128 in, 256 out, ms a step          c: 256 requests, 512 in, 256 out, tokens/s
CONFIG_DIR holds a config.json. Prints a line of JSON for each part.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--parts", default="abdc")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="arguments of LLM")
    args = parser.parse_args()

    start = time.perf_counter()
    from pelton import LLM, SamplingParams

    folder = with_tokenizer(args.config)
    options = {
        "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 8320, "max_num_seqs": 256,
        "max_num_batched_tokens": 8192, "enable_prefix_caching": False, **args.options,
    }
    imported = time.perf_counter()
    llm = LLM(model=str(folder), **options)
    loaded = time.perf_counter()
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)

    def seconds(num: int, num_prompt: int, num_new: int) -> float:
        prompts = [{"prompt_token_ids": [rng.randrange(100, vocab_size - 100) for _ in range(num_prompt)]}
                   for _ in range(num)]
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_new, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - begin
        if sum(len(output.outputs[0].token_ids) for output in outputs) != num * num_new:
            raise SystemExit("tokens are missing")
        return took

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
        else:
            seconds(256, 512, 8)
            tell(part, output_tokens_per_s=256 * 256 / seconds(256, 512, 256))


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
