"""Measures pelton and vLLM in turn on this GPU, with random weights, and holds pelton to its bars.

    python benchmarks/gpu_peers.py --configs DIR [--vllm DIR] [--only NAME,...] [--to FILE]

--configs: a folder with one for each model, which holds its config.json. --vllm: a folder to import vLLM from, if it is
not installed. --only: the runs of these names. Each run is a fresh process of gpu_engine.py; what is compared runs
next to each other. The figures, the bars and the machine are written to --to after each run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import read_speed

HERE = Path(__file__).parent
RUN_TIMEOUT_S = 400
FIGURES = {  # of the parts of gpu_engine.py
    "a": "ms_per_step", "d": "ms_per_step", "b": "prefill_tokens_per_s", "c": "output_tokens_per_s",
    "e": "ms_to_token", "f": "ms_to_token", "start": "to_first_token_s",
}  # fmt: skip
LLAMA, LLAMA_GPTQ, QWEN, GEMMA = "llama-3.1-8b", "llama-3.1-8b-gptq4", "qwen2.5-7b", "gemma-3-12b"
Figures = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One process of gpu_engine.py."""

    name: str
    engine: str
    config: str
    parts: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: float = 16.0  # of a number of its layers
    num_gpus: int = 1

    def floor_ms(self, configs: Path, gb_per_s: float) -> float:
        """Reading its weights once."""
        config = json.loads((configs / self.config / "config.json").read_text())
        return weight_bytes(config, self.bits) / self.num_gpus / gb_per_s / 1e6


RUNS = [
    Run("llama", "pelton", LLAMA, "abdefc"),
    Run("llama vllm", "vllm", LLAMA, "abdefc"),
    Run("llama deterministic", "pelton", LLAMA, "abdefc", {"deterministic": True}),
    Run("llama on two", "pelton", LLAMA, "a", {"tensor_parallel_size": 2}, num_gpus=2),
    Run("llama gptq", "pelton", LLAMA, "abdefc", {"quantization": "gptq"}, 4 + 16 / 128),
    Run("llama gptq vllm", "vllm", LLAMA_GPTQ, "abdefc", {"dtype": "float16"}, 4 + 16 / 128),
    Run("llama gptq deterministic", "pelton", LLAMA, "abdefc", {"quantization": "gptq", "deterministic": True},
        4 + 16 / 128),
    Run("llama awq", "pelton", LLAMA, "a", {"quantization": "awq"}, 4 + 32 / 128),
    Run("llama nf4", "pelton", LLAMA, "a", {"quantization": "bitsandbytes"}, 4 + 32 / 64),
    Run("llama q4_k", "pelton", LLAMA, "a", {"quantization": "gguf"}, 4.5),
    Run("qwen", "pelton", QWEN, "a"),
    Run("qwen vllm", "vllm", QWEN, "a"),
    Run("gemma", "pelton", GEMMA, "ac"),
    Run("gemma vllm", "vllm", GEMMA, "ac"),
]


@dataclass(frozen=True)
class Bar:
    """What a figure of pelton's has to reach: `needed` times that of `theirs` or, without it, at most `needed`."""

    ours: str  # run
    part: str
    needed: float
    theirs: str | None = None

    def value(self, figures: Mapping[str, Figures]) -> float | None:
        """What is held against `needed`, if it was measured: larger is better with a peer."""
        ours = figures.get(self.ours, {}).get(self.part)
        theirs = None if self.theirs is None else figures.get(self.theirs, {}).get(self.part)
        if ours is None or (self.theirs is not None and theirs is None):
            return None
        if theirs is None:
            return ours
        return theirs / ours if FIGURES[self.part].startswith("ms") else ours / theirs

    def line(self, value: float) -> str:
        """For the table."""
        ours = f"{self.ours} {self.part}"
        if self.theirs is None:
            return f"{ours}: {value:.1f}, at most {self.needed:g}: {verdict(value <= self.needed)}"
        return f"{ours}: {value:.2f} x {self.theirs}, {self.needed:.3g} asked: {verdict(value >= self.needed)}"


