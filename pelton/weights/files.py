"""From a path to the files of a model: which they are, what they say about it, and how much room it needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pelton.config import DTYPE_BYTES
from pelton.errors import ModelFormatError, ModelNotFoundError
from pelton.weights.fields import Fields, read_json, shorten
from pelton.weights.gguf import SPLIT_NAME, GGUFFile, open_gguf
from pelton.weights.gguf_config import config_from_gguf, generation_config_from_gguf
from pelton.weights.gguf_names import ARCHITECTURES, Architecture, hf_tensors
from pelton.weights.hf_names import text_tensors
from pelton.weights.inside import child, optional_child
from pelton.weights.safetensors import find_shards, open_safetensors
from pelton.weights.stored import StoredTensor

# Formats of Python objects: reading one can run code that is hidden in it, so none is ever opened.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# The largest sizes that are believed: far above every model there is, far below what would exhaust the machine.
MAX_SIZES = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}


NO_WEIGHTS = "neither .safetensors nor .gguf files"


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `config` and `generation_config` are in Hugging Face's terms for both formats."""

    root: Path
    weights: tuple[Path, ...]  # *.safetensors or *.gguf, all parts in order
    format: str  # "safetensors", "gguf" or "none": a config.json alone
    config: dict[str, Any]
    generation_config: dict[str, Any]  # {} if there is none
    gguf: GGUFFile | None = None

    @property
    def gguf_architecture(self) -> Architecture | None:
        """What the GGUF file says it holds; None for safetensors."""
        return None if self.gguf is None else ARCHITECTURES[self.gguf.metadata["general.architecture"]]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The weights under Hugging Face's names. Headers are read and checked here, data when it is used."""
        if self.format == "none":
            return {}
        if self.gguf is None or self.gguf_architecture is None:
            return text_tensors(open_safetensors(self.weights))
        return hf_tensors(self.gguf.tensors, self.gguf_architecture)

    def optional(self, name: str) -> Path | None:
        """The file `name` of the model's folder, if it is there."""
        return optional_child(self.root, name)


def open_model(path: Path) -> ModelFiles:
    """Open a .gguf file, or a folder that holds config.json and safetensors, or one GGUF. A folder that holds
    config.json alone will do for random weights.

    Raises ModelNotFoundError if there is nothing, ModelFormatError if it is not a model that can be read.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise ModelNotFoundError(f"{path} does not exist")
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    _refuse_pickles(path.name, [path])
    raise ModelFormatError(f"{path} is not a model: give a .gguf file, or the folder that holds config.json")


def weight_bytes(files: ModelFiles) -> dict[str, int]:
    """The memory that the weights take in each compute dtype, and as they are "stored", in bytes."""
    num_weights = sum(tensor.num_weights for tensor in files.tensors.values())
    stored = sum(tensor.data.size for tensor in files.tensors.values())
    return {**bytes_in_memory(num_weights), "stored": stored}


def bytes_in_memory(num_weights: int) -> dict[str, int]:
    """The memory that weights take in each compute dtype; "stored": as they are trained in most often."""
    sizes = {dtype: size * num_weights for dtype, size in DTYPE_BYTES.items()}
    return {**sizes, "stored": sizes["bfloat16"]}


def _open_folder(folder: Path) -> ModelFiles:
    if shards := find_shards(folder):
        return _from_json(folder, shards, "safetensors")
    # "mmproj" files hold the vision part of a model, in a format of their own.
    if ggufs := sorted(path.name for path in folder.glob("*.gguf") if not path.name.startswith("mmproj")):
        models = sorted({match["stem"] if (match := SPLIT_NAME.fullmatch(name)) else name for name in ggufs})
        if len(models) > 1:
            raise ModelFormatError(f"{folder} holds several GGUF models, give one file of {', '.join(models)}")
        return _open_gguf(child(folder, ggufs[0]))
    _refuse_pickles(str(folder), folder.iterdir())
    if optional_child(folder, "config.json"):
        return _from_json(folder, (), "none")
    raise ModelNotFoundError(f"{folder} holds no model: {NO_WEIGHTS}")


def _from_json(folder: Path, weights: tuple[Path, ...], format: str) -> ModelFiles:
    config = text_config(read_json(child(folder, "config.json")))
    generation = optional_child(folder, "generation_config.json")
    return ModelFiles(folder, weights, format, config, read_json(generation) if generation else {})


def _open_gguf(path: Path) -> ModelFiles:
    file = open_gguf(path)
    config = _checked(config_from_gguf(file, path.name), path.name)
    return ModelFiles(path.parent, file.paths, "gguf", config, generation_config_from_gguf(file, path.name), file)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as the rest of pelton reads it: the text part of a model that also sees is merged up, and
    `torch_dtype` is the name of a compute dtype. ModelFormatError names the field that cannot be.
    """
    text = Fields(config).optional_object("text_config")
    if text is not None:
        given = {name: value for name, value in text.values.items() if value is not None}
        config = {**config, **given, "architectures": config.get("architectures")}
    fields = Fields(config)
    quantization = fields.optional_object("quantization_config")
    if quantization is not None:
        method = shorten(quantization.str("quant_method", "unknown"))
        raise fields.error("quantization_config", f"is {method}: not supported; use the original or a GGUF")
    if "rope_freq_factors" in config:
        raise fields.error("rope_freq_factors", "is not one of config.json's; use rope_scaling")
    return _checked({**config, "torch_dtype": _trained_dtype(fields)}, "config.json")


def _trained_dtype(fields: Fields) -> str:
    """`dtype`, in older files `torch_dtype`: "bfloat16" or "torch.bfloat16"."""
    name = "torch_dtype" if fields.optional_str("dtype") is None else "dtype"
    dtype = fields.str(name, "bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise fields.error(name, f"is {shorten(dtype)}: not supported; known are {', '.join(DTYPE_BYTES)}")
    return dtype


def _checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    """`config`, if the fields that everybody reads have the right types and sizes that can be."""
    fields = Fields(config, where)
    fields.str_list("architectures", [])
    fields.optional_str("model_type")
    fields.optional_ints("eos_token_id")
    for name, limit in MAX_SIZES.items():
        fields.optional_int(name, low=1, high=limit)
    return config


def _refuse_pickles(where: str, paths: Iterable[Path]) -> None:
    for path in paths:
        if path.suffix.lower() in PICKLES:
            raise ModelFormatError(
                f"{where}: {path.name} is a pickle, which can run code when read; convert the model to safetensors"
            )
