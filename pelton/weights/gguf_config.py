"""GGUF metadata in the terms of Hugging Face's config.json and generation_config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pelton.errors import ModelFormatError
from pelton.weights.fields import Fields, shorten
from pelton.weights.gguf import GGUFFile
from pelton.weights.gguf_names import ARCHITECTURES, ROPE_FACTORS
from pelton.weights.stored import StoredTensor

# GGUF names a size, llama.cpp knows its scale of attention scores: it is 1 / sqrt(hidden / heads) in these two and
# 1 / sqrt(head size) in the others (the 27B models, told by their number of layers, as in llama-model.cpp).
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def config_from_gguf(file: GGUFFile, where: str) -> dict[str, Any]:
    """What config.json would say about the model in `file`."""
    name = Fields(file.metadata, where).str("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelFormatError(
            f"{where}: general.architecture {shorten(name)} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    prefix = f"{name}."
    fields = Fields(
        {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}, where
    )
    shape = _shape(fields)
    config = {
        "architectures": [ARCHITECTURES[name].name],
        "model_type": ARCHITECTURES[name].model_type,
        "torch_dtype": _dtype(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": _vocab_size(file, fields),
        **shape,
        **_rope(file, fields, shape["head_dim"]),
        **_special_tokens(file, where),
    }
    if name.startswith("gemma"):
        config.update(_gemma(name, fields, config))
    else:
        config["hidden_act"] = "silu"
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    return config


def generation_config_from_gguf(file: GGUFFile, where: str) -> dict[str, Any]:
    """What generation_config.json would say: tokens that end a text, and the recommended sampling where given."""
    fields = Fields(file.metadata, where)
    ends = [fields.optional_int(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    values = {
        "bos_token_id": fields.optional_int("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None,
        "temperature": fields.optional_float("general.sampling.temp", low=0),
        "top_k": fields.optional_int("general.sampling.top_k"),
        "top_p": fields.optional_float("general.sampling.top_p", low=0, high=1),
        "min_p": fields.optional_float("general.sampling.min_p", low=0, high=1),
    }
    return {name: value for name, value in values.items() if value is not None}


def _shape(fields: Fields) -> dict[str, Any]:
    """The sizes of the network."""
    num_heads = fields.int("attention.head_count", low=1)
    hidden_size = fields.int("embedding_length", low=1)
    head_dim = fields.int("attention.key_length", hidden_size // num_heads, low=1)
    if fields.int("attention.value_length", head_dim) != head_dim:
        raise fields.error("attention.value_length", f"differs from attention.key_length {head_dim}: not supported")
    if fields.int("rope.dimension_count", head_dim) != head_dim:
        raise fields.error("rope.dimension_count", f"differs from the head size {head_dim}: not supported")
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": fields.int("block_count", low=1, high=10_000),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.int("attention.head_count_kv", num_heads, low=1),
        "head_dim": head_dim,
        "intermediate_size": fields.int("feed_forward_length", low=1),
        "max_position_embeddings": fields.int("context_length", low=1),
        "rms_norm_eps": fields.float("attention.layer_norm_rms_epsilon", low=0),
    }


def _rope(file: GGUFFile, fields: Fields, head_dim: int) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling`, and `rope_freq_factors`: divisors of the frequencies (Llama 3 files)."""
    config: dict[str, Any] = {"rope_theta": fields.float("rope.freq_base", 10000.0, low=1), "rope_scaling": None}
    kind = fields.str("rope.scaling.type", "linear" if "rope.scale_linear" in fields.values else "none")
    if kind == "linear":
        factor = fields.float("rope.scaling.factor", fields.float("rope.scale_linear", 1.0, low=1e-6), low=1e-6)
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": fields.float("rope.scaling.factor", low=1),
            "original_max_position_embeddings": fields.int("rope.scaling.original_context_length", low=1),
            "beta_fast": fields.float("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": fields.float("rope.scaling.yarn_beta_slow", 1.0),
        }
    elif kind != "none":
        raise fields.error("rope.scaling.type", f"is {shorten(kind)}; supported are none, linear and yarn")
    if ROPE_FACTORS in file.tensors:
        config["rope_freq_factors"] = _rope_factors(file.tensors[ROPE_FACTORS], head_dim // 2, fields.where)
    return config


def _rope_factors(tensor: StoredTensor, count: int, where: str) -> list[float]:
    if tensor.type.name == "F32" and tensor.shape == (count,):
        factors: list[float] = tensor.data.view("<f4").tolist()
        if all(0 < factor < math.inf for factor in factors):
            return factors
    raise ModelFormatError(f"{where}: tensor {tensor.name} must be {count} positive numbers of type F32")


def _gemma(name: str, fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    """What the Gemma models have besides: local layers, caps, and their own rotary base."""
    num_layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    if num_layers == _LAYERS_OF_27B[name]:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
    caps = (50.0, 30.0) if name == "gemma2" else (None, None)
    gemma = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": fields.int("attention.sliding_window", 4096, low=1),
        "layer_types": _layer_types(fields, num_layers, global_every=2 if name == "gemma2" else 6),
        "attn_logit_softcapping": fields.optional_float("attn_logit_softcapping", low=1e-6) or caps[0],
        "final_logit_softcapping": fields.optional_float("final_logit_softcapping", low=1e-6) or caps[1],
    }
    if name == "gemma3":
        gemma["rope_local_base_freq"] = fields.float("rope.freq_base_swa", 10000.0, low=1)
    return gemma


def _layer_types(fields: Fields, num_layers: int, global_every: int) -> list[str]:
    """Which layers see only their window: the file says for each layer, or every which one does not, or nothing."""
    key = "attention.sliding_window_pattern"
    pattern = fields.values.get(key)
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != np.bool_ or len(pattern) != num_layers:
            raise fields.error(key, f"must say true or false for each of {num_layers} layers")
        local = pattern.tolist()
    else:
        every = fields.int(key, global_every, low=1)
        local = [(layer + 1) % every != 0 for layer in range(num_layers)]
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


def _vocab_size(file: GGUFFile, fields: Fields) -> int:
    """The rows of the embedding: what the model needs, whatever the tokenizer holds."""
    if "token_embd.weight" not in file.tensors:
        raise ModelFormatError(f"{fields.where}: tensor token_embd.weight is missing; the file holds no model")
    return file.tensors["token_embd.weight"].shape[0]


def _special_tokens(file: GGUFFile, where: str) -> dict[str, int]:
    fields = Fields(file.metadata, where)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{hf}_token_id": fields.optional_int(f"tokenizer.ggml.{ggml}_token_id") for hf, ggml in names.items()}
    return {name: value for name, value in ids.items() if value is not None}


def _dtype(file: GGUFFile) -> str:
    """What the model was trained in: F16 or F32 if all matrices are that; quantised ones come from bfloat16 models."""
    types = {tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return {"F16": "float16", "F32": "float32"}.get(types.pop() if len(types) == 1 else "", "bfloat16")
