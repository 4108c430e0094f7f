"""Tensors of a model by their Hugging Face names, in the compute dtype: what models are built from."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pelton.errors import ModelFormatError
from pelton.ops import gpu
from pelton.ops.native import native
from pelton.ops.parallel import ALONE, Ranks
from pelton.quant import CODED, FORMATS
from pelton.quant.layout import Blocks, Dense, LinearWeight
from pelton.quant.native import NUMBERS, Table, pack
from pelton.types import OnProgress
from pelton.weights.fields import Fields
from pelton.weights.files import ModelFiles
from pelton.weights.gguf_names import Architecture
from pelton.weights.stored import StoredTensor, release, release_files
from pelton.weights.upload import upload

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights decoded at a time: on a CPU, what lies between bytes and result stays in each core's cache.
CHUNK_PER_THREAD = 1 << 17
CHUNK_ON_GPU = 1 << 23

# May be left unread: what old versions of transformers stored and everybody computes; a head tied to the embedding.
OPTIONAL = re.compile(r".*\.rotary_emb\.inv_freq|lm_head\.weight")


class Checkpoint:
    """The tensors of a model. Each read is recorded, so that `finish()` can tell what was left over."""

    def __init__(
        self,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        tensors: Mapping[str, StoredTensor],
        gguf: Architecture | None = None,
        on_progress: OnProgress | None = None,
        activations: str = "fp32",
        ranks: Ranks = ALONE,
        deterministic: bool = False,
    ) -> None:
        """activations: what products with packed weights round their input to, see quant/native.py. ranks: of which
        this one reads its share. deterministic: on a GPU, see quant/gpu.py."""
        self.config = dict(config)
        self.dtype = dtype
        self.device = device
        self.activations = activations
        self.ranks = ranks
        self.deterministic = deterministic
        self._tensors = tensors
        self._gguf = gguf
        self._on_progress = on_progress
        self._unread = {name: tensor.data.size for name, tensor in tensors.items()}
        self._kept: list[StoredTensor] = []  # read as they are in the file, and not packed yet
        self._num_bytes = sum(self._unread.values())
        self._prefix = ""

    @property
    def activation_dtype(self) -> torch.dtype:
        """What layers pass on: the compute dtype, but float32 where the CPU's kernels run."""
        return torch.float32 if self.device.type == "cpu" and native is not None else self.dtype

    def at(self, prefix: str) -> Checkpoint:
        """A view: its names continue `prefix`. What is read through it is recorded in the whole."""
        view = copy.copy(self)
        view._prefix = self.full_name(prefix)
        return view

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self.full_name(name) in self._tensors

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name`, on the device, in `dtype` (default: the compute dtype).

        Do not write to it: it may be a view of the file. ModelFormatError if it is missing or has another shape.
        """
        stored = self._find(name, shape)
        tensor = self._load(stored, dtype or self.dtype, self._num_interleaved_heads(name))
        self._tell_read(name)
        return tensor

    def linear(
        self, name: str, shape: tuple[int, int], rows: range | None = None, columns: range | None = None
    ) -> LinearWeight:
        """The weight `name` [N, K], to be given to `packed`: on a CPU as the file holds it, but float32 in the compute
        dtype; on a GPU decoded.

        rows (whole heads of a query or key projection), columns: read these only. ConfigError if the columns cut what
        the file keeps together.
        """
        stored = self._find(name, shape)
        heads = self._num_interleaved_heads(name)
        rows, columns = rows or range(shape[0]), columns or range(shape[1])
        if (len(rows), len(columns)) != shape:
            stored = stored.part(rows, columns)
            heads = heads * len(rows) // shape[0]
        self._tell_read(name)
        if not self._keeps(stored):
            return Dense(self._load(stored, self.dtype, heads))
        order = None if heads == 0 else _half_split_rows(stored, heads)
        self._kept.append(stored)
        data = upload(torch.from_numpy(stored.data), self.device)
        return Blocks(stored.type, data, (len(rows), len(columns)), None if order is None else order.to(self.device))

    def packed(self, weight: LinearWeight) -> LinearWeight:
        """`weight` in the order that the device multiplies fastest."""
        if self.device.type == "cuda":
            self._kept.clear()
            return weight if gpu.why_not() else _pack_on_gpu(weight, self.dtype, self.deterministic)
        if self.device.type == "meta":
            return weight
        packed = pack(weight, self.activations, self.dtype)
        if packed is not weight:
            for stored in self._kept:
                release(stored)
        self._kept.clear()
        return packed

    def table(self, name: str, shape: tuple[int, int]) -> LinearWeight:
        """The weight `name` [N, K], of which only rows are looked up: numbers stay in the mapped file on a CPU."""
        weight = self.linear(name, shape)
        if self.device.type == "cuda" or not isinstance(weight, Blocks) or weight.type.name not in NUMBERS.values():
            return self.packed(weight)
        self._kept.clear()
        return Table(weight)

    def finish(self) -> None:
        """To be called when the model is built: ModelFormatError if it left tensors of the checkpoint unread."""
        release_files(self._tensors.values())
        unread = sorted(name for name in self._unread if not OPTIONAL.fullmatch(name))
        if unread:
            names = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
            raise ModelFormatError(f"{len(unread)} tensors of the checkpoint belong to no part of the model: {names}")

    def full_name(self, name: str) -> str:
        """The name in the whole checkpoint."""
        return f"{self._prefix}.{name}" if self._prefix else name

    def _find(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The stored tensor `name`, if it has this shape and a format that can be read."""
        name = self.full_name(name)
        stored = self._tensors.get(name)
        if stored is None:
            raise ModelFormatError(f"tensor {name} is missing in the checkpoint")
        if stored.shape != shape:
            raise ModelFormatError(f"tensor {name} has shape {list(stored.shape)}, the config says {list(shape)}")
        if stored.type.name not in FORMATS:
            raise ModelFormatError(f"tensor {name} is stored as {stored.type.name}, which is not supported for weights")
        return stored

    def _tell_read(self, name: str) -> None:
        self._unread.pop(self.full_name(name), None)
        if self._on_progress is not None:
            self._on_progress(self._num_bytes - sum(self._unread.values()), self._num_bytes)

    def _keeps(self, stored: StoredTensor) -> bool:
        """Whether a weight stays in its file's format."""
        if self.device.type == "cuda":
            return not gpu.why_not() and stored.type.name in CODED and self.dtype != torch.float32
        if native is None or stored.type.name not in native.packed_formats():
            return False
        return stored.type.name != "F32" or self.dtype == torch.float32

    def _num_interleaved_heads(self, name: str) -> int:
        """Of a weight whose rows GGUF keeps in another order, the number of heads; else 0."""
        if self._gguf is not None and self._gguf.permutes_qk:
            for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f".{part}." in self.full_name(name):
                    return Fields(self.config).int(heads, low=1)
        return 0

    def _load(self, stored: StoredTensor, dtype: torch.dtype, interleaved_heads: int) -> Tensor:
        """Decode, and undo what the conversion to GGUF does to norms."""
        if self._gguf is not None and self._gguf.adds_one_to_norms and stored.name.endswith("norm.weight"):
            return (decode(stored, torch.float32, self.device) - 1).to(dtype)
        return decode(stored, dtype, self.device, interleaved_heads)


def open_checkpoint(
    files: ModelFiles, dtype: torch.dtype, device: torch.device, on_progress: OnProgress | None = None,
    activations: str = "fp32", ranks: Ranks = ALONE, deterministic: bool = False,
) -> Checkpoint:
    """The checkpoint of a model on disk; `on_progress` is called after each tensor."""
    architecture = files.gguf_architecture
    return Checkpoint(
        files.config, dtype, device, files.tensors, architecture, on_progress, activations, ranks, deterministic
    )


def _pack_on_gpu(weight: LinearWeight, dtype: torch.dtype, deterministic: bool) -> LinearWeight:
    from pelton.quant.gpu import pack as pack_on_gpu  # its kernels need Triton

    return pack_on_gpu(weight, dtype, deterministic)


def decode(stored: StoredTensor, dtype: torch.dtype, device: torch.device, interleaved_heads: int = 0) -> Tensor:
    """The weights of `stored` as numbers; a view of the file where it holds just these.

    `interleaved_heads`: the rows of each of so many heads are in the order of interleaved rotary pairs (0, D/2, 1,
    D/2 + 1, ...), as `llama` GGUF files keep q and k; they are put into Hugging Face's order (0, 1, ..., D - 1).
    """
    data = torch.from_numpy(stored.data)
    if data.data_ptr() % 8:
        data = data.clone()
    if interleaved_heads:
        data = data.view(stored.shape[0], -1)[_half_split_rows(stored, interleaved_heads)].view(-1)
    if PLAIN.get(stored.type.name) == dtype:
        return upload(data.view(dtype).view(stored.shape), device)
    block = stored.type
    weights = torch.empty(stored.num_weights // block.block_size, block.block_size, dtype=dtype, device=device)
    chunk = CHUNK_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else CHUNK_ON_GPU
    blocks, step = data.view(-1, block.block_bytes), chunk // block.block_size
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        weights[part] = FORMATS[block.name](upload(blocks[part], device))
    return weights.view(stored.shape)


def _half_split_rows(stored: StoredTensor, num_heads: int) -> Tensor:
    """The rows of a weight of so many heads, whose rotary pairs are interleaved, in Hugging Face's order."""
    num_rows = stored.shape[0]
    if num_rows % (2 * num_heads):
        raise ModelFormatError(f"{stored.name} has {num_rows} rows, which are not {num_heads} heads")
    return torch.arange(num_rows).view(num_heads, -1, 2).transpose(1, 2).reshape(-1)
