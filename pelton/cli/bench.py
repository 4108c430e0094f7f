"""Measure: `latency` (a batch, alone), `throughput` (many prompts at once), `serve` (load on a running server),
`quality` (what the chosen numerics cost)."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Sequence
from typing import Any

from pelton.cli.parser import Parser, did_you_mean
from pelton.errors import ConfigError

KINDS = {"latency": "bench_offline", "throughput": "bench_offline", "serve": "bench_serve", "quality": "bench_quality"}
PERCENTILES = (50, 90, 99)


def add_arguments(parser: Parser) -> None:
    """Which measurement, then its own arguments."""
    parser.add_argument("kind", metavar="{" + ",".join(KINDS) + "}", nargs="?", default="",
                        help="pelton bench KIND --help tells more")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--quality", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # as the kind of that name


def run(options: argparse.Namespace) -> int:
    """Measure and show."""
    kind, rest = (options.kind, options.rest) if options.quality is None else ("quality", options.quality)
    if kind not in KINDS:
        what = f"there is no bench {kind}{did_you_mean(kind, KINDS)}" if kind else "what is to be measured?"
        raise ConfigError(f"{what}; choose {', '.join(KINDS)}")
    module = importlib.import_module(f"pelton.cli.{KINDS[kind]}")
    parser = Parser(prog=f"pelton bench {kind}", description=f"Measure {kind}.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    module.add_arguments(parser, kind)
    given = parser.parse_args(rest)
    result = module.measure(given, kind)
    show(result, kind, given.json)
    return 1 if result.get("num_failed") else 0


def add_workload(parser: Parser) -> None:
    """Random prompts of one length, completions of one length."""
    parser.add_argument("--input-len", type=positive, default=128, metavar="N", help="tokens in a prompt [128]")
    parser.add_argument("--output-len", type=positive, default=64, metavar="N", help="tokens to generate [64]")
    parser.add_argument("--bench-seed", type=int, default=0, metavar="N", help="seed of the random prompts [0]")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles (nearest rank) of at least one value."""
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **ranks}


def show(result: dict[str, Any], title: str, as_json: bool) -> None:
    """JSON, or two tables: single figures, and distributions (dictionaries from `summarize`)."""
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    figures = Table(title=f"pelton bench {title}", title_justify="left", show_header=False)
    distributions = Table("", "mean", *(f"p{p}" for p in PERCENTILES))
    for name, value in result.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            distributions.add_row(label, *map(digits, value.values()))
        else:
            figures.add_row(label, digits(value) if isinstance(value, float) else str(value))
    console.print(figures)
    if distributions.rows:
        console.print(distributions)


def digits(value: float) -> str:
    """Two decimals; of what is small, three digits."""
    return f"{value:,.2f}" if value == 0 or abs(value) >= 1 else f"{value:.3g}"
