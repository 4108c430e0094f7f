"""`pelton run`: prompts from flags and files, JSON lines out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pelton.cli.main import main


def test_one_prompt_is_streamed(fake_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.gguf", "--prompt", "Once", "--seed", "7"]) == 0
    assert capsys.readouterr().out == fake_llm.answer + "\n"
    assert fake_llm.seen[0][0] == "Once"
    assert fake_llm.seen[0][1].seed == 7


def test_jsonl_of_texts_and_conversations(fake_llm: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    lines = ["plain", {"messages": messages, "temperature": 0}, {"prompt": "with field", "max_tokens": 3}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert main(["run", "m.gguf", "--input", "in.jsonl", "--output", "out.jsonl", "--max-tokens", "5"]) == 0
    (texts, text_params), (chats, chat_params) = fake_llm.seen
    assert texts == ["plain", "with field"]
    assert [params.max_tokens for params in text_params] == [5, 3]
    assert chats == [messages]
    assert chat_params[0].temperature == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record.get("prompt") for record in records] == ["plain", None, "with field"]
    assert records[1]["messages"] == messages
    assert records[0]["outputs"][0] == {
        "text": fake_llm.answer, "finish_reason": "stop", "num_tokens": len(fake_llm.answer)
    }


def test_text_file_through_the_chat_template(
    fake_llm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("天空\nb\n", encoding="utf-8")
    assert main(["run", "m.gguf", "--input", "in.txt", "--chat"]) == 0
    assert fake_llm.seen[0][0] == [[{"role": "user", "content": "天空"}], [{"role": "user", "content": "b"}]]
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "in.jsonl line 1 is not JSON"),
        ('"a"\n\n{"prompt": 3}', "prompt 2 is neither"),
        ('{"prompt": "a", "messages": []}', "prompt 1 is neither"),
        ('{"prompt": "a", "temprature": 1}', "temprature is no sampling field"),
        ('{"prompt": "a", "temperature": -1}', "temperature must be in"),
        ("\n", "holds no prompts"),
    ],
)
def test_bad_input(
    fake_llm: Any, tmp_path: Path, content: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    assert main(["run", "m.gguf", "--input", "in.jsonl"]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk(fake_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.gguf", "--prompt", "x", "--output", "/dev/full"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "pelton: error: cannot write /dev/full: No space left on device; choose another --output"
    )


def test_output_is_opened_before_the_work(fake_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.gguf", "--prompt", "x", "--output", "missing/out.jsonl"]) == 2
    assert "cannot write missing/out.jsonl" in capsys.readouterr().err
    assert fake_llm.args is None
