"""Products of few rows on a GPU, in every layout, against the weights' definitions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from coded import LAYOUTS, NUM_IN, close, integers
from torch import Tensor

from pelton.quant.codes import Codes
from pelton.quant.tiled import make_tiles

cuts = pytest.importorskip("pelton.ops.cuda.cuts")
few_rows = pytest.importorskip("pelton.ops.cuda.few_rows")
same_rows = pytest.importorskip("pelton.ops.cuda.same_rows")
open_tiles = pytest.importorskip("pelton.ops.cuda.tiles").open_tiles
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
NUM_OUT = 72


@pytest.fixture(params=["few", "more", "more with less memory"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel multiplies, whatever the number of rows and the size of the weight."""
    if request.param == "dense" and not few_rows.has_tma(torch.device("cuda")):
        pytest.skip("dense_rows.cu needs compute capability 9.0")
    monkeypatch.setattr(cuts, "is_few", lambda *given: request.param == "few")
    monkeypatch.setattr(few_rows, "has_tma", lambda device: request.param == "dense")
    if request.param == "more with less memory":  # before Hopper
        monkeypatch.setattr(few_rows, "has_wgmma", lambda device: False)
        monkeypatch.setattr(few_rows, "shared_memory", lambda device: 99 << 10)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("_kernel", ["few", "more"], indirect=True)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_codes(name: str, half: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = LAYOUTS[name](NUM_OUT)
    tiles, expected = make_tiles(parts), parts.weights()
    opened = open_tiles(tiles, half)
    assert (opened.float() - expected).abs().max() < 1e-2 * expected.abs().max()
    for num_rows in (1, 2, 8, 9, 16, 31, 64):
        x = torch.randn(num_rows, expected.shape[1], device="cuda").to(half)
        bias = torch.randn(expected.shape[0], device="cuda").to(half)
        out = torch.empty(num_rows, expected.shape[0], device="cuda")
        few_rows.multiply(x, tiles, out, bias)
        close(out, x.double() @ expected.double().T + bias.double(), half)
        again = torch.empty_like(out)
        few_rows.multiply(x, tiles, again, bias)
        assert torch.equal(out, again)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("_kernel", ["few", "more"], indirect=True)
@pytest.mark.parametrize("processors", [1, 2])  # many tiles for each, or some; above there are few
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "int4 group 128", "int4 of 1216 columns with minima",
                                  "nf4 of 1216 columns", "float8 group 128", "float8 of 192 columns"])
