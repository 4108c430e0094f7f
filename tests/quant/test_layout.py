"""A weight multiplies as its definition, `dequantize()`, says."""

from __future__ import annotations

import torch

from pelton.quant.layout import Codebook4, Dense, Int, LinearWeight, Stack, fuse


def check(weight: LinearWeight) -> None:
    n, k = weight.shape
    dense = weight.dequantize()
    assert dense.shape == (n, k)
    x, bias = torch.randn(5, k), torch.randn(n)
    torch.testing.assert_close(weight.matmul(x), x @ dense.T)
    torch.testing.assert_close(weight.matmul(x, bias), x @ dense.T + bias)
    total = torch.randn(5, n)
    torch.testing.assert_close(weight.matmul(x, bias, total.clone()), total + x @ dense.T + bias)
    ids = torch.tensor([n - 1, 0, 0])
    torch.testing.assert_close(weight.rows(ids), dense[ids])
    torch.testing.assert_close(weight.rows(ids, 2.0), dense[ids] * 2)


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


def test_int_by_hand() -> None:
    """Two groups of two columns; w = scale (code - zero), and with an order the columns go where they belong."""
    codes, scales = torch.tensor([[0, 8, 15, 7]], dtype=torch.uint8), torch.tensor([[0.5, 2.0]])
    check(Int(4, codes, scales, 8))
    assert Int(4, codes, scales, 8).dequantize().tolist() == [[-4.0, 0.0, 14.0, -2.0]]
    zeros = torch.tensor([[0.0, 15.0]])
    assert Int(4, codes, scales, zeros).dequantize().tolist() == [[0.0, 4.0, 0.0, -16.0]]
    order = torch.tensor([3, 0, 1, 2])
    assert Int(4, codes, scales, 8, order).dequantize().tolist() == [[0.0, 14.0, -2.0, -4.0]]


def test_codebook_by_hand() -> None:
    weight = Codebook4(torch.tensor([[0, 15, 1]], dtype=torch.uint8), torch.tensor([[2.0]]), torch.arange(16).float())
    assert weight.dequantize().tolist() == [[0.0, 30.0, 2.0]]
    check(weight)
