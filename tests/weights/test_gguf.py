"""The GGUF reader: good files against the `gguf` package, and every published way in which a file can lie."""

from __future__ import annotations

import re
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pelton.errors import ModelFormatError
from pelton.weights.gguf import open_gguf, parse_gguf


def test_every_kind_of_value(seed_gguf: bytes) -> None:
    metadata, tensors = parse_gguf(seed_gguf, "seed")
    assert metadata["a.1"] == -7
    assert metadata["a.6"] == 0.5
    assert metadata["a.7"] is True
    assert metadata["b.3"].tolist() == [-7, -7]
    assert metadata["b.7"].tolist() == [True, True]
    assert metadata["tokens"] == ["a", "", "née"]
    assert len(metadata["empty"]) == 0
    assert {name: (t.shape, t.type.name) for name, t in tensors.items()} == {
        "token_embd.weight": ((2, 32), "Q4_0"),
        "output_norm.weight": ((8,), "F32"),
        "blk.0.attn_q.weight": ((1, 1, 2, 4), "F16"),
        "rope_freqs.weight": ((4,), "F32"),
    }
    assert tensors["token_embd.weight"].data.tolist() == list(range(36))
    assert tensors["output_norm.weight"].data.tolist() == list(range(64, 96))


def write(path: Path, tensors: dict[str, np.ndarray], **settings: Any) -> list[Path]:
    """A file of the `gguf` package's writer; the paths of its parts."""
    writer = gguf.GGUFWriter(path, "llama", **settings)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "é", "\u2581the"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.5])
    writer.add_uint64("llama.large", 1 << 40)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("*.gguf"))


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"blk.{i}.ffn_up.weight": rng.standard_normal((i + 1, 32), dtype=np.float32) for i in range(5)}


def test_file_of_the_gguf_package(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    file = open_gguf(write(tmp_path / "m.gguf", arrays)[0])
    assert file.metadata["tokenizer.ggml.tokens"] == ["<s>", "é", "\u2581the"]
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.0, -1.0, -2.5]
    assert file.metadata["llama.large"] == 1 << 40
    assert file.tensors.keys() == arrays.keys()
    for name, values in arrays.items():
        assert file.tensors[name].shape == values.shape
        assert np.array_equal(file.tensors[name].data.view(np.float32), values.ravel())


@pytest.mark.parametrize("given", [0, 1, 2])
def test_split_file(tmp_path: Path, arrays: dict[str, np.ndarray], given: int) -> None:
    parts = write(tmp_path / "m.gguf", arrays, split_max_tensors=2)
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    file = open_gguf(parts[given])
    assert file.paths == tuple(parts)
    assert "tokenizer.ggml.tokens" in file.metadata
    assert file.tensors.keys() == arrays.keys()


