"""Paths to models: what is opened, what is refused, and GGUF metadata as Hugging Face configs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pelton.errors import ModelFormatError, ModelNotFoundError
from pelton.weights.files import open_model, weight_bytes

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "eos_token_id": [1, 2]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


def set_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **values}))


class Canary:
    """An object whose pickle, when it is read, creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# --- folders ------------------------------------------------------------------------------------------------------


def test_folder(folder: Path) -> None:
    files = open_model(folder)
    assert (files.format, files.root, files.weights) == ("safetensors", folder, (folder / "model.safetensors",))
    assert files.config == {**CONFIG, "torch_dtype": "bfloat16"}
    assert files.generation_config == {"temperature": 0.6}
    assert files.gguf is None
    assert weight_bytes(files) == {"stored": 32, "float32": 32, "bfloat16": 16, "float16": 16}
    (folder / "generation_config.json").unlink()
    assert open_model(folder).generation_config == {}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        open_model(tmp_path / "none")
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        open_model(tmp_path)
    (tmp_path / "model.txt").touch()
    with pytest.raises(ModelFormatError, match="is not a model"):
        open_model(tmp_path / "model.txt")


def test_config_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelFormatError, match=r"config\.json is missing"):
        open_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_links_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(ModelFormatError, match=f"{name} .*leads out of the folder"):
        open_model(folder)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused_and_never_run(folder: Path, suffix: str) -> None:
    canary = folder.parent / "canary"
    (folder / "model.safetensors").rename(folder / f"pytorch_model{suffix}")
    (folder / f"pytorch_model{suffix}").write_bytes(pickle.dumps(Canary(canary)))
    for path in (folder, folder / f"pytorch_model{suffix}"):
        with pytest.raises(ModelFormatError, match="is a pickle.*convert the model to safetensors"):
            open_model(path)
    # As a safetensors file it is no better.
    (folder / f"pytorch_model{suffix}").rename(folder / "model.safetensors")
    with pytest.raises(ModelFormatError, match="header length"):
        _ = open_model(folder).tensors
    assert not canary.exists()


def test_code_beside_the_model_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True)
    for name in ("evil.py", "config.py", "model.py", "tokenizer.py"):
        (folder / name).write_text("raise SystemExit('code of a checkpoint was run')")
    monkeypatch.syspath_prepend(str(folder.parent))
    assert open_model(folder).config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("architectures", "LlamaForCausalLM"), ("architectures", [3]), ("model_type", 3), ("torch_dtype", 16),
     ("eos_token_id", "2"), ("hidden_size", "8"), ("hidden_size", 0), ("hidden_size", 1 << 40), ("vocab_size", -1),
     ("num_hidden_layers", 1 << 31), ("num_attention_heads", 8.0), ("num_key_value_heads", True), ("head_dim", [64]),
     ("intermediate_size", {}), ("max_position_embeddings", 1 << 62), ("text_config", []), ("dtype", ["bfloat16"])],
)
def test_wrong_fields(folder: Path, field: str, value: Any) -> None:
    set_config(folder, **{field: value})
    with pytest.raises(ModelFormatError, match=f"config.json: field {field} must be"):
        open_model(folder)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtype(folder: Path, field: str) -> None:
    for name in ("bfloat16", "torch.bfloat16"):
        set_config(folder, **{field: name})
        assert open_model(folder).config["torch_dtype"] == "bfloat16"
    for name in ("float64", "float8_e4m3fn", "torch", ""):
        set_config(folder, **{field: name})
        with pytest.raises(ModelFormatError, match=f"config.json: field {field} is '{name}': not supported; known are"):
            open_model(folder)


def test_rope_factors_come_from_gguf_only(folder: Path) -> None:
    set_config(folder, rope_freq_factors=[1.0])
    with pytest.raises(ModelFormatError, match="field rope_freq_factors is not one of config.json's"):
        open_model(folder)


def test_quantised_checkpoints_are_refused(folder: Path) -> None:
    set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelFormatError, match="field quantization_config is 'gptq': not supported"):
        open_model(folder)


