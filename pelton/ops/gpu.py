"""Whether kernels for GPUs run on this machine."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

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
    return ""
