"""The architectures: one file each, found by the name in config.json's `architectures`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from pelton.config import KVLayer
from pelton.errors import ModelFormatError
from pelton.layers.batch import Batch
from pelton.layers.vocab import LMHead
from pelton.ops.parallel import ALONE, Ranks
from pelton.weights.checkpoint import Checkpoint
from pelton.weights.fields import Fields, shorten

# architecture -> "file:class". A new model is one new file and one line here.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "llama:Mistral",
    "Qwen2ForCausalLM": "qwen:Qwen2",
    "Qwen3ForCausalLM": "qwen:Qwen3",
    "Gemma2ForCausalLM": "gemma:Gemma2",
    "Gemma3ForCausalLM": "gemma:Gemma3",
    "Gemma3ForConditionalGeneration": "gemma:Gemma3",
}


class Model(ABC):
    """A decoder: tokens in, hidden states out, logits of the states that are asked for."""

    lm_head: LMHead

    @abstractmethod
    def __init__(self, ckpt: Checkpoint, config: Any) -> None:
        """Build every layer from the checkpoint, as `config`, a result of parse(), says."""

    @classmethod
    @abstractmethod
    def parse(cls, config: Mapping[str, Any]) -> Any:
        """The network that a config.json describes: a record of the model's own. Its `attention` holds an
        AttentionShape for each layer."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """The last hidden states [T, d_model], or of the batch's wanted rows [M, d_model], normalised. What the last
        layer computes behind its keys and values, it computes for these alone."""

    @classmethod
    def kv_layers(cls, config: Mapping[str, Any], ranks: Ranks = ALONE) -> list[KVLayer]:
        """What each attention layer of one rank keeps in the KV cache. ConfigError if ranks cannot share its heads."""
        return [shape.share(ranks).kv_layer for shape in cls.parse(config).attention]

    @classmethod
    def load(cls, ckpt: Checkpoint) -> Model:
        """Build the model from its checkpoint; ModelFormatError names what is missing or misshapen."""
        return cls(ckpt, cls.parse(ckpt.config))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[M, d_model] -> [M, V] float32, written to `out` if that is given."""
        return self.lm_head(hidden, out)


def find_model(config: Mapping[str, Any]) -> type[Model]:
    """The class for a config.json; ModelFormatError lists what is known."""
    names = Fields(config).str_list("architectures", [])
    for name in names:
        if name in ARCHITECTURES:
            module, _, cls = ARCHITECTURES[name].partition(":")
            return getattr(import_module(f"pelton.models.{module}"), cls)  # type: ignore[no-any-return]
    asked = ", ".join(map(shorten, names)) or "(none)"
    raise ModelFormatError(f"architecture {asked} is not supported; known: {', '.join(ARCHITECTURES)}")
