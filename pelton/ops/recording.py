"""Recording kernel calls on a CPU, to be replayed in one call.

While a `Recorder` is entered, this thread's kernel calls are kept instead of run, and what they write goes to memory
that stays. Anything else that computes would be missing from the replay, so it is refused.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pelton.ops.native import native

_thread = threading.local()


class NotRecordable(Exception):
    """The computation does something that is no kernel call; the message names it."""


def refuse_to_record(what: str) -> None:
    """To be called by what is no kernel call and moves data: raises NotRecordable while this thread records."""
    if getattr(_thread, "recorder", None) is not None:
        raise NotRecordable(f"{what} cannot be recorded")


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets pass what moves no data."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler at the first call, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ("empty", "detach"):
            raise NotRecordable(f"{func} has no kernel here")
        return func(*args, **(kwargs or {}))


class Recorder:
    """A context in which a computation over `max_rows` rows becomes a program.

    Its buffers are as long as the rows, and are used again as soon as nothing refers to them: a program needs as much
    memory as a forward pass of `max_rows` rows.
    """

    def __init__(self, max_rows: int) -> None:
        self.program = native.Program(max_rows)  # type: ignore[union-attr]
        self._free: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._guard = _OnlyViews()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Recorder:
        native.begin_recording(self.program)  # type: ignore[union-attr]
        _thread.recorder = self
        self._guard.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._guard.__exit__(*error)  # type: ignore[no-untyped-call]
        _thread.recorder = None
        native.end_recording()  # type: ignore[union-attr]

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A buffer of float32, in use until the last view of it is gone."""
        size = int(np.prod(shape))
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else np.empty(size, np.float32)
        lease = memory[:]  # the tensor keeps this view alive, and its end gives the memory back
        weakref.finalize(lease, free.append, memory)
        return torch.frombuffer(lease, dtype=torch.float32).view(shape)


def empty(*shape: int) -> Tensor:
    """Memory for a kernel's float32 output."""
    recorder: Recorder | None = getattr(_thread, "recorder", None)
    return torch.empty(shape) if recorder is None else recorder.empty(shape)
