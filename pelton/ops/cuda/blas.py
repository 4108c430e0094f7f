"""torch's own products, of few rows."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

from pelton.ops.cuda.program import HOPPER

MAX_ROWS = 64

_choosing = threading.RLock()  # torch's choice is the process's, in which engines may run in several threads


@contextmanager
def for_rows(num_rows: int, device: torch.device) -> Iterator[None]:
    """torch multiplies so many rows in this context: few by cuBLASLt, which joins what blocks have summed in the same
    kernel, where cuBLAS launches one more (32 rows by 4096 x 4096, H200: 12.2 us, not 14.1)."""
    if num_rows > MAX_ROWS or device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        yield
        return
    with _choosing:
        _say_nothing()
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        try:
            yield
        finally:
            torch.backends.cuda.preferred_blas_library(before)


@cache
def _say_nothing() -> None:
    """torch says once that to choose is experimental, in a line to the process's standard error that Python does not
    see: nothing that a user can act on."""
    # A process may have no standard error.
    with suppress(OSError), os.fdopen(os.dup(2), "wb") as error, open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            before = torch.backends.cuda.preferred_blas_library()
            torch.backends.cuda.preferred_blas_library("cublaslt")
            torch.backends.cuda.preferred_blas_library(before)
        finally:
            os.dup2(error.fileno(), 2)
