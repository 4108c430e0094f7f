"""Products whose rows do not depend on their company: against float64, and against themselves with other rows."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime import interpreter

from pelton.ops.cuda import cuts, same_rows
from pelton.quant import gpu
from pelton.quant.layout import Dense, Stack

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STEPS = {F32: 2**-20, BF16: 2**-8, F16: 2**-11}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, expected: Tensor) -> None:
    assert (got.double() - expected).abs().max() <= 2 * STEPS[got.dtype] * expected.abs().max()


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("num_out", "num_in"), [(72, 1100), (300, 64), (33, 20), (64, 2048)])
def test_numbers(
    device: torch.device, dtype: torch.dtype, num_out: int, num_in: int, descriptors: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not descriptors:
        monkeypatch.setattr(same_rows, "has_tma", lambda device: False)
    weight = random(num_out, num_in, dtype=dtype).to(device)
    bias = random(num_out, seed=1, dtype=dtype).to(device)
    for num_rows in (1, 17, 70):
        x = random(num_rows, num_in + 8, seed=2, dtype=dtype).to(device)[:, :num_in]
        product = x.double() @ weight.double().T
        wide = random(num_rows, num_out + 3, seed=3, dtype=dtype).to(device)
        out, rest = wide[:, :num_out], wide[:, num_out:].clone()
        expected = product + bias.double() + out.double()
        same_rows.multiply(x, weight, out, bias, accumulate=True)
        close(out, expected)
        assert torch.equal(wide[:, num_out:], rest)
        logits = torch.empty(num_rows, num_out, device=device)
        same_rows.multiply(x, weight, logits)
        assert (logits.double() - product).abs().max() <= 2**-18 * product.abs().max()


@pytest.fixture
def _column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy's products, which the interpreter uses, are summed in an order that depends on their size; a GPU's not."""
    if not knobs.runtime.interpret:
        return

    def dot(self: Any, a: Any, b: Any, sums: Any, *args: Any) -> Any:
        left, right = (
            (x.data.astype("uint32") << 16).view("float32") if x.data.dtype == np.uint16 else x.data.astype("float32")
            for x in (a, b)
        )
        total = sums.data.copy()
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[k]
        return interpreter.TensorHandle(total, sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.usefixtures("_column_by_column")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("num_out", "num_in"), [(72, 1100), (520, 200), (192, 2056)])
def test_a_row_has_the_same_bits_in_any_company(
    device: torch.device, dtype: torch.dtype, num_out: int, num_in: int
) -> None:
    weight = random(num_out, num_in, dtype=dtype).to(device)
    x = random(600, num_in, seed=2, dtype=dtype).to(device)
    outs = {}
    for num_rows in (1, 2, 7, 32, 44, 128, 256, 600):
        outs[num_rows] = torch.empty(num_rows, num_out, device=device)
        same_rows.multiply(x[:num_rows], weight, outs[num_rows])
    for num_rows, out in outs.items():
        assert torch.equal(out, outs[600][:num_rows]), num_rows
    shifted = torch.empty(40, num_out, device=device)
    same_rows.multiply(x[77:117], weight, shifted)
    assert torch.equal(shifted, outs[600][77:117])


@pytest.mark.usefixtures("_column_by_column")
def test_deterministic_weights_are_multiplied_so(device: torch.device) -> None:
    parts = [Dense(random(num_out, 1100, seed=num_out).to(device)) for num_out in (48, 30)]
    weight = gpu.pack(Stack(parts), F32, deterministic=True)
    x, bias = random(20, 1100, seed=1).to(device), random(78, seed=2).to(device)
    assert weight.gated(x, None, "silu") is None
    for num_rows in (1, 3):
        assert torch.equal(weight.matmul(x[:num_rows], bias), weight.matmul(x, bias)[:num_rows])
        assert torch.equal(weight.logits(x[:num_rows]), weight.logits(x)[:num_rows])
        assert torch.equal(
            weight.matmul(x[:num_rows], add_to=x[:num_rows, :78].clone()),
            weight.matmul(x, add_to=x[:, :78].clone())[:num_rows],
        )


