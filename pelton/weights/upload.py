"""What is in a mapped file to a GPU, at the speed of its bus."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

PIECE = 32 << 20  # bytes


def upload(data: Tensor, device: torch.device) -> Tensor:
    """A contiguous tensor on a device. To a GPU it goes in pieces through page-locked memory: while one is on its way,
    several threads read the next, and the host holds no other copy."""
    if device.type != "cuda" or data.nbytes < PIECE:
        return data.to(device)
    given = data.view(-1).view(torch.uint8)
    out = torch.empty(data.nbytes, dtype=torch.uint8, device=device)
    for i, start in enumerate(range(0, data.nbytes, PIECE)):
        piece = given[start : start + PIECE]
        locked, sent = _buffers(device)[i % 2]
        sent.synchronize()
        locked[: len(piece)].copy_(piece)
        out[start : start + PIECE].copy_(locked[: len(piece)], non_blocking=True)
        sent.record()
    return out.view(data.dtype).view(data.shape)


@cache
def _buffers(device: torch.device) -> list[tuple[Tensor, torch.cuda.Event]]:
    """Page-locked memory, and when what was in it last has been sent."""
    return [
        (torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
        for _ in range(2)
    ]
