"""GGUF's tensor names in Hugging Face's terms, and what GGUF does to the tensors on the way in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pelton.errors import ModelFormatError
from pelton.weights.fields import shorten
from pelton.weights.stored import StoredTensor

ROPE_FACTORS = "rope_freqs.weight"  # read as config["rope_freq_factors"], see gguf_config.py

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """What `general.architecture` stands for."""

    model_type: str  # in config.json
    name: str  # in config.json's "architectures"
    blocks: Mapping[str, str]
    permutes_qk: bool = False  # rows of q and k are in the order of interleaved rotary pairs
    adds_one_to_norms: bool = False  # the file holds 1 + w where Hugging Face holds w


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _BLOCK, permutes_qk=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _BLOCK),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _BLOCK),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA_BLOCK, adds_one_to_norms=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA_BLOCK, adds_one_to_norms=True),
}

_BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([a-z_]+)\.(weight|bias)")
_COMPUTED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_TOP_NAME = re.compile(r"([a-z_]+)\.(weight|bias)")


def hf_tensors(tensors: Mapping[str, StoredTensor], architecture: Architecture) -> dict[str, StoredTensor]:
    """The tensors under the names they have in a Hugging Face checkpoint."""
    return {
        hf_name(name, architecture): tensor for name, tensor in tensors.items() if not _COMPUTED.fullmatch(name)
    }


def hf_name(name: str, architecture: Architecture) -> str:
    """The name of the GGUF tensor `name` in a Hugging Face checkpoint."""
    if match := _BLOCK_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        if part in architecture.blocks:
            return f"model.layers.{layer}.{architecture.blocks[part]}.{kind}"
    elif (match := _TOP_NAME.fullmatch(name)) and match[1] in _TOP:
        return f"{_TOP[match[1]]}.{match[2]}"
    raise ModelFormatError(f"tensor {shorten(name)} is unknown in a {architecture.model_type} model")
