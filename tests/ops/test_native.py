"""The extension module against plain torch, on every instruction set this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pelton.ops.native import native, reason

DIMS = [1, 7, 16, 64, 576, 577]


@pytest.fixture(params=["generic", "avx2", "avx512"])
def cpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module, switched to one instruction set."""
    if native is None:
        pytest.skip(reason)
    if request.param not in native.supported_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    yield native
    native.set_isa(before)


def run(cpu: Any, x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    out = torch.empty_like(x)
    dtype = str(x.dtype).removeprefix("torch.")
    cpu.rms_norm(out.data_ptr(), x.data_ptr(), weight.data_ptr(), *x.shape, out.stride(0), x.stride(0), eps, dtype)
    return out


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    y = x.double()
    return y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm_float32(cpu: Any, dim: int) -> None:
    x, weight = torch.randn(5, dim), torch.randn(dim)
    torch.testing.assert_close(run(cpu, x, weight).double(), reference(x, weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm_bfloat16_is_rounded_once(cpu: Any, dim: int) -> None:
    x, weight = torch.randn(5, dim).bfloat16(), torch.randn(dim)
    exact = reference(x, weight)
    error = (run(cpu, x, weight).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 * 1.001).all()  # half a unit in the last of 8 bits


def test_rms_norm_in_place_on_strided_rows(cpu: Any) -> None:
    rows, weight = torch.randn(4, 100), torch.randn(64)
    kept, x = rows.clone(), rows[:, :64]
    expected = run(cpu, x.contiguous(), weight)
    cpu.rms_norm(x.data_ptr(), x.data_ptr(), weight.data_ptr(), 4, 64, 100, 100, 1e-5, "float32")
    assert torch.equal(rows[:, :64], expected)
    assert torch.equal(rows[:, 64:], kept[:, 64:])


def test_every_instruction_set_gives_the_same_bits(cpu: Any) -> None:
    x, weight = torch.randn(9, 577), torch.randn(577)
    here = run(cpu, x, weight), run(cpu, x.bfloat16(), weight)
    cpu.set_isa("generic")
    assert torch.equal(here[0], run(cpu, x, weight))
    assert torch.equal(here[1], run(cpu, x.bfloat16(), weight))


def test_nan_and_infinity_stay_visible(cpu: Any) -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0]]).bfloat16()
    assert run(cpu, x, torch.ones(2)).isnan().any(dim=1).all()


@pytest.mark.parametrize(
    "change",
    [{"out": 0}, {"x": 0}, {"weight": 0}, {"weight": 3}, {"dim": 0}, {"x_stride": 1}, {"out_stride": 1}, {"eps": -1.0},
     {"eps": float("nan")}, {"dtype": "float16"}],
)
def test_arguments_are_checked(cpu: Any, change: dict[str, Any]) -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    arguments = {"out": x.data_ptr(), "x": x.data_ptr(), "weight": weight.data_ptr(), "num_rows": 2, "dim": 8,
                 "out_stride": 8, "x_stride": 8, "eps": 1e-5, "dtype": "float32"}
    with pytest.raises(ValueError):
        cpu.rms_norm(**arguments | change)


def test_unknown_instruction_set(cpu: Any) -> None:
    with pytest.raises(ValueError, match="mmx"):
        cpu.set_isa("mmx")
