"""The list of ops. Each is declared once; its body, in plain torch, is its meaning.

Backends register kernels for an op with a condition on its arguments. Calling an op runs the first kernel whose
condition holds, else the body. Ops that write into an argument end in `_`.

Shapes: T tokens, R requests, H query heads, G key/value heads, D head size, B blocks, S slots in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op: `run` has the op's signature, `accepts` says for which arguments it may run.

    The name begins with the device it is for: "cpu-avx512".
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
    served = {o.name: [k.name for k in o.kernels if k.name.partition("-")[0] == device] for o in OPS.values()}
    plain = [name for name, kernels in served.items() if not kernels]
    parts = [f"{name} {'/'.join(kernels)}" for name, kernels in served.items() if kernels]
    return ", ".join([*parts, *([f"{' '.join(plain)} in plain torch"] if plain else [])]) if parts else ""


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 (Zhang & Sennrich, arXiv:1910.07467).

    x [..., K], weight [K] float32 -> [..., K] in x's dtype.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


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
def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate pairs (i, i + D/2) of each head by its position's angles, in place (Su et al., arXiv:2104.09864).

    x [T, H, D]; cos, sin [T, D/2] float32.
    """
    x1, x2 = x.float().chunk(2, dim=-1)  # [T, H, D/2]
    cos, sin = cos[:, None], sin[:, None]
    x.copy_(torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1))


@op
def store_kv_(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write the keys and values [T, G, D] of new tokens to their slots [T] of cache [2, B, S, G, D]."""
    flat = cache.view(2, -1, *cache.shape[3:])  # [2, B*S, G, D]
    flat[0].index_copy_(0, slots, key.to(cache.dtype))
    flat[1].index_copy_(0, slots, value.to(cache.dtype))


@op
def paged_attention(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_starts: list[int],
    context_lens: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of each request's new tokens over its context in the paged cache (arXiv:2309.06180).

    query [T, H, D]; cache [2, B, S, G, D], H a multiple of G; block_table [R, blocks]. Request r owns query rows
    query_starts[r]:query_starts[r + 1], the last tokens of its context of context_lens[r] tokens. With `window`,
    a token sees itself and the window - 1 tokens before; `softcap` c turns scores s into c * tanh(s / c).
    Returns [T, H, D].
    """
    out = torch.empty_like(query)
    block_size = cache.shape[2]
    for r, context_len in enumerate(context_lens):
        begin, end = query_starts[r], query_starts[r + 1]
        start = context_len - (end - begin)  # position of the first query
        first = 0 if window is None else max(0, start - window + 1) // block_size  # first block any query sees
        blocks = block_table[r, first : (context_len + block_size - 1) // block_size]
        context = slice(0, context_len - first * block_size)
        key, value = (cache[i].index_select(0, blocks).flatten(0, 1)[context] for i in range(2))  # [C, G, D]
        out[begin:end] = _attend(query[begin:end], key, value, start - first * block_size, scale, window, softcap)
    return out


def _attend(
    query: Tensor, key: Tensor, value: Tensor, start: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of one request: query [T, H, D] at positions start.., key and value [C, G, D] at positions 0..C-1."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    mask, sees_all = None, window is None or num_keys <= window
    is_causal = num_queries > 1 and start == 0 and sees_all and softcap is None  # torch then skips what is masked
    if not is_causal and (num_queries > 1 or not sees_all):
        distance = torch.arange(start, start + num_queries, device=query.device)[:, None]
        distance = distance - torch.arange(num_keys, device=query.device)  # [T, C]: how far back a key lies
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
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


from pelton.ops import cpu  # noqa: E402  (backends import the declarations above)

cpu.register_kernels()
