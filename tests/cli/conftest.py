"""A stand-in for pelton.llm.LLM that answers with a fixed text, a few characters at a time."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pelton.config import EngineArgs
from pelton.door import log_choices
from pelton.engine.messages import EngineInfo
from pelton.errors import PromptTooLongError
from pelton.types import CompletionOutput, RequestOutput, SamplingParams

ANSWER = "The sky is blue because short waves are scattered more than long ones."


class FakeLLM:
    """Answers everything with ANSWER; `seen` records what it was asked."""

    answer = ANSWER
    seen: list[Any] = []
    args: EngineArgs | None = None
    interrupt_after: int | None = None  # pieces of a stream

    @classmethod
    def from_args(cls, args: EngineArgs, on_progress: Callable[[int, int], None] | None = None) -> FakeLLM:
        cls.args = args
        if on_progress:
            on_progress(1, 2)
        log_choices(EngineInfo(320, 320, "none", ("dtype float32",), ("max_model_len 320 instead of 1024",)))
        return cls()

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams()

    def get_tokenizer(self) -> Any:
        return types.SimpleNamespace(vocab_size=100)

    def generate(self, prompts: Any, params: Any = None, use_tqdm: bool = True, *, stream: bool = False) -> Any:
        self.seen.append((prompts, params))
        if "too long" in str(prompts):
            raise PromptTooLongError("the prompt is too long; shorten it")
        return self._stream() if stream else [_output(ANSWER, ANSWER, "stop") for _ in prompts]

    chat = generate

    def _stream(self) -> Iterator[RequestOutput]:
        pieces = [ANSWER[i : i + 5] for i in range(0, len(ANSWER), 5)]
        for number, piece in enumerate(pieces):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            yield _output(piece, piece, "stop" if number == len(pieces) - 1 else None)


def _output(text: str, tokens: str, finish: str | None) -> RequestOutput:
    completion = CompletionOutput(0, text, [ord(c) for c in tokens], finish_reason=finish)
    return RequestOutput("0", None, [1, 2, 3], [completion], finish is not None)


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> type[FakeLLM]:
    """FakeLLM in place of LLM, and a model file that exists."""
    module = types.ModuleType("pelton.llm")
    fake = type("FakeLLM", (FakeLLM,), {"seen": []})
    module.LLM = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pelton.llm", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    return fake


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal() -> Terminal:
    """Somewhere to write as on a terminal."""
    return Terminal()
