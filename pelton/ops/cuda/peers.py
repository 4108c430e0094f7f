"""Sums over the ranks of one host, of few numbers: straight through the others' memory (all_reduce.cu)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from pelton.errors import DeviceError
from pelton.ops.cuda.program import Function, check, driver, load

MAX_BYTES = 2 << 20  # that a rank sends of its own: more takes as long by NCCL
MAX_SIZE = 8  # ranks
WORD = 8  # bytes, of which 16 are sent
THREADS, BLOCKS = 256, 128  # so few that all run at once
HANDLE = 64  # bytes
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


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
        self._calls = torch.zeros(BLOCKS, dtype=torch.int32, device=device)
        self._functions: dict[int, Function] = {}
        self._inboxes: list[int] = []
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes sure that the device has a context
            self._own = _allocate(2 * size * self._max_words * 2 * WORD)
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
        args = _Args(
            x.data_ptr(), self._calls.data_ptr(), self._stop.data_ptr(), inboxes, self.rank, num_words, self._max_words
        )
        self._function(TYPES[x.dtype]).launch((min(BLOCKS, -(-num_words // THREADS)), 1), THREADS, args)

    def _function(self, kind: int) -> Function:
        if kind not in self._functions:
            defines = {"SIZE": self.size, "TYPE": kind, "THREADS": THREADS, "BLOCKS": BLOCKS}
            self._functions[kind] = load("all_reduce.cu", "all_reduce", defines, self.device)
        return self._functions[kind]

    def abort(self) -> None:
        """End sums that wait for a rank that is lost."""
        self._stop.fill_(1)


def meet(
    rank: int, size: int, device: torch.device, gather: Callable[[Tensor], Tensor], least: Callable[[int], int]
) -> Peers | None:
    """The ranks' memory, if each can reach that of all others: all get the same answer. gather: every rank's bytes
    [1, n] side by side; least: of every rank's number."""
    peers, handle = None, bytes(HANDLE)
    with suppress(DeviceError):
        peers = Peers(rank, size, device)
        handle = peers.handle()
    all_bytes = bytes(gather(torch.tensor([list(handle)], dtype=torch.uint8, device=device)).flatten().tolist())
    is_open = False
    if peers is not None:
        with suppress(DeviceError):
            peers.open([all_bytes[i * HANDLE : (i + 1) * HANDLE] for i in range(size)])
            is_open = True
    return peers if least(int(is_open)) else None


def _allocate(num_bytes: int) -> int:
    """Zeros of the driver's own, which another process may open whole."""
    address = ctypes.c_uint64()
    check(driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(num_bytes)), "memory for other ranks")
    check(driver().cuMemsetD8_v2(address, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes)), "memory for other ranks")
    torch.cuda.synchronize()
    return address.value


def _free(device: torch.device, own: int, inboxes: Sequence[int]) -> None:
    with torch.cuda.device(device):
        for address in inboxes:
            if address != own:
                driver().cuIpcCloseMemHandle(ctypes.c_uint64(address))
        driver().cuMemFree_v2(ctypes.c_uint64(own))
