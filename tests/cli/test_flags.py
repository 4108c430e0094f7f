"""Flags become EngineArgs, ServerSettings and SamplingParams."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import pytest

from pelton import vllm_options
from pelton.cli import flags, serve
from pelton.cli.parser import Parser
from pelton.config import DEFAULT_MODEL, EngineArgs
from pelton.errors import ConfigError


def parse(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="pelton serve")
    serve.add_arguments(parser)
    return parser.parse_args(argv)


def test_every_field_of_engine_args_is_a_flag() -> None:
    assert list(flags.ENGINE_FLAGS) == [field.name for field in fields(EngineArgs)]


def test_nothing_typed_is_every_default() -> None:
    assert flags.engine_args(parse()) == EngineArgs(model=DEFAULT_MODEL)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["org/name"], {"model": "org/name"}),
        (["--model", "org/name"], {"model": "org/name"}),
        (["--max_model_len", "4k"], {"max_model_len": 4000}),
        (["--max-model-len=4K"], {"max_model_len": 4096}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--no_enable_prefix_caching"], {"enable_prefix_caching": False}),
        (["--enforce-eager", "--trust_remote_code"], {"enforce_eager": True, "trust_remote_code": True}),
        (["--lazy-capture"], {"lazy_capture": True}),
        (["--served-model-name", "a", "b"], {"served_model_name": ["a", "b"]}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["-tp", "1", "--chat-template", "my_template.jinja"], {"chat_template": "my_template.jinja"}),
    ],
)
def test_engine_flags(argv: list[str], expected: dict[str, Any]) -> None:
    assert flags.engine_args(parse(*argv)) == EngineArgs(**expected)


def test_server_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = serve.settings(parse(
        "m", "--host", "0.0.0.0", "--port", "80", "--api-key", "k1", "k2", "--allowed-origins", '["*"]',
        "--shutdown-timeout", "5", "--disable-log-requests",
    ))  # fmt: skip
    assert (settings.host, settings.port, settings.api_keys) == ("0.0.0.0", 80, ("k1", "k2"))
    assert (settings.allowed_origins, settings.drain_s, settings.log_requests) == (("*",), 5.0, False)
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    assert serve.settings(parse()).api_keys == ("from-environment",)


def test_flags_without_effect_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse("--swap_space", "4", "--disable-log-stats", "--pipeline-parallel-size", "1")
    assert flags.engine_args(options) == EngineArgs()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--swap-space", "--disable-log-stats"]
    tables = (vllm_options.SWITCHES, vllm_options.VALUES, vllm_options.ONLY, vllm_options.NOT_YET)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)) and not set(names) & flags.ENGINE_FLAGS.keys()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice: parsing of tool calls is not in this version"),
        (["--reasoning_parser", "deepseek_r1"], "--reasoning-parser: parsing of reasoning"),
        (["--lora-modules", "a=b", "c=d"], "--lora-modules: LoRA"),
        (["--chat-template-content-format", "openai"], "--chat-template-content-format openai"),
    ],
)
def test_what_vllm_has_and_pelton_has_not_is_refused(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse("m", *argv)


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(ConfigError, match="unknown flag --enforce"):
        parse("--enforce")


@pytest.mark.parametrize("text", ["4x", "", "1.5", "-", "k", "1e400k"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        flags.parse_count(text)
