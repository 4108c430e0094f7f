"""Packed weights against the definitions of their layouts, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pelton.quant import FORMATS
from pelton.quant.layout import W8A8, Blocks, Codebook4, Dense, Float8, Int, LinearWeight, Stack, fuse
from pelton.quant.native import Packed, PackedStack, Table, pack
from pelton.weights.gguf import BLOCK_TYPES

TYPES = {block.name: block for block in BLOCK_TYPES.values()}
NUM_OUT, NUM_IN = 40, 512  # three tiles, the last one not full; two blocks of 256
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q6_K": (208,)}  # where a block holds an f16; elsewhere at 0
NF4 = torch.linspace(-1, 1, 16) ** 3


def blocks(name: str, num_out: int = NUM_OUT, num_in: int = NUM_IN, seed: int = 0) -> Blocks:
    """Random blocks with small scales."""
    block, rng = TYPES[name], np.random.default_rng(seed)
    if name in ("F32", "F16", "BF16"):
        numbers = torch.from_numpy(rng.standard_normal((num_out, num_in), np.float32))
        numbers = numbers.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name])
        return Blocks(block, numbers.view(torch.uint8), (num_out, num_in))
    raw = rng.integers(0, 256, (num_out * num_in // block.block_size, block.block_bytes), dtype=np.uint8)
    for start in HALVES.get(name, (0,)):
        scales = (rng.random((len(raw), 1)) * 0.01 + 0.001).astype(np.float16)
        raw[:, start : start + 2] = scales.view(np.uint8)
    return Blocks(block, torch.from_numpy(raw), (num_out, num_in))


def codes(bits: int, group: int, zeros: bool, order: bool = False, num_in: int = NUM_IN) -> Int:
    values = torch.randint(0, 1 << bits, (NUM_OUT, num_in), dtype=torch.uint8)
    groups = -(-num_in // group)
    scales = torch.rand(NUM_OUT, groups) * 0.01 + 0.001
    zero: Tensor | int = torch.randint(0, 1 << bits, (NUM_OUT, groups)).float() if zeros else 1 << (bits - 1)
    return Int(bits, values, scales, zero, torch.randperm(num_in) if order else None)


def float8(num_in: int, num_out: int = NUM_OUT) -> Float8:
    """With a scale for each block."""
    numbers = torch.randn(num_out, num_in).to(torch.float8_e4m3fn)
    return Float8(numbers.view(torch.uint8), torch.rand(-(-num_out // 128), -(-num_in // 128)), (128, 128))


LAYOUTS: dict[str, Any] = {
    **{name: lambda name=name: blocks(name) for name in FORMATS},
    "rows in another order": lambda: Blocks(TYPES["Q4_1"], blocks("Q4_1").data, (NUM_OUT, NUM_IN),
                                            torch.randperm(NUM_OUT)),
    "int4 group 32": lambda: codes(4, 32, zeros=False),
    "int4 group 128": lambda: codes(4, 128, zeros=False),
    "int4 group 64 with zeros": lambda: codes(4, 64, zeros=True),
    "int4 act-order": lambda: codes(4, 128, zeros=True, order=True),
    "int8 per channel": lambda: codes(8, NUM_IN, zeros=False),
    "int8 group 128 with zeros": lambda: codes(8, 128, zeros=True),
    "int8 of 70 columns": lambda: codes(8, 96, zeros=False, num_in=70),
    "codebook4": lambda: Codebook4(torch.randint(0, 16, (NUM_OUT, NUM_IN), dtype=torch.uint8),
                                   torch.rand(NUM_OUT, NUM_IN // 64), NF4),
    "float8": lambda: float8(NUM_IN),
    "float8 of 100 columns": lambda: float8(100),
    "dense of 37 columns": lambda: Dense(torch.randn(NUM_OUT, 37)),
    "dense bfloat16 of 37 columns": lambda: Dense(torch.randn(NUM_OUT, 37).bfloat16()),
}


def packed(weight: LinearWeight, activations: str = "fp32") -> LinearWeight:
    result = pack(weight, activations)
    assert isinstance(result, Packed | PackedStack)
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_packed_weight_is_its_layout(cpu: Any, name: str) -> None:
    """Unpacked to the last bit, with zeros as w = d (u - z); minima made of scale and zero round once more."""
    weight = LAYOUTS[name]()
    got = packed(weight).dequantize()
    expected = weight.dequantize().float()
    if "zeros" in name or name == "int4 act-order":
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("activations", "error"), [("fp32", 1e-6), ("bf16", 5e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_products(cpu: Any, name: str, activations: str, error: float) -> None:
    """x W^T against float64, for few rows and many, rows of a longer matrix, with bias and into a sum."""
    weight = LAYOUTS[name]()
    exact, num_in = weight.dequantize().double(), weight.shape[1]
    multiply = packed(weight, activations).matmul
    bias = torch.randn(NUM_OUT)
    for num_rows in (1, 4, 29):
        x = torch.randn(num_rows, num_in + 3)[:, :num_in] * torch.rand(num_rows, 1)
        product = x.double() @ exact.T
        allowed = error * (x.double().norm(dim=1, keepdim=True) * exact.norm(dim=1))
        assert ((multiply(x).double() - product).abs() <= allowed).all()
        assert ((multiply(x, bias).double() - product - bias).abs() <= allowed + 1e-5).all()
        total = torch.randn(num_rows, NUM_OUT + 5)
        before = total.clone()
        multiply(x, add_to=total[:, 2 : 2 + NUM_OUT])
        added = (total.double() - before)[:, 2 : 2 + NUM_OUT]
        assert ((added - product).abs() <= allowed + 1e-5).all()
        assert torch.equal(total[:, :2], before[:, :2]) and torch.equal(total[:, -3:], before[:, -3:])


@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "IQ4_XS", "Q8_0", "BF16", "F32", "int4 act-order", "codebook4"])
def test_a_row_does_not_depend_on_its_company(cpu: Any, name: str, activations: str) -> None:
    weight = packed(LAYOUTS[name](), activations)
    x = torch.randn(40, NUM_IN)
    alone = torch.cat([weight.matmul(row[None]) for row in x])
    for num_rows in (2, 3, 7, 12, 13, 32, 40):
        assert torch.equal(weight.matmul(x[:num_rows]), alone[:num_rows])
    for num_threads in (1, 3):
        cpu.set_threads(num_threads)
        assert torch.equal(weight.matmul(x), alone)


@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(cpu: Any, activations: str, value: float) -> None:
    x = torch.zeros(3, NUM_IN)
    x[1, 77] = value
    for name in ("Q4_1", "Q6_K", "BF16"):
        finite = packed(LAYOUTS[name](), activations).matmul(x).isfinite()
        assert finite[0].all() and finite[2].all() and not finite[1].all()


def test_parts_of_one_format_become_one_weight() -> None:
    parts = [blocks("Q4_1", 32, seed=1), blocks("Q4_1", 16, seed=2), blocks("Q4_1", 40, seed=3)]
    joined = packed(fuse(parts))
    assert isinstance(joined, Packed)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_parts_of_several_formats_stay_apart_and_write_side_by_side() -> None:
    kinds = (("Q4_K", 32), ("Q4_K", 16), ("Q6_K", 16), ("Q4_K", 24))
    parts = [blocks(name, rows, seed=i) for i, (name, rows) in enumerate(kinds)]
    stack = packed(fuse(parts))
    assert isinstance(stack, PackedStack) and len(stack.parts) == 3
    x, bias = torch.randn(5, NUM_IN), torch.randn(88)
    expected = x @ Stack(parts).dequantize().T + bias
    torch.testing.assert_close(stack.matmul(x, bias), expected, atol=1e-4, rtol=1e-4)
    start = torch.randn(5, 88)
    torch.testing.assert_close(stack.matmul(x, bias, start.clone()), expected + start, atol=1e-4, rtol=1e-4)


def test_float8_becomes_numbers_of_the_compute_dtype() -> None:
    parts = [float8(256, 48), float8(256, 20)]
    joined = pack(fuse(parts), "fp32", torch.bfloat16)
    assert isinstance(joined, Packed)
    assert torch.equal(joined.dequantize(), Stack(parts).dequantize().bfloat16().float())


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_w8a8_rounds_its_input_as_all_weights_do(cpu: Any, activations: str) -> None:
    """As finely as its definition at least, also where a row has outliers."""
    int8 = codes(8, NUM_IN, zeros=False)
    weight = W8A8(int8.codes, int8.scales)
    x = torch.randn(7, NUM_IN)
    x[:, 5] *= 30
    got, expected = packed(weight, activations).matmul(x), packed(int8, activations).matmul(x)
    assert torch.equal(got, expected)
    exact = x.double() @ weight.dequantize().double().T
    assert (got - exact).norm() < (weight.matmul(x) - exact).norm()


def test_rows_of_an_embedding(cpu: Any) -> None:
    weight = blocks("Q6_K")
    ids = torch.tensor([39, 0, 17, 17])
    torch.testing.assert_close(packed(weight).rows(ids, 2.5), weight.dequantize()[ids] * 2.5)
    for name in ("F32", "F16", "BF16"):
        weight = blocks(name, num_in=37)
        assert torch.equal(Table(weight).rows(ids, 2.5), weight.dequantize()[ids].float() * 2.5)
