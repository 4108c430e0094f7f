"""Gated products of many rows, against the product and its gate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pelton.ops.cuda import gated_rows, many_rows
from pelton.quant import gpu
from pelton.quant.codes import Codes
from pelton.quant.tiled import make_tiles


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "num_out", "num_in", "has_bias"),
    [(65, 72, 200, True), (300, 136, 64, False), (130, 1000, 72, True), (1100, 136, 64, False)],
)
def test_products(
    device: torch.device, gate: str, dtype: torch.dtype, num_rows: int, num_out: int, num_in: int, has_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By few processors, each of which has several tiles; of 1,100 rows there are two bands."""
    monkeypatch.setattr(gated_rows, "num_processors", lambda device: 2)
    x = random(num_rows, num_in + 8, seed=0, dtype=dtype).to(device)[:, :num_in]
    weight = random(2 * num_out, num_in, seed=1, dtype=dtype).to(device) / 8
    bias = random(2 * num_out, seed=2, dtype=dtype).to(device) if has_bias else None
    out = torch.full((num_rows + 1, num_out), 7.0, dtype=dtype, device=device)
    gated_rows.multiply(x, weight, out[:num_rows], bias, gate)

    both = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    turned, up = both.to(dtype).double().chunk(2, 1)
    gelu = torch.nn.functional.gelu(turned, approximate="tanh")
    expected = (torch.nn.functional.silu(turned) if gate == "silu" else gelu) * up
    step = torch.finfo(dtype).eps
    assert (out[:num_rows].double() - expected).abs().max() <= 4 * step * expected.abs().max()
    assert (out[num_rows] == 7.0).all()


def test_what_it_takes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_rows, "has_wgmma", lambda device: True)
    monkeypatch.setattr(gated_rows, "is_faster", lambda *shape: True)
    x = torch.zeros(256, 64, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(256, 64, dtype=torch.bfloat16, device=device)
    assert gated_rows.accepts(x, weight)
    assert not gated_rows.accepts(x[:64], weight)
    assert not gated_rows.accepts(x.float(), weight)
    assert not gated_rows.accepts(x.half(), weight)
    assert not gated_rows.accepts(x[:, :60], weight[:, :60])
    assert not gated_rows.accepts(x[:, 1:57], weight[:, :56])
    assert not gated_rows.accepts(x, weight[:24])
    monkeypatch.setattr(gated_rows, "is_faster", lambda *shape: False)
    assert not gated_rows.accepts(x, weight)
    monkeypatch.setattr(gated_rows, "has_wgmma", lambda device: False)
    monkeypatch.setattr(gated_rows, "is_faster", lambda *shape: True)
    assert not gated_rows.accepts(x, weight)


def test_rows_that_leave_processors_idle_are_for_torch() -> None:
    """Of Llama-8B, on an H200."""
    given = (96, 128, 192, 256, 320, 512, 700, 1024, 1030, 8192)
    assert [rows for rows in given if gated_rows.is_faster(rows, 14336, 132)] == [128, 256, 1024, 8192]


@pytest.mark.parametrize("kind", ["numbers", "tiles"])
def test_weights_multiply_many_rows_so(device: torch.device, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_rows, "has_wgmma", lambda device: True)
    monkeypatch.setattr(gated_rows, "is_faster", lambda *shape: True)
    opened = random(96, 128, seed=1, dtype=torch.bfloat16).to(device) / 8
    if kind == "tiles":
        monkeypatch.setattr(gpu, "open_tiles", lambda tiles, dtype: opened)
        monkeypatch.setattr(many_rows, "MAX_ROWS", 0)
        codes = Codes(4, torch.zeros(96, 128, dtype=torch.uint8), torch.ones(96, 1), zero=8)
        weight: gpu.Whole = gpu.Tiled(make_tiles(codes), torch.bfloat16)
    else:
        weight = gpu.Numbers(opened)
    x = random(70, 128, seed=0, dtype=torch.bfloat16).to(device)
    bias = random(96, seed=2, dtype=torch.bfloat16).to(device)
    hidden = weight.gated(x, bias, "silu")
    gate, up = (x.double() @ opened.double().T + bias.double()).chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    assert hidden is not None and (hidden.double() - expected).abs().max() <= 2**-6 * expected.abs().max()
    weight.deterministic = True  # many rows are multiplied as few are
    if kind == "numbers":
        assert weight.gated(x, bias, "silu") is None
