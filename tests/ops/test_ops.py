"""The ops' bodies against independent definitions, and every registered kernel against the body."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pelton import ops

# test_sampling.py, below, cuda/
TESTED_ELSEWHERE = {"sample", "rms_norm_add_norm_", "rope_and_attend_", "prompt_attention", "quantize_rows"}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache_of(dtype: torch.dtype, device: str = "cpu") -> ops.LayerCache:
    """9 blocks of 16 slots, 2 heads of 16."""
    cache = ops.make_cache(9, 16, 2, 16, dtype, torch.device(device))
    for i, numbers in enumerate((cache.key, cache.value)):
        numbers.copy_((random(*numbers.shape, seed=i) * (40 if dtype == torch.int8 else 1)).to(dtype))
    for scales in (cache.key_scale, cache.value_scale):
        if scales is not None:
            scales.fill_(1 / 40)
    return cache


TABLE, STARTS, LENS = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([0, 3, 4]), torch.tensor([39, 20])

# op -> its arguments; a new op is one row here. Each has several where its kernels differ.
ARGUMENTS: dict[str, list[Any]] = {
    "rms_norm": [lambda: (random(7, 48), random(48), 1e-6), lambda: (random(3, 37), random(37), 1e-6)],
    "rms_norm_add_": [lambda: (random(7, 40, seed=1), random(7, 40), random(40), 1e-6)],
    "silu_and_mul": [lambda: (random(7, 64) * 4,), lambda: (random(2, 70) * 30,)],
    "gelu_tanh_and_mul": [lambda: (random(7, 64) * 4,), lambda: (random(2, 70) * 30,)],
    "softcap_": [lambda: (random(3, 50) * 40, 30.0)],
    "select_rows": [lambda: (random(9, 24), torch.tensor([8, 0, 3]))],
    "rope_angles": [lambda: (torch.tensor([0, 1, 77, 4000]), random(8).abs(), 1.5)],
    "rope_and_store_": [
        lambda dtype=dtype, norm=norm: (
            random(3, 10 * 16), random(3, 8).cos(), random(3, 8).sin(), cache_of(dtype), torch.tensor([17, 130, 2]),
            *((random(16, seed=2), random(16, seed=3), 1e-6) if norm else ()),
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
        for norm in (False, True)
    ],
    "paged_attention": [
        lambda dtype=dtype, options=options: (
            random(4, 6, 16), cache_of(dtype), TABLE, STARTS, LENS, 0.25, *options
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
        for options in ((), (7,), (None, 2.0), (20, 5.0))
    ],
}
CASES = [(name, i) for name, rows in ARGUMENTS.items() for i in range(len(rows))]


def numbers_of(value: Any) -> list[Tensor]:
    """All tensors in an argument or a result, as float32."""
    if isinstance(value, Tensor):
        return [value.float()]
    if isinstance(value, ops.LayerCache):
        value = (value.key, value.value, value.key_scale, value.value_scale)
    return [t for item in value for t in numbers_of(item)] if isinstance(value, tuple) else []


def tolerance(args: tuple[Any, ...]) -> float:
    """float32 sums in another order; numbers rounded to the cache's type may differ by one step of it."""
    steps = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.int8: 1.0}
    dtypes = [arg.key.dtype for arg in args if isinstance(arg, ops.LayerCache)]
    return max((steps[dtype] for dtype in dtypes), default=1e-5)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_kernels_equal_their_declaration(cpu: Any, name: str, case: int) -> None:
    """On every instruction set, every kernel of every op."""
    op = ops.OPS[name]
    expected_args = ARGUMENTS[name][case]()
    expected = op.reference(*expected_args)
    served = False
    for kernel in op.kernels:
        args = ARGUMENTS[name][case]()
        if not kernel.accepts(*args):
            continue
        served = True
        got = kernel.run(*args)
        allowed = 2e-2 if name == "paged_attention" and args[1].key.dtype == torch.int8 else tolerance(args)
        pairs = zip(numbers_of(got) + numbers_of(args), numbers_of(expected) + numbers_of(expected_args), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=allowed, rtol=allowed)
    assert served, "no kernel took these arguments"


def test_every_op_is_in_the_table() -> None:
    assert {*ARGUMENTS, *TESTED_ELSEWHERE} == ops.OPS.keys()


def test_first_accepting_kernel_is_called() -> None:
    double = ops.Op(lambda x: x + x)
    double.register("never", lambda x: 0, lambda x: False)
    double.register("small", lambda x: -1, lambda x: x < 10)
    assert (double(3), double(30)) == (-1, 60)


def test_rms_norm_against_torch() -> None:
    x, weight = random(5, 32), random(32)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (32,), weight, 1e-5))


def test_rows_as_int8() -> None:
    """By hand: the largest number is 127 steps; halves go to the even step; zeros have no scale."""
    x = torch.tensor([[127.0, -2.5, 1.5, 0.4], [0.0, 0.0, 0.0, 0.0], [0.5, -63.5, 31.75, 0.25]])
    numbers, scales = ops.quantize_rows(x)
    assert numbers.dtype == torch.int8 and scales.tolist() == [1.0, 0.0, 0.5]
    assert numbers.tolist() == [[127, -2, 2, 0], [0, 0, 0, 0], [1, -127, 64, 0]]


