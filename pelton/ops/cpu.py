"""Registers the kernels of the extension module for CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from pelton import ops
from pelton.ops.native import native

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    size = x.shape[-1]
    num_rows = x.numel() // size
    native.rms_norm(  # type: ignore[union-attr]
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), num_rows, size, size, size, eps, DTYPE_NAMES[x.dtype]
    )
    return out


def _accepts_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    return (
        x.device.type == "cpu" and x.dtype in DTYPE_NAMES and x.is_contiguous() and x.numel() > 0
        and weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape == x.shape[-1:]
    )


def register_kernels() -> None:
    """Make the ops use what the extension offers; without the extension the references serve."""
    if native is not None:
        ops.rms_norm.register(f"cpu-{native.isa()}", _rms_norm, _accepts_rms_norm)
