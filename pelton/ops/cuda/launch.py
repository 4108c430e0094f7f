"""What the launches of kernels share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Event
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import cuda
from triton.runtime import driver

from pelton.errors import DeviceError
from pelton.ops.cuda.program import HOPPER, compiling_by, is_compiling

# From compute capability 9.0 on a kernel may be brought up while the one before it still runs.
OVERLAPS = tl.constexpr(not knobs.runtime.interpret and torch.cuda.get_device_capability() >= (9, 0))
OVERLAP: dict[str, Any] = {"launch_pdl": True} if OVERLAPS.value else {}
"""Launch options of a kernel that waits for the one before."""


@triton.jit
def let_next_begin():
    """Let the next kernel be brought up, once all programs are here."""
    if OVERLAPS:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Wait until the kernel before is complete, and so all before that. What a step began with can be read earlier."""
    if OVERLAPS:
        cuda.gdc_wait()


@triton.jit
def wait_for_inputs():
    """The first thing in a kernel: lets the next one be brought up, and waits for the one before."""
    let_next_begin()
    wait_for_previous()


@triton.jit
def ask_for(pointers, there):
    """Have the lines of 128 bytes that pointers point to brought into the L2 cache, of those that are `there`."""
    if OVERLAPS:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0;}", "=r,l,r",
            [pointers, there.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )


_NOTHING = SimpleNamespace(
    launch_metadata=lambda *args: None, run=lambda *args: None, function=None, packed_metadata=None
)


class _Unready:
    """In place of a kernel that is being compiled: nothing, where kernels are only compiled; elsewhere the kernel, once
    it is there: Triton 3.9 keeps this where other threads find it, 3.6 does not."""

    def __init__(self, kernel: Future[Any]) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(_NOTHING if is_compiling() else self._kernel.result(), name)


class _Later(triton.AsyncCompileMode):  # type: ignore[misc]
    """Kernels are compiled by an executor, and not launched meanwhile."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor, ignore_errors=True)  # else one that does not compile leaves the mode active
        self._device = torch.cuda.current_device()  # which each thread has of its own
        self._failures: list[Exception] = []

    def submit(self, key: Any, compile_it: Callable[[], Any], *others: Any) -> Any:  # versions of Triton give more
        def compile_or_note() -> Any:
            try:
                kernel = compile_it()
                with torch.cuda.device(self._device):
                    _ = kernel.run  # loads it, and before Triton 3.9 compiles what launches it
                return kernel
            except Exception as error:
                self._failures.append(error)
                raise

        return _Unready(super().submit(key, compile_or_note, *others).future)

    def check(self) -> None:
        """DeviceError, if a kernel could not be compiled, or loaded: its cause tells whether memory ran out."""
        if self._failures:
            error = self._failures[0]
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DeviceError(
                f"a kernel does not compile for {torch.cuda.get_device_name(self._device)} ({why}); install torch and "
                "triton in versions that belong together"
            ) from error


@contextmanager
def only_compiling() -> Iterator[None]:
    """What is launched in this context and is not compiled yet is compiled instead, side by side, which is done at the
    context's end. So what is computed is of no use; it must not matter to what is launched. DeviceError at the end, if
    something does not compile."""
    if knobs.runtime.interpret:
        yield
        return
    noted = Event()  # what to compile: compiling meanwhile would hold up this thread, which needs Python's lock too
    with (
        ThreadPoolExecutor(os.cpu_count(), initializer=noted.wait) as executor,
        _Later(executor) as later, compiling_by(executor),
    ):  # fmt: skip
        try:
            yield
        finally:
            noted.set()
    later.check()


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether all tensors (of those that are there) lie where Triton's kernels run: on a GPU, or on the CPU in
    Triton's interpreter."""
    kind = "cpu" if knobs.runtime.interpret else "cuda"
    return all(tensor is None or tensor.device.type == kind for tensor in tensors)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; as much as an H100's in the interpreter."""
    if device.type != "cuda":
        return 227 << 10
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@cache
def has_float8(device: torch.device) -> bool:
    """Whether kernels can convert float8_e4m3fn."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def has_tma(device: torch.device) -> bool:
    """Whether tiles can be fetched by descriptors."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_wgmma(device: torch.device) -> bool:
    """Whether four warps can multiply together: by instructions of Hopper alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


@cache
def counters(device: torch.device) -> Tensor:
    """int32 [4 * processors]: how many of the parts that several programs compute are there. Zeros, which a kernel
    leaves as it found them, once it has waited for the one before."""
    return torch.zeros(4 * num_processors(device), dtype=torch.int32, device=device)


@triton.jit
def place_in_band(tile, num_down, num_across, BAND: tl.constexpr):
    """Where the tile of a matrix [num_down, num_across] lies that a program computes: BAND of them stand one below the
    other before the next column, so that they share in caches what lies across."""
    first = tile // (BAND * num_across) * BAND
    height = tl.minimum(num_down - first, BAND)
    return first + tile % (BAND * num_across) % height, tile % (BAND * num_across) // height
