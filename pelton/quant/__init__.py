"""One small file a family of checkpoint formats, and the layouts they are lowered to (layout.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pelton.quant import gguf
from pelton.quant.codes import Codes

# Name of a block format -> the parts of its blocks, uint8 [B, bytes].
CODED: Mapping[str, Callable[[Tensor], Codes]] = {
    "Q4_0": gguf.q4_0,
    "Q4_1": gguf.q4_1,
    "Q5_0": gguf.q5_0,
    "Q5_1": gguf.q5_1,
    "Q8_0": gguf.q8_0,
    "Q2_K": gguf.q2_k,
    "Q3_K": gguf.q3_k,
    "Q4_K": gguf.q4_k,
    "Q5_K": gguf.q5_k,
    "Q6_K": gguf.q6_k,
    "IQ4_NL": gguf.iq4_nl,
    "IQ4_XS": gguf.iq4_xs,
}


def _weights(parts_of: Callable[[Tensor], Codes]) -> Callable[[Tensor], Tensor]:
    return lambda blocks: parts_of(blocks).weights()


# Name of a block format -> its definition: bytes of blocks, uint8 [B, bytes], to weights, float32 [B, weights].
FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "F32": gguf.f32,
    "F16": gguf.f16,
    "BF16": gguf.bf16,
    **{name: _weights(parts_of) for name, parts_of in CODED.items()},
}
