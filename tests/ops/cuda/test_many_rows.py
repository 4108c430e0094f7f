"""Products of many rows with codes, in every layout, against the weights' definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pelton.quant import gpu
from pelton.quant.codes import Codes
from pelton.quant.tiled import make_tiles

cuts = pytest.importorskip("pelton.ops.cuda.cuts")
many_rows = pytest.importorskip("pelton.ops.cuda.many_rows")
tiles = pytest.importorskip("pelton.ops.cuda.tiles")
is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper, reason="needs compute capability 9.0")]
NUM_OUT = 352  # of four blocks, of which the third has fewer and the last none


def codes(bits: int, group: int, num_in: int = 640, mins: bool = False, **options: object) -> Codes:
    """Of any bits; with minima, or a zero point in the middle."""
    numbers = torch.randint(0, 1 << bits, (NUM_OUT, num_in), dtype=torch.uint8, device="cuda")
    scales = torch.rand(NUM_OUT, num_in // group, device="cuda") * 0.01 + 0.001
    zero = 0 if mins or options else 1 << (bits - 1)
    return Codes(bits, numbers, scales, scales * 7 if mins else None, zero=zero, **options)


def with_zeros(bits: int, group: int) -> Codes:
    parts = codes(bits, group)
    zeros = torch.randint(0, 1 << bits, parts.scales.shape, device="cuda").float()
    return Codes(bits, parts.codes, parts.scales.half().float(), zeros=zeros)


def in_super_blocks(bits: int, group: int, mins: bool) -> Codes:
    """As K-quants have them."""
    num_in = 2304
    numbers = torch.randint(0, 1 << bits, (NUM_OUT, num_in), dtype=torch.uint8, device="cuda")
    scales = [torch.randint(0, 64, (NUM_OUT, num_in // group), dtype=torch.uint8, device="cuda") for _ in range(2)]
    supers = [(torch.rand(NUM_OUT, num_in // 256, device="cuda") * 1e-3).half().float() for _ in range(2)]
    if mins:
        return Codes(bits, numbers, *scales, supers=supers[0], super_mins=supers[1])
    return Codes(bits, numbers, (scales[0] * 2).view(torch.int8) - 64, zero=1 << (bits - 1), supers=supers[0])


def float8(group: int) -> Codes:
    numbers = torch.randn(NUM_OUT, 640, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
    return Codes(8, numbers, codes(8, group).scales, float8=True)


LAYOUTS = {
    "int4 group 128": lambda: codes(4, 128),
    "int4 of 4096 columns": lambda: codes(4, 128, 4096),
    "int4 of 192 columns": lambda: codes(4, 64, 192),
    "int4 group 32 with minima": lambda: codes(4, 32, mins=True),
    "int4 group 128 with zero points": lambda: with_zeros(4, 128),
    "int3 group 16 with zero points": lambda: with_zeros(3, 16),
    "int8 of a row": lambda: codes(8, 640),
    "int8 group 32": lambda: codes(8, 32),
    "float8 of a row": lambda: float8(640),
    "float8 group 128": lambda: float8(128),
    "nf4": lambda: codes(4, 64, values=tuple((torch.linspace(-1, 1, 16) ** 3).tolist())),
    "Q2_K": lambda: in_super_blocks(2, 16, True),
    "Q3_K": lambda: in_super_blocks(3, 16, False),
    "Q4_K": lambda: in_super_blocks(4, 32, True),
    "Q5_K": lambda: in_super_blocks(5, 32, True),
    "Q6_K": lambda: in_super_blocks(6, 16, False),
}


def close(got: Tensor, expected: Tensor, half: torch.dtype) -> None:
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[half]
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < 3 * step, float(error)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_codes(name: str, half: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = LAYOUTS[name]()
    weight, expected = make_tiles(parts), parts.weights().double()
    for num_rows in (1, 65, 128, 300):
        x = torch.randn(num_rows, expected.shape[1] + 8, device="cuda").to(half)[:, :-8]
        bias, before = torch.randn(NUM_OUT, device="cuda").to(half), torch.randn(num_rows, NUM_OUT, device="cuda")
        outs = [before.clone() for _ in range(2)]
        for out in outs:
            many_rows.multiply(x, weight, out, bias, accumulate=True)
        close(outs[0], x.double() @ expected.T + bias.double() + before.double(), half)
        assert torch.equal(*outs)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nt", cuts.MANY_TILES)
@pytest.mark.parametrize("split", cuts.MANY_SPLITS)
@pytest.mark.parametrize("name", ["int4 of 4096 columns", "Q4_K", "Q6_K", "nf4", "int4 of 192 columns"])
def test_cuts(name: str, nt: int, split: int, half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sizes, with a gate, added to what is there, and into columns of longer rows."""
    torch.manual_seed(0)
    parts = LAYOUTS[name]()
    weight, numbers = make_tiles(parts), parts.weights().double()
    if split > 1 and weight.shape[1] < 512 * split:
        pytest.skip("too few columns to share")
    given = tiles.has_values(weight), many_rows.shared_memory(weight.codes.device)
    monkeypatch.setattr(cuts, "many", lambda num_rows, *shape: cuts._many_of(nt, split, *given, num_rows))
    for num_rows in (70, 256, 515):
        x = (torch.randn(num_rows, numbers.shape[1], device="cuda") * 0.05).to(half)
        product = x.double() @ numbers.T
        residual = torch.randn(num_rows, NUM_OUT + 32, device="cuda").to(half)
        expected = residual.double()
        expected[:, 16:-16] += product
        many_rows.multiply(x, weight, residual[:, 16:-16], accumulate=True)
        close(residual, expected, half)
        bias = torch.randn(NUM_OUT, device="cuda").to(half)
        left, right = (product + bias.double()).chunk(2, dim=1)
        for gate, act in (("silu", F.silu), ("gelu_tanh", partial(F.gelu, approximate="tanh"))):
            out = torch.empty(num_rows, NUM_OUT // 2, device="cuda", dtype=half)
            many_rows.multiply(x, weight, out, bias, gate=gate)
            close(out, act(left) * right, half)


def test_weights_multiply_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 to 512 rows, but not where bits are to be the same; rows that begin anywhere are opened."""
    calls, lay_out = [], many_rows.lay_out
    monkeypatch.setattr(many_rows, "lay_out", lambda x, *given: calls.append(len(x)) or lay_out(x, *given))
    parts = codes(4, 128)
    weight, numbers = gpu.Tiled(make_tiles(parts), torch.bfloat16), parts.weights().double()
    for num_rows in (32, 33, 512, 513):
        x = (torch.randn(num_rows, 640, device="cuda") * 0.05).bfloat16()
        product = x.double() @ numbers.T
        before = torch.randn(num_rows, NUM_OUT, device="cuda").bfloat16()
        close(weight.matmul(x, add_to=before.clone()), product + before.double(), x.dtype)
        left, right = product.chunk(2, dim=1)
        hidden = weight.gated(x, None, "silu")
        if num_rows <= 512 or hidden is not None:
            close(hidden, F.silu(left) * right, x.dtype)
    assert calls == [33, 33, 512, 512]
    x = torch.randn(100, 643, device="cuda").bfloat16()[:, 3:]
    close(weight.matmul(x), x.double() @ numbers.T, x.dtype)
    weight.deterministic = True
    weight.matmul(x.clone(memory_format=torch.contiguous_format))
    assert calls == [33, 33, 512, 512]


def test_no_rows_are_no_launch() -> None:
    weight = make_tiles(codes(4, 128))
    many_rows.multiply(torch.empty(0, 640, device="cuda").bfloat16(), weight, torch.empty(0, NUM_OUT, device="cuda"))
