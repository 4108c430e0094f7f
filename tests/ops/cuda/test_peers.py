"""Sums through other ranks' memory, one process for each GPU: against sums of the same numbers in one place."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]
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
    """Many calls of several sizes, captured too, of which one rank or the other is late."""
    ranks, device = connect(rank, folder)
    x, total = torch.zeros(300_000, device=device), torch.zeros(300_000, device=device)

    def step() -> None:
        for size in (8192, len(x), 64):
            part = x[:size]
            part.fill_(rank + 1)
            ranks.all_reduce_(part)
            total[:size].add_(part)

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
    for size, times in ((slice(64), 3), (slice(64, 8192), 2), (slice(8192, None), 1)):
        assert (total[size] == times * 3 * 1200).all()


def check_end(rank: int, folder: str) -> None:
    """A rank that never comes does not keep the other, once it is told."""
    ranks, device = connect(rank, folder)
    if rank == 1:
        return
    x = torch.zeros(64, device=device)
    ranks.all_reduce_(x)
    threading.Timer(0.5, ranks._peers.abort).start()
    torch.cuda.synchronize()


@pytest.mark.parametrize("check", ["check_sums", "check_turns", "check_end"])
def test_two_ranks(check: str, tmp_path: Path) -> None:
    run = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_peers; test_peers.{check}"
    processes = [subprocess.Popen([sys.executable, "-c", f"{run}({rank}, {str(tmp_path)!r})"]) for rank in range(2)]
    try:
        assert [process.wait(100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
