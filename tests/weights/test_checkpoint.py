"""Checkpoints: the same tensors under the same names, whatever the format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pelton.errors import ConfigError, ModelFormatError
from pelton.ops.native import native, reason
from pelton.quant.layout import Blocks, Dense, fuse
from pelton.quant.native import Packed, Table
from pelton.weights.checkpoint import Checkpoint, open_checkpoint
from pelton.weights.dummy import LAYOUTS, DummyCheckpoint
from pelton.weights.files import ModelFiles, open_model
from pelton.weights.gguf_names import ARCHITECTURES, hf_name

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD, HIDDEN, FFN, VOCAB = 4, 2, 8, 32, 64, 10


def llama_tensors(bias: bool) -> dict[str, torch.Tensor]:
    """One layer, under Hugging Face's names."""
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN),
        f"{layer}input_layernorm.weight": (HIDDEN,), f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        f"{layer}mlp.gate_proj.weight": (FFN, HIDDEN), f"{layer}mlp.up_proj.weight": (FFN, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, FFN),
    }
    if bias:
        shapes[f"{layer}self_attn.q_proj.bias"] = (HEADS * HEAD,)
        shapes[f"{layer}self_attn.k_proj.bias"] = (KV_HEADS * HEAD,)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def gemma_tensors() -> dict[str, torch.Tensor]:
    """A layer of Gemma 3: more norms, one head for keys and values."""
    layer = "model.layers.0."
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    kept = {name: value for name, value in llama_tensors(False).items() if "norm" not in name and "lm_head" not in name}
    sizes = {f"{layer}{name}.weight": HIDDEN for name in norms}
    sizes |= {f"{layer}self_attn.{x}_norm.weight": HEAD for x in "qk"} | {"model.norm.weight": HIDDEN}
    return kept | {name: torch.randn(size) for name, size in sizes.items()}


