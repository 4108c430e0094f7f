"""The gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pelton import ops
from pelton.errors import ModelFormatError
from pelton.layers.linear import Linear
from pelton.weights.checkpoint import Checkpoint

ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "silu": ("silu", ops.silu_and_mul),
    "gelu_pytorch_tanh": ("gelu_tanh", ops.gelu_tanh_and_mul),
}


class GatedMLP:
    """down(act(gate(x)) * up(x))."""

    def __init__(self, gate_up: Linear, down: Linear, activation: str) -> None:
        self.gate_up = gate_up
        self.down = down
        self.gate, self.act_and_mul = find_activation(activation)

    @classmethod
    def load(cls, ckpt: Checkpoint, d_model: int, d_hidden: int, activation: str, bias: bool = False) -> GatedMLP:
        """Read `gate_proj`, `up_proj` [d_hidden, d_model] and `down_proj` [d_model, d_hidden]."""
        return cls(
            Linear.load(ckpt, {"gate_proj": d_hidden, "up_proj": d_hidden}, d_model, bias, split="out"),
            Linear.load(ckpt, {"down_proj": d_model}, d_hidden, bias, split="in"),
            activation,
        )

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """[T, d_model] -> [T, d_model]; with `add_to` added to that, in place."""
        hidden = self.gate_up.weight.gated(x, self.gate_up.bias, self.gate)
        return self.down(self.act_and_mul(self.gate_up(x)) if hidden is None else hidden, add_to)


def find_activation(name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The gated activation of that name in config.json: what weights call it, and its op."""
    if name not in ACTIVATIONS:
        raise ModelFormatError(f"hidden_act {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
