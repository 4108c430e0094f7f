"""Tensors of a model by their Hugging Face names, in the compute dtype: what models are built from."""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pelton.errors import ModelFormatError
from pelton.quant import FORMATS
from pelton.quant.layout import Dense, LinearWeight
from pelton.types import OnProgress
from pelton.weights.fields import Fields
from pelton.weights.files import ModelFiles
from pelton.weights.gguf_names import Architecture
from pelton.weights.stored import StoredTensor

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
    ) -> None:
        self.config = dict(config)
        self.dtype = dtype
        self.device = device
        self._tensors = tensors
        self._gguf = gguf
        self._on_progress = on_progress
        self._unread = {name: tensor.data.size for name, tensor in tensors.items()}
        self._num_bytes = sum(self._unread.values())
        self._prefix = ""

    def at(self, prefix: str) -> Checkpoint:
        """A view: its names continue `prefix`. What is read through it is recorded in the whole."""
        view = copy.copy(self)
        view._prefix = self._full(prefix)
        return view

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self._full(name) in self._tensors

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name`, on the device, in `dtype` (default: the compute dtype).

        Do not write to it: it may be a view of the file. ModelFormatError if it is missing or has another shape.
        """
        name = self._full(name)
        stored = self._tensors.get(name)
        if stored is None:
            raise ModelFormatError(f"tensor {name} is missing in the checkpoint")
        if stored.shape != shape:
            raise ModelFormatError(f"tensor {name} has shape {list(stored.shape)}, the config says {list(shape)}")
        if stored.type.name not in FORMATS:
            raise ModelFormatError(f"tensor {name} is stored as {stored.type.name}, which is not supported for weights")
        tensor = self._load(name, stored, dtype or self.dtype)
        self._unread.pop(name, None)
        if self._on_progress is not None:
            self._on_progress(self._num_bytes - sum(self._unread.values()), self._num_bytes)
        return tensor

    def linear(self, name: str, shape: tuple[int, int]) -> LinearWeight:
        """The weight `name` [N, K], in a layout to multiply by."""
        return Dense(self.tensor(name, shape))

    def finish(self) -> None:
        """To be called when the model is built: ModelFormatError if it left tensors of the checkpoint unread."""
        unread = sorted(name for name in self._unread if not OPTIONAL.fullmatch(name))
        if unread:
            names = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
            raise ModelFormatError(f"{len(unread)} tensors of the checkpoint belong to no part of the model: {names}")

    def _full(self, name: str) -> str:
        return f"{self._prefix}.{name}" if self._prefix else name

    def _load(self, name: str, stored: StoredTensor, dtype: torch.dtype) -> Tensor:
        """Decode, and undo what the conversion to GGUF does to some tensors."""
        if self._gguf is not None and self._gguf.adds_one_to_norms and name.endswith("norm.weight"):
            return (decode(stored, torch.float32, self.device) - 1).to(dtype)
        if self._gguf is not None and self._gguf.permutes_qk:
            for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f".{part}." in name:
                    return decode(stored, dtype, self.device, Fields(self.config).int(heads, low=1))
        return decode(stored, dtype, self.device)


class DummyCheckpoint(Checkpoint):
    """Has every tensor that is asked for: random, the same for the same name, shape and seed."""

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 0.02
    ) -> None:
        super().__init__(config, dtype, device, {})
        self._seed = seed
        self._scale = scale

    def has(self, name: str) -> bool:
        return True

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Normal with deviation `scale`; around 1 for norms."""
        name = self._full(name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        values = torch.randn(shape, generator=generator) * self._scale
        if "norm" in name:
            values += 1
        return values.to(self.device, dtype or self.dtype)


def open_checkpoint(
    files: ModelFiles, dtype: torch.dtype, device: torch.device, on_progress: OnProgress | None = None
) -> Checkpoint:
    """The checkpoint of a model on disk; `on_progress` is called after each tensor."""
    return Checkpoint(files.config, dtype, device, files.tensors, files.gguf_architecture, on_progress)


def decode(stored: StoredTensor, dtype: torch.dtype, device: torch.device, interleaved_heads: int = 0) -> Tensor:
    """The weights of `stored` as numbers; a view of the file where it holds just these.

    `interleaved_heads`: the rows of each of so many heads are in the order of interleaved rotary pairs (0, D/2, 1,
    D/2 + 1, ...), as `llama` GGUF files keep q and k; they are put into Hugging Face's order (0, 1, ..., D - 1).
    """
    data = torch.from_numpy(stored.data)
    if data.data_ptr() % 8:
        data = data.clone()
    if interleaved_heads:
        if stored.shape[0] % (2 * interleaved_heads):
            raise ModelFormatError(f"{stored.name} has {stored.shape[0]} rows, which are not {interleaved_heads} heads")
        num_bytes = data.numel() // stored.shape[0]
        data = data.view(interleaved_heads, -1, 2, num_bytes).transpose(1, 2).reshape(-1)
    if PLAIN.get(stored.type.name) == dtype:
        return data.view(dtype).view(stored.shape).to(device)
    block = stored.type
    weights = torch.empty(stored.num_weights // block.block_size, block.block_size, dtype=dtype, device=device)
    chunk = CHUNK_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else CHUNK_ON_GPU
    blocks, step = data.view(-1, block.block_bytes), chunk // block.block_size
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        weights[part] = FORMATS[block.name](blocks[part].to(device))
    return weights.view(stored.shape)
