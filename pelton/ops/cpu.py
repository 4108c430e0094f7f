"""The kernels of the extension module: registered for the ops, and as products with packed weights.

Activations are float32 rows. A kernel is given addresses, sizes and strides; csrc/cpu/kernels.h says what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pelton import ops
from pelton.ops.native import native
from pelton.ops.recording import empty

DTYPE_NAMES = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8",
}


def is_rows(x: Tensor) -> bool:
    """Whether x [T, K] is rows of float32 on the CPU, whose elements are adjacent."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2 and x.stride(1) == 1


def _is_vector(weight: Tensor | None, size: int) -> bool:
    return weight is None or (
        weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape == (size,)
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# --- products with packed weights (quant/native.py) ------------------------------------------------------------------


def linear(
    x: Tensor, weight: Any, out: Tensor, activations: str, bias: Tensor | None = None, accumulate: bool = False
) -> None:
    """out = x W^T (+ bias), or added to out. x [T, K], out [T, N] rows; weight: a native Weight."""
    native.linear(  # type: ignore[union-attr]
        out.data_ptr(), x.data_ptr(), weight, _address(bias), x.shape[0], out.stride(0), x.stride(0), activations,
        accumulate,
    )


def embed(ids: Tensor, weight: Any, size: int, scale: float) -> Tensor:
    """Rows of a native Weight [N, size], times scale: int64 [T] -> [T, size]."""
    out = empty(ids.shape[0], size)
    native.embed(out.data_ptr(), ids.data_ptr(), weight, ids.shape[0], size, scale)  # type: ignore[union-attr]
    return out


def look_up(
    ids: Tensor, address: int, dtype: torch.dtype, size: int, stride: int, scale: float = 1.0
) -> Tensor:
    """Rows of numbers at an address, times scale: int64 [T] -> float32 [T, size]."""
    out = empty(ids.shape[0], size)
    native.gather(  # type: ignore[union-attr]
        out.data_ptr(), address, ids.data_ptr(), ids.shape[0], size, out.stride(0), stride, DTYPE_NAMES[dtype], scale
    )
    return out


# --- rows ---------------------------------------------------------------------------------------------------------


def _run_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, accumulate: bool) -> None:
    native.rms_norm(  # type: ignore[union-attr]
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), x.shape[0], x.shape[1], out.stride(0), x.stride(0), eps,
        accumulate,
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = empty(*x.shape)
    _run_norm(x, weight, eps, out, accumulate=False)
    return out


def _rms_norm_add_(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    _run_norm(x, weight, eps, out, accumulate=True)


def _gated(gate: str, x: Tensor) -> Tensor:
    size = x.shape[1] // 2
    out = empty(x.shape[0], size)
    native.gated(out.data_ptr(), x.data_ptr(), x.shape[0], size, size, x.stride(0), gate)  # type: ignore[union-attr]
    return out


def _softcap_(x: Tensor, cap: float) -> None:
    native.softcap(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), cap)  # type: ignore[union-attr]


def _select_rows(x: Tensor, row_ids: Tensor) -> Tensor:
    return look_up(row_ids, x.data_ptr(), torch.float32, x.shape[1], x.stride(0))


# --- positions and the cache --------------------------------------------------------------------------------------


def _is_native_cache(cache: ops.LayerCache) -> bool:
    """Whether a cache has the strides of `make_cache` on a CPU, in blocks that fill registers."""
    key, value = cache.key, cache.value
    _, block_size, num_heads, head_size = key.shape
    row = -(-head_size // 16) * 16
    return (
        key.device.type == "cpu" and key.dtype in DTYPE_NAMES and block_size % 16 == 0 and head_size % 2 == 0
        and key.stride() == (num_heads * head_size * block_size, 1, head_size * block_size, block_size)
        and value.stride() == (num_heads * block_size * row, row, block_size * row, 1)
    )


def _native_cache(cache: ops.LayerCache) -> Any:
    return native.Cache.make(  # type: ignore[union-attr]
        cache.key.data_ptr(), cache.value.data_ptr(), _address(cache.key_scale), _address(cache.value_scale),
        *cache.key.shape, DTYPE_NAMES[cache.key.dtype],
    )


def _rope_angles(positions: Tensor, inv_freq: Tensor, magnitude: float) -> tuple[Tensor, Tensor]:
    num_rows, half = positions.shape[0], inv_freq.shape[0]
    cos, sin = empty(num_rows, half), empty(num_rows, half)
    native.angles(  # type: ignore[union-attr]
        cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), inv_freq.data_ptr(), num_rows, half, magnitude
    )
    return cos, sin


