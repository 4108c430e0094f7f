"""What the machine offers, and what fails on it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from pelton.config import DeviceConfig, DeviceFacts
from pelton.errors import ConfigError, DeviceError, DeviceLostError, OutOfMemoryError
from pelton.ops import gpu
from pelton.ops.native import native
from pelton.ops.parallel import ALONE, Ranks

T = TypeVar("T")

# What libraries say that do not raise torch's own error: the driver, Triton, cuBLAS.
NO_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


def probe_device(kind: str, visible: str | None = None, ranks: Ranks = ALONE) -> DeviceFacts:
    """Facts about "cpu", "cuda", or for "auto" the best there is. visible: CUDA_VISIBLE_DEVICES.

    Each of several ranks has a GPU of its own (the first sees all of them, the others theirs), or a share of the CPU.
    ConfigError if there is no such device, DeviceError if it cannot be used.
    """
    has_cuda = torch.cuda.is_available()
    if kind == "cuda" and not has_cuda:
        raise ConfigError(f"--device cuda: {_why_no_gpu(visible)}; or use --device cpu")
    cpus = _usable_cpus()
    num_cores = _num_cores(cpus)
    if kind == "cuda" or (kind == "auto" and has_cuda):
        num_devices = torch.cuda.device_count()
        if ranks.rank == 0 and ranks.size > max(1, num_devices):
            raise ConfigError(
                f"--tensor-parallel-size {ranks.size}: torch sees {num_devices} GPU{'s' * (num_devices > 1)}; use "
                f"{num_devices}, or name more in CUDA_VISIBLE_DEVICES if it is set"
            )
        free_bytes = _open_gpu()
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


def _why_no_gpu(visible: str | None) -> str:
    """Why torch sees no GPU, and what helps."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install one with it (pip install torch, on Linux)"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        why = ""
    except RuntimeError as error:
        why = first_line(error)
    if "driver" in why and "too old" in why:
        found = re.search(r"found version (\d+)", why)  # 12040 is 12.4
        known = f"of CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10} " if found else ""
        return (
            f"the NVIDIA driver {known}is too old for this torch, which is for CUDA {torch.version.cuda}; update the "
            "driver, or install a torch for the CUDA that it knows"
        )
    if "no NVIDIA driver" in why:
        return "there is no NVIDIA driver; install it (a container is to be started with --gpus all)"
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine; unset it, or name one as nvidia-smi does"
    return f"torch sees no GPU{f' ({why})' if why else ''}; see whether nvidia-smi does"


def _open_gpu() -> int:
    """Begin to use the GPU; returns its free memory in bytes. DeviceError if it does not work."""
    try:
        torch.ones(1, device="cuda").item()
        return torch.cuda.mem_get_info()[0]
    except RuntimeError as error:
        why = first_line(error)
    if "no kernel image" in why:
        major, minor = torch.cuda.get_device_capability()
        raise DeviceError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name()} (compute capability {major}."
            f"{minor}); install a torch for an older CUDA, or use --device cpu"
        )
    raise DeviceError(
        f"the GPU cannot be opened ({why}); see with nvidia-smi who uses it and its memory, or use --device cpu"
    )


def guard(compute: Callable[[], T], doing: str, remedy: str) -> T:
    """What `compute` returns. If a GPU fails: OutOfMemoryError "... ran out {doing}; {remedy}", when memory that torch
    keeps has been released; DeviceLostError if it will not answer again. Other errors pass."""
    try:
        return compute()
    except Exception as error:
        failure = _failure_of_gpu(error, doing, remedy)
        if failure is None:
            raise
    # Here no traceback holds the tensors of what failed any more.
    if isinstance(failure, OutOfMemoryError):
        torch.cuda.empty_cache()
    raise failure


def _failure_of_gpu(error: BaseException, doing: str, remedy: str) -> DeviceError | None:
    if is_out_of_memory(error):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        tried = f", {asked[1]} were asked for in vain" if asked else ""
        return OutOfMemoryError(f"GPU memory ran out {doing}{tried}; {remedy}")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # and so will whatever is called next
            return DeviceLostError(
                f"the GPU failed and does not answer again ({first_line(error)}); only a new process can use it"
            )
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also where one of another kind followed from it, as in a capture that is broken off."""
    while error is not None:
        is_ours = isinstance(error, (torch.OutOfMemoryError, OutOfMemoryError))
        if is_ours or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


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


def free_memory(kind: str) -> int:
    """Bytes that are free on a device: what torch keeps of a GPU's memory without using it, too."""
    if kind == "cpu":
        return _free_memory()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


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
