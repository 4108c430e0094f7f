"""Products of many rows with codes, in every layout, against the weights' definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from coded import LAYOUTS, NUM_IN, close, integers
from torch import Tensor
from torch.nn import functional as F

from pelton.ops.prompts import of_prompts
from pelton.quant import gpu
from pelton.quant.tiled import make_tiles

cuts = pytest.importorskip("pelton.ops.cuda.cuts")
many_rows = pytest.importorskip("pelton.ops.cuda.many_rows")
same_rows = pytest.importorskip("pelton.ops.cuda.same_rows")
tiles = pytest.importorskip("pelton.ops.cuda.tiles")
is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper, reason="needs compute capability 9.0")]
NUM_OUT = 352  # of four blocks, of which the third has fewer and the last none


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_codes(name: str, half: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = LAYOUTS[name](NUM_OUT)
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
@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_are_opened_exactly(name: str, half: torch.dtype) -> None:
    """All but few weights are rounded once, unless they are looked up: values are rounded before they are scaled."""
    parts = LAYOUTS[name](NUM_OUT)
    if parts.values:
        pytest.skip("values that are looked up")
    weights = parts.weights()
    columns = torch.randperm(weights.shape[1], device="cuda")[:128]
    x = F.one_hot(columns, weights.shape[1]).to(half)
    out = torch.empty(len(columns), NUM_OUT, device="cuda", dtype=half)
    many_rows.multiply(x, make_tiles(parts), out)
    expected = weights[:, columns].T
    close(out, expected.double(), half)
    off = (out.float() - expected.to(half).float()).abs()
    least = expected.abs().mean() * {torch.bfloat16: 2**-10, torch.float16: 2**-13}[half]  # what a zero may be off
    assert (off > least).float().mean() < 0.05


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nt", cuts.MANY_TILES)
@pytest.mark.parametrize("split", cuts.MANY_SPLITS)
@pytest.mark.parametrize("name", ["int4 group 128", "Q4_K", "Q6_K", "nf4", "int4 of 1216 columns with minima"])
def test_cuts(name: str, nt: int, split: int, half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sizes, with a gate, added to what is there, and into columns of longer rows."""
    torch.manual_seed(0)
    parts = LAYOUTS[name](NUM_OUT)
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
    """33 to 1024 rows, but not where bits are to be the same. Else, or if rows begin anywhere, codes are opened."""

    def plain(x: Tensor, weight: Tensor, out: Tensor, bias: None, accumulate: bool) -> None:
        product = x.double() @ weight.double().T
        out.copy_(product + out if accumulate else product)

    monkeypatch.setattr(gpu, "_multiply", plain)
    calls, lay_out = [], many_rows.lay_out
    monkeypatch.setattr(many_rows, "lay_out", lambda x, *given: calls.append(len(x)) or lay_out(x, *given))
    parts = integers(NUM_OUT, 4, 128, False)
    weight, numbers = gpu.Tiled(make_tiles(parts), torch.bfloat16), parts.weights().double()
    for num_rows in (32, 33, 1024, 1025):
        x = (torch.randn(num_rows, NUM_IN, device="cuda") * 0.05).bfloat16()
        product = x.double() @ numbers.T
        before = torch.randn(num_rows, NUM_OUT, device="cuda").bfloat16()
        close(weight.matmul(x, add_to=before.clone()), product + before.double(), x.dtype)
        left, right = product.chunk(2, dim=1)
        hidden = weight.gated(x, None, "silu")
        if num_rows <= 1024 or hidden is not None:
            close(hidden, F.silu(left) * right, x.dtype)
    assert calls == [33, 33, 1024, 1024]
    x = torch.randn(100, NUM_IN + 3, device="cuda").bfloat16()[:, 3:]
    close(weight.matmul(x), x.double() @ numbers.T, x.dtype)
    weight.deterministic = True
    x = x.clone(memory_format=torch.contiguous_format)
    weight.matmul(x)
    assert calls == [33, 33, 1024, 1024]
    with of_prompts(True):
        weight.matmul(x)
        weight.gated(x[:1], None, "silu")
    assert calls == [33, 33, 1024, 1024, 100, 1]


@pytest.mark.parametrize(("hopper", "split"), [(True, 1), (True, 2), (False, 1)])
@pytest.mark.parametrize("name", ["int4 group 128", "Q4_K", "Q6_K", "nf4", "int4 of 1216 columns with minima"])
def test_a_row_of_prompts_has_the_same_bits_in_any_company(
    name: str, hopper: bool, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks share columns or not; rows fill one block, several, or are cut. Elsewhere codes are opened."""
    monkeypatch.setattr(many_rows, "MAX_WHOLE_ROWS", 1024)
    monkeypatch.setattr(many_rows, "has_wgmma", lambda device: hopper)
    monkeypatch.setattr(cuts, "same_split", lambda *given: split)
    torch.manual_seed(0)
    parts = LAYOUTS[name](NUM_OUT)
    weight, numbers = make_tiles(parts), parts.weights().double()
    x = torch.randn(1500, numbers.shape[1], device="cuda").bfloat16() * 0.05
    whole, gated = (torch.empty(1500, n, device="cuda", dtype=x.dtype) for n in (NUM_OUT, NUM_OUT // 2))

    def multiply(rows: slice, out: Tensor, gated: Tensor) -> None:
        with of_prompts(True):
            same_rows.multiply(x[rows], weight, out)
            assert same_rows.accepts_gated(x[rows], weight) == hopper
            if hopper:
                same_rows.multiply(x[rows], weight, gated, gate="silu")

    multiply(slice(None), whole, gated)
    product = x.double() @ numbers.T
    close(whole, product, x.dtype)
    if hopper:
        left, right = product.chunk(2, dim=1)
        close(gated, F.silu(left) * right, x.dtype)
    for num_rows in (1, 2, 16, 64, 65, 128, 200, 256, 300, 512, 700, 1024, 1100):
        for rows in (slice(num_rows), slice(1500 - num_rows, 1500)):
            outs = [torch.empty_like(out[rows]) for out in (whole, gated)]
            multiply(rows, *outs)
            assert torch.equal(outs[0], whole[rows]), num_rows
            assert not hopper or torch.equal(outs[1], gated[rows]), num_rows


def test_no_rows_are_no_launch() -> None:
    weight = make_tiles(integers(NUM_OUT, 4, 128, False))
    many_rows.multiply(torch.empty(0, NUM_IN, device="cuda").bfloat16(), weight, torch.empty(0, NUM_OUT, device="cuda"))