def write_gguf(path: Path, arch: str, tensors: dict[str, torch.Tensor], quant: str = "F32") -> ModelFiles:
    """Write `tensors` as llama.cpp's converter would, matrices quantised; names come from the `gguf` package."""
    model_arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(model_arch, 1)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": FFN,
                       "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
                       "attention.key_length": HEAD, "attention.value_length": HEAD}.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):  # the converter's `permute`
            heads = HEADS if "q_proj" in name else KV_HEADS
            values = values.reshape(heads, 2, HEAD // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if "gemma" in arch and name.endswith("norm.weight"):
            values = values + 1
        kind = gguf.GGMLQuantizationType[quant if values.ndim > 1 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_model(path)


def write_safetensors(folder: Path, tensors: dict[str, torch.Tensor], config: str = "{}") -> ModelFiles:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return open_model(folder)


def read_all(files: ModelFiles, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    ckpt = open_checkpoint(files, dtype, CPU)
    tensors = {name: ckpt.tensor(name, stored.shape) for name, stored in files.tensors.items()}
    ckpt.finish()
    return tensors


def check_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance or {"atol": 0, "rtol": 0})


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("bias", [False, True])
def test_gguf_gives_back_what_was_converted(tmp_path: Path, arch: str, bias: bool) -> None:
    """The rows of q and k are interleaved in `llama` files only."""
    tensors = llama_tensors(bias)
    files = write_gguf(tmp_path / "m.gguf", arch, tensors)
    assert files.config["tie_word_embeddings"] is False
    check_equal(read_all(files), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stored", ["Q8_0", "F16", "F32", "safetensors"])
def test_a_rank_reads_its_share(tmp_path: Path, stored: str, dtype: torch.dtype) -> None:
    """Whole heads of q and k, whose rows `llama` files keep interleaved; and columns, which blocks hold."""
    tensors = llama_tensors(bias=False)
    files = (
        write_safetensors(tmp_path / "m", tensors) if stored == "safetensors"
        else write_gguf(tmp_path / "m.gguf", "llama", tensors, stored)
    )  # fmt: skip
    layer = open_checkpoint(files, dtype, CPU).at("model.layers.0")
    for name, shape, rows, columns in [
        ("self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN), range(2 * HEAD, 4 * HEAD), None),
        ("self_attn.k_proj.weight", (KV_HEADS * HEAD, HIDDEN), range(HEAD), None),
        ("mlp.down_proj.weight", (HIDDEN, FFN), None, range(32, 64)),
        ("mlp.gate_proj.weight", (FFN, HIDDEN), range(40, 64), range(32)),
    ]:
        whole = layer.linear(name, shape).dequantize()
        part = layer.packed(layer.linear(name, shape, rows, columns)).dequantize()
        rows, columns = rows or range(shape[0]), columns or range(shape[1])
        assert torch.equal(part.float(), whole[rows.start : rows.stop, columns.start : columns.stop].float())


def test_a_share_does_not_cut_blocks(tmp_path: Path) -> None:
    files = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(bias=False), "Q8_0")
    layer = open_checkpoint(files, torch.float32, CPU).at("model.layers.0")
    with pytest.raises(ConfigError, match=r"^blk.0.attn_output.weight is stored in blocks of 32 columns \(Q8_0\)"):
        layer.linear("self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD), None, range(16, 32))


def test_whole_rows_of_a_share_stay_in_the_file(tmp_path: Path) -> None:
    stored = write_safetensors(tmp_path, {"w": torch.randn(6, 8)}).tensors["w"]
    part = stored.part(range(2, 4), range(8))
    assert part.shape == (2, 8) and np.array_equal(part.data, stored.data[64:128])
    assert part.data.ctypes.data == stored.data.ctypes.data + 64


def test_norms_of_gemma(tmp_path: Path) -> None:
    """1 + w loses a bit or two of w."""
    tensors = gemma_tensors()
    check_equal(read_all(write_gguf(tmp_path / "m.gguf", "gemma3", tensors)), tensors, atol=1e-6, rtol=0)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_gguf(tmp_path: Path, quant: str, dtype: torch.dtype) -> None:
    """Dequantised in float32, then rounded to the compute dtype; permuted as a whole."""
    tensors = llama_tensors(bias=False)
    kind = gguf.GGMLQuantizationType[quant]
    expected = {
        name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)).to(dtype)
        if tensor.ndim > 1 else tensor.to(dtype)
        for name, tensor in tensors.items()
    }
    check_equal(read_all(write_gguf(tmp_path / "m.gguf", "llama", tensors, quant), dtype), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in llama_tensors(bias=False).items()}
    files = write_safetensors(tmp_path, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = read_all(files, dtype)
    check_equal(actual, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def test_weights_in_the_compute_dtype_are_views_of_the_file(tmp_path: Path) -> None:
    files = write_safetensors(tmp_path, {"a": torch.randn(4, 4), "b": torch.randn(3)})
    tensor = open_checkpoint(files, torch.float32, CPU).tensor("a", (4, 4))
    assert tensor.data_ptr() == files.tensors["a"].data.ctypes.data


def test_data_that_is_not_aligned(tmp_path: Path, safe_bytes: Any) -> None:
    values = torch.randn(5)
    header = b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}'
    while len(header) % 8 != 1:
        header += b" "
    (tmp_path / "model.safetensors").write_bytes(safe_bytes(header, values.numpy().tobytes()))
    (tmp_path / "config.json").write_text("{}")
    check_equal(read_all(open_model(tmp_path)), {"a": values})


def test_one_chunk_or_many_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(bias=False), "Q4_1")
    whole = read_all(files)
    monkeypatch.setattr("pelton.weights.checkpoint.CHUNK_PER_THREAD", 96)
    check_equal(read_all(files), whole)


def test_real_models_against_the_gguf_package(smollm2_path: Path, gemma3_path: Path) -> None:
    """The first layer of both: Q4_1; Q5_0, Q4_K, Q6_K and Q8_0."""
    for path, untouched in ((smollm2_path, "o_proj|v_proj|mlp"), (gemma3_path, "_proj")):
        files = open_model(path)
        ckpt = open_checkpoint(files, torch.float32, CPU)
        for name, stored in files.tensors.items():
            if not name.startswith("model.layers.0.") or not any(part in name for part in untouched.split("|")):
                continue
            raw = stored.data.reshape(stored.shape[0], -1)
            expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[stored.type.name])
            assert np.array_equal(ckpt.tensor(name, stored.shape).numpy(), expected), name


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return write_safetensors(tmp_path, {
        "model.norm.weight": torch.ones(4), "model.layers.0.q.weight": torch.randn(2, 4), "ids": torch.arange(3),
    })


def test_views_and_records(files: ModelFiles) -> None:
    seen: list[tuple[int, int]] = []
    ckpt = open_checkpoint(files, torch.float32, CPU, lambda done, total: seen.append((done, total)))
    layer = ckpt.at("model").at("layers.0")
    assert layer.has("q.weight")
    assert not layer.has("k.weight")
    assert layer.linear("q.weight", (2, 4)).shape == (2, 4)
    assert ckpt.tensor("model.norm.weight", (4,), torch.float64).dtype == torch.float64
    assert seen == [(32, 72), (48, 72)]
    with pytest.raises(ModelFormatError, match="1 tensors of the checkpoint belong to no part of the model: ids"):
        layer.finish()


def test_errors_name_the_tensor(files: ModelFiles) -> None:
    ckpt = open_checkpoint(files, torch.float32, CPU).at("model")
    with pytest.raises(ModelFormatError, match=r"tensor model\.head\.weight is missing"):
        ckpt.tensor("head.weight", (4,))
    with pytest.raises(ModelFormatError, match=r"tensor model\.norm\.weight has shape \[4\], the config says \[5\]"):
        ckpt.tensor("norm.weight", (5,))
    with pytest.raises(ModelFormatError, match="tensor ids is stored as I64"):
        open_checkpoint(files, torch.float32, CPU).tensor("ids", (3,))


def test_what_may_be_left_unread(tmp_path: Path) -> None:
    names = ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    open_checkpoint(write_safetensors(tmp_path, {name: torch.ones(1) for name in names}), torch.float32, CPU).finish()


def test_rows_that_are_not_heads(tmp_path: Path) -> None:
    files = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(bias=False))
    files.config["num_attention_heads"] = 3
    with pytest.raises(ModelFormatError, match=r"blk\.0\.attn_q\.weight has 32 rows, which are not 3 heads"):
        open_checkpoint(files, torch.float32, CPU).tensor("model.layers.0.self_attn.q_proj.weight", (32, 32))


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.99999999.attn_q.weight", "blk.00.attn_q.weight",
                                  "blk.-1.attn_q.weight", "blk.0.attn_q", "token_embd", "v.patch_embd.weight", "\n"])
