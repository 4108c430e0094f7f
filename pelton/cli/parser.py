"""argparse with `_` and `-` alike in flags, did-you-mean on unknown ones, and errors of one line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from pelton.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors; flags may not be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """As in argparse; ConfigError for anything that is not understood."""
        options, unknown = self.parse_known_args(_with_dashes(args), namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            what = "flag" if flag.startswith("-") else "argument"
            self.error(f"unknown {what} {flag}{did_you_mean(flag, self._option_string_actions)}")
        return options

    def error(self, message: str) -> NoReturn:
        """ConfigError in place of usage and exit."""
        raise ConfigError(f"{message}; see {self.prog} --help")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """Positional arguments only: fifty flags in brackets help nobody."""
        super().add_usage(usage, [a for a in actions if not a.option_strings], [], prefix)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """", did you mean --x?" or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def _with_dashes(args: Sequence[str]) -> list[str]:
    """--max_model_len=4_096 -> --max-model-len=4_096; what follows a bare -- is left alone."""
    result, flags_end = [], False
    for arg in args:
        flags_end = flags_end or arg == "--"
        name, equals, value = arg.partition("=")
        is_flag = arg.startswith("--") and not flags_end and " " not in name
        result.append(name.replace("_", "-") + equals + value if is_flag else arg)
    return result
