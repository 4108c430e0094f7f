"""Random weights of any shape and layout, for tests and benchmarks without files."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pelton.ops.parallel import ALONE, Ranks
from pelton.quant.layout import W8A8, Blocks, Codebook4, Dense, Float8, Int, LinearWeight
from pelton.weights.checkpoint import Checkpoint
from pelton.weights.stored import BlockType

GROUP, NF4_GROUP = 128, 64  # float8's blocks have 128 rows and columns
Shape = tuple[int, int]


class Unmade(LinearWeight):
    """A weight of a model whose weights are only counted."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def dequantize(self) -> Tensor:
        raise NotImplementedError(f"a weight {list(self.shape)} that is only counted has no numbers")


class DummyCheckpoint(Checkpoint):
    """Has every tensor that is asked for: random, the same for the same name, shape and seed. On the device "meta" they
    are only counted."""

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 0.02,
        activations: str = "fp32", layout: str | None = None, ranks: Ranks = ALONE, deterministic: bool = False,
    ) -> None:
        """layout: of the layers' weights, of LAYOUTS; None: numbers."""
        super().__init__(
            config, dtype, device, {}, activations=activations, ranks=ranks, deterministic=deterministic
        )
        self.num_weights = 0  # of what was asked for, here or through a view
        self._counter = self
        self._seed = seed
        self._scale = scale
        self._layout = layout

    def has(self, name: str) -> bool:
        return True

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        self._counter.num_weights += math.prod(shape)
        if self.device.type == "meta":  # a vector, to which is added: there that imports torch's compiler, for seconds
            return torch.empty(shape, dtype=dtype or self.dtype)
        return self.numbers(self.full_name(name), shape).to(self.device, dtype or self.dtype)

    def numbers(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Those of a tensor by its full name: normal with deviation `scale`; around 1 for norms."""
        values = torch.randn(shape, generator=self._generator(name), device=self.device) * self._scale
        if "norm" in name:
            values += 1
        return values

    def linear(
        self, name: str, shape: Shape, rows: range | None = None, columns: range | None = None
    ) -> LinearWeight:
        if self.device.type == "meta":
            self._counter.num_weights += math.prod(shape)
            return Unmade(shape)
        if self._layout is None or ".layers." not in self.full_name(name):
            weight: LinearWeight = Dense(self.tensor(name, shape))
        else:
            weight = LAYOUTS[self._layout](shape, self._scale, self._generator(self.full_name(name)))
        rows, columns = rows or range(shape[0]), columns or range(shape[1])
        return weight if (len(rows), len(columns)) == shape else weight.part(rows, columns)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))


def _codes(shape: Shape, most: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, most, shape, dtype=torch.uint8, device=generator.device, generator=generator)


def _scales(shape: Shape, group: int, value: float, generator: torch.Generator) -> Tensor:
    """Around `value`, and exact in float16: [N, K / group], in smaller groups where these do not divide K."""
    groups = shape[0], shape[1] // math.gcd(shape[1], group)
    random = torch.rand(groups, device=generator.device, generator=generator) + 0.5
    return (random * value).half().float()


def _int4(shape: Shape, scale: float, generator: torch.Generator) -> LinearWeight:
    return Int(4, _codes(shape, 16, generator), _scales(shape, GROUP, scale / 4.6, generator), 8)


def _int4_with_zeros(shape: Shape, scale: float, generator: torch.Generator) -> LinearWeight:
    scales = _scales(shape, GROUP, scale / 4.6, generator)
    zeros = torch.randint(6, 10, scales.shape, device=generator.device, generator=generator).float()
    return Int(4, _codes(shape, 16, generator), scales, zeros)


def _int8(shape: Shape, scale: float, generator: torch.Generator) -> LinearWeight:
    return Int(8, _codes(shape, 256, generator), _scales(shape, shape[1], scale / 74, generator), 128)


def _w8a8(shape: Shape, scale: float, generator: torch.Generator) -> LinearWeight:
    return W8A8(_codes(shape, 256, generator), _scales(shape, shape[1], scale / 74, generator))


def _float8(shape: Shape, scale: float, generator: torch.Generator) -> LinearWeight:
    numbers = torch.randn(shape, device=generator.device, generator=generator) * 64
    blocks = -(-shape[0] // GROUP), -(-shape[1] // GROUP)
    scales = (torch.rand(blocks, device=generator.device, generator=generator) + 0.5) * scale / 64
    return Float8(numbers.to(torch.float8_e4m3fn).view(torch.uint8), scales, (GROUP, GROUP))


def _nf4(shape: Shape, scale: float, generator: torch.Generator) -> LinearWeight:
    values = torch.linspace(-1, 1, 16, device=generator.device)
    return Codebook4(_codes(shape, 16, generator), _scales(shape, NF4_GROUP, scale / 0.61, generator), values)


def _q4_k(shape: Shape, scale: float, generator: torch.Generator) -> LinearWeight:
    """Blocks with random codes: scales around 32 times d, and minima that centre them."""
    if shape[1] % 256:
        return _int4(shape, scale, generator)
    blocks = _codes((shape[0] * shape[1] // 256, 144), 256, generator)
    d = torch.tensor([scale / 4.6 / 32, scale / 4.6 / 32 * 7.5], dtype=torch.float16).view(torch.uint8)
    blocks[:, :4] = d.to(blocks.device)
    return Blocks(BlockType("Q4_K", 256, 144), blocks, shape)


LAYOUTS: Mapping[str, Callable[[Shape, float, torch.Generator], LinearWeight]] = {
    "gptq": _int4,
    "awq": _int4_with_zeros,
    "compressed-tensors": _int8,
    "w8a8": _w8a8,
    "fp8": _float8,
    "bitsandbytes": _nf4,
    "gguf": _q4_k,
}
"""By the name of the format, as --quantization takes it, that has such a layout."""
