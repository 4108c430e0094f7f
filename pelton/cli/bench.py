"""Measure: `latency` (a batch, alone), `throughput` (many prompts at once), `serve` (load on a running server)."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from pelton.cli.flags import add_engine_flags
from pelton.cli.parser import Parser, did_you_mean
from pelton.errors import ConfigError

KINDS = ("latency", "throughput", "serve")
PERCENTILES = (50, 90, 99)


def add_arguments(parser: Parser) -> None:
    """Which measurement, then its own arguments."""
    parser.add_argument("kind", metavar="{latency,throughput,serve}", nargs="?", default="",
                        help="pelton bench KIND --help tells more")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Measure and show."""
    kind = options.kind
    if kind not in KINDS:
        what = f"there is no bench {kind}{did_you_mean(kind, KINDS)}" if kind else "what is to be measured?"
        raise ConfigError(f"{what}; choose {', '.join(KINDS)}")
    parser = Parser(prog=f"pelton bench {kind}", description=f"Measure {kind}.")
    _add_common(parser)
    if kind == "serve":
        from pelton.cli import bench_serve

        bench_serve.add_arguments(parser)
        given = parser.parse_args(options.rest)
        result = bench_serve.measure(given)
    else:
        from pelton.cli import bench_offline

        bench_offline.add_arguments(parser, kind)
        add_engine_flags(parser, skip=("seed",))
        given = parser.parse_args(options.rest)
        result = bench_offline.measure(given, kind)
    show(result, kind, given.json)
    return 1 if result.get("num_failed") else 0


def _add_common(parser: Parser) -> None:
    parser.add_argument("--input-len", type=positive, default=128, metavar="N", help="tokens in a prompt [128]")
    parser.add_argument("--output-len", type=positive, default=64, metavar="N", help="tokens to generate [64]")
    parser.add_argument("--bench-seed", type=int, default=0, metavar="N", help="seed of the random prompts [0]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


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
            distributions.add_row(label, *(f"{number:,.2f}" for number in value.values()))
        else:
            figures.add_row(label, f"{value:,.2f}" if isinstance(value, float) else str(value))
    console.print(figures)
    if distributions.rows:
        console.print(distributions)
