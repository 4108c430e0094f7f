"""A weight multiplies as its definition, `dequantize()`, says."""

from __future__ import annotations

import pytest
import torch

from pelton.errors import ConfigError, ModelFormatError
from pelton.quant.layout import W8A8, Blocks, Codebook4, Dense, Float8, Int, LinearWeight, Stack, fuse
from pelton.weights.dummy import LAYOUTS
from pelton.weights.stored import BlockType


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


def test_groups_have_one_size() -> None:
    """576 columns are four groups of 128 and one of 64, or of other sizes: shapes do not tell."""
    codes, scales = torch.zeros(6, 576, dtype=torch.uint8), torch.ones(6, 5)
    for make in (lambda: Int(4, codes, scales, 8), lambda: Codebook4(codes, scales, torch.arange(16).float())):
        with pytest.raises(ModelFormatError, match=r"a weight \[6, 576\] has 5 groups .* that divides 576"):
            make()


def float8(n: int, k: int) -> torch.Tensor:
    """Every number there is, in some order."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers & 127 != 127].repeat(-(-n * k // 254))[: n * k]
    return numbers[torch.randperm(n * k)].view(n, k)


@pytest.mark.parametrize("num_in", [256, 192, 100])
@pytest.mark.parametrize("num_out", [128, 200])
def test_float8(num_out: int, num_in: int) -> None:
    """A scale for the whole, for each row, and for each block, of which the last ones are smaller."""
    codes = float8(num_out, num_in)
    numbers = codes.view(torch.float8_e4m3fn).float()
    one, by_row = torch.rand(1, 1) / 1000, torch.rand(num_out, 1) / 1000
    by_block = torch.rand(-(-num_out // 128), -(-num_in // 128)) / 1000
    columns = torch.arange(num_in) // 128
    for scales, block, expected in (
        (one, (num_out, num_in), one), (by_row, (1, num_in), by_row),
        (by_block, (128, 128), by_block[torch.arange(num_out) // 128][:, columns]),
    ):
        weight = Float8(codes, scales, block)
        assert torch.equal(weight.dequantize(), numbers * expected)
        assert weight.scales.shape == (num_out, num_in // weight.group)
        check(weight)


def test_float8_by_hand() -> None:
    """The largest number, one, the least normal and subnormal ones, minus zero, and what is no number."""
    codes = torch.tensor([[0x7E, 0x38, 0x08, 0x01, 0x80, 0x7F]], dtype=torch.uint8)
    numbers = Float8(codes, torch.tensor([[2.0]]), (1, 6)).dequantize()[0]
    assert numbers[:5].tolist() == [896.0, 2.0, 2.0**-5, 2.0**-8, 0.0] and numbers[5].isnan()


def test_w8a8_multiplies_integers() -> None:
    weight = W8A8(torch.randint(0, 256, (9, 40), dtype=torch.uint8), torch.rand(9, 1))
    x, bias = torch.randn(5, 40), torch.randn(9)
    x[3] = 0
    x[4, :2] = torch.tensor([4.0, 2.5 * 4 / 127])  # 2.5 steps: to the even one
    scales = x.abs().amax(1) / 127
    rounded = (x / scales[:, None]).nan_to_num().round().int()
    assert rounded[4, :2].tolist() == [127, 2] and rounded.abs().max() == 127
    sums = (rounded[:, None] * (weight.codes.int() - 128)).sum(-1)
    expected = sums.float() * scales[:, None] * weight.scales[:, 0]
    assert torch.equal(weight.matmul(x), expected)
    assert torch.equal(weight.matmul(x, bias), expected + bias)
    total = torch.randn(5, 9)
    assert torch.equal(weight.matmul(x, bias, total.clone()), total + (expected + bias))
    exact = x @ weight.dequantize().T
    assert (weight.matmul(x) - exact).abs().max() < 0.02 * exact.abs().max()
    for i in range(5):
        assert torch.equal(weight.matmul(x[i : i + 1])[0], expected[i])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_w8a8_shows_what_is_not_finite(value: float) -> None:
    weight = W8A8(torch.randint(0, 256, (9, 40), dtype=torch.uint8), torch.rand(9, 1))
    x = torch.randn(2, 40)
    x[1, 7] = value
    finite = weight.matmul(x).isfinite()
    assert finite[0].all() and not finite[1].any()


# --- parts ------------------------------------------------------------------------------------------------------------


def blocks(num_rows: int, num_blocks: int, row_ids: torch.Tensor | None = None) -> Blocks:
    """Q8_0 with scales of 1 to 2: blocks of 32 columns."""
    data = torch.randint(0, 256, (num_rows * num_blocks, 34), dtype=torch.uint8)
    data[:, :2] = (torch.rand(len(data), 1) + 1).half().view(torch.uint8)
    return Blocks(BlockType("Q8_0", 32, 34), data, (num_rows, num_blocks * 32), row_ids)


def whole_weights() -> dict[str, LinearWeight]:
    made = {name: make((6, 512), 0.05, torch.Generator().manual_seed(1)) for name, make in LAYOUTS.items()}
    codes, order = torch.randint(0, 16, (6, 512), dtype=torch.uint8), torch.randperm(512)
    by_row = Int(8, codes, torch.rand(6, 1), torch.rand(6, 1))
    act_order = Int(4, codes, torch.rand(6, 4), 8, order)
    return {
        **made, "dense": Dense(torch.randn(6, 512)), "one group": by_row, "act-order": act_order,
        "fp8 by row": Float8(float8(6, 512), torch.rand(6, 1), (1, 512)),
        "blocks": blocks(6, 16), "blocks in another order": blocks(6, 16, torch.randperm(6)),
    }


@pytest.mark.parametrize("name", whole_weights())
def test_a_part_is_cut_out_of_the_definition(name: str) -> None:
    weight = whole_weights()[name]
    cuts = [(range(2, 5), range(512)), (range(6), range(256, 512)), (range(1), range(256))]
    for rows, columns in cuts[:1] if name == "act-order" else cuts:
        part = weight.part(rows, columns)
        assert type(part) is type(weight) and part.shape == (len(rows), len(columns))
        whole = weight.dequantize()
        assert torch.equal(part.dequantize(), whole[rows.start : rows.stop, columns.start : columns.stop])


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("gguf", range(128), r"blocks of 256 columns \(Q4_K\), which would be cut at 0 and 128"),
        ("blocks", range(48, 512), "blocks of 32 columns .* cut at 48 and 512"),
        ("gptq", range(64, 512), "groups of 128 columns, which would be cut at 64 and 512"),
        ("awq", range(192), "groups of 128 columns, which would be cut at 0 and 192"),
        ("bitsandbytes", range(32), "groups of 64 columns"),
        ("fp8", range(64, 512), "groups of 128 columns, which would be cut at 64 and 512"),
        ("act-order", range(256), "act-order"),
    ],
)
def test_columns_that_are_kept_together_are_not_cut(name: str, columns: range, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        whole_weights()[name].part(range(6), columns)
    assert "--tensor-parallel-size" in str(refused.value) and "\n" not in str(refused.value)


def test_parts_of_w8a8_round_no_more_than_the_whole() -> None:
    weight = W8A8(torch.randint(0, 256, (9, 64), dtype=torch.uint8), torch.rand(9, 1))
    x = torch.randn(20, 64)
    x[:, 50] = 30.0  # one number makes the steps of all columns large; in parts, of its half only
    exact = x @ weight.dequantize().T
    halves = [range(32), range(32, 64)]
    in_parts = sum(weight.part(range(9), half).matmul(x[:, half.start : half.stop]) for half in halves)
    assert 0 < (in_parts - exact).norm() < (weight.matmul(x) - exact).norm()