def test_tensors_that_no_model_has(name: str) -> None:
    with pytest.raises(ModelFormatError, match="is unknown in a llama model"):
        hf_name(name, ARCHITECTURES["llama"])


# --- dummy --------------------------------------------------------------------------------------------------------


def test_dummy_checkpoint() -> None:
    ckpt: Checkpoint = DummyCheckpoint({"hidden_size": 4}, torch.bfloat16, CPU, seed=3)
    layer = ckpt.at("model.layers.1")
    assert layer.has("anything")
    weight = layer.linear("q_proj.weight", (300, 200)).dequantize()
    assert weight.dtype == torch.bfloat16
    assert 0.015 < weight.float().std() < 0.025
    assert torch.equal(weight, layer.tensor("q_proj.weight", (300, 200)))
    assert not torch.equal(weight, layer.tensor("k_proj.weight", (300, 200)))
    assert 0.9 < layer.tensor("input_layernorm.weight", (64,), torch.float32).mean() < 1.1
    ckpt.finish()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(300, 512), (48, 96)])
def test_dummy_layouts(layout: str, shape: tuple[int, int]) -> None:
    """Random weights of about the usual size; packed they are the same, float8 in the compute dtype."""
    ckpt = DummyCheckpoint({}, torch.bfloat16, CPU, layout=layout).at("model.layers.0")
    weight = ckpt.linear("q_proj.weight", shape)
    numbers = weight.dequantize().float()
    assert numbers.shape == shape and 0.01 < numbers.std() < 0.04 and numbers.mean().abs() < 0.004
    assert torch.equal(ckpt.linear("q_proj.weight", shape).dequantize().float(), numbers)
    packed = ckpt.packed(fuse([weight, ckpt.linear("k_proj.weight", shape)])).dequantize().float()
    torch.testing.assert_close(packed[: shape[0]], numbers, atol=1e-6, rtol=2**-8 if layout == "fp8" else 1e-6)


def test_weights_keep_their_format_and_the_file_its_content(smollm2_path: Path) -> None:
    """On a CPU a weight is packed from the file's blocks, whose pages are given back and can be read again."""
    if native is None:
        pytest.skip(reason)
    files = open_model(smollm2_path)
    ckpt = open_checkpoint(files, torch.bfloat16, torch.device("cpu"), activations="int8")
    name, stored = "model.layers.0.self_attn.q_proj.weight", files.tensors["model.layers.0.self_attn.q_proj.weight"]
    before = stored.data.copy()
    weight = ckpt.linear(name, (576, 576))
    assert isinstance(weight, Blocks) and weight.type.name == "Q4_1"
    expected = weight.dequantize()
    packed = ckpt.packed(weight)
    assert isinstance(packed, Packed)
    assert torch.equal(packed.dequantize(), expected)
    assert np.array_equal(stored.data, before)


def test_float32_weights_become_the_compute_dtype(tmp_path: Path) -> None:
    save_file({"w.weight": torch.randn(32, 32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": []}')
    for dtype, kept in ((torch.float32, Blocks), (torch.bfloat16, Dense)):
        ckpt = open_checkpoint(open_model(tmp_path), dtype, torch.device("cpu"))
        weight = ckpt.linear("w.weight", (32, 32))
        assert isinstance(weight, kept if native is not None else Dense)
        assert weight.dequantize().dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_table_stays_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows that are only looked up are not packed; 37 columns of 2 or 4 bytes begin at odd multiples."""
    numbers = torch.randn(20, 37).to(dtype)
    save_file({"w.weight": numbers}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": []}')
    files = open_model(tmp_path)
    ckpt = open_checkpoint(files, dtype, torch.device("cpu"))
    table = ckpt.table("w.weight", (20, 37))
    ckpt.finish()
    if native is not None:
        assert isinstance(table, Table)
        assert table.weight.data.data_ptr() == files.tensors["w.weight"].data.ctypes.data
    ids = torch.tensor([19, 0, 7, 7])
    assert torch.equal(table.rows(ids, 2.5).float(), (numbers[ids].float() * 2.5).to(table.rows(ids).dtype).float())
    assert torch.equal(table.dequantize().float(), numbers.float())


def test_a_quantised_table_is_packed(smollm2_path: Path) -> None:
    ckpt = open_checkpoint(open_model(smollm2_path), torch.float32, torch.device("cpu"))
    assert isinstance(ckpt.table("model.embed_tokens.weight", (49152, 576)), Dense if native is None else Packed)
