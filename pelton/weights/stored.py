"""A tensor as it lies in a file, whatever the file's format."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pelton.errors import ConfigError, ModelFormatError

Buffer = mmap.mmap | bytes


@dataclass(frozen=True)
class BlockType:
    """How weights are stored: blocks of `block_size` weights in `block_bytes` bytes. quant/ defines them by name."""

    name: str
    block_size: int
    block_bytes: int

    def bytes_of(self, columns: range, what: str) -> slice:
        """Where a row holds these columns. ConfigError, about the weight `what`, if they cut a block."""
        if columns.start % self.block_size or columns.stop % self.block_size:
            raise ConfigError(
                f"{what} is stored in blocks of {self.block_size} columns ({self.name}), which would be cut at "
                f"{columns.start} and {columns.stop}; use a smaller --tensor-parallel-size"
            )
        return slice(*(at // self.block_size * self.block_bytes for at in (columns.start, columns.stop)))


@dataclass(frozen=True)
class StoredTensor:
    """`shape` is outermost dimension first; `data` is a view of the mapped file: rows of whole blocks."""

    name: str  # in the file
    shape: tuple[int, ...]
    type: BlockType
    data: npt.NDArray[np.uint8]

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    def part(self, rows: range, columns: range) -> StoredTensor:
        """Some adjacent rows and columns of a matrix: a view of the file if whole rows, else a copy. ConfigError if
        the columns cut a block."""
        by_row = self.data.reshape(self.shape[0], -1)[rows.start : rows.stop, self.type.bytes_of(columns, self.name)]
        return StoredTensor(self.name, (len(rows), len(columns)), self.type, by_row.reshape(-1))


def release(tensor: StoredTensor) -> None:
    """Give back the memory of a tensor's pages in the mapped file, once nobody reads them; the file still has them."""
    file = _file(tensor)
    if file is None:
        return
    start = tensor.data.ctypes.data - tensor.data.base.ctypes.data  # type: ignore[union-attr]
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + tensor.data.size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end:
        file.madvise(mmap.MADV_DONTNEED, first, end - first)


def release_files(tensors: Iterable[StoredTensor]) -> None:
    """Give back the memory of all pages of the tensors' files; what is still used is read again."""
    for file in {id(file): file for file in map(_file, tensors) if file is not None}.values():
        file.madvise(mmap.MADV_DONTNEED)


def _file(tensor: StoredTensor) -> mmap.mmap | None:
    """The mapped file that holds a tensor, where its pages can be given back."""
    whole = tensor.data.base  # an array over the whole file
    view = getattr(whole, "base", None)
    file = view.obj if isinstance(view, memoryview) else None
    return file if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def map_file(path: Path) -> mmap.mmap:
    """The file as memory. Private and writable: torch warns about read-only buffers; nothing writes to it."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:  # an empty file cannot be mapped
            raise ModelFormatError(f"{path.name} is empty") from None
