"""Kernels for NVIDIA GPUs from compute capability 8.0 on, in Triton. Imported only where torch sees such a GPU.

Each module holds the kernels of some ops: a function with the op's signature, and one that says which arguments it
takes. Nothing here waits for the GPU, and grids follow from shapes alone: every kernel can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pelton.ops import Op
from pelton.ops.cuda import attention, rows, sampling


def register_kernels() -> None:
    """Make the ops use the kernels."""

    def add(op: Op[..., Any], run: Callable[..., Any], accepts: Callable[..., bool]) -> None:
        op.register("cuda-triton", run, accepts)

    rows.register(add)
    sampling.register(add)
    attention.register(add)
