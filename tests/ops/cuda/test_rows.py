"""The kernels over rows against the bodies of their ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pelton import ops
from pelton.ops.cuda import rows

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float8_e4m3fn: 2**-3, torch.int8: 1.0}
STRIDES = {"[B, S, G, D]": (0, 1, 2, 3), "[B, G, D, S]": (0, 2, 3, 1)}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def strided(x: Tensor, device: torch.device) -> Tensor:
    """The same numbers as part of a wider tensor."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype, device=device)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


def close(got: Tensor, expected: Tensor, steps: float = 1.0) -> None:
    """Equal but for so many roundings."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    step = steps * STEPS[expected.dtype]
    torch.testing.assert_close(got.cpu().float(), expected.float(), atol=step, rtol=step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 37, 256, 5000])
def test_norms(device: torch.device, dtype: torch.dtype, size: int) -> None:
    x, out, weight = random(3, size, dtype=dtype, scale=3), random(3, size, dtype=dtype, seed=1), random(size, seed=2)
    there, out_there, weight_there = strided(x, device), strided(out, device), weight.to(device)
    assert rows.accepts_rms_norm_add(out_there, there, weight_there, 1e-6)
    close(rows.rms_norm(there, weight_there, 1e-6), ops.rms_norm.reference(x, weight, 1e-6))
    close(rows.rms_norm(x[:, None].to(device), weight_there, 1e-6), ops.rms_norm.reference(x[:, None], weight, 1e-6))
    rows.rms_norm_add_(out_there, there, weight_there, 1e-6)
    ops.rms_norm_add_.reference(out, x, weight, 1e-6)
    close(out_there, out, steps=2)
    assert torch.equal(there.cpu(), x)

    again, next_weight = strided(random(3, size, dtype=dtype, seed=1), device), random(size, seed=3).to(device)
    assert rows.accepts_rms_norm_add_norm(again, there, weight_there, next_weight, 1e-6)
    then = rows.rms_norm_add_norm_(again, there, weight_there, next_weight, 1e-6)
    assert torch.equal(again, out_there) and torch.equal(then, rows.rms_norm(out_there.contiguous(), next_weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "kernel"), [
    (ops.silu_and_mul, rows.silu_and_mul), (ops.gelu_tanh_and_mul, rows.gelu_tanh_and_mul),
])
def test_gated(
    device: torch.device, dtype: torch.dtype, op: ops.Op[..., Tensor], kernel: Callable[[Tensor], Tensor]
) -> None:
    for size in (1, 70, 1500):
        x = random(2, 2 * size, dtype=dtype, scale=4)
        x[0, 0] = -60.0
        close(kernel(strided(x, device)), op.reference(x), steps=3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is no number
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 37, 256, 20_000])
def test_rows_as_int8(device: torch.device, dtype: torch.dtype, size: int) -> None:
    x = random(4, size, dtype=dtype, scale=4)
    x[1] = 0
    x[3, size // 2] *= 100
    there = strided(x, device)
    assert rows.is_rows(there)
    (numbers, scales), expected = rows.quantize_rows(there), ops.quantize_rows.reference(x)
    assert torch.equal(numbers.cpu(), expected[0]) and torch.equal(scales.cpu(), expected[1])
    for value in (torch.nan, torch.inf, -torch.inf):
        there[2, size // 3] = value
        finite = rows.quantize_rows(there)[1].isfinite()
        assert finite.tolist() == [True, True, False, True]


def test_softcap(device: torch.device) -> None:
    for size in (3, 1100):
        x = random(2, size, scale=40)
        x[0, :3] = torch.tensor([1e-4, 1e6, -1e6])
        there = strided(x, device)
        rows.softcap_(there, 30.0)
        ops.softcap_.reference(x, 30.0)
        close(there, x, steps=2)
        assert bool((there[1].cpu() / x[1] - 1).abs().max() < 1e-5)  # also where they are almost nothing


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_look_ups(device: torch.device, dtype: torch.dtype) -> None:
    ids = torch.tensor([8, 0, 3, 3])
    for size in (24, 1061):
        table = random(9, size, dtype=dtype)
        if dtype in DTYPES:
            there = strided(table, device)
            assert rows.accepts_select_rows(there, ids.to(device))
            assert torch.equal(rows.select_rows(there, ids.to(device)).cpu(), table[ids])
        assert rows.accepts_embed(ids.to(device), table.to(device))
        for scale in (1.0, 3.5):
            for into in (torch.float32, torch.bfloat16, *((None,) if dtype in DTYPES else ())):
                got = rows.embed(ids.to(device), table.to(device), scale, into)
                close(got, (table.float()[ids] * scale).to(into or dtype))


def test_angles(device: torch.device) -> None:
    for half in (1, 8, 60):
        positions, freq = torch.tensor([0, 1, 77, 4000, 120_000]), torch.logspace(0, -5, half)
        got = rows.rope_angles(positions.to(device), freq.to(device), 1.5)
        for a, b in zip(got, ops.rope_angles.reference(positions, freq, 1.5), strict=True):
            close(a, b)


def make_cache(dtype: torch.dtype, order: tuple[int, ...], head_size: int, device: torch.device) -> ops.LayerCache:
    """9 blocks of 16 slots, 2 heads, its dimensions in memory in some order."""
    shape = [(9, 16, 2, head_size)[i] for i in order]
    back = [order.index(i) for i in range(4)]
    key, value = (torch.zeros(shape, dtype=dtype, device=device).permute(back) for _ in range(2))
    if dtype != torch.int8:
        return ops.LayerCache(key, value)
    return ops.LayerCache(key, value, *(torch.zeros(9, 2, 16, device=device).transpose(1, 2) for _ in range(2)))


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize(("dtype", "cache_dtype"), [
    *((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float8_e4m3fn),
    (torch.bfloat16, torch.float8_e4m3fn), (torch.float32, torch.int8), (torch.bfloat16, torch.int8),
])
def test_rope_and_store(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, layout: str
) -> None:
    for num_heads, head_size, norms in ((6, 16, True), (2, 24, True), (5, 16, False), (1, 128, True)):
        qkv = random(3, (num_heads + 4) * head_size, dtype=dtype)
        qkv[1, -head_size:] = 0  # a value of zeros has no scale
        qkv[2, -head_size:] /= 100  # less than the least normal number of float8
        angles = random(3, head_size // 2, seed=1)
        weights = [random(head_size, seed=i) for i in (2, 3)] if norms else [None, None]
        slots = torch.tensor([17, 130, 2])
        cpu = torch.device("cpu")
        args: list[Any] = [
            [qkv.clone(), angles.cos(), angles.sin(), make_cache(cache_dtype, STRIDES[layout], head_size, where), slots,
             *weights, 1e-6] for where in (cpu, device)
        ]
        args[1] = [a.to(device) if isinstance(a, Tensor) else a for a in args[1]]
        args[1][0] = strided(qkv, device)
        assert rows.accepts_rope_and_store(*args[1])
        ops.rope_and_store_.reference(*args[0])
        rows.rope_and_store_(*args[1])
        close(args[1][0], args[0][0], steps=2)
        close_caches(args[1][3], args[0][3], 2 * STEPS[dtype])
        if cache_dtype == torch.float8_e4m3fn:  # values come as they were: they are rounded once
            assert torch.equal(args[1][3].value.float().cpu(), args[0][3].value.float())


def close_caches(got: ops.LayerCache, expected: ops.LayerCache, step: float) -> None:
    """Equal but for a rounding to the cache's dtype, and those before."""
    for name in ("key", "value"):
        a, b = getattr(got, name), getattr(expected, name)
        allowed = max(step, STEPS[a.dtype])
        torch.testing.assert_close(a.cpu().float(), b.float(), atol=allowed, rtol=allowed)
        scales = getattr(got, name + "_scale"), getattr(expected, name + "_scale")
        if scales[0] is not None:
            torch.testing.assert_close(scales[0].cpu(), scales[1], atol=0.0, rtol=step)


