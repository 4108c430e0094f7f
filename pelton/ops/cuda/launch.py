"""What the launches of kernels share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether all tensors (of those that are there) lie where Triton's kernels run: on a GPU, or on the CPU in
    Triton's interpreter."""
    kind = "cpu" if knobs.runtime.interpret else "cuda"
    return all(tensor is None or tensor.device.type == kind for tensor in tensors)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; as much as an H100's in the interpreter."""
    if device.type != "cuda":
        return 227 << 10
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@cache
def has_float8(device: torch.device) -> bool:
    """Whether kernels can convert float8_e4m3fn."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
