"""What the machine offers."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pelton.config import DeviceFacts
from pelton.errors import ConfigError


def probe_device(kind: str) -> DeviceFacts:
    """Facts about "cpu", "cuda", or for "auto" the best there is. ConfigError if there is no such device."""
    has_cuda = torch.cuda.is_available()
    if kind == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu or install torch with CUDA")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if kind == "cuda" or (kind == "auto" and has_cuda):
        free_bytes, _ = torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        return DeviceFacts("cuda", torch.cuda.get_device_name(), free_bytes, capability >= (8, 0), num_cores)
    return DeviceFacts("cpu", _cpu_name(), _free_memory(), _cpu_has_fast_bf16(), num_cores)


def _cpu_has_fast_bf16() -> bool:
    """Whether torch's matrix products in bfloat16 use instructions of this processor's own."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("bf16"))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "this CPU"


def _free_memory() -> int:
    """Bytes this process may still take: free memory of the machine, cut to what its cgroup leaves."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)
