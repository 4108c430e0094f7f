"""Runs the tests that need a GPU, and the kernels' under compute-sanitizer, and notes what came of it.

    python benchmarks/gpu_checks.py [--only NAME,...] [--limit SECONDS] [--to FILE]

Memory first, which needs the GPU for itself; then kernels and engine; then the sanitizers, side by side, each on some
cases of every test of a file. What is not done after --limit seconds is ended, and it is noted how far it came.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_peers import machine

HERE = Path(__file__).parent
KERNELS, RUNNER = "tests/ops/cuda", "tests/runner"
SANITIZER = "compute-sanitizer"
CASES = 3  # of each test
EXCLUDE = "--kernel-name-exclude"
OTHERS = [arg for name in ("cudnn", "fmha_cutlass", "nvjet") for arg in (EXCLUDE, f"kns={name}")]
"""Attention of cuDNN and torch, products of cuBLAS: what kernels are compared with, where racecheck errs."""
ERROR = r"========= +(?:Invalid|Error|Warning|Race|Program hit)"  # a line of its, which may begin with a test's name
END = r"terminate called|what\(\)|Fatal Python error|CUDA error"  # what a process says that is ended


@dataclass(frozen=True)
class Check:
    """Tests, run by so many processes; or by one under a tool of compute-sanitizer."""

    name: str
    path: str
    processes: int = 1
    tool: str = ""
    without: str = ""  # a test of this name


@dataclass
class Found:
    """What came of it. errors: those that the tool printed; exit_code: None if it was ended."""

    passed: int
    failed: int
    skipped: int
    errors: int
    exit_code: int | None
    seconds: float

    @property
    def is_clean(self) -> bool:
        """As far as it came."""
        return self.failed == self.errors == 0 and not self.exit_code


STAGES = [
    [Check("memory", f"{RUNNER}/test_gpu_memory.py")],
    [Check("kernels", KERNELS, 8), Check("engine", f"{RUNNER}/test_gpu.py", 4)],
    [
        Check("racecheck same_rows", f"{KERNELS}/test_same_rows.py", tool="racecheck", without="all_sizes"),  # minutes
        *(Check(f"memcheck {part}", f"{KERNELS}/test_{part}.py", tool="memcheck")
          for part in ("attention", "few_rows", "gated_rows", "int8", "many_rows", "rows", "same_rows", "sampling")),
        *(Check(f"racecheck {part}", f"{KERNELS}/test_{part}.py", tool="racecheck")
          for part in ("attention", "few_rows", "many_rows", "sampling")),
    ],
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME,...", help="checks of these names")
    parser.add_argument("--limit", type=float, default=240, metavar="SECONDS", help="of a check")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "gpu_checks.json", metavar="FILE")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [check.name for checks in STAGES for check in checks]
    found = {"machine": machine(), "date": str(datetime.date.today())}
    results: dict[str, Found] = {}
    for checks in STAGES:
        asked = [check for check in checks if check.name in names]
        if any(check.tool for check in asked) and shutil.which(SANITIZER) is None:
            sys.exit(f"{SANITIZER} is not on the PATH: it comes with the CUDA toolkit")
        with ThreadPoolExecutor(max(len(asked), 1)) as pool:
            for check, result in zip(asked, pool.map(lambda check: run(check, args.limit), asked), strict=True):
                print(f"{check.name}: {result}", flush=True)
                results[check.name] = result
        found["checks"] = {name: asdict(result) for name, result in results.items()}
        args.to.write_text(json.dumps(found, indent=1) + "\n")
    unclean = [name for name, result in results.items() if not result.is_clean]
    if unclean:
        sys.exit(f"not clean: {', '.join(unclean)}")


def run(check: Check, limit: float) -> Found:
    """Run a check in processes of their own."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-vrN"]
    command = [*pytest, check.path]
    if check.processes > 1:
        command += ["-n", str(check.processes)]
    if check.tool:
        others = OTHERS if check.tool == "racecheck" else []
        command = [SANITIZER, "--tool", check.tool, *others, *pytest, *some_of(collect(check.path, check.without))]
    start = time.perf_counter()
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    if check.tool:
        environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else what lies behind a tensor is torch's too, and no error
    process = subprocess.Popen(
        command, cwd=HERE.parent, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=limit)
        exit_code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool's child too
        out, _ = process.communicate()
        exit_code = None
    if exit_code not in (0, 1, None):  # 1: tests fail
        print(f"{check.name} ended with {exit_code}:", out[-2000:], sep="\n", flush=True)
    for line in out.splitlines():
        if "FAILED" in line or line.startswith("E  ") or re.search(f"{ERROR}|{END}", line):
            print(f"{check.name}: {line}", flush=True)
    cases = [line for line in out.splitlines() if "::" in line]
    counts = [sum(word in line for line in cases) for word in ("PASSED", "FAILED", "SKIPPED")]
    return Found(*counts, num_errors(out), exit_code, round(time.perf_counter() - start, 1))


def num_errors(out: str) -> int:
    """As the tool sums them up, or as many as it had printed when it was ended."""
    sums = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", out)
    return sum(map(int, sums)) if sums else len(re.findall(ERROR, out))


def collect(path: str, without: str) -> list[str]:
    """The cases of a file, as pytest names them, without a test."""
    command = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "--collect-only", "-q", path]
    if without:
        command += ["-k", f"not {without}"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def some_of(cases: Iterable[str]) -> Sequence[str]:
    """CASES of each test: the first, the last, and what lies evenly between."""
    of_test: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        of_test[case.partition("[")[0]].append(case)
    return [
        case for all_cases in of_test.values()
        for case in dict.fromkeys(all_cases[i * (len(all_cases) - 1) // (CASES - 1)] for i in range(CASES))
    ]


if __name__ == "__main__":
    main()
