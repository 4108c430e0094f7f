"""Names in Hugging Face checkpoints: a model that also sees keeps its text part under a prefix of its own."""

from __future__ import annotations

from collections.abc import Mapping

from pelton.errors import ModelFormatError
from pelton.weights.fields import shorten
from pelton.weights.stored import StoredTensor

# Prefix of the text part (as older and newer versions of transformers write it) -> what a text model has there.
_TEXT_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
_VISION_PREFIXES = tuple(
    f"{model}{part}." for model in ("", "model.") for part in ("vision_tower", "multi_modal_projector", "visual")
)


def text_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of the text part, named as in a checkpoint of a text model."""
    prefix = next((prefix for prefix in _TEXT_PREFIXES if any(name.startswith(prefix) for name in tensors)), None)
    if prefix is None:
        return dict(tensors)
    named: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_VISION_PREFIXES):
            continue
        text_name = _TEXT_PREFIXES[prefix] + name.removeprefix(prefix) if name.startswith(prefix) else name
        if text_name in named:
            raise ModelFormatError(f"tensors {shorten(named[text_name].name)} and {shorten(name)} are the same one")
        named[text_name] = tensor
    return named
