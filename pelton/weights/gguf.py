"""Reader of GGUF files, version 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    magic "GGUF", version, number of tensors, number of metadata entries
    metadata: key, type, value          (strings and arrays carry their length in front)
    tensors:  name, dimensions, type, offset
    padding to `general.alignment`, then the tensors' data

The file is not trusted. Arithmetic is on Python's integers, which cannot wrap; every length is compared with the
bytes that are left before anything is allocated or looped over; whatever is wrong is a ModelFormatError that names
the field. The file is mapped, not read: `data` costs nothing until it is used.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pelton.errors import ModelFormatError
from pelton.weights.fields import Fields, shorten
from pelton.weights.inside import child
from pelton.weights.stored import BlockType, Buffer, StoredTensor, map_file

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

MAX_METADATA = 100_000
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 64 << 10  # of a key or a tensor's name
MAX_STRING_BYTES = 64 << 20
MAX_ARRAY_STRINGS = 8 << 20  # in all arrays of a file: as Python strings they take more room than in the file
MAX_DIMS = 4
MAX_ALIGNMENT = 64 << 10
MAX_SPLITS = 10_000

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")

BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    30: BlockType("BF16", 1, 2),
}
# Types that exist but are not read yet: a message with a name helps more than a number.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4",
}

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1", 10: "<u8", 11: "<i8",
           12: "<f8"}
UINT32 = 4


@dataclass(frozen=True)
class GGUFFile:
    """A parsed file, or all parts of a split one as if they were one file.

    Metadata values are int, float, bool, str, list[str], or a numpy array for arrays of numbers.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file; of a split one (`name-00001-of-00003.gguf`) open all parts, whichever is given."""
    paths = split_paths(path)
    first, tensors = parse_gguf(map_file(paths[0]), paths[0].name)
    _check_split(first, 0, len(paths), paths[0].name)
    for index, part in enumerate(paths[1:], start=1):
        metadata, more = parse_gguf(map_file(part), part.name)
        _check_split(metadata, index, len(paths), part.name)
        if twice := tensors.keys() & more.keys():
            raise ModelFormatError(f"{part.name}: tensor {min(twice)} is in an earlier part too")
        tensors.update(more)
    expected = Fields(first, path.name).int("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelFormatError(f"{path.name}: split.tensors.count is {expected}, but there are {len(tensors)} tensors")
    return GGUFFile(paths, first, tensors)


def split_paths(path: Path) -> tuple[Path, ...]:
    """All parts of the split file that `path` belongs to, in order; (path,) if it is whole."""
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if not 1 <= int(match["index"]) <= count <= MAX_SPLITS:
        raise ModelFormatError(f"{path.name}: part {match['index']} of {count} cannot be")
    names = [f"{match['stem']}-{index:05d}-of-{count:05d}.gguf" for index in range(1, count + 1)]
    return tuple(path if name == path.name else child(path.parent, name) for name in names)


def _check_split(metadata: Mapping[str, Any], index: int, count: int, where: str) -> None:
    fields = Fields(metadata, where)
    found = fields.int("split.no", 0), fields.int("split.count", 0)
    if found != (index, count) and not (count == 1 and found == (0, 0)):  # a whole file need not say that it is one
        raise ModelFormatError(
            f"{where}: split.no and split.count are {found}, the file's name says {(index, count)}; restore the name"
        )


def parse_gguf(buffer: Buffer, where: str) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors of one file's bytes; `where` names it in errors."""
    reader = _Reader(buffer, where)
    num_tensors, num_entries = _read_head(reader)
    metadata = _read_metadata(reader, num_entries)
    alignment = _alignment(reader, metadata)
    return {key: value for key, (_, value) in metadata.items()}, _read_tensors(reader, num_tensors, alignment)