def test_nothing_to_do(device: torch.device) -> None:
    nothing = torch.empty(0, 32, device=device)
    assert rows.rms_norm(nothing, torch.ones(32, device=device), 1e-6).shape == (0, 32)
    assert rows.silu_and_mul(nothing).shape == (0, 16)
    assert rows.select_rows(nothing, torch.empty(0, dtype=torch.int64, device=device)).shape == (0, 32)


def test_what_is_not_taken(device: torch.device) -> None:
    x, weight = torch.ones(4, 8, device=device), torch.ones(8, device=device)
    assert not rows.is_rows(x.double()) and not rows.is_rows(x.T) and not rows.is_rows(x[0])
    assert not rows.accepts_rms_norm(x, weight.half(), 1e-6) and not rows.accepts_rms_norm(x, weight[:7], 1e-6)
    assert not rows.accepts_rms_norm(torch.ones(1, rows.MAX_NORM + 1, device=device), weight, 1e-6)
    assert not rows.accepts_select_rows(x, torch.zeros(2, dtype=torch.int32, device=device))


@pytest.mark.parametrize("num", [1, 1024, 3000])
def test_numbers_go_to_and_from_the_host(device: torch.device, num: int) -> None:
    is_pinned = device.type == "cuda"
    here, back = (torch.arange(num + 5).flip(0) for _ in range(2))
    if is_pinned:
        here, back = here.pin_memory(), back.pin_memory()
    there = torch.zeros(num + 5, dtype=torch.int64, device=device)
    rows.copy_from_host_(there[:num], here[:num])
    assert torch.equal(there[:num].cpu(), here[:num]) and not there[num:].any()
    back.zero_()
    rows.copy_to_host_(back[2 : num + 2], there[:num])
    if is_pinned:
        torch.cuda.synchronize()
    assert torch.equal(back[2 : num + 2], here[:num]) and not back[num + 2 :].any()


def test_what_comes_from_the_host_can_be_read_without_waiting(device: torch.device) -> None:
    """By the kernel that comes next, which reads its slots before the one before has ended."""
    num = 1 << 20 if device.type == "cuda" else 1500
    qkv, cos, sin = (random(1, size).to(device) for size in (4 * 16, 8, 8))
    cache = make_cache(torch.float32, (0, 1, 2, 3), 16, device)
    here, there = torch.zeros(num, dtype=torch.int64), torch.zeros(num, dtype=torch.int64, device=device)
    if device.type == "cuda":
        here = here.pin_memory()
    for slot in (3, 40, 140):
        here[-1] = slot
        rows.copy_from_host_(there, here)
        rows.rope_and_store_(qkv, cos, sin, cache, there[-1:])
        if device.type == "cuda":
            torch.cuda.synchronize()
    assert cache.value.any(-1).any(-1).flatten().nonzero().flatten().tolist() == [3, 40, 140]


def test_samples_are_filled_in(device: torch.device) -> None:
    token_ids = torch.arange(300, device=device)
    starts, rows_of = torch.tensor([0, 1, 7, 299], device=device), torch.tensor([-1, 2, 0, 1], device=device)
    rows.fill_in_(token_ids, starts, rows_of, torch.tensor([50, -3, 60], device=device))
    expected = torch.arange(300)
    expected[[1, 7, 299]] = torch.tensor([60, 50, 0])
    assert torch.equal(token_ids.cpu(), expected)