def test_split_file_lies(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    parts = write(tmp_path / "m.gguf", arrays, split_max_tensors=2)
    good = [part.read_bytes() for part in parts]
    parts[1].unlink()
    with pytest.raises(ModelFormatError, match=r"m-00002-of-00003\.gguf is missing"):
        open_gguf(parts[0])
    parts[1].write_bytes(good[2])
    with pytest.raises(ModelFormatError, match=r"split\.no"):
        open_gguf(parts[0])
    renamed = tmp_path / "whole.gguf"
    renamed.write_bytes(good[0])
    with pytest.raises(ModelFormatError, match=r"split\.count"):
        open_gguf(renamed)
    parts[1].write_bytes(good[0].replace(b"split.no\x02\0\0\0\0\0", b"split.no\x02\0\0\0\x01\0"))
    with pytest.raises(ModelFormatError, match="is in an earlier part too"):
        open_gguf(parts[0])
    parts[1].write_bytes(good[1])
    count = good[0].index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    parts[0].write_bytes(good[0][:count] + struct.pack("<i", 6) + good[0][count + 4 :])
    with pytest.raises(ModelFormatError, match=r"split\.tensors\.count is 6"):
        open_gguf(parts[0])
    for name in ("m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-99999.gguf"):
        with pytest.raises(ModelFormatError, match="cannot be"):
            open_gguf(tmp_path / name)


def test_version_2_is_read(gguf_bytes: Any) -> None:
    assert parse_gguf(gguf_bytes(version=2).build(), "f") == ({}, {})


def test_large_vocabulary_is_quick(gguf_bytes: Any) -> None:
    """Linear, not quadratic: 100,000 tokens take a fraction of a second even on a slow machine."""
    tokens = b"".join(gguf_bytes.string(f"token {i}") for i in range(100_000))
    data = gguf_bytes([gguf_bytes.entry("tokens", 9, gguf_bytes.array(8, 100_000, tokens))]).build()
    start = time.perf_counter()
    metadata, _ = parse_gguf(data, "f")
    assert time.perf_counter() - start < 1
    assert metadata["tokens"][99_999] == "token 99999"


BIG = 1 << 40
MAX = (1 << 64) - 1
U32 = struct.Struct("<I").pack


def lies(g: Any) -> dict[str, tuple[Any, str]]:
    """Name of a lie -> (the file, what the error says). After llama.cpp's tests/test-gguf.cpp and published reports."""
    good = g.tensor("t", [4], 0, 0)
    data = bytes(64)

    def with_entry(key: str, kind: int, payload: bytes) -> Any:
        return g([g.entry(key, kind, payload)], alignment=1)

    def with_tensor(*entries: bytes, **settings: Any) -> Any:
        return g([], list(entries), data, **settings)

    return {
        "magic": (g(magic=b"FUGU"), "not a GGUF file"),
        "version 0": (g(version=0), "version 0|big-endian"),
        "version 1": (g(version=1), "version 1 is not supported"),
        "version 4": (g(version=4), "version 4 is not supported"),
        "big-endian": (g(version=3 << 24), "big-endian"),
        "tensor count": (g(num_tensors=BIG), "tensor count"),
        "tensor count wraps": (g(num_tensors=MAX), "tensor count"),
        "tensor count beyond the file": (g(num_tensors=1), "tensor count"),
        "metadata count": (g(num_entries=BIG), "metadata count"),
        "metadata count wraps": (g(num_entries=MAX), "metadata count"),
        "key length": (g([g.string("k", BIG) + bytes(16)]), "key 0 is .* bytes long"),
        "key length wraps": (g([g.string("k", MAX) + bytes(16)]), "key 0"),
        "key longer than the file": (g([g.string("k", 1000) + bytes(16)]), "key 0 needs 1000 bytes"),
        "key is empty": (with_entry("", 4, U32(1)), "key 0 is empty"),
        "key is not UTF-8": (g([g.string(b"\xff\xfe") + U32(4) + U32(1)]), "not UTF-8"),
        "key twice": (g([g.entry("k", 4, U32(1)), g.entry("k", 8, g.string("x"))]), "'k' occurs twice"),
        "value type": (with_entry("k", 13, bytes(16)), "unknown type 13"),
        "value type wraps": (with_entry("k", 0xFFFFFFFF, bytes(16)), "unknown type"),
        "bool": (with_entry("k", 7, b"\x02"), "neither true nor false"),
        "string length": (with_entry("k", 8, g.string("v", BIG)), "'k' is .* bytes long"),
        "string longer than the file": (with_entry("k", 8, g.string("v", 1 << 20)), "'k' needs"),
        "string is not UTF-8": (with_entry("k", 8, g.string(b"\xc3")), "not UTF-8"),
        "array type": (with_entry("k", 9, g.array(77, 1, bytes(16))), "unknown type 77"),
        "array of arrays": (with_entry("k", 9, g.array(9, 1, g.array(0, 1, b"a"))), "array of arrays"),
        "array length": (with_entry("k", 9, g.array(4, BIG, bytes(16))), "'k' needs"),
        "array length wraps in bytes": (with_entry("k", 9, g.array(10, 1 << 61, bytes(16))), "'k' needs"),
        "array length -1": (with_entry("k", 9, g.array(5, MAX, bytes(16))), "'k' needs"),
        "array of bools": (with_entry("k", 9, g.array(7, 2, b"\x01\x03")), "neither true nor false"),
        "strings count": (with_entry("k", 9, g.array(8, 1 << 30, bytes(16))), "too many"),
        "strings count beyond the file": (with_entry("k", 9, g.array(8, 99, bytes(16))), "too many"),
        "strings end early": (with_entry("k", 9, g.array(8, 2, g.string("x" * 9))), "beyond the end"),
        "string in array": (with_entry("k", 9, g.array(8, 2, g.string("", MAX) + bytes(32))), "beyond the end"),
        "string in array is not UTF-8": (with_entry("k", 9, g.array(8, 1, g.string(b"\x80"))), "not UTF-8"),
        "alignment 0": (with_entry("general.alignment", 4, U32(0)), "alignment must be a power of two"),
        "alignment 12": (with_entry("general.alignment", 4, U32(12)), "alignment must be a power of two"),
        "alignment 2**31": (with_entry("general.alignment", 4, U32(1 << 31)), "alignment must be a power of two"),
        "alignment is a string": (with_entry("general.alignment", 8, g.string("32")), "alignment must be"),
        "alignment is uint64": (with_entry("general.alignment", 10, struct.pack("<Q", 32)), "alignment must be"),
        "alignment is a bool": (with_entry("general.alignment", 7, b"\x01"), "alignment must be"),
        "name length": (with_tensor(g.string("t", BIG) + bytes(64)), "name of tensor 0 is .* bytes long"),
        "name is empty": (with_tensor(g.tensor("", [4], 0, 0)), "tensor 0 has no name"),
        "name twice": (with_tensor(good, g.tensor("t", [4], 0, 32)), "'t' occurs twice"),
        "no dimensions": (with_tensor(g.tensor("t", [], 0, 0) + bytes(8)), "0 dimensions"),
        "5 dimensions": (with_tensor(g.tensor("t", [1] * 5, 0, 0)), "5 dimensions"),
        "2**32 - 1 dimensions": (with_tensor(g.tensor("t", [1], 0, 0, num_dims=0xFFFFFFFF)), "dimensions"),
        "zero dimension": (with_tensor(g.tensor("t", [4, 0], 0, 0)), "none may be 0"),
        "product wraps to 0": (with_tensor(g.tensor("t", [1 << 32, 1 << 32], 0, 0)), "the file holds only 64"),
        "product wraps to 4": (with_tensor(g.tensor("t", [4, (1 << 62) + 1], 0, 0)), "the file holds only 64"),
        "negative dimension": (with_tensor(g.tensor("t", [MAX], 0, 0)), "the file holds only 64"),
        "not whole blocks": (with_tensor(g.tensor("t", [33], 2, 0)), "multiple of 32"),
        "unknown tensor type": (with_tensor(g.tensor("t", [32], 4, 0)), "type 4, which is not supported"),
        "tensor type beyond the table": (with_tensor(g.tensor("t", [32], 0xFFFFFFFF, 0)), "not supported"),
        "known but unsupported type": (with_tensor(g.tensor("t", [256], 16, 0)), "IQ2_XXS, which is not supported"),
        "offset is not aligned": (with_tensor(g.tensor("t", [4], 0, 4)), "multiple of the alignment"),
        "offset beyond the file": (with_tensor(g.tensor("t", [4], 0, 64)), "the file holds only 64"),
        "offset wraps": (with_tensor(g.tensor("t", [4], 0, MAX - 31)), "the file holds only 64"),
        "data ends early": (with_tensor(g.tensor("t", [17], 0, 0)), "download complete"),
        "no data": (g([], [good], b"", alignment=1), "the file holds only 0"),
        "tensors overlap": (with_tensor(g.tensor("a", [9], 0, 0), g.tensor("b", [4], 0, 32)), "overlap"),
        "tensors at one place": (with_tensor(good, g.tensor("b", [4], 0, 0)), "overlap"),
    }


def test_lies(gguf_bytes: Any) -> None:
    for name, (file, message) in lies(gguf_bytes).items():
        try:
            parse_gguf(file.build(), "f.gguf")
            pytest.fail(f"{name}: not found out")
        except ModelFormatError as error:
            assert re.match(f"f.gguf: .*({message})", str(error)), name
            assert len(str(error)) < 400, name


def test_files_shorter_than_their_head(tmp_path: Path) -> None:
    for data in (b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x03\0\0\0" + bytes(12)):
        with pytest.raises(ModelFormatError, match="needs"):
            parse_gguf(data, "f")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelFormatError, match="is empty"):
        open_gguf(tmp_path / "empty.gguf")


def test_truncation_at_every_byte(seed_gguf: bytes) -> None:
    for length in range(len(seed_gguf)):
        with pytest.raises(ModelFormatError):
            parse_gguf(seed_gguf[:length], "f")
