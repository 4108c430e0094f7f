"""The list of ops. Each is declared once; its body, in plain torch, is its meaning.

Backends register kernels for an op with a condition on its arguments. Calling an op runs the first kernel whose
condition holds, else the body. Ops that write into an argument end in `_`.

Shapes: T tokens, R requests, H query heads, G key/value heads, D head size, B blocks, S slots in a block.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

# On Linux an anonymous map is shared memory unless it is asked to be private.
PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op: `run` has the op's signature, `accepts` says for which arguments it may run.

    The name begins with the device it is for: "cpu-avx2".
    """

    name: str
    run: Callable[..., Any]
    accepts: Callable[..., bool]


class Op(Generic[P, Result]):
    """A declared op: callable, with the kernels that serve it."""

    def __init__(self, reference: Callable[P, Result]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.kernels: list[Kernel] = []
        self.only_on = ""  # the device that has kernels for it, if not all
        self.__doc__ = reference.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        for kernel in self.kernels:
            if kernel.accepts(*args, **kwargs):
                return kernel.run(*args, **kwargs)  # type: ignore[no-any-return]
        return self.reference(*args, **kwargs)

    def register(self, name: str, run: Callable[P, Result], accepts: Callable[P, bool]) -> None:
        """Add a kernel; those registered first are asked first."""
        self.kernels.append(Kernel(name, run, accepts))


OPS: dict[str, Op[..., Any]] = {}


def op(reference: Callable[P, Result]) -> Op[P, Result]:
    """Declare an op by its reference."""
    declared = Op(reference)
    OPS[declared.name] = declared
    return declared


def describe(device: str) -> str:
    """Which ops have which kernels on "cpu" or "cuda", in one line; "" if none has."""
    called = [o for o in OPS.values() if o.only_on in ("", device)]
    served = {o.name: [k.name for k in o.kernels if k.name.partition("-")[0] == device] for o in called}
    plain = [name for name, kernels in served.items() if not kernels]
    parts = [f"{name} {'/'.join(kernels)}" for name, kernels in served.items() if kernels]
    return ", ".join([*parts, *([f"{' '.join(plain)} in plain torch"] if plain else [])]) if parts else ""


# --- rows ---------------------------------------------------------------------------------------------------------


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 (Zhang & Sennrich, arXiv:1910.07467).

    x [..., K], weight [K] float32 -> [..., K] in x's dtype.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


@op
def rms_norm_add_(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out += rms_norm(x): a normalised branch joins the residual stream. out, x [T, K]; weight [K] float32."""
    out.add_(rms_norm.reference(x, weight, eps))


@op
def rms_norm_add_norm_(out: Tensor, x: Tensor, weight: Tensor, next_weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_add_`, then `rms_norm` of out with the next weight [K]: where the next branch begins, [T, K]."""
    rms_norm_add_(out, x, weight, eps)
    return rms_norm(out, next_weight, eps)


rms_norm_add_norm_.only_on = "cuda"  # elsewhere it is its two parts, which have kernels


@op
def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x = [gate | up]: [T, 2K] -> [T, K] (Shazeer, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@op
def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """gelu(gate) * up with gelu's tanh approximation, for x = [gate | up]: [T, 2K] -> [T, K]."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


@op
def softcap_(x: Tensor, cap: float) -> None:
    """x = cap * tanh(x / cap), in place: [T, K]."""
    x.div_(cap).tanh_().mul_(cap)


@op
def select_rows(x: Tensor, row_ids: Tensor) -> Tensor:
    """Some rows of x: [T, K], int64 [M] -> [M, K]."""
    return x.index_select(0, row_ids)


@op
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 times a scale each, which is their largest number / 127: [T, K] -> int8 [T, K], float32 [T].

    Rounded to even. The scale of a row with numbers that are not finite is not finite.
    """
    x = x.float()
    scales = x.abs().amax(-1) / 127
    return (x / scales.clamp(min=2e-38)[:, None]).round().nan_to_num().to(torch.int8), scales


quantize_rows.only_on = "cuda"  # on a CPU products round their input themselves


# --- positions and the cache -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCache:
    """The keys and values of one layer, in blocks, with whatever strides its device reads fastest (`make_cache`)."""

    key: Tensor  # [B, S, G, D]
    value: Tensor  # [B, S, G, D]
    key_scale: Tensor | None = None  # [B, S, G] float32, where the numbers are int8
    value_scale: Tensor | None = None


def make_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> LayerCache:
    """An empty cache. On a CPU, keys lie as [B, G, D, S] and values as [B, G, S, D rounded up to 16]: sixteen keys,
    or sixteen numbers of a value, fill a register. Elsewhere both lie as [B, G, S, D]: a head of a block is read in
    one piece."""
    size = num_blocks, num_kv_heads
    if device.type == "cpu":
        key = _untouched_zeros(*size, head_size, block_size, dtype=dtype).permute(0, 3, 1, 2)
        padded = -(-head_size // 16) * 16
        value = _untouched_zeros(*size, block_size, padded, dtype=dtype)[..., :head_size].transpose(1, 2)
    else:
        key, value = (
            torch.zeros(*size, block_size, head_size, dtype=dtype, device=device).transpose(1, 2) for _ in range(2)
        )
    if dtype != torch.int8:
        return LayerCache(key, value)
    scales = (torch.zeros(*size, block_size, device=device).transpose(1, 2) for _ in range(2))
    return LayerCache(key, value, *scales)


def _untouched_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written to, then whole huge pages where the system has them."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def split_heads(qkv: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: views [T, H, D], [T, G, D], [T, G, D] of [T, (H + 2G) D]."""
    num_kv_heads, head_size = cache.key.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_size)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v


@op
def rope_angles(positions: Tensor, inv_freq: Tensor, magnitude: float) -> tuple[Tensor, Tensor]:
    """cos and sin of positions * inv_freq, times magnitude: int64 [T], float32 [D/2] -> two float32 [T, D/2]."""
    angles = positions.float()[:, None] * inv_freq
    return angles.cos() * magnitude, angles.sin() * magnitude


@op
def rope_and_store_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slots: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Prepare new tokens for attention: normalise each query and key head (where weights [D] are given), rotate pairs
    (i, i + D/2) by their position's angles (Su et al., arXiv:2104.09864), and write keys and values to their slots.

    qkv [T, (H + 2G) D]: queries and keys are changed in place; cos, sin [T, D/2]; slots [T]: block * S + offset.
    """
    q, k, v = split_heads(qkv, cache)
    for part, weight in ((q, q_norm), (k, k_norm)):
        if weight is not None:
            part.copy_(rms_norm.reference(part, weight, eps))
        x1, x2 = part.float().chunk(2, dim=-1)  # [T, heads, D/2]
        turned = x1 * cos[:, None] - x2 * sin[:, None], x2 * cos[:, None] + x1 * sin[:, None]
        part.copy_(torch.cat(turned, dim=-1))
    block_size = cache.key.shape[1]
    where = slots // block_size, slots % block_size
    for numbers, scales, new in ((cache.key, cache.key_scale, k), (cache.value, cache.value_scale, v)):
        if scales is not None:
            scale = new.float().abs().amax(-1) / 127  # [T, G]
            scales[where] = scale
            new = (new.float() / scale.clamp(min=1e-38)[..., None]).round()
        numbers[where] = new.to(numbers.dtype)


@op
def paged_attention(
    query: Tensor,
    cache: LayerCache,
    block_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    span_ends: Tensor | None = None,
) -> Tensor:
    """Causal attention of each request's new tokens over its context in the paged cache (arXiv:2309.06180).

    query [T, H, D], H a multiple of G; block_table [R, blocks]. Request r owns query rows query_starts[r] to
    query_starts[r + 1] (none, if they are equal), the last tokens of its context of context_lens[r] tokens. With
    `window`, a token sees itself and the window - 1 tokens before; `softcap` c turns scores s into c * tanh(s / c).
    Some tokens see each other, those of an image: span_ends [T] is the last position that a token sees at least (of its
    context); its own, or an earlier one, changes nothing. Returns [T, H, D].
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    block_size = cache.key.shape[1]
    starts = query_starts.tolist()
    for r, context_len in enumerate(context_lens.tolist()):
        begin, end = starts[r], starts[r + 1]
        if begin == end:
            continue
        start = context_len - (end - begin)  # position of the first query
        first = 0 if window is None else max(0, start - window + 1) // block_size  # first block any query sees
        blocks = block_table[r, first : (context_len + block_size - 1) // block_size]
        context = slice(0, context_len - first * block_size)
        key, value = (
            _read(numbers, scales, blocks)[context]
            for numbers, scales in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
        )  # [C, G, D]
        ends = None if span_ends is None else span_ends[begin:end] - first * block_size
        out[begin:end] = _attend(query[begin:end], key, value, start - first * block_size, scale, window, softcap, ends)
    return out


@op
def rope_and_attend_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slots: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    block_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`rope_and_store_`, then `paged_attention`. Returns [T, H, D].

    Where there are as many tokens as requests, each request has one at most. No request sees the slot of another one's
    new token: a kernel may write it before or after it computes that request. Tokens of no request need not be stored,
    and what is in qkv afterwards is not said.
    """
    rope_and_store_(qkv, cos, sin, cache, slots, q_norm, k_norm, eps)
    query, _, _ = split_heads(qkv, cache)
    return paged_attention(query, cache, block_table, query_starts, context_lens, scale, window, softcap)


rope_and_attend_.only_on = "cuda"  # elsewhere it is its two parts, which have kernels


@op
def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, prompts: Sequence[tuple[int, int]], scale: float
) -> Tensor:
    """Causal attention of whole prompts, whose keys and values are at hand: rows begin to end - 1 for each of
    `prompts`, which together are all rows. query [T, H, D]; key, value [T, G, D], H a multiple of G. Returns [T, H, D].
    """
    parts = []
    for begin, end in prompts:
        q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))  # [1, heads, tokens, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


prompt_attention.only_on = "cuda"  # elsewhere the kernels of paged_attention are as fast


def _read(numbers: Tensor, scales: Tensor | None, blocks: Tensor) -> Tensor:
    """Some blocks of a cache [B, S, G, D] in a row: [blocks * S, G, D]."""
    rows = numbers.index_select(0, blocks).flatten(0, 1)
    return rows if scales is None else rows.float() * scales.index_select(0, blocks).flatten(0, 1)[..., None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, start: int, scale: float, window: int | None, softcap: float | None,
    span_ends: Tensor | None,
) -> Tensor:
    """Attention of one request: query [T, H, D] at positions start.., key and value [C, G, D] at positions 0..C-1."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    mask, sees_all = None, window is None or num_keys <= window
    # torch then skips what is masked
    is_causal = num_queries > 1 and start == 0 and sees_all and softcap is None and span_ends is None
    if not is_causal and (num_queries > 1 or not sees_all):
        distance = torch.arange(start, start + num_queries, device=query.device)[:, None]
        at = torch.arange(num_keys, device=query.device)
        distance = distance - at  # [T, C]: how far back a key lies
        mask = distance >= 0 if span_ends is None else (distance >= 0) | (at <= span_ends[:, None])
        if window is not None:
            mask &= distance < window
    if num_queries == 1:  # heads that share a key become queries of one head: a quarter of the time on a CPU
        query = query.reshape(key.shape[1], -1, query.shape[2]).transpose(0, 1)  # [1, H, D] -> [H / G, G, D]
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key.to(query.dtype), value.to(query.dtype)))
    if softcap is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
    else:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        scores = softcap * torch.tanh((query.float() @ key.float().transpose(-1, -2)) * (scale / softcap))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out = (torch.softmax(scores, dim=-1) @ value.float()).to(query.dtype)
    return out[0].transpose(0, 1) if num_queries > 1 else out[0].flatten(0, 1)[None]  # [T, H, D]


from pelton.ops import cpu, cpu_sampling, gpu  # noqa: E402  (backends import the declarations above)

cpu.register_kernels()
cpu_sampling.register_kernels()
if not gpu.why_not():
    from pelton.ops import cuda

    cuda.register_kernels()
