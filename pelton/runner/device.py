"""What the machine offers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pelton.config import DeviceConfig, DeviceFacts
from pelton.errors import ConfigError
from pelton.ops import gpu
from pelton.ops.native import native
from pelton.ops.parallel import ALONE, Ranks


def probe_device(kind: str, ranks: Ranks = ALONE) -> DeviceFacts:
    """Facts about "cpu", "cuda", or for "auto" the best there is. ConfigError if there is no such device.

    Each of several ranks has a GPU of its own (the first sees all of them, the others theirs), or a share of the CPU.
    """
    has_cuda = torch.cuda.is_available()
    if kind == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu or install torch with CUDA")
    cpus = _usable_cpus()
    num_cores = _num_cores(cpus)
    if kind == "cuda" or (kind == "auto" and has_cuda):
        num_devices = torch.cuda.device_count()
        if ranks.rank == 0 and num_devices < ranks.size:
            raise ConfigError(
                f"--tensor-parallel-size {ranks.size}: torch sees {num_devices} GPU{'s' * (num_devices > 1)}; use "
                f"{num_devices}, or name more in CUDA_VISIBLE_DEVICES if it is set"
            )
        free_bytes, _ = torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        name, has_bf16 = torch.cuda.get_device_name(), capability >= (8, 0)
        has_kernels = not gpu.why_not()
        has_float8 = has_kernels and capability >= (8, 9)
        return DeviceFacts("cuda", name, free_bytes, has_bf16, num_cores, (), has_float8, has_kernels)
    has_kernels = native is not None
    fast = native.has_bf16_dot() if native is not None else _torch_has_fast_bf16()
    free_bytes, num_cores = _free_memory() // ranks.size, max(1, num_cores // ranks.size)
    return DeviceFacts("cpu", _cpu_name(), free_bytes, fast, num_cores, cpus, keeps_formats=has_kernels)


def least_of_all(facts: DeviceFacts, ranks: Ranks) -> DeviceFacts:
    """What all ranks can count on, so that all decide alike."""
    mine = [facts.free_bytes, facts.has_fast_bf16, facts.has_float8, facts.keeps_formats]
    free_bytes, *flags = ranks.least(mine, torch.device(facts.kind))
    has_fast_bf16, has_float8, keeps_formats = map(bool, flags)
    return replace(
        facts, free_bytes=free_bytes, has_fast_bf16=has_fast_bf16, has_float8=has_float8, keeps_formats=keeps_formats
    )


def use_cpu(config: DeviceConfig, isa: str | None) -> str:
    """Set up the threads and the instruction set the kernels run with; returns a line that says so.

    ConfigError for an instruction set the machine lacks.
    """
    torch.set_num_threads(config.num_threads)
    if native is None:
        return f"{config.num_threads} threads"
    if isa is not None and isa not in native.supported_isas():
        raise ConfigError(
            f"PELTON_CPU_ISA={isa}: this processor runs {', '.join(native.supported_isas())}; use one of these, or "
            "unset it"
        )
    native.set_isa(isa or native.supported_isas()[0])
    native.set_threads(config.num_threads, list(config.cpus))
    where = f" on processors {', '.join(map(str, config.cpus))}" if config.cpus else ""
    return f"kernels for {native.isa()}, {config.num_threads} threads{where}, activations {config.activations}"


def _usable_cpus() -> tuple[int, ...]:
    """The processors this process may run on: one of each core first, then their siblings."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    cpus = sorted(os.sched_getaffinity(0))
    firsts = {_core_of(cpu): cpu for cpu in reversed(cpus)}.values()
    return tuple(sorted(cpus, key=lambda cpu: (cpu not in firsts, cpu)))


def _core_of(cpu: int) -> str:
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return siblings.read_text().strip() if siblings.exists() else str(cpu)


def _num_cores(cpus: Sequence[int]) -> int:
    """Cores among the processors, cut to the time that the cgroup grants."""
    cores = len({_core_of(cpu) for cpu in cpus})
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        granted, _, period = quota.read_text().strip().partition(" ")
        if granted.isdecimal() and period.isdecimal():
            cores = min(cores, max(1, math.ceil(int(granted) / int(period))))
    return cores


def _torch_has_fast_bf16() -> bool:
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
