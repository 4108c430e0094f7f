"""A tensor as it lies in a file, whatever the file's format."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pelton.errors import ModelFormatError

Buffer = mmap.mmap | bytes


@dataclass(frozen=True)
class BlockType:
    """How weights are stored: blocks of `block_size` weights in `block_bytes` bytes. quant/ defines them by name."""

    name: str
    block_size: int
    block_bytes: int


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


def map_file(path: Path) -> mmap.mmap:
    """The file as memory. Private and writable: torch warns about read-only buffers; nothing writes to it."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:  # an empty file cannot be mapped
            raise ModelFormatError(f"{path.name} is empty") from None