def _rope_and_store_(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: ops.LayerCache, slots: Tensor, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 0.0,
) -> None:
    num_kv_heads, head_size = cache.key.shape[2:]
    native.rope_store(  # type: ignore[union-attr]
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), _address(q_norm), _address(k_norm), slots.data_ptr(),
        _native_cache(cache), qkv.shape[0], qkv.stride(0), qkv.shape[1] // head_size - 2 * num_kv_heads, eps,
    )


def _accepts_rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: ops.LayerCache, slots: Tensor, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 0.0,
) -> bool:
    size = cache.key.shape[3]
    return (
        is_rows(qkv) and is_rows(cos) and is_rows(sin) and cos.is_contiguous() and sin.is_contiguous()
        and slots.is_contiguous() and _is_native_cache(cache) and _is_vector(q_norm, size) and _is_vector(k_norm, size)
    )


def _paged_attention(
    query: Tensor, cache: ops.LayerCache, block_table: Tensor, query_starts: Tensor, context_lens: Tensor,
    scale: float, window: int | None = None, softcap: float | None = None, span_ends: None = None,
) -> Tensor:
    num_tokens, num_heads, head_size = query.shape
    out = empty(num_tokens, num_heads, head_size)
    native.attention(  # type: ignore[union-attr]
        out.data_ptr(), query.data_ptr(), query_starts.data_ptr(), context_lens.data_ptr(), block_table.data_ptr(),
        _native_cache(cache), num_tokens, context_lens.shape[0], block_table.stride(0), num_heads, out.stride(0),
        query.stride(0), window or 0, scale, softcap or 0.0,
    )
    return out


def _accepts_paged_attention(
    query: Tensor, cache: ops.LayerCache, block_table: Tensor, query_starts: Tensor, context_lens: Tensor,
    scale: float, window: int | None = None, softcap: float | None = None, span_ends: Tensor | None = None,
) -> bool:
    return (
        span_ends is None and query.device.type == "cpu" and query.dtype == torch.float32 and query.stride(2) == 1
        and query.stride(1) == query.shape[2] and _is_native_cache(cache) and block_table.stride(1) == 1
        and query_starts.is_contiguous() and context_lens.is_contiguous()
        and all(t.dtype == torch.int64 for t in (block_table, query_starts, context_lens))
    )


def register_kernels() -> None:
    """Make the ops use what the extension offers; without the extension the references serve."""
    if native is None:
        return
    name = "cpu-native"

    def register(op: ops.Op[..., Any], run: Callable[..., Any], accepts: Callable[..., bool]) -> None:
        op.register(name, run, accepts)

    register(ops.rms_norm, _rms_norm, lambda x, weight, eps: is_rows(x) and _is_vector(weight, x.shape[1]))
    register(
        ops.rms_norm_add_, _rms_norm_add_,
        lambda out, x, weight, eps: is_rows(out) and is_rows(x) and _is_vector(weight, x.shape[1]),
    )
    register(ops.silu_and_mul, partial(_gated, "silu"), is_rows)
    register(ops.gelu_tanh_and_mul, partial(_gated, "gelu_tanh"), is_rows)
    register(ops.softcap_, _softcap_, lambda x, cap: is_rows(x))
    register(ops.select_rows, _select_rows, lambda x, row_ids: is_rows(x) and row_ids.dtype == torch.int64)
    register(
        ops.rope_angles, _rope_angles,
        lambda positions, inv_freq, magnitude: positions.device.type == "cpu" and positions.dtype == torch.int64,
    )
    register(ops.rope_and_store_, _rope_and_store_, _accepts_rope_and_store)
    register(ops.paged_attention, _paged_attention, _accepts_paged_attention)
