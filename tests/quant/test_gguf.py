"""Every GGUF block format against the definitions in the `gguf` package, bit for bit, and against fixed bytes."""

from __future__ import annotations

import hashlib

import gguf
import numpy as np
import pytest
import torch

from pelton.quant import FORMATS
from pelton.weights.gguf import BLOCK_TYPES

TYPES = {block.name: block for block in BLOCK_TYPES.values()}


def weights_of(name: str, raw: np.ndarray) -> np.ndarray:
    return FORMATS[name](torch.from_numpy(raw)).numpy()


def golden_block(name: str) -> np.ndarray:
    """A block of all kinds of bytes whose scales (every f16 in it) are small numbers."""
    raw = (np.arange(TYPES[name].block_bytes * 8, dtype=np.uint32) * 37 + 11).astype(np.uint8)
    raw = raw.reshape(8, TYPES[name].block_bytes)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
              "Q6_K": (208,), "F32": ()}
    for start in halves.get(name, (0,)):
        raw[:, start : start + 2] = np.frombuffer(np.float16(0.0125 + start / 1000).tobytes(), np.uint8)
    return raw


# sha256 of the float32 weights of golden_block
GOLDEN = {
    "F32": "83b7a8ed859053c8",
    "F16": "371c0edd22ee137c",
    "BF16": "440663e2fcfef987",
    "Q4_0": "49cadc01fa5827e4",
    "Q4_1": "6bb903db505c6442",
    "Q5_0": "f9e9e5b2571a6e80",
    "Q5_1": "a284b28349a26459",
    "Q8_0": "cf9427ab49ebd21c",
    "Q2_K": "34d77565c1637c49",
    "Q3_K": "ae7d6428439ed73d",
    "Q4_K": "d8d77af4c76646e8",
    "Q5_K": "cf58e19d49f9e433",
    "Q6_K": "2cde9f3336d075c1",
    "IQ4_NL": "233f9606c3aae25d",
    "IQ4_XS": "a6fa06540edd0875",
}


def test_formats_and_file_types_agree() -> None:
    assert FORMATS.keys() == TYPES.keys()
    for type_id, block in BLOCK_TYPES.items():
        known = gguf.GGMLQuantizationType(type_id)
        assert (known.name, gguf.GGML_QUANT_SIZES[known]) == (block.name, (block.block_size, block.block_bytes))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_random_blocks_equal_the_gguf_package(name: str, seed: int) -> None:
    """All bytes are random, so scales are also infinite and not numbers."""
    block = TYPES[name]
    raw = np.random.default_rng(seed).integers(0, 256, (200, block.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(200, block.block_size)
    actual = weights_of(name, raw)
    assert actual.dtype == np.float32
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), ~numbers)
    np.testing.assert_array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize(
    ("name", "error"), [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 0.03), ("Q5_1", 0.2), ("Q5_0", 0.3), ("Q4_1", 0.4),
                        ("Q4_0", 0.6)]
)
def test_round_trip(name: str, error: float) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)
    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name]).view(np.uint8)
    back = weights_of(name, raw.reshape(-1, TYPES[name].block_bytes)).reshape(weights.shape)
    assert np.abs(back - weights).max() < error


def test_q4_0_by_hand() -> None:
    """d = 0.5; the low halves of the 16 bytes are weights 0 to 15, the high halves 16 to 31."""
    raw = np.frombuffer(np.float16(0.5).tobytes() + bytes([0xF0, 0x19] + [0x88] * 14), np.uint8)
    weights = weights_of("Q4_0", raw[None].copy())[0]
    assert weights[:2].tolist() == [-4.0, 0.5]
    assert weights[16:18].tolist() == [3.5, -3.5]
    assert not weights[2:16].any()
    assert not weights[18:].any()


def test_q8_0_by_hand() -> None:
    raw = np.frombuffer(np.float16(2).tobytes() + bytes([1, 255, 128, 127]) + bytes(28), np.uint8)
    assert weights_of("Q8_0", raw[None].copy())[0, :5].tolist() == [2.0, -2.0, -256.0, 254.0, 0.0]


@pytest.mark.parametrize("name", FORMATS)
def test_golden_bytes(name: str) -> None:
    weights = weights_of(name, golden_block(name))
    assert hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest()[:16] == GOLDEN[name]
