"""The command line as a whole: help, errors of one line, exit codes."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pelton.cli import main as cli
from pelton.errors import ModelNotFoundError


def run(*argv: str) -> int:
    return cli.main(list(argv))


@pytest.mark.parametrize("argv", [[], ["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*argv)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: pelton")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sevre"], "did you mean serve?"),
        (["serve", "--max_modle_len", "5"], "did you mean --max-model-len?"),
        (["serve", "--port", "abc"], "'abc' is not a whole number"),
        (["serve", "--dtype", "int8"], "--dtype int8 is unknown"),
        (["serve", "a/b", "--model", "c/d"], "two models are given"),
        (["serve", "--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
        (["serve", "--allowed-origins", "*"], "is not a JSON list"),
        (["pull", "smollm"], "did you mean smollm2-135m-instruct?"),
        (["chat", "hi", "--top-p", "2"], "top_p must be in (0.0, 1.0]"),
        (["run"], "give either --prompt TEXT or --input FILE"),
        (["run", "--input", "/missing.txt"], "cannot read /missing.txt"),
        (["bench", "latancy"], "did you mean latency?"),
        (["bench", "serve", "--base-url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["bench", "serve", "--base-url", "ftp://x"], "no http or https address"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pelton: error: ")
    assert err.count("\n") == 1
    assert says in err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ModelNotFoundError):
        run("pull", "smollm", "--debug")
    logging.getLogger("pelton").setLevel(logging.NOTSET)


def test_a_taken_port_is_noticed_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pelton.async_llm.AsyncLLM.start", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run("serve", "--port", str(taken.getsockname()[1])) == 2
    assert capsys.readouterr().err.startswith("pelton: error: cannot listen on 127.0.0.1:")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pelton", "pull", __file__], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "pelton: error: [Errno 28] No space left on device; --debug shows where\n"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert run("pull") == 130


@pytest.mark.parametrize("module", ["pelton", "pelton.entrypoints.openai.api_server"])
def test_module_entry_points(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("pelton: error: ")
