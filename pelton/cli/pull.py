"""Fetch a model, so that later commands find it on this machine; prints its path."""

from __future__ import annotations

import argparse

from pelton.cli.flags import ENGINE_FLAGS, add_flags, engine_args
from pelton.cli.parser import Parser
from pelton.config import EngineArgs

FLAGS = ("hub", "revision", "download_dir")


def add_arguments(parser: Parser) -> None:
    """MODEL and where it comes from."""
    parser.add_argument("model_tag", metavar="MODEL", nargs="?", help=ENGINE_FLAGS["model"])
    add_flags(parser, "options", EngineArgs, {name: ENGINE_FLAGS[name] for name in FLAGS})


def run(options: argparse.Namespace) -> int:
    """Fetch, and print where it is."""
    from pelton.cli.loading import fetch

    print(fetch(engine_args(options)).model)
    return 0
