"""Sums over the ranks of one host, of few numbers: straight through the others' memory (all_reduce.cu)."""

from __future__ import annotations

import ctypes
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from pelton.errors import DeviceError
from pelton.ops.cuda.program import Function, check, driver, load

logger = logging.getLogger(__name__)

MAX_BYTES = 2 << 20  # of its own numbers that a rank sends: so many were measured, in half of NCCL's time
MAX_SIZE = 8  # ranks
WORD = 8  # bytes; 16 are sent for each
THREADS, BLOCKS = 256, 128  # so few that all run at once
HANDLE = 64  # bytes
TRIAL_S = 20.0  # what the first sum may take, with all that is loaded for it
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
TYPES = torch.bfloat16, torch.float16, torch.float32


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE)]


class _Args(ctypes.Structure):
    """As in all_reduce.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p), ("calls", ctypes.c_void_p), ("stop", ctypes.c_void_p),
        ("inboxes", ctypes.c_void_p * MAX_SIZE),
        ("rank", ctypes.c_int), ("num_words", ctypes.c_int), ("most_words", ctypes.c_int),
    ]


class Peers:
    """A rank's memory that the others write to, and theirs."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        """DeviceError if there is no memory that others could see."""
        self.rank = rank
        self.size = size
        self.device = device
        self._max_words = MAX_BYTES // (size - 1) // WORD  # of what is summed
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._inboxes: list[int] = []
        inbox_bytes = 2 * size * self._max_words * 2 * WORD
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes sure that the device has a context
            self._own = _allocate(inbox_bytes + BLOCKS * 4)
        self._calls = self._own + inbox_bytes
        self._free = weakref.finalize(self, _free, device, self._own, self._inboxes)
        self._free.atexit = False  # with the process all of it is gone

    def handle(self) -> bytes:
        """What others open this rank's memory by."""
        handle = _Handle()
        check(driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(self._own)), "sharing memory")
        return bytes(handle)

    def open(self, handles: Sequence[bytes]) -> None:
        """Those of all ranks; DeviceError if one cannot be reached."""
        for rank, handle in enumerate(handles):
            address = ctypes.c_uint64(self._own)
            if rank != self.rank:
                with torch.cuda.device(self.device):
                    given = _Handle.from_buffer_copy(handle)
                    opened = driver().cuIpcOpenMemHandle_v2(ctypes.byref(address), given, LAZY_PEER_ACCESS)
                check(opened, f"reaching rank {rank}'s memory")
            self._inboxes.append(address.value)

    def accepts(self, x: Tensor) -> bool:
        """Whether `all_reduce_` takes x."""
        return (
            x.dtype in TYPES and x.device == self.device and x.is_contiguous()
            and 0 < x.nbytes <= self._max_words * WORD and x.nbytes % WORD == 0 and x.data_ptr() % WORD == 0
        )

    def all_reduce_(self, x: Tensor) -> None:
        """The sum of every rank's x, in place, in the current stream."""
        num_words = x.nbytes // WORD
        inboxes = (ctypes.c_void_p * MAX_SIZE)(*self._inboxes)
        pointers = x.data_ptr(), self._calls, self._stop.data_ptr()
        args = _Args(*pointers, inboxes, self.rank, num_words, self._max_words)
        grid = min(BLOCKS, -(-num_words // THREADS)), 1
        _function(self.size, x.dtype, self.device).launch(grid, THREADS, args)

    def is_reached(self) -> bool:
        """Whether a sum of all ranks' comes, and is right: on some hosts GPUs open each other's memory, but what they
        write there does not arrive."""
        numbers = torch.arange(1000, device=self.device).remainder(7).bfloat16()  # whose sums are exact
        x = numbers * (self.rank + 1)
        self.all_reduce_(x)
        done = torch.cuda.Event()
        done.record()
        end = time.monotonic() + TRIAL_S
        while not done.query():
            if time.monotonic() > end:
                self.abort()
                return False
            time.sleep(0.001)
        return torch.equal(x, numbers * (self.size * (self.size + 1) // 2))

    def abort(self) -> None:
        """End sums that wait for a rank that is lost."""
        self._stop.fill_(1)


def meet(
    rank: int, size: int, device: torch.device, gather: Callable[[Tensor], Tensor], least: Callable[[int], int]
) -> Peers | None:
    """The ranks' memory, if each reaches that of all others: all get the same answer. gather: every rank's bytes
    [1, n] side by side; least: of every rank's number."""
    if size > MAX_SIZE:
        return None
    peers, handle, is_open = None, bytes(HANDLE), False
    with suppress(DeviceError):
        peers = Peers(rank, size, device)
        handle = peers.handle()
    all_bytes = bytes(gather(torch.tensor([list(handle)], dtype=torch.uint8, device=device)).flatten().tolist())
    if peers is not None:
        with suppress(DeviceError):
            peers.open([all_bytes[i * HANDLE : (i + 1) * HANDLE] for i in range(size)])
            is_open = True
    if not least(int(is_open)) or peers is None:
        return None
    if not least(int(peers.is_reached())):
        if rank == 0:
            logger.warning("what a GPU writes to another's memory does not arrive; --disable-custom-all-reduce saves "
                           "the time that finding this out takes")
        return None
    return peers


@cache
def _function(size: int, dtype: torch.dtype, device: torch.device) -> Function:
    is_half, is_float = int(dtype == torch.float16), int(dtype == torch.float32)
    defines = {"SIZE": size, "HALF": is_half, "FLOAT32": is_float, "THREADS": THREADS, "BLOCKS": BLOCKS}
    return load("all_reduce.cu", "all_reduce", defines, device)


def _allocate(num_bytes: int) -> int:
    """Zeros of the driver's own, which another process may open whole."""
    address = ctypes.c_uint64()
    check(driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(num_bytes)), "memory for other ranks")
    check(driver().cuMemsetD8_v2(address, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes)), "memory for other ranks")
    torch.cuda.synchronize()
    return address.value


def _free(device: torch.device, own: int, inboxes: Sequence[int]) -> None:
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes sure that this thread has the device's context
        for address in inboxes:
            if address != own:
                driver().cuIpcCloseMemHandle(ctypes.c_uint64(address))
        driver().cuMemFree_v2(ctypes.c_uint64(own))
