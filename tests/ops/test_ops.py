"""The ops' bodies against independent definitions, and every registered kernel against the body."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pelton import ops

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ARGUMENTS: dict[str, Any] = {  # op -> arguments for a dtype; a new op is one row here
    "rms_norm": lambda d: (random(7, 48, dtype=d), random(48), 1e-6),
    "silu_and_mul": lambda d: (random(7, 64, dtype=d),),
    "gelu_tanh_and_mul": lambda d: (random(7, 64, dtype=d),),
    "rope_": lambda d: (random(7, 3, 16, dtype=d), random(7, 8).cos(), random(7, 8).sin()),
    "store_kv_": lambda d: (
        random(2, 5, 4, 2, 16, dtype=d), random(3, 2, 16, dtype=d), random(3, 2, 16, dtype=d), torch.tensor([4, 9, 11])
    ),
    "paged_attention": lambda d: (
        random(4, 6, 16, dtype=d), random(2, 9, 4, 2, 16, dtype=d), torch.tensor([[1, 2, 3], [4, 5, 0]]), [0, 3, 4],
        [11, 6], 0.25,
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", sorted(ops.OPS))
def test_kernels_equal_their_declaration(name: str, dtype: torch.dtype) -> None:
    op = ops.OPS[name]
    expected_args = ARGUMENTS[name](dtype)
    expected = op.reference(*expected_args)
    for kernel in op.kernels:
        args = ARGUMENTS[name](dtype)
        if not kernel.accepts(*args):
            continue
        got = kernel.run(*args)
        if name.endswith("_"):
            got, expected = args[0], expected_args[0]
        torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_first_accepting_kernel_is_called() -> None:
    double = ops.Op(lambda x: x + x)
    double.register("never", lambda x: 0, lambda x: False)
    double.register("small", lambda x: -1, lambda x: x < 10)
    assert (double(3), double(30)) == (-1, 60)


def test_rms_norm_against_torch() -> None:
    x, weight = random(5, 32), random(32)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (32,), weight, 1e-5))


def test_rope_turns_each_pair_by_its_angle() -> None:
    x = random(4, 2, 8)
    angles = torch.arange(4)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01])
    got = x.clone()
    ops.rope_(got, angles.cos(), angles.sin())
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), dim=-1))


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_paged_attention_against_a_loop(window: int | None, softcap: float | None) -> None:
    """Scattered blocks, three requests (a prefill, a later chunk, a decode), one score at a time."""
    block_size, scale = 4, 0.3
    table = torch.tensor([[7, 2, 0, 0], [1, 5, 3, 8], [4, 6, 9, 0]])
    query_starts, context_lens = [0, 6, 9, 10], [6, 14, 10]
    query, cache = random(10, 4, 8), random(2, 10, block_size, 2, 8, seed=1)
    cache[:, 0] = torch.nan  # the null block must never be read
    got = ops.paged_attention(query, cache, table, query_starts, context_lens, scale, window, softcap)
    for r, context_len in enumerate(context_lens):
        for t in range(query_starts[r], query_starts[r + 1]):
            position = context_len - (query_starts[r + 1] - t)
            seen = range(0 if window is None else max(0, position - window + 1), position + 1)
            keys = [cache[:, table[r, p // block_size], p % block_size] for p in seen]  # [2, G, D]
            for head in range(4):
                scores = [float(query[t, head] @ kv[0, head // 2]) * scale for kv in keys]
                if softcap is not None:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                weights = torch.softmax(torch.tensor(scores), dim=0)
                expected = sum(w * kv[1, head // 2] for w, kv in zip(weights, keys, strict=True))
                torch.testing.assert_close(got[t, head], expected, atol=1e-5, rtol=1e-5)


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    rms_norm, rope_ = ops.Op(ops.rms_norm.reference), ops.Op(ops.rope_.reference)
    monkeypatch.setattr(ops, "OPS", {"rms_norm": rms_norm, "rope_": rope_})
    assert ops.describe("cpu") == ""
    rms_norm.register("cpu-avx2", rms_norm.reference, lambda *args: False)
    assert ops.describe("cpu") == "rms_norm cpu-avx2, rope_ in plain torch"
    assert ops.describe("cuda") == ""
