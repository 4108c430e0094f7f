"""The names that `import pelton` promises, and what it costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pelton

NAMES = {
    "LLM", "AsyncLLM", "CompletionOutput", "ConfigError", "EngineArgs", "EngineDeadError",
    "GuidedDecodingParams", "Logprob", "ModelFormatError", "ModelNotFoundError", "OverloadedError", "PeltonError",
    "PromptTooLongError", "RequestError", "RequestFailedError", "RequestOutput", "RequestOutputKind",
    "SamplingParams", "StructuredOutputsParams", "TextPrompt", "TokensPrompt", "__version__",
}  # fmt: skip
# What a machine without a package index has. The server's and the command line's packages are not for LLM.
NOT_FOR_LLM = ["starlette", "uvicorn", "pydantic", "msgpack", "prometheus_client", "rich", "huggingface_hub",
               "transformers"]


def python(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout


def test_the_public_names() -> None:
    assert set(pelton.__all__) == NAMES == set(dir(pelton))
    for name in NAMES:
        assert getattr(pelton, name) is not None
    assert "LLM" in pelton.LLM.__name__ and issubclass(pelton.RequestError, pelton.PeltonError)
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = pelton.LMM


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert pelton.__version__ == project["version"]


def test_import_loads_nothing_heavy() -> None:
    script = "import pelton, sys; pelton.SamplingParams(); print(*{n.partition('.')[0] for n in sys.modules})"
    assert not {"torch", "numpy", "tokenizers", "jinja2", "asyncio"} & set(python(script).split())


def test_llm_needs_five_packages() -> None:
    blocked = dict.fromkeys(NOT_FOR_LLM)
    script = f"import sys; sys.modules.update({blocked}); from pelton import LLM; import pelton.build; print(LLM)"
    assert "pelton.llm.LLM" in python(script)
