"""The ops over rows: normalisation, gated activations, look-ups, positions and the cache's write.

Arithmetic is in float32, whatever the dtype of activations. Rows may be strided; their last dimension is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelton import ops
from pelton.ops.cuda.launch import OVERLAP, has_float8, let_next_begin, on_gpu, wait_for_inputs, wait_for_previous

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
TABLES = (*ACTIVATIONS, torch.float8_e4m3fn, torch.float8_e5m2)
MAX_NORM = 16384  # numbers of a row that are kept in registers to be normalised
COLUMNS = 1024  # of a row, that one program changes where columns do not depend on each other
LOG2_E = tl.constexpr(1.4426950408889634)
ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a smaller float32 and subtracted again, it rounds to even


def is_rows(*tensors: Tensor) -> bool:
    """Whether all are [T, K] activations on the GPU whose rows are contiguous."""
    return on_gpu(*tensors) and all(
        x.dim() == 2 and x.dtype in ACTIVATIONS and (x.stride(1) == 1 or x.shape[1] == 1) for x in tensors
    )


def _is_vector(weight: Tensor | None, size: int) -> bool:
    return weight is None or (
        on_gpu(weight) and weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape == (size,)
    )


# --- normalisation ---------------------------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    out_ptr, x_ptr, weight_ptr, next_ptr, next_weight_ptr, eps, size, out_stride, x_stride, ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program; with next_ptr, the norm of what was written as well, to contiguous rows."""
    let_next_begin()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)  # never changes
    if next_ptr is not None:
        next_weight = tl.load(next_weight_ptr + column, mask=inside, other=0.0)
    wait_for_previous()
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = _normalised(x, weight, size, eps)
    out = out_ptr + row * out_stride + column
    if ADD:  # what is added has been rounded, as if it had been written
        y = tl.load(out, mask=inside, other=0.0).to(tl.float32) + y.to(x_ptr.dtype.element_ty).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out, y, mask=inside)
    if next_ptr is not None:
        y = _normalised(y.to(tl.float32), next_weight, size, eps)
        tl.store(next_ptr + row * size + column, y.to(next_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normalised(x, weight, size, eps):
    return x * (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / size + eps)) * weight


def _normalise(
    out: Tensor, x: Tensor, weight: Tensor, eps: float, add: bool, then: Tensor | None = None,
    next_weight: Tensor | None = None,
) -> None:
    """out (+)= rms_norm(x); then, contiguous, = rms_norm(out, next_weight), if that is given: all [T, K]."""
    num_rows, size = x.shape
    block = triton.next_power_of_2(size)
    if num_rows:
        _norm_kernel[(num_rows,)](
            out, x, weight, then, next_weight, eps, size, out.stride(0), x.stride(0), ADD=add, BLOCK=block,
            num_warps=min(max(block // 256, 1), 16), **OVERLAP,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _normalise(out.view(-1, x.shape[-1]), x.view(-1, x.shape[-1]), weight, eps, add=False)
    return out


def accepts_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    """Rows, or anything contiguous, that fit into the registers of a program."""
    size = x.shape[-1]
    has_rows = is_rows(x) or (on_gpu(x) and x.dtype in ACTIVATIONS and x.is_contiguous())
    return has_rows and 0 < size <= MAX_NORM and _is_vector(weight, size)


def rms_norm_add_(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """`ops.rms_norm_add_`."""
    _normalise(out, x, weight, eps, add=True)


def rms_norm_add_norm_(out: Tensor, x: Tensor, weight: Tensor, next_weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm_add_norm_`, in one kernel."""
    then = torch.empty(x.shape, dtype=out.dtype, device=x.device)
    _normalise(out, x, weight, eps, add=True, then=then, next_weight=next_weight)
    return then


def accepts_rms_norm_add(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> bool:
    """Rows."""
    return is_rows(out, x) and accepts_rms_norm(x, weight, eps)


def accepts_rms_norm_add_norm(out: Tensor, x: Tensor, weight: Tensor, next_weight: Tensor, eps: float) -> bool:
    """Rows."""
    return accepts_rms_norm_add(out, x, weight, eps) and _is_vector(next_weight, x.shape[1])


# --- activations -----------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """As accurate near zero, by its series, as elsewhere."""
    s = x * x
    series = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def turn_of(gate, GELU: tl.constexpr):
    """What a gate is turned by: times the sigmoid of this it is its silu or, with GELU, its gelu by tanh, which is
    x / 2 (1 + tanh y) = x sigmoid(2 y)."""
    return 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate


@triton.jit
def _gated_kernel(out_ptr, x_ptr, size, out_stride, x_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of one row a program."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    x = x_ptr + row * x_stride + column
    gate = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + size, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(turn_of(gate, GELU)) * up
    tl.store(out_ptr + row * out_stride + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def _gated(x: Tensor, gelu: bool) -> Tensor:
    num_rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (num_rows, triton.cdiv(size, COLUMNS))
        _gated_kernel[grid](out, x, size, size, x.stride(0), GELU=gelu, BLOCK=COLUMNS, num_warps=4, **OVERLAP)
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """`ops.silu_and_mul`."""
    return _gated(x, gelu=False)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """`ops.gelu_tanh_and_mul`."""
    return _gated(x, gelu=True)


@triton.jit
def _softcap_kernel(x_ptr, cap, size, stride, BLOCK: tl.constexpr):
    """Some columns of one row a program."""
    wait_for_inputs()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = x_ptr + tl.program_id(0).to(tl.int64) * stride + column
    y = cap * _tanh(tl.load(x, mask=column < size, other=0.0).to(tl.float32) / cap)
    tl.store(x, y.to(x_ptr.dtype.element_ty), mask=column < size)


def softcap_(x: Tensor, cap: float) -> None:
    """`ops.softcap_`."""
    num_rows, size = x.shape
    if x.numel():
        _softcap_kernel[(num_rows, triton.cdiv(size, COLUMNS))](
            x, cap, size, x.stride(0), BLOCK=COLUMNS, num_warps=4, **OVERLAP
        )


# --- look-ups --------------------------------------------------------------------------------------------------------


@triton.jit
def _gather_kernel(out_ptr, x_ptr, ids_ptr, scale, size, x_stride, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of one row of the result a program."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x_ptr + tl.load(ids_ptr + row) * x_stride + column, mask=column < size)
    if SCALED:
        numbers = numbers.to(tl.float32) * scale
    tl.store(out_ptr + row * size + column, numbers.to(out_ptr.dtype.element_ty), mask=column < size)


def _gather(x: Tensor, ids: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Rows of x [N, K], times scale: int64 [M] -> [M, K]."""
    num_rows, size = ids.shape[0], x.shape[1]
    out = torch.empty(num_rows, size, dtype=dtype, device=x.device)
    if out.numel():
        scaled = scale != 1.0 or dtype != x.dtype
        _gather_kernel[(num_rows, triton.cdiv(size, COLUMNS))](
            out, x, ids, scale, size, x.stride(0), SCALED=scaled, BLOCK=COLUMNS, num_warps=4, **OVERLAP
        )
    return out


def select_rows(x: Tensor, row_ids: Tensor) -> Tensor:
    """`ops.select_rows`."""
    return _gather(x, row_ids, x.dtype)


def accepts_select_rows(x: Tensor, row_ids: Tensor) -> bool:
    """Rows."""
    return is_rows(x) and _is_ids(row_ids)


def embed(ids: Tensor, table: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a table [N, K] of floats, times scale, in the table's dtype or another: int64 [T] -> [T, K]."""
    return _gather(table, ids, dtype or table.dtype, scale)


def accepts_embed(ids: Tensor, table: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> bool:
    """Rows of a dtype that the GPU converts."""
    return (
        on_gpu(table) and _is_ids(ids) and table.dim() == 2 and table.stride(1) == 1 and table.dtype in TABLES
        and (table.dtype.itemsize > 1 or has_float8(table.device))
    )


def _is_ids(ids: Tensor) -> bool:
    return on_gpu(ids) and ids.dtype == torch.int64 and ids.dim() == 1 and ids.is_contiguous()


@triton.jit(do_not_specialize=["num"])
def _copy_kernel(out_ptr, x_ptr, num, BLOCK: tl.constexpr):
    """Some numbers a program, which are read before the kernel before has ended. The next one begins when all are
    there: kernels of a step read what it began with before they wait."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < num)
    wait_for_previous()
    tl.store(out_ptr + i, x, mask=i < num)


def copy_from_host_(out: Tensor, x: Tensor) -> None:
    """out = x, int64 [N] both: x in pinned memory. The copying engines of a GPU begin later (on an H200: 7 us)."""
    _copy_kernel[(triton.cdiv(len(x), 1024),)](out, x, len(x), BLOCK=1024, num_warps=4, **OVERLAP)


@triton.jit(do_not_specialize=["num"])
def _send_kernel(out_ptr, x_ptr, num, BLOCK: tl.constexpr):
    """Some numbers a program."""
    wait_for_inputs()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < num), mask=i < num)


def copy_to_host_(out: Tensor, x: Tensor) -> None:
    """The same from the GPU to pinned memory, where it is once the stream has come so far."""
    _send_kernel[(triton.cdiv(len(x), 1024),)](out, x, len(x), BLOCK=1024, num_warps=4, **OVERLAP)


@triton.jit(do_not_specialize=["num"])
def _fill_in_kernel(token_ids_ptr, starts_ptr, rows_ptr, sampled_ptr, num, BLOCK: tl.constexpr):
    """Some requests a program."""
    wait_for_inputs()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + i, mask=i < num, other=-1)
    start = tl.load(starts_ptr + i, mask=i < num, other=0)
    token = tl.load(sampled_ptr + row, mask=row >= 0, other=0)
    tl.store(token_ids_ptr + start, tl.maximum(token, 0), mask=row >= 0)


def fill_in_(token_ids: Tensor, starts: Tensor, rows: Tensor, sampled: Tensor) -> None:
    """token_ids[starts[i]] = sampled[rows[i]] where rows[i] >= 0; all int64, rows [R]. Codes in place of tokens, which
    are negative, end their requests: any token does."""
    num = rows.shape[0]
    _fill_in_kernel[(triton.cdiv(num, 128),)](
        token_ids, starts, rows, sampled, num, BLOCK=128, num_warps=4, **OVERLAP
    )


# --- positions and the cache -----------------------------------------------------------------------------------------


@triton.jit
def _angles_kernel(cos_ptr, sin_ptr, positions_ptr, freq_ptr, magnitude, half, BLOCK: tl.constexpr):
    """One position a program."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < half
    angle = tl.load(positions_ptr + row).to(tl.float32) * tl.load(freq_ptr + column, mask=inside, other=0.0)
    tl.store(cos_ptr + row * half + column, tl.cos(angle) * magnitude, mask=inside)
    tl.store(sin_ptr + row * half + column, tl.sin(angle) * magnitude, mask=inside)


def rope_angles(positions: Tensor, inv_freq: Tensor, magnitude: float) -> tuple[Tensor, Tensor]:
    """`ops.rope_angles`."""
    num_rows, half = positions.shape[0], inv_freq.shape[0]
    cos, sin = (torch.empty(num_rows, half, device=positions.device) for _ in range(2))
    if cos.numel():
        _angles_kernel[(num_rows,)](
            cos, sin, positions, inv_freq, magnitude, half, BLOCK=triton.next_power_of_2(half), num_warps=1, **OVERLAP
        )
    return cos, sin


def accepts_rope_angles(positions: Tensor, inv_freq: Tensor, magnitude: float) -> bool:
    """int64 positions and float32 frequencies."""
    return _is_ids(positions) and _is_vector(inv_freq, inv_freq.shape[0])


@triton.jit
def norm_factor(x1, x2, eps, SIZE: tl.constexpr):
    """1 / rms [heads, 1] of heads of SIZE numbers, from their two halves [heads, n] float32. The squares are added as
    integers, whose sum has no order: where it is compiled, and how numbers are laid out there, does not matter."""
    squares = tl.fma(x1, x1, x2 * x2)
    unit = tl.maximum(tl.max(squares, axis=1, keep_dims=True), 1e-28) * (SIZE / (1 << 30))
    total = tl.sum(tl.fma(squares, 1.0 / unit, 0.5).to(tl.int32), axis=1, keep_dims=True)
    return 1.0 / tl.sqrt_rn(tl.fma(total.to(tl.float32) * unit, 1.0 / SIZE, eps))


@triton.jit
def rotate(x, partner, cos, sin):
    """x * cos + partner * sin, with what is fused said: where it is compiled must not matter."""
    return tl.fma(partner, sin, x * cos)


@triton.jit
def _load_heads(row_ptr, first, end, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Some heads of a token, as two halves [HEADS, BLOCK] float32, where they lie, and which of that there is."""
    head = first + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < end) & (column < HALF)
    place = row_ptr + head * (2 * HALF) + column
    x1 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    return x1, x2, place, inside


@triton.jit
def _turn_heads(
    row_ptr, first, end, cos_ptr, sin_ptr, norm_ptr, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Normalise and rotate some heads in place. Every result is rounded to the activations' dtype."""
    x1, x2, place, inside = _load_heads(row_ptr, first, end, HALF, HEADS, BLOCK)
    column = tl.arange(0, BLOCK)
    if NORM:
        factor = norm_factor(x1, x2, eps, 2 * HALF)
        w1 = tl.load(norm_ptr + column, mask=column < HALF, other=0.0)[None, :]
        w2 = tl.load(norm_ptr + HALF + column, mask=column < HALF, other=0.0)[None, :]
        x1 = (x1 * factor * w1).to(row_ptr.dtype.element_ty).to(tl.float32)
        x2 = (x2 * factor * w2).to(row_ptr.dtype.element_ty).to(tl.float32)
    cos = tl.load(cos_ptr + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + column, mask=column < HALF, other=0.0)[None, :]
    y1 = rotate(x1, x2, cos, -sin).to(row_ptr.dtype.element_ty)
    y2 = rotate(x2, x1, cos, sin).to(row_ptr.dtype.element_ty)
    tl.store(place, y1, mask=inside)
    tl.store(place + HALF, y2, mask=inside)
    return y1.to(tl.float32), y2.to(tl.float32)


@triton.jit
def _to_float8(x):
    """float32 to the bits of float8_e4m3fn, to even, what is too large to 448; GPUs before 8.9 cannot."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    normal = size.to(tl.int32, bitcast=True)  # 8 bits of exponent, 23 of mantissa: 20 are dropped
    normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = ((size * 512.0 + ROUNDS) - ROUNDS).to(tl.int32)
    number = tl.where(size < 0.015625, subnormal, normal)
    return (tl.where(x != x, 0x7F, number) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def scale_of(largest):
    """Of int8 numbers, from the largest they stand for."""
    return tl.div_rn(largest, 127.0)


@triton.jit
def _divide(x, scale):
    """x / scale, two of one shape, rounded to even: int8 numbers, as float32."""
    return (tl.div_rn(x, tl.maximum(scale, 2e-38)) + ROUNDS) - ROUNDS


@triton.jit
def to_cache(x, scale, dtype: tl.constexpr):
    """Heads [heads, n] float32 as numbers of a cache: int8 with a scale [heads] each, float8 or its bits in uint8."""
    if dtype == tl.int8:
        x = _divide(x, tl.broadcast_to(scale[:, None], x.shape))
    if dtype == tl.uint8 or dtype == tl.float8e4nv:
        x = _to_float8(x).to(dtype, bitcast=True)
    return x.to(dtype)


@triton.jit
def _store_heads(
    x1, x2, first, end, slot, cache_ptr, scale_ptr, block_size, stride_b, stride_s, stride_g, stride_d,
    scale_b, scale_s, scale_g, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write some heads of keys or values to their slot: as int8 with a scale each, float8 in a cache of uint8."""
    block, offset = slot // block_size, slot % block_size
    head = first + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)[None, :]
    scale = None
    if cache_ptr.dtype.element_ty == tl.int8:
        scale = scale_of(tl.maximum(tl.max(tl.abs(x1), axis=1), tl.max(tl.abs(x2), axis=1)))
        tl.store(scale_ptr + block * scale_b + offset * scale_s + head * scale_g, scale, mask=head < end)
    place = cache_ptr + block * stride_b + offset * stride_s + head[:, None] * stride_g + column * stride_d
    inside = (head[:, None] < end) & (column < HALF)
    tl.store(place, to_cache(x1, scale, cache_ptr.dtype.element_ty), mask=inside)
    tl.store(place + HALF * stride_d, to_cache(x2, scale, cache_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, q_norm_ptr, k_norm_ptr, eps, qkv_stride, cos_stride, sin_stride,
    key_ptr, key_b, key_s, key_g, key_d, key_scale_ptr, value_ptr, value_b, value_s, value_g, value_d,
    value_scale_ptr, scale_b, scale_s, scale_g, block_size, num_heads, num_kv_heads,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):
    """A few heads of one token a program: of its queries, then of its keys, then of its values."""
    let_next_begin()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)  # there since the step began
    wait_for_previous()
    row = qkv_ptr + token * qkv_stride
    cos, sin = cos_ptr + token * cos_stride, sin_ptr + token * sin_stride
    num_q, num_kv = tl.cdiv(num_heads, HEADS), tl.cdiv(num_kv_heads, HEADS)
    part = tl.program_id(1)
    if part < num_q:
        _turn_heads(row, part * HEADS, num_heads, cos, sin, q_norm_ptr, eps, HALF, Q_NORM, HEADS, BLOCK)
    elif part < num_q + num_kv:
        first = (part - num_q) * HEADS
        keys = row + num_heads * (2 * HALF)
        k1, k2 = _turn_heads(keys, first, num_kv_heads, cos, sin, k_norm_ptr, eps, HALF, K_NORM, HEADS, BLOCK)
        _store_heads(
            k1, k2, first, num_kv_heads, slot, key_ptr, key_scale_ptr, block_size, key_b, key_s, key_g, key_d,
            scale_b, scale_s, scale_g, HALF, HEADS, BLOCK,
        )
    else:
        first = (part - num_q - num_kv) * HEADS
        values = row + (num_heads + num_kv_heads) * (2 * HALF)
        v1, v2, _, _ = _load_heads(values, first, num_kv_heads, HALF, HEADS, BLOCK)
        _store_heads(
            v1, v2, first, num_kv_heads, slot, value_ptr, value_scale_ptr, block_size, value_b, value_s, value_g,
            value_d, scale_b, scale_s, scale_g, HALF, HEADS, BLOCK,
        )


def rope_and_store_(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: ops.LayerCache, slots: Tensor, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 0.0,
) -> None:
    """`ops.rope_and_store_`."""
    _, block_size, num_kv_heads, head_size = cache.key.shape
    num_tokens, num_heads = qkv.shape[0], qkv.shape[1] // head_size - 2 * num_kv_heads
    block = triton.next_power_of_2(head_size // 2)
    heads = min(max(512 // block, 1), triton.next_power_of_2(max(num_heads, num_kv_heads)))
    parts = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    scale_strides = (0, 0, 0) if cache.key_scale is None else cache.key_scale.stride()
    key, value = cache.key, cache.value
    if key.dtype == torch.float8_e4m3fn:
        key, value = key.view(torch.uint8), value.view(torch.uint8)
    if num_tokens:
        _rope_kernel[(num_tokens, parts)](
            qkv, cos, sin, slots, q_norm, k_norm, eps, qkv.stride(0), cos.stride(0), sin.stride(0),
            key, *key.stride(), cache.key_scale, value, *value.stride(), cache.value_scale, *scale_strides,
            block_size, num_heads, num_kv_heads, Q_NORM=q_norm is not None, K_NORM=k_norm is not None,
            HALF=head_size // 2, HEADS=heads, BLOCK=block, num_warps=4, **OVERLAP,
        )


def accepts_rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: ops.LayerCache, slots: Tensor, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 0.0,
) -> bool:
    """Rows, and a cache of any strides."""
    size, dtype = cache.key.shape[3], cache.key.dtype
    return (
        is_rows(qkv, cos, sin) and cos.dtype == sin.dtype == torch.float32 and _is_ids(slots)
        and on_gpu(cache.key, cache.value, cache.key_scale, cache.value_scale)
        and dtype in (*ACTIVATIONS, torch.float8_e4m3fn, torch.int8)
        and (dtype == torch.int8) == (cache.key_scale is not None)
        and (cache.key_scale is None or cache.key_scale.stride() == cache.value_scale.stride())  # type: ignore[union-attr]
        and _is_vector(q_norm, size) and _is_vector(k_norm, size)
    )


# --- int8 ------------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_kernel(out_ptr, scale_ptr, x_ptr, size, x_stride, BLOCK: tl.constexpr):
    """One row a program, which it reads twice."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest, broken = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=start + columns < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        broken += x - x  # zero, or not a number: a maximum forgets these
    scale = scale_of(tl.max(largest, axis=0)) + tl.sum(broken, axis=0)
    tl.store(scale_ptr + row, scale)
    scale = tl.broadcast_to(scale, [BLOCK])
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * size + start + columns, _divide(x, scale).to(tl.int8), mask=inside)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.quantize_rows`."""
    num_rows, size = x.shape
    out = torch.empty(num_rows, size, dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(size), MAX_NORM)
    if num_rows:
        _quantize_kernel[(num_rows,)](
            out, scales, x, size, x.stride(0), BLOCK=block, num_warps=min(max(block // 512, 1), 16), **OVERLAP
        )
    return out, scales


def register(add: Callable[[ops.Op[..., Any], Callable[..., Any], Callable[..., bool]], None]) -> None:
    """Give each kernel of this module to `add(op, run, accepts)`."""
    add(ops.rms_norm, rms_norm, accepts_rms_norm)
    add(ops.rms_norm_add_, rms_norm_add_, accepts_rms_norm_add)
    add(ops.rms_norm_add_norm_, rms_norm_add_norm_, accepts_rms_norm_add_norm)
    add(ops.silu_and_mul, silu_and_mul, is_rows)
    add(ops.gelu_tanh_and_mul, gelu_tanh_and_mul, is_rows)
    add(ops.softcap_, softcap_, lambda x, cap: is_rows(x))
    add(ops.select_rows, select_rows, accepts_select_rows)
    add(ops.quantize_rows, quantize_rows, is_rows)
    add(ops.rope_angles, rope_angles, accepts_rope_angles)
    add(ops.rope_and_store_, rope_and_store_, accepts_rope_and_store)
