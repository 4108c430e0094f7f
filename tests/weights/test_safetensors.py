"""The safetensors reader: files of the `safetensors` package, and headers that lie."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pelton.errors import ModelFormatError
from pelton.weights.safetensors import INDEX, MAX_HEADER_BYTES, find_shards, open_safetensors, parse_safetensors


def test_file_of_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(4), "scalar": torch.ones(())}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = open_safetensors((tmp_path / "model.safetensors",))
    assert {name: (t.shape, t.type.name) for name, t in stored.items()} == {
        "a": ((3, 5), "F32"), "b": ((7,), "BF16"), "c": ((4,), "I64"), "scalar": ((), "F32"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, tensor in tensors.items():
            assert torch.equal(torch.from_numpy(stored[name].data).view(tensor.dtype).view(tensor.shape), tensor)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ENTRY = json.dumps(entry()).encode()
LIES = {
    "not JSON": (b"{,}", "not valid JSON"),
    "not an object": ([], "must hold a JSON object"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "duplicate name": (b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", "twice"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "twice"),
    "entry is a list": ({"a": []}, "data_offsets of 'a'"),
    "metadata is a list": ({"__metadata__": [], "a": entry()}, "__metadata__"),
    "metadata holds numbers": ({"__metadata__": {"x": 1}, "a": entry()}, "__metadata__"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "dtype of 'a' is None"),
    "unknown dtype": ({"a": entry("F33")}, "dtype of 'a' is 'F33'"),
    "dtype is a list": ({"a": entry(["F32"])}, "dtype of 'a'"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "shape of 'a'"),
    "shape is a number": ({"a": entry(shape=2)}, "shape of 'a'"),
    "size is a float": ({"a": entry(shape=[2.0])}, "shape of 'a'"),
    "size is true": ({"a": entry(shape=[True, 2])}, "shape of 'a'"),
    "negative sizes": ({"a": entry(shape=[-1, -2])}, "shape of 'a'"),
    "many dimensions": ({"a": entry(shape=[1] * 9)}, "shape of 'a'"),
    "product wraps": ({"a": entry(shape=[1 << 62, 4, 1])}, "does not fit bytes"),
    "shape is too large": ({"a": entry(shape=[3])}, "does not fit bytes"),
    "shape is too small": ({"a": entry(shape=[1])}, "does not fit bytes"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets of 'a'"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, "data_offsets of 'a'"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, "data_offsets of 'a'"),
    "huge offset": ({"a": entry(offsets=[1 << 64, 1 << 65])}, "data_offsets of 'a'"),
    "reversed offsets": ({"a": entry(offsets=[8, 0])}, "end before they begin"),
    "beyond the file": ({"a": entry(shape=[4], offsets=[0, 16])}, "does not fit bytes"),
    "a hole before": ({"a": entry(shape=[1], offsets=[4, 8])}, "begins at byte 4 of the data, not at 0"),
    "overlap": ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "begins at byte 4"),
    "bytes left over": ({"a": entry(shape=[1], offsets=[0, 4])}, "end at byte 4 of the data, the file at 8"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies(name: str, safe_bytes: Callable[..., bytes]) -> None:
    header, message = LIES[name]
    with pytest.raises(ModelFormatError, match=rf"^f: .*{message}") as caught:
        parse_safetensors(safe_bytes(header, bytes(8)), "f")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("length", [9, 1 << 20, MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_header_length(length: int, safe_bytes: Callable[..., bytes]) -> None:
    with pytest.raises(ModelFormatError, match="header length"):
        parse_safetensors(safe_bytes(b"{}", bytes(6), length=length), "f")


def test_truncation_at_every_byte(seed_safetensors: bytes) -> None:
    assert len(parse_safetensors(seed_safetensors, "f")) == 3
    for length in range(len(seed_safetensors)):
        with pytest.raises(ModelFormatError):
            parse_safetensors(seed_safetensors[:length], "f")


def test_many_tensors_are_quick(safe_bytes: Callable[..., bytes]) -> None:
    header = {f"t{i}": entry("U8", [1], [i, i + 1]) for i in range(50_000)}
    assert len(parse_safetensors(safe_bytes(header, bytes(50_000)), "f")) == 50_000


# --- which files --------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"b": "two.safetensors", "a": "one.safetensors"}}))
    return folder


def test_shards(sharded: Path) -> None:
    shards = find_shards(sharded)
    assert [shard.name for shard in shards] == ["one.safetensors", "two.safetensors"]
    assert open_safetensors(shards).keys() == {"a", "b"}
    save_file({"b": torch.ones(3), "a": torch.ones(2)}, sharded / "two.safetensors")
    with pytest.raises(ModelFormatError, match="'a' is in another file too"):
        open_safetensors(shards)
    (sharded / INDEX).unlink()
    with pytest.raises(ModelFormatError, match="holds 2 .safetensors files"):
        find_shards(sharded)
    (sharded / "two.safetensors").rename(sharded / "model.safetensors")
    assert [shard.name for shard in find_shards(sharded)] == ["model.safetensors"]


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..\\secret.safetensors",
             "C:x.safetensors", "x\0.safetensors", ".safetensors/..", "missing.safetensors", "link.safetensors",
             "config.json", "weights.bin", "", 3, None, ["one.safetensors"]]
)
def test_index_must_name_files_of_the_folder(sharded: Path, name: Any) -> None:
    save_file({"s": torch.ones(2)}, sharded.parent / "secret.safetensors")
    (sharded / "link.safetensors").symlink_to(sharded.parent / "secret.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": name}}))
    with pytest.raises(ModelFormatError):
        find_shards(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "one.safetensors"}])
def test_index_without_map(sharded: Path, index: Any) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match="weight_map"):
        find_shards(sharded)


def test_links_of_the_hugging_face_cache(tmp_path: Path) -> None:
    """snapshots/<revision>/<name> may point into blobs/ of the same repository, and nowhere else."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert open_safetensors(find_shards(snapshot)).keys() == {"a"}
    (blobs / "0123").rename(tmp_path / "models--x" / "0123")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../0123")
    with pytest.raises(ModelFormatError, match="leads out of the folder"):
        find_shards(snapshot)
