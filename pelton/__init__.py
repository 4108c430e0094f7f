"""LLM inference and serving with vLLM's interfaces. A name is loaded when it is first used, and torch with LLM."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pelton.async_llm import AsyncLLM
    from pelton.config import EngineArgs
    from pelton.errors import (
        ConfigError,
        EngineDeadError,
        ModelFormatError,
        ModelNotFoundError,
        OverloadedError,
        PeltonError,
        PromptTooLongError,
        RequestError,
        RequestFailedError,
    )
    from pelton.llm import LLM
    from pelton.types import (
        CompletionOutput,
        GuidedDecodingParams,
        Logprob,
        RequestOutput,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
        TextPrompt,
        TokensPrompt,
    )

__all__ = [
    "LLM", "AsyncLLM", "CompletionOutput", "ConfigError", "EngineArgs", "EngineDeadError",
    "GuidedDecodingParams", "Logprob", "ModelFormatError", "ModelNotFoundError", "OverloadedError", "PeltonError",
    "PromptTooLongError", "RequestError", "RequestFailedError", "RequestOutput", "RequestOutputKind",
    "SamplingParams", "StructuredOutputsParams", "TextPrompt", "TokensPrompt", "__version__",
]  # fmt: skip

_MODULES = {"LLM": "llm", "AsyncLLM": "async_llm", "EngineArgs": "config"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pelton' has no attribute {name!r}")
    module = _MODULES.get(name, "errors" if name.endswith("Error") else "types")
    return getattr(import_module(f"pelton.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
