"""Serve a model over HTTP, with the OpenAI API and vLLM's flags."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from pelton.cli.flags import add_engine_flags, add_flags, engine_args, given_fields
from pelton.cli.parser import Parser
from pelton.config import EngineArgs, Environment
from pelton.server.settings import ServerSettings

if TYPE_CHECKING:
    from pelton.async_llm import AsyncLLM

SERVER_FLAGS = {
    "host": "address to listen on; 0.0.0.0 lets other machines in",
    "port": "port to listen on; 0 takes a free one",
    "root_path": "prefix of every path, put there by a proxy in front",
    "allow_credentials": "CORS: allow cookies",
    "ssl_keyfile": "key for HTTPS",
    "ssl_certfile": "certificate for HTTPS",
    "ssl_ca_certs": "certificate authorities for clients' certificates",
    "ssl_cert_reqs": "0: clients need no certificate, 2: they need one",
    "uvicorn_log_level": "log level of the HTTP server",
    "response_role": "role of the answers",
    "return_tokens_as_token_ids": 'show tokens as "token_id:N" in logprobs',
    "enable_prompt_tokens_details": "tell in usage how many prompt tokens were cached",
    "trust_request_chat_template": "let clients send a chat template",
}
LIST_FLAGS = ("allowed_origins", "allowed_methods", "allowed_headers")


def add_arguments(parser: Parser) -> None:
    """The engine's flags and the server's."""
    add_engine_flags(parser)
    add_flags(parser, "server", ServerSettings, SERVER_FLAGS)
    group = parser.add_argument_group("server, further")
    group.add_argument("--api-key", nargs="+", metavar="KEY", help="keys that open the API [VLLM_API_KEY; none: open]")
    for name in LIST_FLAGS:
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=_json_list, default=argparse.SUPPRESS,
                           metavar="LIST", help=f"CORS: {name.replace('_', ' ')}, as a JSON list")
    group.add_argument("--shutdown-timeout", dest="drain_s", type=float, default=argparse.SUPPRESS, metavar="SECONDS",
                       help=f"after SIGTERM, time for running requests to finish [{ServerSettings.drain_s:g}]")
    group.add_argument("--log-requests", "--enable-log-requests", dest="log_requests", action="store_true",
                       default=argparse.SUPPRESS, help="log one line a request, without its text [on]")
    group.add_argument("--disable-log-requests", "--no-log-requests", "--no-enable-log-requests", dest="log_requests",
                       action="store_false", default=argparse.SUPPRESS, help="log no line a request")
    group.add_argument("--access-log", dest="access_log", action="store_true", default=argparse.SUPPRESS,
                       help="log one line an HTTP request")
    group.add_argument("--disable-uvicorn-access-log", dest="access_log", action="store_false",
                       default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def settings(options: argparse.Namespace) -> ServerSettings:
    """The ServerSettings that were typed."""
    given: dict[str, Any] = given_fields(
        options, SERVER_FLAGS | dict.fromkeys((*LIST_FLAGS, "drain_s", "log_requests", "access_log"), "")
    )
    from_environment = Environment.read().api_key
    keys = options.api_key or ([from_environment] if from_environment else [])
    return ServerSettings(api_keys=tuple(keys), **given)


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    args, server_settings = engine_args(options), settings(options)
    from pelton.server.run import run_server

    run_server(args, server_settings, start)
    return 0


async def start(args: EngineArgs) -> AsyncLLM:
    """The engine in a supervised child process; this process never loads torch."""
    from pelton.async_llm import AsyncLLM
    from pelton.cli.loading import fetching

    with fetching(args) as report:
        return await AsyncLLM.start(args, child=True, on_fetch=report)


def _json_list(text: str) -> tuple[str, ...]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON list; write for example '[\"https://example.com\"]'")
    return tuple(values)