@pytest.mark.parametrize(("language", "vision"), [("language_model.model.", ""), ("model.language_model.", "model.")])
def test_text_part_of_a_model_that_also_sees(folder: Path, language: str, vision: str) -> None:
    set_config(
        folder,
        architectures=["Gemma3ForConditionalGeneration"],
        model_type="gemma3",
        dtype="bfloat16",
        text_config={"architectures": None, "hidden_size": 16, "model_type": "gemma3_text"},
    )
    names = [f"{language}norm.weight", f"{vision}vision_tower.x.weight", f"{vision}multi_modal_projector.w"]
    save_file({name: torch.ones(16) for name in names}, folder / "model.safetensors")
    files = open_model(folder)
    assert files.config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert (files.config["hidden_size"], files.config["model_type"]) == (16, "gemma3_text")
    assert files.config["torch_dtype"] == "bfloat16"
    assert files.tensors.keys() == {"model.norm.weight"}
    save_file({name: torch.ones(16) for name in [names[0], "model.norm.weight"]}, folder / "model.safetensors")
    with pytest.raises(ModelFormatError, match="are the same one"):
        _ = open_model(folder).tensors


# --- GGUF ---------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path, arch: str, num_layers: int = 7, tensors: dict[str, np.ndarray] | None = None, **values: Any
) -> Path:
    """A file with little more than metadata. `values`: further keys, `__` for `.`, None to leave one out."""
    writer = gguf.GGUFWriter(path, arch)
    keys = {
        f"{arch}.block_count": num_layers, f"{arch}.context_length": 512, f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 96, f"{arch}.attention.head_count": 4, f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6, f"{arch}.rope.freq_base": 50000.0,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    add = {
        int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
        list: writer.add_array,
    }
    for key, value in keys.items():
        if value is not None:
            add[type(value)](key, value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(10)])
    for name, tensor in {"token_embd.weight": np.zeros((10, 64), np.float16), **(tensors or {})}.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What this project writes besides or instead of transformers.
OURS = {"architectures", "torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq"}


def check_against_transformers(path: Path) -> None:
    from transformers import AutoConfig

    config = open_model(path).config
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    same = config.keys() - OURS
    assert {key: theirs[key] for key in same if key in theirs} == {key: config[key] for key in same if key in theirs}
    missing = same - theirs.keys()
    assert missing <= {"attention_bias", "mlp_bias", "head_dim"}
    rope = theirs["rope_parameters"]
    assert config["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    if "rope_local_base_freq" in config:
        assert config["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_config_is_that_of_transformers(tmp_path: Path, arch: str) -> None:
    keys = {f"{arch}__attention__key_length": 256, f"{arch}__attention__value_length": 256} if "gemma" in arch else {}
    if "gemma" in arch:
        keys[f"{arch}__attention__sliding_window"] = 128
    if arch == "qwen3":
        keys = {"qwen3__attention__key_length": 128, "qwen3__attention__value_length": 128}
    check_against_transformers(write_gguf(tmp_path / "m.gguf", arch, **keys))


def test_config_of_smollm2(smollm2_path: Path) -> None:
    """As transformers 5.23 reads it (which takes seconds)."""
    files = open_model(smollm2_path)
    assert files.config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "tie_word_embeddings": True, "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "rms_norm_eps": 9.999999747378752e-06, "hidden_act": "silu",
        "rope_theta": 100000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "pad_token_id": 2,
    }
    assert files.generation_config == {"bos_token_id": 1, "eos_token_id": [2]}
    assert weight_bytes(files)["bfloat16"] == 2 * 134_515_008


def test_config_of_gemma3(gemma3_path: Path) -> None:
    """As transformers 5.23 reads it (which takes seconds)."""
    files = open_model(gemma3_path)
    assert files.config == {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "torch_dtype": "bfloat16",
        "tie_word_embeddings": True, "vocab_size": 262144, "hidden_size": 640, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048,
        "max_position_embeddings": 32768, "rms_norm_eps": 9.999999974752427e-07,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1000000.0,
        "rope_scaling": None, "rope_local_base_freq": 10000.0,
        "bos_token_id": 2, "eos_token_id": 1, "unk_token_id": 3, "pad_token_id": 0,
    }
    assert weight_bytes(files)["bfloat16"] == 2 * 268_098_176


def test_gguf_alone_in_a_folder(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama")
    (tmp_path / "mmproj-m.gguf").write_bytes(b"vision")
    files = open_model(tmp_path)
    assert (files.format, files.weights, files.generation_config) == (
        "gguf", (path,), {"bos_token_id": 1, "eos_token_id": [2]}
    )
    assert files.tensors.keys() == {"model.embed_tokens.weight"}
    assert files.config["tie_word_embeddings"] is True
    assert files.config["torch_dtype"] == "float16"
    write_gguf(tmp_path / "n.gguf", "llama")
    with pytest.raises(ModelFormatError, match=r"several GGUF models, give one file of m\.gguf, n\.gguf"):
        open_model(tmp_path)


def test_generation_config(tmp_path: Path) -> None:
    keys = {"tokenizer__ggml__eot_token_id": 7, "tokenizer__ggml__eom_token_id": 2, "general__sampling__temp": 0.5}
    assert open_model(write_gguf(tmp_path / "m.gguf", "llama", **keys)).generation_config == {
        "bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.5
    }


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 128},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
          "beta_slow": 1.0}),
    ],
)
def test_rope_scaling(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any] | None) -> None:
    keys = {f"llama__rope__scaling__{key}": value for key, value in keys.items()}
    assert open_model(write_gguf(tmp_path / "m.gguf", "llama", **keys)).config["rope_scaling"] == expected


