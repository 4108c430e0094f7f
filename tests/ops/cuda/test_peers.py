"""Sums through other ranks' memory, one process for each GPU: against sums of the same numbers in one place. And that
ranks agree on whether they sum so."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pelton.errors import DeviceError, OutOfMemoryError
from pelton.ops.cuda import peers

CAN_REACH = torch.cuda.device_count() > 1 and torch.cuda.can_device_access_peer(0, 1)
CPU = torch.device("cpu")
SIZES = {torch.bfloat16: (4, 4096, 4100, 131072, 1 << 20, 200000), torch.float16: (8, 12288), torch.float32: (2, 65536)}


def numbers(rank: int, size: int, dtype: torch.dtype, call: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randn(size, generator=generator).to(dtype)


def connect(rank: int, folder: str) -> tuple[object, torch.device]:
    from pelton.ops.parallel import Ranks

    torch.cuda.set_device(rank)
    ranks = Ranks(rank, 2)
    ranks.connect(Path(folder), "cuda")
    assert ranks._peers is not None
    return ranks, torch.device("cuda", rank)


def check_sums(rank: int, folder: str) -> None:
    ranks, device = connect(rank, folder)
    for dtype, sizes in SIZES.items():
        for call, size in enumerate(sizes):
            x = numbers(rank, size, dtype, call).to(device)
            assert ranks._peers.accepts(x)
            ranks.all_reduce_(x)
            first, second = (numbers(i, size, dtype, call).float() for i in range(2))
            assert torch.equal(x.cpu(), (first + second).to(dtype)), (dtype, size)
    large = torch.ones(1 << 20, device=device)
    assert not ranks._peers.accepts(large)
    assert ranks.all_reduce_(large).sum() == 2 << 20


def check_turns(rank: int, folder: str) -> None:
    """Many calls of several sizes, captured too, of which one rank or the other is late. Each sums other numbers."""
    ranks, device = connect(rank, folder)
    x, wrong = torch.zeros(300_000, device=device), torch.zeros((), dtype=torch.int64, device=device)
    call = torch.zeros((), device=device)

    def step() -> None:
        for size in (8192, len(x), 64):
            call.add_(1)
            part = x[:size]
            part.copy_(call.expand(size)).mul_(rank + 1)
            ranks.all_reduce_(part)
            wrong.add_((part != 3 * call).sum())

    for i in range(200):
        if i % 50 == 25 * rank:
            time.sleep(0.05)
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            step()
    for i in range(100):
        if i % 50 == 25 * rank:
            time.sleep(0.05)
        graph.replay()
    assert call == 3600 and wrong == 0


def check_end(rank: int, folder: str) -> None:
    """A rank that never comes does not keep the other, once it is told."""
    ranks, device = connect(rank, folder)
    if rank == 1:
        return
    x = torch.zeros(64, device=device)
    ranks.all_reduce_(x)
    threading.Timer(0.5, ranks._peers.abort).start()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not CAN_REACH, reason="needs two GPUs that reach each other's memory")
@pytest.mark.parametrize("check", ["check_sums", "check_turns", "check_end"])
def test_two_ranks(check: str, tmp_path: Path) -> None:
    run = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_peers; test_peers.{check}"
    processes = [subprocess.Popen([sys.executable, "-c", f"{run}({rank}, {str(tmp_path)!r})"]) for rank in range(2)]
    try:
        assert [process.wait(100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


class Fake(peers.Peers):
    """Those of rank 0, on a CPU: what fails in it."""

    def __init__(self, failing: str) -> None:
        self.failing = failing

    def __call__(self, *args: object) -> Fake:
        if self.failing == "device":
            raise DeviceError("x")
        if self.failing == "memory":
            raise OutOfMemoryError("x")
        return self

    def handle(self) -> bytes:
        return bytes(range(peers.HANDLE))

    def open(self, handles: Sequence[bytes]) -> None:
        assert handles == [self.handle(), bytes(peers.HANDLE)]
        if self.failing == "open":
            raise DeviceError("x")

    def is_reached(self) -> bool:
        return self.failing != "trial"


@pytest.mark.parametrize("other_can", [True, False])
@pytest.mark.parametrize("failing", ["", "device", "memory", "open", "trial"])
def test_ranks_agree(monkeypatch: pytest.MonkeyPatch, failing: str, other_can: bool) -> None:
    """A rank where something fails tells the others, in the calls that they make too."""
    told: list[int] = []

    def gather(handle: torch.Tensor) -> torch.Tensor:
        return torch.cat([handle, torch.zeros_like(handle)], 1)

    def least(value: int) -> int:
        told.append(value)
        return min(value, int(other_can))

    fake = Fake(failing)
    monkeypatch.setattr(peers, "Peers", fake)
    found = peers.meet(0, 2, CPU, gather, least)
    can_open = failing in ("", "trial")
    assert told == [int(can_open)] + [int(failing == "")] * (can_open and other_can)
    assert found is (fake if failing == "" and other_can else None)


def test_more_ranks_than_a_kernel_knows() -> None:
    assert peers.meet(0, peers.MAX_SIZE + 1, CPU, None, None) is None  # type: ignore[arg-type]
