"""Reader of safetensors files (https://github.com/huggingface/safetensors#format).

    8 bytes: length n of the header; n bytes of JSON: name -> dtype, shape, [begin, end); then the data

The file is not trusted: the header is checked against the file before any tensor is touched. Data is mapped, not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pelton.errors import ModelFormatError
from pelton.weights.fields import parse_json_object, read_json, shorten
from pelton.weights.inside import child, optional_child
from pelton.weights.stored import BlockType, Buffer, StoredTensor, map_file

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_DIMS = 8
INDEX = "model.safetensors.index.json"

DTYPES = {
    name: BlockType(name, 1, size)
    for size, names in {
        1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
        2: ("I16", "U16", "F16", "BF16"),
        4: ("I32", "U32", "F32"),
        8: ("I64", "U64", "F64"),
    }.items()
    for name in names
}


def open_safetensors(paths: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint's files."""
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        more = parse_safetensors(map_file(path), path.name)
        if twice := tensors.keys() & more.keys():
            raise ModelFormatError(f"{path.name}: tensor {shorten(min(twice))} is in another file too")
        tensors.update(more)
    return tensors


def find_shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint: those of its index, or its only one; () if there are none."""
    if index := optional_child(folder, INDEX):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
            raise ModelFormatError(f"{INDEX}: field weight_map must be an object that maps tensors to files")
        names = set(weight_map.values()) if all(isinstance(name, str) for name in weight_map.values()) else set()
        if not names or not all(name.endswith(".safetensors") for name in names):
            raise ModelFormatError(f"{INDEX}: field weight_map must name .safetensors files only")
        return tuple(child(folder, name) for name in sorted(names))
    names = {path.name for path in folder.glob("*.safetensors")}
    if "model.safetensors" in names:
        return (child(folder, "model.safetensors"),)
    if len(names) > 1:
        raise ModelFormatError(f"{folder} holds {len(names)} .safetensors files, but no {INDEX} that says which to use")
    return tuple(child(folder, name) for name in names)


def parse_safetensors(buffer: Buffer, where: str) -> dict[str, StoredTensor]:
    """The tensors of one file's bytes; `where` names it in errors."""
    if len(buffer) < 8:
        raise ModelFormatError(f"{where}: header length needs 8 bytes, the file has {len(buffer)}")
    length = int.from_bytes(buffer[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(buffer) - 8):
        raise ModelFormatError(f"{where}: header length {length} is more than the file or {MAX_HEADER_BYTES} bytes")
    header = parse_json_object(buffer[8 : 8 + length], f"{where}: header")
    if len(header) > MAX_TENSORS:
        raise ModelFormatError(f"{where}: {len(header)} tensors are more than {MAX_TENSORS}")
    _check_metadata(header.pop("__metadata__", {}), where)
    data = np.frombuffer(buffer, np.uint8, offset=0)[8 + length :]
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for (begin, stop), name in sorted((_range(entry, name, where), name) for name, entry in header.items()):
        if begin != end:
            raise ModelFormatError(f"{where}: tensor {shorten(name)} begins at byte {begin} of the data, not at {end}")
        tensors[name] = _tensor(name, header[name], data, where)
        end = stop
    if end != len(data):
        raise ModelFormatError(f"{where}: the tensors end at byte {end} of the data, the file at {len(data)}")
    return tensors


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFormatError(f"{where}: __metadata__ must map strings to strings")


def _range(entry: Any, name: str, where: str) -> tuple[int, int]:
    """The tensor's `data_offsets`."""
    offsets = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise ModelFormatError(f"{where}: data_offsets of {shorten(name)} must be two byte positions")
    if offsets[0] > offsets[1]:
        raise ModelFormatError(f"{where}: data_offsets of {shorten(name)} end before they begin")
    return offsets[0], offsets[1]


def _tensor(name: str, entry: Mapping[str, Any], data: npt.NDArray[np.uint8], where: str) -> StoredTensor:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelFormatError(f"{where}: dtype of {shorten(name)} is {shorten(dtype)}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        raise ModelFormatError(f"{where}: shape of {shorten(name)} must be a list of up to {MAX_DIMS} sizes")
    begin, end = _range(entry, name, where)
    if math.prod(shape) * DTYPES[dtype].block_bytes != end - begin or end > len(data):
        raise ModelFormatError(
            f"{where}: tensor {shorten(name)}, {dtype} {shorten(tuple(shape))}, does not fit bytes {begin} to {end}; "
            "is the download complete?"
        )
    return StoredTensor(name, tuple(shape), DTYPES[dtype], data[begin:end])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
