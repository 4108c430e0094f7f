"""Weights in every layout of codes, with random numbers, and how near to them a product has to be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pelton.quant import CODED
from pelton.quant.codes import Codes
from pelton.weights.gguf import BLOCK_TYPES

TYPES = {block.name: block for block in BLOCK_TYPES.values()}
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q6_K": (208,)}  # where a block holds an f16; elsewhere at 0
NUM_IN = 2304  # columns: more than warps ask for ahead, and not as many for each


def blocks(num_out: int, name: str) -> Codes:
    generator = torch.Generator().manual_seed(0)
    block = TYPES[name]
    raw = torch.randint(0, 256, (num_out * NUM_IN // block.block_size, block.block_bytes), dtype=torch.uint8,
                        generator=generator)
    for start in HALVES.get(name, (0,)):
        raw[:, start : start + 2] = (torch.rand(len(raw), 1, generator=generator) * 0.01).half().view(torch.uint8)
    return by_row(num_out, CODED[name](raw.cuda()))


def by_row(num_out: int, parts: Codes) -> Codes:
    rows = {name: getattr(parts, name) for name in ("codes", "scales", "mins", "supers", "super_mins")}
    rows = {name: None if t is None else t.reshape(num_out, -1) for name, t in rows.items()}
    return Codes(bits=parts.bits, zero=parts.zero, values=parts.values, **rows)


def integers(num_out: int, bits: int, group: int, mins: bool, num_in: int = NUM_IN) -> Codes:
    codes = torch.randint(0, 1 << bits, (num_out, num_in), dtype=torch.uint8, device="cuda")
    scales = torch.rand(num_out, -(-num_in // group), device="cuda") * 0.01 + 0.001
    return Codes(bits, codes, scales, scales * 7 if mins else None, zero=0 if mins else 1 << (bits - 1))


def with_zeros(parts: Codes) -> Codes:
    zeros = torch.randint(0, 1 << parts.bits, parts.scales.shape, device="cuda").float()
    return Codes(parts.bits, parts.codes, parts.scales.half().float(), zeros=zeros)


def float8(num_out: int, group: int, num_in: int = NUM_IN) -> Codes:
    """Every number there is."""
    numbers = torch.arange(256, dtype=torch.uint8, device="cuda")
    numbers = numbers[numbers & 127 != 127].repeat(num_out * num_in // 254 + 1)[: num_out * num_in]
    numbers = numbers[torch.randperm(num_out * num_in, device="cuda")].view(num_out, num_in)
    return Codes(8, numbers, integers(num_out, 8, group, False, num_in).scales, float8=True)


def nf4(num_out: int, num_in: int = NUM_IN) -> Codes:
    parts = integers(num_out, 4, 64, False, num_in)
    return Codes(4, parts.codes, parts.scales, values=tuple((torch.linspace(-1, 1, 16) ** 3).tolist()))


LAYOUTS: dict[str, Callable[[int], Codes]] = {  # of the number of rows
    **{name: lambda num_out, name=name: blocks(num_out, name) for name in CODED},
    "int4 group 128": lambda num_out: integers(num_out, 4, 128, False),
    "int4 group 64 with minima": lambda num_out: integers(num_out, 4, 64, True),
    "int4 group 128 with zero points": lambda num_out: with_zeros(integers(num_out, 4, 128, False)),
    "int3 group 16 with zero points": lambda num_out: with_zeros(integers(num_out, 3, 16, False)),
    "int4 group 32": lambda num_out: integers(num_out, 4, 32, False),
    "int4 of 1216 columns with minima": lambda num_out: integers(num_out, 4, 64, True, num_in=1216),
    "int8 per channel": lambda num_out: integers(num_out, 8, NUM_IN, False),
    "int8 group 128 with zero points": lambda num_out: with_zeros(integers(num_out, 8, 128, False)),
    "int8 of 192 columns": lambda num_out: integers(num_out, 8, 192, False, num_in=192),
    "float8 per channel": lambda num_out: float8(num_out, NUM_IN),
    "float8 group 128": lambda num_out: float8(num_out, 128),
    "float8 of 192 columns": lambda num_out: float8(num_out, 64, num_in=192),
    "nf4": nf4,
    "nf4 of 1216 columns": lambda num_out: nf4(num_out, 1216),
}


def close(got: Tensor, expected: Tensor, half: torch.dtype) -> None:
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[half]
    scale = expected.abs().max()
    assert ((got.double() - expected).abs().max() / scale) < 3 * step, float((got - expected).abs().max() / scale)
