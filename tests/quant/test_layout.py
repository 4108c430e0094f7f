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


def test_packed_is_the_same_weight() -> None:
    plain = Dense(torch.randn(48, 32).bfloat16())
    packed = plain.packed()
    assert packed.shape == plain.shape
    assert torch.equal(packed.dequantize(), plain.weight)
    assert torch.equal(packed.rows(torch.tensor([5, 0])), plain.weight[[5, 0]])
    for num_rows in (1, 16):
        x = torch.randn(num_rows, 32).bfloat16()
        torch.testing.assert_close(packed.matmul(x), plain.matmul(x), atol=0.1, rtol=0.02)
    assert isinstance(Stack([plain, plain]).packed(), Stack)


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