def test_cuts_of_other_sizes(name: str, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps, teams and blocks share columns otherwise where there are more tiles for each processor."""
    torch.manual_seed(0)
    parts = LAYOUTS[name](NUM_OUT)
    tiles, weights = make_tiles(parts), parts.weights().double()
    monkeypatch.setattr(few_rows, "num_processors", lambda device: processors)
    for num_rows in (1, 2, 5, 12, 31, 64):
        x = torch.randn(num_rows, tiles.shape[1], device="cuda").bfloat16()
        out = torch.empty(num_rows, NUM_OUT, device="cuda")
        few_rows.multiply(x, tiles, out)
        close(out, x.double() @ weights.T, torch.bfloat16)


@pytest.mark.parametrize("processors", [1, 2])  # teams of four warps, or of eight
@pytest.mark.parametrize(("teams", "entry"), [(1, 128), (1, 256), (2, 256)])
@pytest.mark.parametrize("name", ["nf4", "IQ4_NL", "IQ4_XS"])
def test_tables_of_values(
    name: str, teams: int, entry: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last team has no rows."""
    torch.manual_seed(0)
    parts = LAYOUTS[name](NUM_OUT)
    tiles, weights = make_tiles(parts), parts.weights().double()
    monkeypatch.setattr(few_rows, "num_processors", lambda device: processors)
    monkeypatch.setattr(cuts, "is_few", lambda *given: True)
    monkeypatch.setattr(cuts, "with_table", lambda cut, *given: replace(cut, TEAMS=teams, ENTRY=entry))
    for num_rows in (1, 2, 5):
        x = torch.randn(num_rows, tiles.shape[1], device="cuda").bfloat16()
        out = torch.empty(num_rows, NUM_OUT, device="cuda")
        few_rows.multiply(x, tiles, out)
        close(out, x.double() @ weights.T, torch.bfloat16)


def test_rows_may_begin_anywhere_where_bits_are_the_same() -> None:
    tiles = make_tiles(integers(NUM_OUT, 4, 64, True))
    x = torch.randn(70, NUM_IN + 3, device="cuda").bfloat16()[:, 3:]
    out, expected = (torch.empty(70, NUM_OUT, device="cuda") for _ in range(2))
    same_rows.multiply(x, tiles, out)
    same_rows.multiply(x.clone(memory_format=torch.contiguous_format), tiles, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("num_out", [72, 4608, 20000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_can_have_the_same_bits_in_any_company(name: str, num_out: int) -> None:
    """Few tiles, more, and many."""
    parts = LAYOUTS[name](NUM_OUT)
    repeats = -(-num_out // NUM_OUT)
    many = {field: torch.cat([value] * repeats) for field, value in vars(parts).items() if isinstance(value, Tensor)}
    tiles = make_tiles(replace(parts, **many))
    x = torch.randn(64, tiles.shape[1], device="cuda").bfloat16()
    residual = torch.randn(64, tiles.shape[0], device="cuda").bfloat16()
    outs = {num_rows: residual[:num_rows].clone() for num_rows in (1, 2, 7, 9, 16, 31, 44, 64)}
    for num_rows, out in outs.items():
        few_rows.multiply(x[:num_rows], tiles, out, accumulate=True, same=True)
    for num_rows, out in outs.items():
        assert torch.equal(out, outs[64][:num_rows]), num_rows
    if tiles.shape[0] % 32 == 0:
        gated = [torch.empty(num_rows, tiles.shape[0] // 2, device="cuda", dtype=x.dtype) for num_rows in (1, 9, 64)]
        for out in gated:
            few_rows.multiply(x[: len(out)], tiles, out, gate="silu", same=True)
        assert all(torch.equal(out, gated[-1][: len(out)]) for out in gated)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "int4 group 128", "int4 group 128 with zero points",
                                  "int4 of 1216 columns with minima", "nf4", "float8 group 128"])
def test_parts_of_a_sum_are_added_in_one_order(name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks that share them, teams, or one block in turn, as the number of rows has it."""
    torch.manual_seed(0)
    monkeypatch.setattr(cuts, "is_few", lambda *given: False)
    monkeypatch.setattr(cuts, "same_parts", lambda *given: parts)
    codes = LAYOUTS[name](NUM_OUT)
    fields = {field: torch.cat([value] * 4) for field, value in vars(codes).items() if isinstance(value, Tensor)}
    tiles = make_tiles(replace(codes, **fields))
    weights = replace(codes, **fields).weights().double()
    x = torch.randn(64, tiles.shape[1], device="cuda").bfloat16()
    outs = {num_rows: torch.empty(num_rows, tiles.shape[0], device="cuda") for num_rows in (1, 3, 8, 9, 16, 30, 64)}
    gated = {num_rows: torch.empty(num_rows, tiles.shape[0] // 2, device="cuda", dtype=x.dtype) for num_rows in outs}
    for num_rows, out in outs.items():
        few_rows.multiply(x[:num_rows], tiles, out, same=True)
        few_rows.multiply(x[:num_rows], tiles, gated[num_rows], gate="silu", same=True)
    close(outs[64], x.double() @ weights.T, torch.bfloat16)
    for num_rows, out in outs.items():
        assert torch.equal(out, outs[64][:num_rows]), num_rows
        assert torch.equal(gated[num_rows], gated[64][:num_rows]), num_rows


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("_kernel", ["few", "more", "dense"], indirect=True)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_out", "num_in"), [(72, 1024), (4096, 4096), (20000, 576), (33, 14336), (5, 64)])
def test_numbers(half: torch.dtype, num_out: int, num_in: int) -> None:
    """Of `dense`, blocks with more tiles than are on their way, warps of no columns, tiles of less than 16 rows."""
    torch.manual_seed(0)
    weight = torch.randn(num_out, num_in, device="cuda").to(half)
    for num_rows in (1, 2, 3, 5, 8, 16, 40, 64):
        x = torch.randn(num_rows, num_in + 8, device="cuda").to(half)[:, :num_in]
        residual = torch.randn(num_rows, num_out, device="cuda").to(half)
        expected = x.double() @ weight.double().T + residual.double()
        few_rows.multiply(x, weight, residual, accumulate=True)
        close(residual, expected, half)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("_kernel", ["few", "more", "more with less memory", "dense"], indirect=True)
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("name", ["numbers", "int4 group 128", "Q4_K", "Q6_K", "Q8_0", "float8 group 128", "nf4"])
def test_gates(gate: str, name: str) -> None:
    torch.manual_seed(0)
    half = torch.bfloat16
    if name == "numbers":
        weight = torch.randn(96, NUM_IN, device="cuda").to(half)
        numbers = weight.double()
    else:
        parts = LAYOUTS[name](NUM_OUT)
        parts = replace(parts, **{field: torch.cat([value, value])[:96] for field, value in vars(parts).items()
                                  if isinstance(value, Tensor)})
        weight, numbers = make_tiles(parts), parts.weights().double()
    act = torch.nn.functional.silu if gate == "silu" else partial(torch.nn.functional.gelu, approximate="tanh")
    for num_rows in (1, 3, 16, 30, 64):
        x = (torch.randn(num_rows, NUM_IN, device="cuda") * 0.05).to(half)
        out = torch.empty(num_rows, 48, device="cuda", dtype=half)
        few_rows.multiply(x, weight, out, gate=gate)
        left, right = (x.double() @ numbers.T).chunk(2, dim=1)
        close(out, act(left) * right, half)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_every_float8_is_opened_exactly(half: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes = codes[codes & 127 != 127].repeat(16, 32)[:, :4096]
    opened = open_tiles(make_tiles(Codes(8, codes, torch.ones(16, 1, device="cuda"), float8=True)), half)
    assert torch.equal(opened.float(), codes.view(torch.float8_e4m3fn).float())
