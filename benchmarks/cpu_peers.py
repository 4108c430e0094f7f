"""Measures pelton, llama.cpp and vLLM's CPU build in turn on this machine, and holds pelton to its bars.

    python benchmarks/cpu_peers.py --peers DIR --models DIR [--only WORD,...] [--without WORD,...] [--rounds N]

--peers: a folder with llama.cpp/bin/llama-bench, llama.cpp/bin/llama-batched-bench and vllm-venv/bin/python.
--models: where the models are kept that have to be made, 3 GB. --only: the bars of these runs of pelton's
(smollm2-q4_1, gemma-3-4b, footprint, ...), with the peers they name; --without: no runs of these (vllm, ...).

Each round makes every measurement once, in fresh processes, with peers next to each other. Ratios are taken within a
round, and their median counts: a machine that is shared changes from one minute to the next.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pelton.weights import hub
from pelton.weights.files import open_model

HERE = Path(__file__).parent
KV_BYTES = 256 << 20  # of the runs whose memory is measured
SERVE_TIMEOUT_S = 120
Figures = dict[str, float]


@dataclass(frozen=True)
class Bar:
    """What a figure of pelton's has to reach: `needed` times a peer's or, without a peer, at most `needed`."""

    ours: str  # a measurement
    figure: str
    needed: float
    theirs: str | None = None  # a measurement
    their_figure: str | None = None  # where it has another name

    def values(self, rounds: Sequence[dict[str, Figures]]) -> list[float]:
        """What is held against `needed`, for each round."""
        ours = [figures[self.ours][self.figure] for figures in rounds]
        if self.theirs is None:
            return ours
        theirs = [figures[self.theirs][self.their_figure or self.figure] for figures in rounds]
        return [mine / other for mine, other in zip(ours, theirs, strict=True)]

    def verdict(self, rounds: Sequence[dict[str, Figures]]) -> dict[str, Any]:
        """The bar as a line of the result."""
        values = self.values(rounds)
        value = statistics.median(values)
        met = value <= self.needed if self.theirs is None else value >= self.needed
        return {"ours": self.ours, "figure": self.figure, "theirs": self.theirs, "needed": self.needed,
                "value": value, "met": met, "rounds": values}


BARS = [
    Bar("pelton smollm2-q4_1", "decode_1", 2.0, "llama.cpp smollm2-q4_1"),
    Bar("pelton smollm2-q4_1", "prefill_512", 9.0, "llama.cpp smollm2-q4_1"),
    Bar("pelton smollm2-q4_1", "decode_16", 5.0, "llama.cpp smollm2-q4_1"),
    Bar("pelton smollm2-q4_1", "prefill_512", 1.4, "vllm smollm2-bf16"),
    Bar("pelton smollm2-q4_1", "decode_16", 2.0, "vllm smollm2-bf16"),
    Bar("pelton smollm2-bf16", "decode_1", 2.0, "vllm smollm2-bf16"),
    Bar("pelton smollm2-bf16", "prefill_512", 1.1, "vllm smollm2-bf16"),
    Bar("pelton gemma-3-270m", "decode_1", 1.6, "llama.cpp gemma-3-270m"),
    Bar("pelton gemma-3-270m", "prefill_512", 4.0, "llama.cpp gemma-3-270m"),
    Bar("pelton gemma-3-4b", "weights_gb_per_s", 0.85, "memory", "read_gb_per_s"),
    Bar("pelton gemma-3-4b", "prefill_128", 4.0, "llama.cpp gemma-3-4b"),
    Bar("footprint smollm2-q4_1", "beside_file_and_kv_mb", 300),
    Bar("footprint gemma-3-4b", "beside_file_and_kv_mb", 300),
    Bar("footprint gemma-3-4b", "load_s_per_gb", 1.0),
    Bar("serve smollm2-q4_1", "ready_s", 3.0),
]


class Bench:
    """How each measurement is made, and where what it needs lies."""

    def __init__(self, peers: Path, models: Path) -> None:
        self.llama_bin = peers / "llama.cpp/bin"
        self.vllm_python = peers / "vllm-venv/bin/python"
        self.models = models
        self.num_threads = len(os.sched_getaffinity(0))
        self.versions = {"pelton": run(["git", "-C", HERE, "describe", "--always", "--dirty"]).strip()}
        models.mkdir(parents=True, exist_ok=True)

    # --- models -----------------------------------------------------------------------------------------------------

    @cached_property
    def smollm2(self) -> Path:
        return hub.resolve("smollm2-135m-instruct")

    @cached_property
    def gemma(self) -> Path:
        return hub.resolve("gemma-3-270m")

    @cached_property
    def smollm2_bf16(self) -> Path:
        folder = self.models / "smollm2-135m-bf16"
        if not (folder / "model.safetensors").exists():
            run([sys.executable, HERE / "make_safetensors.py", self.smollm2, folder])
        return folder

    @cached_property
    def gemma_4b(self) -> Path:
        file = self.models / "gemma-3-4b-random-q4_k_m.gguf"
        if not file.exists():
            run([sys.executable, HERE / "make_gguf.py", file])
        return file

    # --- measurements -----------------------------------------------------------------------------------------------

    def engine(
        self, name: str, model: Path, *figures: str, repeats: int = 3, new: int = 128, **options: object
    ) -> Figures:
        """See engine_figures.py. options: of the LLM class."""
        python, environment = sys.executable, dict(os.environ)
        if name == "vllm":
            python, options = str(self.vllm_python), {"dtype": "bfloat16"}
            environment.pop("PYTHONPATH", None)
        command = [python, HERE / "engine_figures.py", name, model, *figures, "--repeats", repeats, "--new", new,
                   "--options", json.dumps(options)]
        result = last_json(run(command, environment))
        self.versions.setdefault(name, result.pop("version"))
        return result

    def llama(self, model: Path, prompt: int, new: int = 128, repeats: int = 3) -> Figures:
        """llama-bench: one prompt, then decoding from an empty context."""
        command = [self.llama_bin / "llama-bench", "-m", model, "-p", prompt, "-n", new, "-t", self.num_threads,
                   "-r", repeats, "-o", "json"]
        prefill, decode = json.loads(run(command))
        self.versions["llama.cpp"] = prefill["build_commit"]
        return {f"prefill_{prompt}": statistics.median(prefill["samples_ts"]),
                "decode_1": statistics.median(decode["samples_ts"])}

    def llama_batched(self, model: Path) -> Figures:
        """llama-batched-bench: 16 requests of 128 and 128 tokens."""
        command = [self.llama_bin / "llama-batched-bench", "-m", model, "-c", 8192, "-npp", 128, "-ntg", 128,
                   "-npl", 16, "-t", self.num_threads, "-tb", self.num_threads, "--output-format", "jsonl"]
        return {"decode_16": last_json(run(command))["speed_tg"]}

    def memory(self) -> Figures:
        """See read_memory.c."""
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "read_memory"
            run(["cc", "-O3", "-march=native", "-pthread", HERE / "read_memory.c", "-o", program])
            read, fresh = run([program, self.num_threads]).split()
            return {"read_gb_per_s": float(read), "fresh_s_per_gb": float(fresh)}

    def pelton_4b(self) -> Figures:
        """Decoding reads every weight once for each token: the embedding's rows too, as they are the head's."""
        figures = self.engine("pelton", self.gemma_4b, "decode_1", "prefill_128", repeats=1, new=32)
        weight_bytes = sum(tensor.data.size for tensor in open_model(self.gemma_4b).tensors.values())
        return {**figures, "weights_gb_per_s": figures["decode_1"] * weight_bytes / 1e9}

    def footprint(self, model: Path) -> Figures:
        """Time to load a file that was read before, and memory after a prompt and an answer."""
        warm(model)
        options = {"repeats": 1, "new": 32, "kv_cache_memory_bytes": KV_BYTES}
        figures = self.engine("pelton", model, "prefill_512", "decode_1", **options)
        file_bytes = model.stat().st_size
        return {
            "load_s": figures["load_s"],
            "load_s_per_gb": figures["load_s"] / file_bytes * 1e9,
            "peak_mb": figures["peak_bytes"] / 1e6,
            "beside_file_and_kv_mb": (figures["peak_bytes"] - file_bytes - KV_BYTES) / 1e6,
        }

    def serve(self, model: Path) -> Figures:
        """Seconds from `pelton serve` to a green /health/ready, and those that `import pelton` takes."""
        warm(model)
        start = time.perf_counter()
        run([sys.executable, "-c", "import pelton"])
        import_s = time.perf_counter() - start
        return {"import_s": import_s, "ready_s": seconds_to_ready(model)}


SPEEDS = ("decode_1", "prefill_512", "decode_16")
MEASUREMENTS: dict[str, Callable[[Bench], Figures]] = {  # in the order of a round
    "pelton smollm2-q4_1": lambda bench: bench.engine("pelton", bench.smollm2, *SPEEDS),
    "llama.cpp smollm2-q4_1": lambda bench: bench.llama(bench.smollm2, 512) | bench.llama_batched(bench.smollm2),
    "pelton smollm2-bf16": lambda bench: bench.engine("pelton", bench.smollm2_bf16, *SPEEDS),
    "vllm smollm2-bf16": lambda bench: bench.engine("vllm", bench.smollm2_bf16, *SPEEDS),
    "pelton gemma-3-270m": lambda bench: bench.engine("pelton", bench.gemma, "decode_1", "prefill_512"),
    "llama.cpp gemma-3-270m": lambda bench: bench.llama(bench.gemma, 512),
    "memory": Bench.memory,
    "pelton gemma-3-4b": Bench.pelton_4b,
    "llama.cpp gemma-3-4b": lambda bench: bench.llama(bench.gemma_4b, 128, new=32, repeats=1),
    "footprint smollm2-q4_1": lambda bench: bench.footprint(bench.smollm2),
    "footprint gemma-3-4b": lambda bench: bench.footprint(bench.gemma_4b),
    "serve smollm2-q4_1": lambda bench: bench.serve(bench.smollm2),
}


def main() -> None:
    args = parse_args()
    bench = Bench(args.peers, args.models)
    bars = [bar for bar in BARS if not args.only or words(bar.ours) & args.only]
    wanted = {name for bar in bars for name in (bar.ours, bar.theirs)}
    names = [name for name in MEASUREMENTS if name in wanted and not words(name) & args.without]
    bars = [bar for bar in bars if {bar.ours, bar.theirs} <= {*names, None}]
    about = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": bench.versions}
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"other processes are at work (load {load:.1f}): these figures are not to be kept", file=sys.stderr)
    rounds: list[dict[str, Figures]] = []
    for number in range(args.rounds):
        rounds.append({})
        for name in names:
            rounds[-1][name] = MEASUREMENTS[name](bench)
            shown = "  ".join(f"{figure} {value:,.4g}" for figure, value in rounds[-1][name].items())
            print(f"round {number + 1}  {name}: {shown}", file=sys.stderr, flush=True)
        result = {**about, "figures": summary(rounds), "bars": [bar.verdict(rounds) for bar in bars]}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rounded(result), indent=2) + "\n")
    show(result)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(), metavar="DIR")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", type=words, default=set(), metavar="WORD,...")
    parser.add_argument("--without", type=words, default=set(), metavar="WORD,...")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, default=HERE / "results/cpu_peers.json", metavar="FILE.json")
    return parser.parse_args()


def words(text: str) -> set[str]:
    """"a,b c" -> {"a", "b", "c"}."""
    return set(text.replace(",", " ").split())


# --- processes ------------------------------------------------------------------------------------------------------


def run(command: Sequence[object], environment: dict[str, str] | None = None) -> str:
    """What a program prints; if it fails, the end of what it complained about."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout


