"""Seeded mutations of checkpoint headers: they are read, or refused with a ModelFormatError; nothing else happens."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pelton.errors import ModelFormatError
from pelton.weights.gguf import GGUFFile, parse_gguf
from pelton.weights.gguf_config import config_from_gguf, generation_config_from_gguf
from pelton.weights.gguf_names import ARCHITECTURES, hf_tensors
from pelton.weights.safetensors import parse_safetensors

MUTATIONS = 20_000
EDGES = [0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 33, 255, 256, 0x7FFF, 0xFFFF, 1 << 16, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFF,
         1 << 32, 1 << 40, (1 << 61) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four of: a bit flipped, a byte or a number set to an extreme, bytes removed, repeated, cut off, moved."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(out))
        kind = rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind in (2, 3):
            code = rng.choice("HIQ")
            value = rng.choice(EDGES) & (1 << 8 * struct.calcsize(code)) - 1
            out[at : at + struct.calcsize(code)] = struct.pack(f"<{code}", value)
        elif kind == 4:
            del out[at : at + rng.randrange(1, 16)]
        elif kind == 5:
            out[at:at] = out[at : at + rng.randrange(1, 64)]
        elif kind == 6:
            del out[at:]
        else:
            other = rng.randrange(len(out))
            out[at : at + 8] = out[other : other + 8]
        if not out:
            break
    return bytes(out)


def mutate_digits(data: bytes, rng: random.Random) -> bytes:
    """A number in the JSON header becomes another one."""
    digits = [i for i, byte in enumerate(data[8:], start=8) if 48 <= byte < 58]
    at = rng.choice(digits)
    number = rng.choice(["-1", "1e9", "0.5", "null", "[]", "99999999999999999999", *map(str, EDGES)]).encode()
    header_length = struct.unpack("<Q", data[:8])[0]
    return struct.pack("<Q", header_length + len(number) - 1) + data[8:at] + number + data[at + 1 :]


def fuzz(parse: Callable[[bytes, str], Any], seed: bytes, mutations: list[Callable[..., bytes]]) -> int:
    """Parse MUTATIONS mutated files; the number of those that were accepted."""
    accepted = 0
    slowest = 0.0
    for number in range(MUTATIONS):
        rng = random.Random(number)
        data = rng.choice(mutations)(seed, rng)
        start = time.perf_counter()
        try:
            parse(data, "f")
            accepted += 1
        except ModelFormatError as error:
            if "\n" in str(error):
                pytest.fail(f"mutation {number}: the message has several lines: {error}")
        except Exception as error:
            pytest.fail(f"mutation {number}: {type(error).__name__}: {error}")
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1
    return accepted


def read_gguf(data: bytes, where: str) -> None:
    """All that is read before the weights are."""
    file = GGUFFile((Path(where),), *parse_gguf(data, where))
    config_from_gguf(file, where)
    generation_config_from_gguf(file, where)
    hf_tensors(file.tensors, ARCHITECTURES["llama"])


def test_gguf(seed_gguf: bytes) -> None:
    read_gguf(seed_gguf, "seed")
    assert 0 < fuzz(read_gguf, seed_gguf, [mutate]) < MUTATIONS / 2


def test_safetensors(seed_safetensors: bytes) -> None:
    assert 0 < fuzz(parse_safetensors, seed_safetensors, [mutate, mutate_digits]) < MUTATIONS / 2


def test_memory_is_bounded_by_the_file(seed_gguf: bytes, seed_safetensors: bytes) -> None:
    """No length in a file, however large, makes the reader allocate more than the file could hold."""
    tracemalloc.start()
    try:
        for parse, seed in ((read_gguf, seed_gguf), (parse_safetensors, seed_safetensors)):
            for number in range(1000):
                data = mutate(seed, random.Random(number))
                try:
                    parse(data, "f")
                except ModelFormatError:
                    continue
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
