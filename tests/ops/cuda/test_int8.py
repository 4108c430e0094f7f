"""Products of int8 with int8: to the last bit, whatever kernel multiplies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pelton.ops.cuda import int8
from pelton.quant import gpu
from pelton.quant.layout import W8A8, Float8, Int, Stack, fuse

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)


def operands(num_rows: int, num_out: int, num_in: int, device: torch.device) -> tuple[Tensor, ...]:
    """x, its scales, W, its scales."""
    scales = [torch.rand(n, generator=torch.Generator().manual_seed(n)) * 1e-3 + 1e-4 for n in (num_rows, num_out)]
    x, weight = numbers(num_rows, num_in), numbers(num_out, num_in, seed=1)
    return x.to(device), scales[0].to(device), weight.to(device), scales[1].to(device)


def expected(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    sums = (x.double() @ weight.double().T).float()
    return sums * x_scales[:, None] * scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # the interpreter cuts bfloat16 off
@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), [(1, 24, 128), (70, 300, 200), (130, 40, 384)])
def test_many_rows(device: torch.device, num_rows: int, num_out: int, num_in: int, dtype: torch.dtype) -> None:
    args = operands(num_rows, num_out, num_in, device)
    product, bias = expected(*args), torch.randn(num_out, device=device).to(dtype)
    wide = torch.full((num_rows, num_out + 7), torch.nan, dtype=dtype, device=device)
    out = wide[:, 3:-4]
    int8.multiply(*args, out)
    assert torch.equal(out, product.to(dtype))
    assert wide[:, :3].isnan().all() and wide[:, -4:].isnan().all()
    int8.multiply(*args, out, bias)
    assert torch.equal(out, (product + bias.float()).to(dtype))
    before = out.clone().float()
    int8.multiply(*args, out, bias, accumulate=True)
    assert torch.equal(out, (before + (product + bias.float())).to(dtype))


def test_the_largest_sums_are_exact(device: torch.device) -> None:
    """Beyond what float32 holds: 2^24."""
    x, weight = (torch.full((rows, 4096), 127, dtype=torch.int8, device=device) for rows in (3, 16))
    weight[5, 7] = 126
    out = torch.empty(3, 16, device=device)
    int8.multiply(x, torch.ones(3, device=device), weight, torch.full((16,), 2.0**-7, device=device), out)
    sums = torch.full((3, 16), 127 * 127 * 4096, dtype=torch.int32)
    sums[:, 5] -= 127
    assert torch.equal(out.cpu(), sums.float() / 128)


def test_a_packed_weight_gives_the_numbers_of_its_definition(device: torch.device) -> None:
    parts = [W8A8(torch.randint(0, 256, (n, 192), dtype=torch.uint8).to(device), torch.rand(n, 1).to(device))
             for n in (20, 16)]
    packed = gpu.pack(fuse(parts), torch.float32)
    assert isinstance(packed, gpu.Int8)
    x = torch.randn(70, 192).to(device)
    assert torch.equal(packed.matmul(x), torch.cat([part.matmul(x) for part in parts], dim=1))
    assert torch.equal(packed.dequantize(), Stack(parts).dequantize())


def test_float8_that_is_no_number_stays_visible(device: torch.device) -> None:
    codes = torch.randint(0, 127, (48, 256), dtype=torch.uint8).to(device)
    codes[33, 200] = 0xFF
    weights = [Float8(codes, torch.rand(1, 2).to(device), (128, 128)) for _ in range(2)]
    packed = gpu.pack(Stack(weights), torch.bfloat16)
    assert isinstance(packed, gpu.Tiled) and packed.tiles.float8 and packed.shape == (96, 256)
    broken = gpu._codes(weights[0]).weights().isnan()
    assert broken[33, 128:].all() and broken.sum() == 128


@pytest.mark.parametrize("num_groups", [2, 24])
def test_groups_that_do_not_fit_into_tiles_become_numbers(device: torch.device, num_groups: int) -> None:
    codes = torch.randint(0, 16, (32, 192), dtype=torch.uint8).to(device)
    weight = Int(4, codes, torch.rand(32, num_groups).to(device), 8)
    packed = gpu.pack(weight, torch.bfloat16)
    assert isinstance(packed, gpu.Numbers) and torch.equal(packed.weight, weight.dequantize().bfloat16())


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_out", "num_in"), [(72, 1024), (4096, 4096), (33, 14336), (28672, 4096)])
def test_few_rows_have_the_same_bits(num_out: int, num_in: int, dtype: torch.dtype) -> None:
    """As many rows, and as the definition."""
    few_rows = pytest.importorskip("pelton.ops.cuda.few_rows")
    x, x_scales, weight, scales = operands(200, num_out, num_in, torch.device("cuda"))
    bias, residual = torch.randn(num_out, device="cuda").to(dtype), torch.randn(200, num_out, device="cuda").to(dtype)
    many = residual.clone()
    int8.multiply(x, x_scales, weight, scales, many, bias, accumulate=True)
    assert torch.equal(many, (residual.float() + (expected(x, x_scales, weight, scales) + bias.float())).to(dtype))
    for num_rows in (1, 5, 8, 16):
        out = residual[:num_rows].clone()
        assert few_rows.accepts_int8(x[:num_rows], out, bias)
        few_rows.multiply_int8(x[:num_rows], x_scales, weight, scales, out, bias, accumulate=True)
        assert torch.equal(out, many[:num_rows])
        logits = [torch.empty(num_rows, num_out, device="cuda") for _ in range(2)]
        few_rows.multiply_int8(x[:num_rows], x_scales, weight, scales, logits[0])
        int8.multiply(x[:num_rows], x_scales, weight, scales, logits[1])
        assert torch.equal(*logits)
