"""Entry point: finds the command, runs it, and turns every error a user can cause into one line and exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from pelton.cli.parser import Parser, did_you_mean
from pelton.errors import ConfigError, PeltonError

COMMANDS = {
    "chat": "talk to a model in the terminal",
    "serve": "serve a model over HTTP, with the OpenAI API",
    "run": "complete one prompt, or a file of prompts",
    "pull": "fetch a model, to be used later",
    "bench": "measure latency, throughput, a server, or what low precision costs",
}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        logging.getLogger("pelton").setLevel(logging.DEBUG)
    try:
        code = _run([argument for argument in arguments if argument != "--debug"])
        sys.stdout.flush()  # what fails here would else fail at exit, where nobody can tell
        return code
    except PeltonError as error:
        if debug:
            raise
        print(f"pelton: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        if debug:
            raise
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `pelton run ... | head`
        _drop_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:  # of this machine: a full disk, no more open files
        if debug:
            raise
        _drop_output()
        print(f"pelton: error: {error}; --debug shows where", file=sys.stderr)
        return EXIT_ERROR


def _drop_output() -> None:
    """What is still to be written to stdout cannot be; keep Python from trying it again at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command not in COMMANDS:
        _no_command(command)
    module = importlib.import_module(f"pelton.cli.{command}")
    parser = Parser(prog=f"pelton {command}", description=module.__doc__)
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(arguments[1:]))
    return code


def _no_command(command: str) -> NoReturn:
    """Answers --help and --version; anything else is an error."""
    if command in ("--version", "-V"):
        from importlib.metadata import version

        print(f"pelton {version('pelton')}")
        raise SystemExit(0)
    if command in ("--help", "-h", "help"):
        print("usage: pelton COMMAND ...\n\nAn LLM inference and serving engine.\n\ncommands:")
        for name, help_text in COMMANDS.items():
            print(f"  {name:8} {help_text}")
        print("\noptions:\n  --help, --version\n  --debug  show more, and the traceback of an error\n")
        print('Try: pelton chat "Why is the sky blue?"    More: pelton COMMAND --help')
        raise SystemExit(0)
    raise ConfigError(f"there is no command {command}{did_you_mean(command, COMMANDS)}; see pelton --help")
