"""What arrives on a device is what was sent."""

from __future__ import annotations

import pytest
import torch

from pelton.weights import upload
from pelton.weights.upload import PIECE


def test_on_a_cpu_nothing_is_copied() -> None:
    data = torch.arange(12.0).view(3, 4)
    assert upload.upload(data, torch.device("cpu")) is data


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_bytes", [0, 100, PIECE, 3 * PIECE + 4096])
def test_pieces(num_bytes: int) -> None:
    data = torch.randint(0, 1 << 15, (num_bytes // 4, 2), dtype=torch.int16)
    there = upload.upload(data, torch.device("cuda"))
    assert there.is_cuda and there.shape == data.shape and torch.equal(there.cpu(), data)
