"""Whether kernels for GPUs run on this machine."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

MIN_CAPABILITY = (8, 0)


@cache
def why_not() -> str:
    """Why they do not, in a line for a person; "" if they do. Ops then run in plain torch."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}: steps run in plain torch, slowly"
        )
    if find_spec("triton") is None:
        return "triton is missing, which torch installs with CUDA on Linux: steps run in plain torch, slowly"
    if nvrtc() is None:
        return f"libnvrtc of the package {nvrtc_package()} is missing: steps run in plain torch, slowly; install it"
    return ""


@cache
def nvrtc() -> ctypes.CDLL | None:
    """The compiler of CUDA C++, in the packages that torch depends on."""
    name = f"libnvrtc.so.{_cuda_major()}"
    for path in (name, *map(str, Path(torch.__file__).parent.parent.glob(f"nvidia/*/lib/{name}"))):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def nvrtc_package() -> str:
    """The Python package that has it."""
    major = _cuda_major()
    return "nvidia-cuda-nvrtc" + (f"-cu{major}" if major.isdecimal() and int(major) < 13 else "")


def _cuda_major() -> str:
    return (torch.version.cuda or "").partition(".")[0]