def test_rope_turns_each_pair_by_its_angle_and_stores() -> None:
    """One query, key and value head of 8: the query turns in place, key and value land in their slots."""
    qkv, cache = random(4, 24), ops.make_cache(3, 16, 1, 8, torch.float32, torch.device("cpu"))
    angles = torch.arange(4)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01])
    turned = torch.complex(qkv[:, :16].view(4, 2, 2, 4)[:, :, 0], qkv[:, :16].view(4, 2, 2, 4)[:, :, 1])
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)  # [T, q and k, D]
    value = qkv[:, 16:].clone()
    slots = torch.tensor([16, 33, 40, 5])
    ops.rope_and_store_(qkv, angles.cos(), angles.sin(), cache, slots)
    torch.testing.assert_close(qkv[:, :8], expected[:, 0])
    torch.testing.assert_close(cache.key[slots // 16, slots % 16, 0], expected[:, 1])
    torch.testing.assert_close(cache.value[slots // 16, slots % 16, 0], value)


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("images", [False, True])
def test_paged_attention_against_a_loop(
    window: int | None, softcap: float | None, native: bool, images: bool
) -> None:
    """Scattered blocks, three requests (a prefill, a later chunk, a decode), one score at a time."""
    block_size, scale = 16, 0.3
    table = torch.tensor([[7, 2, 0, 0], [1, 5, 3, 8], [4, 6, 9, 0]])
    query_starts, context_lens = [0, 6, 9, 10], [6, 54, 40]
    query, cache = random(10, 4, 8), ops.make_cache(10, block_size, 2, 8, torch.float32, torch.device("cpu"))
    cache.key.copy_(random(*cache.key.shape, seed=1))
    cache.value.copy_(random(*cache.value.shape, seed=2))
    for numbers in (cache.key, cache.value):
        numbers[0] = torch.nan  # the null block must never be read
        numbers[7, 6:] = torch.nan  # nor slots behind the context
    run = ops.paged_attention if native else ops.paged_attention.reference
    span_ends = [3, 3, 3, 3, 0, 5, 53, 53, 53, 0] if images else [0] * 10
    got = run(
        query, cache, table, torch.tensor(query_starts), torch.tensor(context_lens), scale, window, softcap,
        torch.tensor(span_ends) if images else None,
    )
    for r, context_len in enumerate(context_lens):
        for t in range(query_starts[r], query_starts[r + 1]):
            position = context_len - (query_starts[r + 1] - t)
            seen = range(0 if window is None else max(0, position - window + 1), max(position, span_ends[t]) + 1)
            places = [(table[r, p // block_size], p % block_size) for p in seen]
            for head in range(4):
                scores = [float(query[t, head] @ cache.key[*place, head // 2]) * scale for place in places]
                if softcap is not None:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                weights = torch.softmax(torch.tensor(scores), dim=0)
                expected = sum(w * cache.value[*place, head // 2] for w, place in zip(weights, places, strict=True))
                torch.testing.assert_close(got[t, head], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_attention_does_not_depend_on_company_or_chunks(cpu: Any, dtype: torch.dtype) -> None:
    """A request's last 40 tokens: all at once beside others, in two chunks, one by one, and over a long context."""
    cache = ops.make_cache(80, 16, 2, 16, dtype, torch.device("cpu"))
    for i, numbers in enumerate((cache.key, cache.value)):
        numbers.copy_((random(*numbers.shape, seed=i) * (40 if dtype == torch.int8 else 1)).to(dtype))
    for scales in (cache.key_scale, cache.value_scale):
        if scales is not None:
            scales.fill_(1 / 40)
    table, length = torch.arange(1, 71)[None], 1100
    query = random(40, 6, 16)

    def attend(begin: int, end: int, window: int | None) -> Tensor:
        lens = torch.tensor([length - (40 - end)])
        return ops.paged_attention(
            query[begin:end], cache, table, torch.tensor([0, end - begin]), lens, 0.25, window
        )

    for window in (None, 600):
        both = ops.paged_attention(
            torch.cat((random(7, 6, 16, seed=5), query)), cache, torch.cat((table.flip(1), table)),
            torch.tensor([0, 7, 47]), torch.tensor([300, length]), 0.25, window,
        )[7:]
        assert torch.equal(both, attend(0, 40, window))
        assert torch.equal(both, torch.cat((attend(0, 13, window), attend(13, 40, window))))
        assert torch.equal(both[-3:], torch.cat([attend(i, i + 1, window) for i in range(37, 40)]))


def test_attention_of_whole_prompts_is_paged_attention_over_them() -> None:
    cache = ops.make_cache(8, 16, 2, 16, torch.float32, torch.device("cpu"))
    query, key, value = random(50, 4, 16), random(50, 2, 16, seed=1), random(50, 2, 16, seed=2)
    slots = torch.cat((torch.arange(16, 46), torch.arange(64, 84)))  # 30 tokens from block 1 on, 20 from block 4 on
    for numbers, new in ((cache.key, key), (cache.value, value)):
        numbers[slots // 16, slots % 16] = new
    starts, lens = torch.tensor([0, 30, 50]), torch.tensor([30, 20])
    expected = ops.paged_attention(query, cache, torch.tensor([[1, 2], [4, 5]]), starts, lens, 0.25)
    torch.testing.assert_close(ops.prompt_attention(query, key, value, [(0, 30), (30, 50)], 0.25), expected)


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    rms_norm, softcap_ = ops.Op(ops.rms_norm.reference), ops.Op(ops.softcap_.reference)
    monkeypatch.setattr(ops, "OPS", {"rms_norm": rms_norm, "softcap_": softcap_})
    assert ops.describe("cpu") == ""
    rms_norm.register("cpu-avx2", rms_norm.reference, lambda *args: False)
    assert ops.describe("cpu") == "rms_norm cpu-avx2, softcap_ in plain torch"
    assert ops.describe("cuda") == ""
