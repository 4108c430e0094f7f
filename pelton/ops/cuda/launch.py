"""What the launches of kernels share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton import knobs


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether all tensors (of those that are there) lie where Triton's kernels run: on a GPU, or on the CPU in
    Triton's interpreter."""
    kind = "cpu" if knobs.runtime.interpret else "cuda"
    return all(tensor is None or tensor.device.type == kind for tensor in tensors)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