def test_weights_note_which_comes_after(device: torch.device) -> None:
    """Those of the same thread: others may run other models meanwhile."""
    first, second, other = (
        gpu.pack(Dense(random(64, 64, seed=seed).to(device)), F32, deterministic=True) for seed in range(3)
    )
    x = random(2, 64).to(device)
    with gpu.noting_order():
        first.matmul(x)
        thread = threading.Thread(target=lambda: other.matmul(x + 0))  # which gives the thread a CUDA context
        thread.start()
        thread.join()
        second.matmul(x)
    assert first.then is second.operand and second.then is first.operand and other.then is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("num_out", "num_in"), [(6144, 4096), (28672, 1024), (1024, 14336), (1543, 2048), (1024, 4864)]
)
def test_tiles_of_all_sizes_give_the_same_bits(dtype: torch.dtype, num_out: int, num_in: int) -> None:
    """Sums by one program and by several, with tiles from the smallest to the largest."""
    torch.manual_seed(0)
    weight = torch.randn(num_out, num_in, device="cuda").to(dtype) * 0.02
    x = torch.randn(8192, num_in, device="cuda").to(dtype)
    whole = torch.empty(8192, num_out, device="cuda")
    same_rows.multiply(x, weight, whole)
    expected = x[-100:].double() @ weight.double().T
    assert (whole[-100:].double() - expected).abs().max() <= 2**-14 * expected.abs().max()
    for num_rows in (1, 2, 3, 4, 7, 16, 17, 32, 44, 64, 128, 200, 256, 257, 512, 1000, 2000):
        for rows in (slice(num_rows), slice(8192 - num_rows, 8192)):
            out = torch.empty(num_rows, num_out, device="cuda")
            same_rows.multiply(x[rows], weight, out)
            assert torch.equal(out, whole[rows]), num_rows


def test_sums_are_cut_by_the_shape_of_the_weight() -> None:
    """Enough parts for few rows, fewer where columns are few, and one where there are tiles for all processors."""
    shapes = [(28672, 4096), (6144, 4096), (4096, 14336), (1024, 4096), (1024, 1024), (64, 576)]
    assert [same_rows.num_parts(*shape, 132) for shape in shapes] == [1, 2, 2, 8, 2, 1]


@pytest.mark.parametrize("processors", [132, 114, 16])
def test_prompts_are_split_by_the_shape_of_the_weight(processors: int) -> None:
    """Whatever the number of rows, and there is room for all sums."""
    for num_out, num_in in [(28672, 4096), (4096, 4096), (4352, 14336), (4096, 14336), (512, 14336), (576, 192)]:
        split = cuts.same_split(num_out, num_in, processors)
        assert split == (2 if num_in == 14336 and num_out <= 32 * processors else 1)
        for cut in cuts.all_many(1024, num_out, num_in, False, processors, 227 << 10, split):
            blocks, sharing = cut.grid(num_out)
            assert sharing == split
            assert split == 1 or blocks <= cuts.MAX_SHARING * processors
            assert split == 1 or blocks * split * 8 * cut.NT * cuts.MANY_OUTS <= cuts.num_sums(processors)


@pytest.mark.parametrize(("processors", "memory"), [(132, 227 << 10), (108, 163 << 10), (24, 99 << 10)])
def test_tiles_are_split_by_the_shape_of_the_weight(processors: int, memory: int) -> None:
    """Whatever the number of rows, and with a gate or not."""
    for num_out, num_in in [(28672, 4096), (6144, 4096), (4096, 14336), (1024, 4096), (576, 192), (128256, 2048)]:
        for piece_bytes in (18, 32, 66):
            given = [(num_rows, num_out, num_in, gated) for num_rows in (1, 8, 9, 16, 17, 33, 64) for gated in (0, 1)]
            few = [cuts.few(*each, False, processors, same=True) for each in given]
            assert len({cut.WARPS for cut in few}) == 1, (num_out, num_in)
            limits, parts = (processors, memory), cuts.same_parts(num_out, num_in, processors)
            found = [cuts.more(*each, piece_bytes, *limits, parts) for each in given]
            found += [cuts.same_of_few(num_out, piece_bytes, looked_up, parts, *limits) for looked_up in (False, True)]
            if processors == 132:
                found += [cuts.more_on_hopper(*each, piece_bytes, False, *limits, parts) for each in given]
            assert all(parts == cut.PARTS and parts % (cut.SPLIT * cut.TEAMS) == 0 for cut in found)
            assert all(cut.TEAMS == 1 or parts == cut.TEAMS for cut in found)  # else they are not joined in order
            assert len({cuts.is_few(*each[:3], processors, same=True) for each in given}) == 1
            for cut in found:
                across, sharing = cut.grid(num_out)
                assert sharing == 1 or across <= cuts.MAX_SHARING * processors
                sums = across * parts * 16 * cut.MT * cut.WARPS * 8 * cut.NT
                assert parts == 1 or sums <= cuts.num_sums(processors)
