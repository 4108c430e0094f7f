"""Writes a GGUF file in the shape of Gemma 3 4B, quantised as llama.cpp's Q4_K_M, with random weights (2.5 GB).

    python benchmarks/make_gguf.py OUT.gguf [--like FILE.gguf] [--layers N]

Speed and memory depend on shapes and formats, not on what a model has learnt, so a large model can be measured without
being fetched. The tokenizer and all else that the file says are those of another Gemma 3 model, by default
gemma-3-270m. Needs the `gguf` package.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, GGUFWriter, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as Format

from pelton.weights import hub

D_MODEL, D_HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, VOCAB, LAYERS = 2560, 10240, 8, 4, 256, 262144, 34
SHAPE = {
    "embedding_length": D_MODEL,
    "feed_forward_length": D_HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD_SIZE,
    "attention.value_length": HEAD_SIZE,
    "attention.sliding_window": 1024,
}
MATRICES = {  # of a block: rows, columns
    "attn_q": (HEADS * HEAD_SIZE, D_MODEL),
    "attn_k": (KV_HEADS * HEAD_SIZE, D_MODEL),
    "attn_v": (KV_HEADS * HEAD_SIZE, D_MODEL),
    "attn_output": (D_MODEL, HEADS * HEAD_SIZE),
    "ffn_gate": (D_HIDDEN, D_MODEL),
    "ffn_up": (D_HIDDEN, D_MODEL),
    "ffn_down": (D_MODEL, D_HIDDEN),
}
NORMS = {
    "attn_norm": D_MODEL,
    "attn_q_norm": HEAD_SIZE,
    "attn_k_norm": HEAD_SIZE,
    "post_attention_norm": D_MODEL,
    "ffn_norm": D_MODEL,
    "post_ffw_norm": D_MODEL,
}
COPIED = ("gemma3.", "tokenizer.", "general.quantization_version", "general.file_type")
DEVIATION = 0.02  # of the weights

Bytes = npt.NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", type=Path, metavar="FILE.gguf", help="a Gemma 3 model with 262,144 tokens")
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N")
    args = parser.parse_args()
    make_gguf(args.out, args.like or hub.resolve("gemma-3-270m"), args.layers)


def make_gguf(out: Path, like: Path, num_layers: int = LAYERS) -> None:
    """Write the file; the same arguments give the same bytes. It has its name only when it is whole."""
    part = out.with_suffix(".part")
    writer = GGUFWriter(part, "gemma3")
    writer.add_name("random weights")
    shape_fields = {f"gemma3.{name}": size for name, size in {**SHAPE, "block_count": num_layers}.items()}
    for key, field in GGUFReader(like).fields.items():
        if key.startswith(COPIED) and key not in shape_fields:
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for key, size in shape_fields.items():
        writer.add_key_value(key, size, GGUFValueType.UINT32)
    for name, shape, kind in tensors(num_layers):
        stored = quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.Generator(np.random.SFC64(0))
    for _, shape, kind in tensors(num_layers):
        writer.write_tensor_data(WEIGHTS[kind](rng, shape))
    writer.close()
    part.rename(out)


def tensors(num_layers: int) -> Iterator[tuple[str, tuple[int, ...], Format]]:
    """Name, shape and format of each tensor, in the file's order. The head is the embedding."""
    yield "token_embd.weight", (VOCAB, D_MODEL), Format.Q6_K
    yield "output_norm.weight", (D_MODEL,), Format.F32
    for layer in range(num_layers):
        for name, size in NORMS.items():
            yield f"blk.{layer}.{name}.weight", (size,), Format.F32
        for name, shape in MATRICES.items():
            more_bits = name in ("attn_v", "ffn_down") and use_more_bits(layer, num_layers)
            yield f"blk.{layer}.{name}.weight", shape, Format.Q6_K if more_bits else Format.Q4_K


def use_more_bits(layer: int, num_layers: int) -> bool:
    """The layers that keep attn_v and ffn_down in Q6_K (the function of this name in llama.cpp's llama-quant.cpp)."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def ones(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A norm that leaves its input as it is."""
    return np.ones(shape, np.float32)


def random_q4_k(rng: np.random.Generator, shape: tuple[int, ...]) -> Bytes:
    """d, dmin (f16), 8 x (6-bit scale, 6-bit min), 256 x 4 bits: w = d sc q - dmin m; here m = sc, dmin = 7.5 d."""
    blocks = random_blocks(rng, shape, Format.Q4_K)
    d = DEVIATION / np.sqrt(mean_square(range(64)) * np.var(range(16)))
    blocks[:, 0:4] = np.array([d, 7.5 * d], np.float16).view(np.uint8)
    blocks[:, 8:12] = blocks[:, 4:8]  # what these say of the scales, those say of the mins
    blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17  # low 4 bits of scales, of mins
    return blocks


def random_q6_k(rng: np.random.Generator, shape: tuple[int, ...]) -> Bytes:
    """256 x 6 bits, 16 x int8 scale, d (f16): w = d sc (q - 32)."""
    blocks = random_blocks(rng, shape, Format.Q6_K)
    d = DEVIATION / np.sqrt(mean_square(range(-128, 128)) * np.var(range(64)))
    blocks[:, 208:210] = np.array([d], np.float16).view(np.uint8)
    return blocks


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: Format) -> Bytes:
    """All bytes random: [blocks, bytes of a block]."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    num_blocks = int(np.prod(shape)) // block_size
    words = rng.integers(0, 1 << 64, -(-num_blocks * block_bytes // 8), dtype=np.uint64)
    return words.view(np.uint8)[: num_blocks * block_bytes].reshape(num_blocks, block_bytes)


def mean_square(values: range) -> float:
    """Of numbers that are drawn evenly."""
    return float(np.mean(np.square(values)))


WEIGHTS = {
    Format.F32: ones,
    Format.Q4_K: random_q4_k,
    Format.Q6_K: random_q6_k,
}


if __name__ == "__main__":
    main()
