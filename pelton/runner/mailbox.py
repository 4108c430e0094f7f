"""How a step's tokens come from a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

NUM_PLACES = 6  # of two steps that are on their way, and of the next, in two parts each


class Mailbox:
    """Pinned memory in which tokens arrive from a GPU. A kernel writes them: the GPU's copying engines begin later."""

    def __init__(self) -> None:
        self._places: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def send(self, tokens: Tensor) -> Callable[[], list[int]]:
        """Enqueue the transfer of int64 [M], whose place on the device later work may use again. Returns what waits for
        it, which is to be called before NUM_PLACES more are sent."""
        num = tokens.shape[0]
        if tokens.device.type != "cuda":
            return tokens.clone().tolist
        from pelton.ops.cuda.rows import copy_to_host_  # its kernels need Triton

        if len(self._places) < NUM_PLACES:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._places.appendleft((torch.empty(0, dtype=torch.int64), event))
        host, event = self._places.popleft()
        event.synchronize()  # of a batch that nobody waited for
        if len(host) < num:
            host = torch.empty(1 << (num - 1).bit_length(), dtype=torch.int64, pin_memory=True)
        self._places.append((host, event))
        copy_to_host_(host[:num], tokens)
        event.record(torch.cuda.current_stream(tokens.device))

        def fetch() -> list[int]:
            event.synchronize()
            return host[:num].tolist()

        return fetch
