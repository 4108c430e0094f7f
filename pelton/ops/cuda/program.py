"""Kernels in CUDA C++: compiled for the GPU at hand by NVRTC, which comes with torch, and kept on disk.

The driver is called through ctypes: torch has no public way to launch a kernel with attributes, and a toolkit is not to
be needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from pelton.errors import DeviceError, OutOfMemoryError
from pelton.ops import gpu

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
KEPT = Path("~/.cache/pelton/kernels")
HOPPER = 9, 0  # a compute capability
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: begin before the kernel before has ended
MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


# What compiles programs in this context, which launches nothing meanwhile, and what it has been given.
_compiling: ContextVar[tuple[Executor, list[Future[bytes]]] | None] = ContextVar("compiling", default=None)


@contextmanager
def compiling_by(executor: Executor) -> Iterator[None]:
    """Programs that are loaded in this context are compiled by the executor, side by side; no function is launched.
    Returns when all are; DeviceError if one cannot be."""
    images: list[Future[bytes]] = []
    before = _compiling.set((executor, images))
    try:
        yield
    finally:
        _compiling.reset(before)
    wait(images)
    for image in images:
        image.result()


def is_compiling() -> bool:
    """Whether this is such a context."""
    return _compiling.get() is not None


class Function:
    """A kernel, taking one struct of arguments."""

    def __init__(self, name: str, device: torch.device, image: Callable[[], bytes]) -> None:
        """image: waits for the machine code, if it is being compiled."""
        self._name = name
        self._device = device
        self._image = image
        self._lock = threading.Lock()  # of what follows: engines in several threads share functions
        self._handle: ctypes.c_void_p | None = None
        self._most_shared = 0  # bytes that it may have

    def _load(self) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().synchronize()  # makes sure that the device has a context
            check(driver().cuModuleLoadData(ctypes.byref(module), self._image()), f"loading {self._name}")
            found = driver().cuModuleGetFunction(ctypes.byref(function), module, self._name.encode())
            check(found, f"finding {self._name}")
        return function

    def _ready(self, shared_bytes: int) -> ctypes.c_void_p:
        """The function on the device, which may have so much memory from now on."""
        with self._lock:
            if self._handle is None:
                self._handle = self._load()
            if shared_bytes > self._most_shared:  # it gets some unasked, but how many is not told
                check(driver().cuFuncSetAttribute(self._handle, MAX_SHARED, shared_bytes), f"memory of {self._name}")
                self._most_shared = shared_bytes
            return self._handle

    def launch(self, grid: tuple[int, int], num_threads: int, args: ctypes.Structure, shared_bytes: int = 0) -> None:
        """Enqueue on the device's current stream. The kernel may begin while the one before still runs, and waits for
        it. shared_bytes: of each block, beside what the kernel has for itself."""
        if is_compiling():
            return
        function = self._ready(shared_bytes)
        attribute = _Attribute(OVERLAP, b"", _Value(programmatic=1))
        config = _Config(*grid, 1, num_threads, 1, 1, shared_bytes, torch.cuda.current_stream(self._device).cuda_stream,
                         ctypes.pointer(attribute), int(torch.cuda.get_device_capability(self._device) >= HOPPER))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        launched = driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
        check(launched, f"launch of {self._name}")


def load(source: str, name: str, defines: Mapping[str, int], device: torch.device) -> Function:
    """The function `name` of a source file of this folder, compiled with some definitions. DeviceError if it cannot be:
    when it is first launched, or as `compiling_by` says."""
    major, minor = torch.cuda.get_device_capability(device)
    native = "a" if (major, minor) == HOPPER else ""  # instructions of this capability alone
    options = [f"--gpu-architecture=sm_{major}{minor}{native}", "--std=c++17", "--device-as-default-execution-space",
               *(f"-D{key}={value}" for key, value in sorted(defines.items()))]
    compile_it = partial(_cubin, _text(source), source, options)
    compiling = _compiling.get()
    if compiling is None:
        return Function(name, device, compile_it)
    executor, images = compiling
    images.append(executor.submit(compile_it))
    return Function(name, device, images[-1].result)


def _text(source: str) -> str:
    """A source file, with the files of this folder that it includes."""
    return re.sub(r'#include "(.*)"', lambda found: _text(found[1]), (SOURCES / source).read_text())


def _cubin(text: str, source: str, options: Sequence[str]) -> bytes:
    """Machine code, from the disk where it is there already."""
    nvrtc = _nvrtc()
    version = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(*(ctypes.byref(part) for part in version))
    key = hashlib.sha256(repr((text, options, [part.value for part in version])).encode()).hexdigest()[:32]
    kept = KEPT.expanduser() / f"{Path(source).stem}-{key}.cubin"
    with suppress(OSError):  # it is not there, or cannot be read
        return kept.read_bytes()
    image = _compile(nvrtc, text, source, options)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")  # others may write the same
        new.write_bytes(image)
        new.replace(kept)
    except OSError as error:  # a home that cannot be written to, or a full disk
        logger.warning("compiled kernels cannot be kept, and every start compiles them anew: %s", error)
    return image


def _compile(nvrtc: ctypes.CDLL, text: str, source: str, options: Sequence[str]) -> bytes:
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), source.encode(), 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
        if failed:
            log = _result(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            logger.error("%s", log)
            raise DeviceError(f"{source} does not compile for this GPU ({' '.join(options)}); the log tells why")
        return _result(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _result(size_of: Any, read: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    read(program, data)
    return data.raw


# --- the libraries --------------------------------------------------------------------------------------------------


class _Value(ctypes.Union):
    _fields_ = [("programmatic", ctypes.c_int), ("room", ctypes.c_char * 64)]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _Value)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint),
    ]


@cache
def driver() -> ctypes.CDLL:
    """The library that comes with the GPU's driver."""
    return ctypes.CDLL("libcuda.so.1")


def _nvrtc() -> ctypes.CDLL:
    library = gpu.nvrtc()
    if library is None:
        raise DeviceError(f"libnvrtc of the package {gpu.nvrtc_package()} is missing; install it")
    return library


def check(status: int, what: str) -> None:
    """DeviceError, or OutOfMemoryError, if a call of the driver's failed."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        kind = OutOfMemoryError if status == OUT_OF_MEMORY else DeviceError
        raise kind(f"{what} failed on the GPU: {(text.value or b'unknown error').decode()}")
