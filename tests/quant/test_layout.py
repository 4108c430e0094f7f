"""A weight multiplies as its definition, `dequantize()`, says."""

from __future__ import annotations

import torch

from pelton.quant.layout import Dense, LinearWeight, Stack, fuse


def check(weight: LinearWeight) -> None:
    n, k = weight.shape
    dense = weight.dequantize()
    assert dense.shape == (n, k)
    x = torch.randn(5, k)
    torch.testing.assert_close(weight.matmul(x), x @ dense.T)
    ids = torch.tensor([n - 1, 0, 0])
    torch.testing.assert_close(weight.rows(ids), dense[ids])


def test_dense() -> None:
    check(Dense(torch.randn(7, 4)))


def test_stack_of_different_layouts() -> None:
    check(Stack([Dense(torch.randn(3, 4)), Stack([Dense(torch.randn(2, 4)), Dense(torch.randn(1, 4))])]))


def test_fuse() -> None:
    parts = [Dense(torch.randn(n, 4)) for n in (3, 1, 2)]
    assert fuse(parts[:1]) is parts[0]
    dense = fuse(parts)
    assert isinstance(dense, Dense)
    assert torch.equal(dense.dequantize(), torch.cat([part.weight for part in parts]))
    mixed = fuse([*parts, Stack(parts)])
    assert isinstance(mixed, Stack)
    check(mixed)
