"""The chat: what goes to stdout and stderr, the conversation, how words wrap."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pelton.cli import chat
from pelton.cli.console import AnswerWriter, width
from pelton.cli.main import main


class Keyboard:
    """Answers input() with lines; an exception among them is raised; then Ctrl-D."""

    def __init__(self, *lines: Any) -> None:
        self.lines = list(lines)

    def __call__(self, prompt: str = "") -> str:
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return str(line)


def talk(monkeypatch: pytest.MonkeyPatch, *lines: Any) -> int:
    monkeypatch.setattr("builtins.input", Keyboard(*lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    return main(["chat", "--model", "m.gguf", "--system", "Be brief."])


def test_one_answer(fake_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "Why?", "--model", "m.gguf", "--temperature", "0", "--max_tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert out == fake_llm.answer + "\n"
    assert "\x1b" not in err
    assert f"{len(fake_llm.answer)} tokens, " in err
    messages, params = fake_llm.seen[0]
    assert messages == [{"role": "user", "content": "Why?"}]
    assert (params.temperature, params.max_tokens, params.top_p) == (0, 9, chat.CHAT_SAMPLING["top_p"])


@pytest.mark.parametrize(
    ("words", "hint"), [(["Why", "is", "it"], "in quotes"), (["gemma-3-270m"], "--model gemma-3-270m"),
                        (["gemma-3-270m", "Why?"], "--model gemma-3-270m")],
)
def test_what_is_not_one_prompt(words: list[str], hint: str, fake_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *words]) == 2
    assert hint in capsys.readouterr().err


def test_prompt_from_stdin(fake_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    assert main(["chat", "--model", "m.gguf"]) == 0
    assert fake_llm.seen[0][0][-1]["content"] == "Why?"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_piped_in_must_be_text(
    fake_llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], errors: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors))
    assert main(["chat", "--model", "m.gguf"]) == 2
    assert capsys.readouterr().err.startswith("pelton: error: stdin is no text in UTF-8")
    assert fake_llm.args is None


@pytest.mark.parametrize("debug", [False, True])
def test_what_was_decided_is_noted(fake_llm: Any, capsys: pytest.CaptureFixture[str], debug: bool) -> None:
    try:
        assert main(["chat", "Why?", "--model", "m.gguf", *(["--debug"] if debug else [])]) == 0
    finally:
        logging.getLogger("pelton").setLevel(logging.NOTSET)
    lines = capsys.readouterr().err.splitlines()
    assert ("kernels: none" in lines) is debug
    assert lines[-3:-1] == ["dtype float32", "max_model_len 320 instead of 1024"]


def test_conversation(fake_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, "one", "", "two \\", "lines", "/help", "/reset", "three", "/exit", "never") == 0
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": fake_llm.answer}
    asked = [messages for messages, _ in fake_llm.seen]
    assert asked[0] == [system, {"role": "user", "content": "one"}]
    assert asked[1] == [*asked[0], answer, {"role": "user", "content": "two \nlines"}]
    assert asked[2] == [system, {"role": "user", "content": "three"}]
    assert len(asked) == 3


def test_ctrl_c_stops_the_answer_not_the_program(
    fake_llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_llm.interrupt_after = 3
    assert talk(monkeypatch, "one", KeyboardInterrupt(), "two") == 0
    said = fake_llm.answer[:15]
    assert fake_llm.seen[1][0][2] == {"role": "assistant", "content": said}
    out, err = capsys.readouterr()
    assert out == f"{said}\n{said}\n"
    assert err.count("Stopped.") == 2


def test_ctrl_c_during_a_single_answer_ends_the_program(fake_llm: Any) -> None:
    fake_llm.interrupt_after = 3
    assert main(["chat", "Why?", "--model", "m.gguf"]) == 130


def test_an_error_forgets_the_prompt(
    fake_llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "too long", "short") == 0
    assert fake_llm.seen[1][0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "short"}]
    assert "shorten it (/reset forgets the conversation)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_tokens", "text"),
    [(0, "0 tokens, first after 0.50 s"), (1, "1 token, first after 0.50 s"),
     (11, "11 tokens, 5.0 tokens/s, first after 0.50 s")],
)
def test_summary(num_tokens: int, text: str) -> None:
    assert chat.summary(num_tokens, 0.5, 2.0) == text


# --- wrapping -----------------------------------------------------------------------------------------------------


def shown(terminal: io.StringIO, text: str, columns: int, monkeypatch: pytest.MonkeyPatch, step: int = 1) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    writer = AnswerWriter(terminal)
    for i in range(0, len(text), step):
        writer.write(text[i : i + step])
    writer.end()
    return terminal.getvalue()


def test_words_are_not_broken(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the quick brown fox\n\n  jumps over unbelievably-long-words-too"
    assert shown(terminal, text, 12, monkeypatch) == (
        "the quick \nbrown fox\n\n  jumps over\nunbelievably-long-words-too\n"
    )


def test_wide_characters_need_no_spaces(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "天空为什么是蓝色的" * 3
    assert shown(terminal, text, 10, monkeypatch) == text + "\n"
    assert [width(c) for c in "a天\u0301"] == [1, 2, 0]


def test_elsewhere_nothing_is_changed() -> None:
    out = io.StringIO()
    writer = AnswerWriter(out)
    writer.write("x" * 200 + " y")
    assert out.getvalue() == "x" * 200 + " y"


@given(text=st.text("ab \n天", max_size=60), step=st.integers(1, 7), columns=st.integers(4, 20))
def test_wrapping_loses_nothing_but_space(text: str, step: int, columns: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
        result = shown(out, text, columns, monkeypatch, step)
    assert "".join(result.split()) == "".join(text.split())
