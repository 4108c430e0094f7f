"""Builders of small checkpoint files, byte by byte, so that each field can lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str | bytes, dims: list[int], kind: int, offset: int, num_dims: int | None = None) -> bytes:
    head = struct.pack("<I", len(dims) if num_dims is None else num_dims)
    return string(name) + head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


@dataclass
class GGUFBytes:
    """The parts of a GGUF file. What is not given is what a good file has."""

    entries: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    alignment: int = 32  # of the data in the file, whatever its metadata says
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_entries: int | None = None

    string = staticmethod(string)
    entry = staticmethod(entry)
    array = staticmethod(array)
    tensor = staticmethod(tensor)

    def build(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_entries = len(self.entries) if self.num_entries is None else self.num_entries
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_entries)
        head += b"".join(self.entries) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data


@pytest.fixture(scope="session")
def gguf_bytes() -> type[GGUFBytes]:
    return GGUFBytes


@pytest.fixture(scope="session")
def seed_gguf() -> bytes:
    """A good file with every kind of metadata value and four tensors: what mutations start from."""
    scalars = [(0, "B", 7), (1, "b", -7), (2, "H", 7), (3, "h", -7), (4, "I", 7), (5, "i", -7), (6, "f", 0.5),
               (7, "?", True), (10, "Q", 7), (11, "q", -7), (12, "d", 0.5)]
    entries: list[bytes] = []
    for kind, code, value in scalars:
        entries.append(entry(f"a.{kind}", kind, struct.pack(f"<{code}", value)))
        entries.append(entry(f"b.{kind}", 9, array(kind, 2, struct.pack(f"<2{code}", value, value))))
    sizes = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
             "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    entries += [entry(f"llama.{name}", 4, struct.pack("<I", size)) for name, size in sizes.items()]
    entries += [
        entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        entry("llama.rope.scaling.type", 8, string("linear")),
        entry("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 2)),
        entry("general.architecture", 8, string("llama")),
        entry("general.alignment", 4, struct.pack("<I", 32)),
        entry("tokens", 9, array(8, 3, string("a") + string("") + string("née"))),
        entry("empty", 9, array(5, 0, b"")),
    ]
    tensors = [
        tensor("token_embd.weight", [32, 2], 2, 0),
        tensor("output_norm.weight", [8], 0, 64),
        tensor("blk.0.attn_q.weight", [4, 2, 1, 1], 1, 96),
        tensor("rope_freqs.weight", [4], 0, 128),
    ]
    return GGUFBytes(entries, tensors, bytes(range(128)) + struct.pack("<4f", 1, 1, 2, 8)).build()


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture(scope="session")
def safe_bytes() -> Callable[..., bytes]:
    """header (object or bytes), data, header length -> the bytes of a file."""
    return safetensors_bytes


@pytest.fixture(scope="session")
def seed_safetensors() -> bytes:
    """A good file with three tensors: what mutations start from."""
    return safetensors_bytes(
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "a": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
            "none": {"dtype": "U8", "shape": [0, 5], "data_offsets": [32, 32]},
        },
        bytes(range(32)),
    )