class _Reader:
    """A position in a buffer that never passes the buffer's end."""

    def __init__(self, buffer: Buffer, where: str) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.where = where
        self.position = 0
        self.strings_left = MAX_ARRAY_STRINGS

    def error(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.where}: {problem}")

    def need(self, num_bytes: int, what: str) -> int:
        """Step over `num_bytes` and return where they start."""
        start = self.position
        if num_bytes > self.size - start:
            raise self.error(f"{what} needs {shorten(num_bytes)} bytes, but only {self.size - start} are left")
        self.position = start + num_bytes
        return start

    def scalar(self, dtype: str, what: str) -> Any:
        size = int(dtype[2])
        return np.frombuffer(self.buffer, dtype, 1, self.need(size, what))[0].item()

    def uint(self, num_bytes: int, what: str) -> int:
        start = self.need(num_bytes, what)
        return int.from_bytes(self.buffer[start : start + num_bytes], "little")

    def string(self, what: str, limit: int) -> str:
        length = self.uint(8, f"length of {what}")
        if length > limit:
            raise self.error(f"{what} is {length} bytes long, more than {limit}")
        start = self.need(length, what)
        try:
            return str(self.buffer[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None


def _read_head(reader: _Reader) -> tuple[int, int]:
    """Check magic and version; return the numbers of tensors and of metadata entries."""
    start = reader.need(4, "magic")
    if reader.buffer[start : start + 4] != MAGIC:
        raise reader.error("this is not a GGUF file, it does not begin with GGUF")
    version = reader.uint(4, "version")
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            raise reader.error("this is a big-endian GGUF file; convert it to little-endian")
        raise reader.error(f"version {version} is not supported; versions 2 and 3 are: convert the model again")
    num_tensors, num_entries = reader.uint(8, "tensor count"), reader.uint(8, "metadata count")
    left = reader.size - reader.position
    # An entry takes at least 13 bytes (key length, type, one byte), a tensor 32 (name length, dims, type, offset).
    for count, limit, least, what in (
        (num_tensors, MAX_TENSORS, 32, "tensor count"), (num_entries, MAX_METADATA, 13, "metadata count")
    ):
        if count > limit or count * least > left:
            raise reader.error(f"{what} {count} is too large (at most {limit}, and {left} bytes are left)")
    return num_tensors, num_entries


# --- metadata -----------------------------------------------------------------------------------------------------


def _read_metadata(reader: _Reader, count: int) -> dict[str, tuple[int, Any]]:
    """Key -> (type, value)."""
    metadata: dict[str, tuple[int, Any]] = {}
    for index in range(count):
        key = reader.string(f"key {index}", MAX_NAME_BYTES)
        if not key or key in metadata:
            raise reader.error(f"key {shorten(key)} occurs twice" if key else f"key {index} is empty")
        kind = reader.uint(4, f"type of {shorten(key)}")
        metadata[key] = kind, _read_value(reader, key, kind)
    return metadata


def _read_value(reader: _Reader, key: str, kind: int) -> Any:
    what = shorten(key)
    if kind == STRING:
        return reader.string(what, MAX_STRING_BYTES)
    if kind == ARRAY:
        return _read_array(reader, what)
    if kind not in SCALARS:
        raise reader.error(f"{what} has unknown type {kind}")
    value = reader.scalar(SCALARS[kind], what)
    if kind != BOOL:
        return value
    if value > 1:
        raise reader.error(f"{what} is neither true nor false but {value}")
    return value == 1


def _read_array(reader: _Reader, what: str) -> list[str] | npt.NDArray[Any]:
    kind, count = reader.uint(4, f"element type of {what}"), reader.uint(8, f"length of {what}")
    if kind == STRING:
        return _read_strings(reader, what, count)
    if kind not in SCALARS:
        raise reader.error(f"{what} is an array of {'arrays' if kind == ARRAY else f'unknown type {kind}'}")
    dtype = np.dtype(SCALARS[kind])
    values = np.frombuffer(reader.buffer, dtype, count, reader.need(count * dtype.itemsize, what)).copy()
    if kind != BOOL:
        return values
    if count and values.max() > 1:
        raise reader.error(f"{what} holds a value that is neither true nor false")
    return values.astype(np.bool_)


def _read_strings(reader: _Reader, what: str, count: int) -> list[str]:
    """An array of strings: the one loop that has to be quick, vocabularies have hundreds of thousands."""
    left = reader.size - reader.position
    if count > reader.strings_left or count * 8 > left:
        raise reader.error(f"{what} has {count} strings, too many: at most {reader.strings_left}, {left} bytes left")
    reader.strings_left -= count
    buffer, size, position = reader.buffer, reader.size, reader.position
    unpack = struct.Struct("<Q").unpack_from
    values: list[str] = []
    try:
        for _ in range(count):
            start = position + 8
            position = start + unpack(buffer, position)[0]
            if position > size:
                break
            values.append(str(buffer[start:position], "utf-8"))
    except struct.error:  # less than 8 bytes were left for a length
        position = size + 1
    except UnicodeDecodeError as error:
        raise reader.error(f"{what}[{len(values)}] is not UTF-8: {error.reason} at byte {error.start}") from None
    if position > size:
        raise reader.error(f"{what}[{len(values)}] reaches beyond the end of the file")
    reader.position = position
    return values


def _alignment(reader: _Reader, metadata: Mapping[str, tuple[int, Any]]) -> int:
    kind, value = metadata.get("general.alignment", (UINT32, DEFAULT_ALIGNMENT))
    if kind != UINT32 or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise reader.error(
            f"general.alignment must be a power of two up to {MAX_ALIGNMENT} as uint32, "
            f"got {shorten(value)} of type {kind}"
        )
    return int(value)


# --- tensors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """What the header says about a tensor."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int  # from the start of the data
    num_bytes: int


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, StoredTensor]:
    entries: dict[str, _Entry] = {}
    for index in range(count):
        entry = _read_entry(reader, index, alignment)
        if entry.name in entries:
            raise reader.error(f"tensor {shorten(entry.name)} occurs twice")
        entries[entry.name] = entry
    data_start = -(-reader.position // alignment) * alignment
    _check_ranges(reader, entries.values(), reader.size - data_start)
    whole = np.frombuffer(reader.buffer, np.uint8)
    return {
        e.name: StoredTensor(e.name, e.shape, e.type, whole[data_start + e.offset :][: e.num_bytes])
        for e in entries.values()
    }


def _read_entry(reader: _Reader, index: int, alignment: int) -> _Entry:
    name = reader.string(f"name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {shorten(name)}"
    if not name:
        raise reader.error(f"tensor {index} has no name")
    num_dims = reader.uint(4, f"number of dimensions of {what}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise reader.error(f"{what} has {num_dims} dimensions; 1 to {MAX_DIMS} are possible")
    dims = [reader.uint(8, f"dimensions of {what}") for _ in range(num_dims)]
    type_id = reader.uint(4, f"type of {what}")
    if type_id not in BLOCK_TYPES:
        raise reader.error(
            f"{what} has type {OTHER_TYPES.get(type_id, type_id)}, which is not supported; "
            f"supported are {', '.join(type.name for type in BLOCK_TYPES.values())}"
        )
    block = BLOCK_TYPES[type_id]
    if 0 in dims or dims[0] % block.block_size:
        raise reader.error(
            f"{what} has dimensions {dims}: none may be 0, the first must be a multiple of {block.block_size}"
        )
    offset = reader.uint(8, f"offset of {what}")
    if offset % alignment:
        raise reader.error(f"{what} has offset {offset}, which is not a multiple of the alignment {alignment}")
    num_bytes = math.prod(dims) // block.block_size * block.block_bytes
    return _Entry(name, tuple(reversed(dims)), block, offset, num_bytes)


def _check_ranges(reader: _Reader, entries: Iterable[_Entry], num_bytes: int) -> None:
    """Each tensor lies inside the file's data, and no two overlap."""
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset < end:
            raise reader.error(f"tensors {shorten(before)} and {shorten(entry.name)} overlap")
        end, before = entry.offset + entry.num_bytes, entry.name
        if end > num_bytes:
            raise reader.error(
                f"tensor {shorten(entry.name)} needs bytes {entry.offset} to {end} of the data, but the file holds "
                f"only {max(num_bytes, 0)}; is the download complete?"
            )
