"""Flags of vLLM that pelton has not: taken without effect and said so, or refused, as the doors do with arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pelton.cli.parser import Parser
from pelton.vllm_options import NOT_YET, ONLY, SWITCHES, VALUES, why_no_effect


def add_ignored(parser: Parser) -> None:
    """Accept the flags of the tables; none is in the help."""
    for name in SWITCHES:
        _add(parser, name, nargs=0)
    for name in (*VALUES, *ONLY):
        _add(parser, name)
    for name in NOT_YET:
        _add(parser, name, nargs="*")


def _add(parser: Parser, name: str, **options: Any) -> None:
    flag = f"--{name.replace('_', '-')}"
    parser.add_argument(flag, action=_Ignored, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


class _Ignored(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        line = why_no_effect(self.dest, values, self.option_strings[0])
        if line is not None:
            print(f"pelton: {line}", file=sys.stderr)