BARS = [
    Bar("llama", "a", 1.2, "llama vllm"), Bar("qwen", "a", 1.2, "qwen vllm"), Bar("gemma", "a", 1.2, "gemma vllm"),
    *(Bar(f"llama {layout}", "a", 2.0, "llama gptq vllm") for layout in ("gptq", "awq", "nf4", "q4_k")),
    Bar("llama", "d", 1.15, "llama vllm"), Bar("llama gptq", "d", 1.3, "llama gptq vllm"),
    Bar("llama", "b", 1.0, "llama vllm"), Bar("llama", "c", 1.1, "llama vllm"), Bar("gemma", "c", 1.1, "gemma vllm"),
    Bar("llama gptq", "c", 1.0, "llama gptq vllm"),
    *(Bar(run, part, 1.0, f"{run} vllm") for run in ("llama", "llama gptq") for part in "ef"),
    *(Bar("llama deterministic", part, 1 / 1.2, "llama") for part in "abdefc"),
    *(Bar("llama gptq deterministic", part, 1 / 1.2, "llama gptq") for part in "abdefc"),
    Bar("llama on two", "a", 1.5, "llama"), Bar("llama", "start", 15.0),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vllm", type=Path, metavar="DIR")
    parser.add_argument("--only", default="", metavar="NAME,...", help="names of runs")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "gpu_peers.json", metavar="FILE")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [run.name for run in RUNS]
    found = {"machine": machine(), "date": str(datetime.date.today()), "read_gb_per_s": round(read_speed())}
    torch.cuda.empty_cache()
    print(json.dumps(found), flush=True)
    figures: dict[str, Figures] = {}
    for run in RUNS:
        if run.name not in names or run.num_gpus > torch.cuda.device_count():
            continue
        figures[run.name] = measure(run, args.configs / run.config, args.vllm)
        floor_ms = round(run.floor_ms(args.configs, found["read_gb_per_s"]), 2)
        print(run.name, figures[run.name], f"floor of a: {floor_ms} ms", flush=True)
        figures[run.name]["floor_ms"] = floor_ms
        bars = [bar.line(value) for bar in BARS if (value := bar.value(figures)) is not None]
        args.to.write_text(json.dumps(found | {"figures": figures, "bars": bars}, indent=1) + "\n")
    print(*bars, sep="\n")


def measure(run: Run, config: Path, vllm: Path | None) -> Figures:
    """The figures of a run, of as many parts as it got through."""
    command = [sys.executable, str(HERE / "gpu_engine.py"), str(config), "--engine", run.engine, "--parts", run.parts,
               "--options", json.dumps(run.options)]
    paths = [str(HERE.parent), *([str(vllm)] if vllm and run.engine == "vllm" else [])]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out, err = (str(text, "utf-8") if isinstance(text, bytes) else "" for text in (late.stdout, late.stderr))
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"part"')]
    if len(lines) <= len(run.parts):
        print(f"{run.name} stopped early:", *err.splitlines()[-12:], sep="\n", flush=True)
    return {line["part"]: line[FIGURES[line["part"]]] for line in lines}


def weight_bytes(config: Mapping[str, Any], bits: float) -> float:
    """Of all layers with so many bits a number, and of the vocabulary in 16, which a step reads."""
    config = config.get("text_config", config)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim") or width // heads
    attention = width * head_size * 2 * (heads + config["num_key_value_heads"])
    layer = attention + 3 * width * config["intermediate_size"]
    return config["num_hidden_layers"] * layer * bits / 8 + 2 * width * config["vocab_size"]


def machine() -> str:
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "triton"))
    return f"one {name} ({memory / 1e9:.0f} GB), {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def verdict(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


if __name__ == "__main__":
    main()