def last_json(output: str) -> dict[str, Any]:
    """The last line of the output that is an object."""
    value: dict[str, Any] = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    return value


def warm(file: Path) -> None:
    """Bring a file into the system's cache."""
    with file.open("rb") as stream:
        while stream.read(1 << 24):
            pass


def seconds_to_ready(model: Path) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-P", "-m", "pelton", "serve", str(model), "--port", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while time.perf_counter() - start < SERVE_TIMEOUT_S:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2):
                    return time.perf_counter() - start
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.02)
        sys.exit(f"pelton serve was not ready after {SERVE_TIMEOUT_S} s")
    finally:
        server.terminate()
        server.wait(30)


# --- the result -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a reader has to know to judge the figures."""
    about_cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in about_cpu.items()}["model name"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": memory / 2**30,
            "python": platform.python_version(), "system": platform.platform(), "load_before": os.getloadavg()[0]}


def summary(rounds: Sequence[dict[str, Figures]]) -> dict[str, dict[str, dict[str, Any]]]:
    """measurement -> figure -> its median and its samples, one a round."""
    samples = {name: {figure: [r[name][figure] for r in rounds] for figure in rounds[0][name]} for name in rounds[0]}
    return {
        name: {figure: {"median": statistics.median(values), "samples": values} for figure, values in figures.items()}
        for name, figures in samples.items()
    }


def rounded(value: Any) -> Any:
    """Numbers with the digits that mean something."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(result: dict[str, Any]) -> None:
    """Two tables: all figures, and the bars."""
    for name, figures in result["figures"].items():
        for figure, values in figures.items():
            samples = "  ".join(f"{sample:,.4g}" for sample in values["samples"])
            print(f"{name:24} {figure:22} {values['median']:12,.4g}   {samples}")
    print()
    for bar in result["bars"]:
        at = f"at least {bar['needed']:g} x {bar['theirs']}" if bar["theirs"] else f"at most {bar['needed']:g}"
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['ours']:24} {bar['figure']:22} {bar['value']:9,.3g}   {at}")


if __name__ == "__main__":
    main()