def test_rope_frequency_factors(tmp_path: Path) -> None:
    """Llama 3's scaling is a tensor in GGUF: part of the config, not of the weights."""
    factors = {"rope_freqs.weight": np.array([1, 1, 2.5, 8, 8, 8, 8, 8], np.float32)}
    files = open_model(write_gguf(tmp_path / "m.gguf", "llama", tensors=factors))
    assert files.config["rope_freq_factors"] == [1.0, 1.0, 2.5, *[8.0] * 5]
    assert files.tensors.keys() == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("factors", [[1, 2], [1] * 7 + [0], [1] * 7 + [float("nan")], [[1] * 8]])
def test_wrong_rope_frequency_factors(tmp_path: Path, factors: list[Any]) -> None:
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    with pytest.raises(ModelFormatError, match=r"tensor rope_freqs\.weight must be 8 positive numbers"):
        open_model(write_gguf(tmp_path / "m.gguf", "llama", tensors=tensors))


@pytest.mark.parametrize(
    ("arch", "num_layers", "scalar"), [("gemma2", 46, 16), ("gemma3", 62, 16), ("gemma3", 34, 256)]
)
def test_attention_scale_of_gemma_27b(tmp_path: Path, arch: str, num_layers: int, scalar: int) -> None:
    keys = {f"{arch}__attention__key_length": 256, f"{arch}__attention__value_length": 256}
    config = open_model(write_gguf(tmp_path / "m.gguf", arch, num_layers, **keys)).config
    assert config["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize(("pattern", "expected"), [(None, "LLLLLG"), (3, "LLGLLG"), ([True, False] * 3, "LGLGLG")])
def test_local_and_global_layers(tmp_path: Path, pattern: Any, expected: str) -> None:
    keys = {"gemma3__attention__sliding_window_pattern": pattern}
    kinds = open_model(write_gguf(tmp_path / "m.gguf", "gemma3", 6, **keys)).config["layer_types"]
    assert kinds == ["full_attention" if kind == "G" else "sliding_attention" for kind in expected]
    keys = {"gemma3__attention__sliding_window_pattern": [True] * 5}
    with pytest.raises(ModelFormatError, match="must say true or false for each of 6 layers"):
        open_model(write_gguf(tmp_path / "m.gguf", "gemma3", 6, **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama__block_count": None}, "field block_count is missing"),
        ({"llama__block_count": 0}, "field block_count must be at least 1"),
        ({"llama__block_count": 1 << 31}, "field block_count must be at most"),
        ({"llama__feed_forward_length": 1 << 30}, "field intermediate_size must be at most"),
        ({"llama__embedding_length": "64"}, "field embedding_length must be an integer"),
        ({"llama__attention__head_count": True}, "field attention.head_count must be an integer"),
        ({"llama__attention__head_count": 0}, "field attention.head_count must be at least 1"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "must be a finite number"),
        ({"llama__attention__value_length": 8}, "field attention.value_length differs"),
        ({"llama__rope__dimension_count": 8}, "field rope.dimension_count differs"),
        ({"llama__rope__scaling__type": "longrope"}, "field rope.scaling.type is 'longrope'"),
        ({"tokenizer__ggml__eos_token_id": "2"}, "field tokenizer.ggml.eos_token_id must be an integer"),
    ],
)
def test_wrong_metadata(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        open_model(write_gguf(tmp_path / "m.gguf", "llama", **keys))


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="general.architecture 'falcon' is not supported; supported are llama"):
        open_model(write_gguf(tmp_path / "m.gguf", "falcon"))
