"""Fetching and loading a model, with a progress bar on a terminal and one line a stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from pelton import door
from pelton.cli.console import log_as_notes
from pelton.config import EngineArgs
from pelton.types import OnProgress

if TYPE_CHECKING:
    from pelton.llm import LLM


def fetching(args: EngineArgs) -> AbstractContextManager[OnProgress]:
    """Shows how far the model has come, if it has to be fetched."""
    return bar(f"fetching {args.model}", in_bytes=True)


def fetch(args: EngineArgs) -> EngineArgs:
    """`args` with the model on this machine, served under the name it was asked for by."""
    with fetching(args) as report:
        return door.fetch(args, report)


def load(args: EngineArgs) -> LLM:
    """A model ready to generate, in this process."""
    name, args = args.model, fetch(args)
    with bar(f"loading {name}", at_once=True) as report, log_as_notes():
        from pelton.llm import LLM

        return LLM.from_args(args, on_progress=report)


@contextmanager
def bar(title: str, *, in_bytes: bool = False, at_once: bool = False) -> Iterator[OnProgress]:
    """A bar on stderr, there from the start (`at_once`) or from the first report, and gone at the end."""
    if not sys.stderr.isatty():
        with _line(title, at_once) as plain_report:
            yield plain_report
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TransferSpeedColumn,
    )

    sizes = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (TaskProgressColumn(),)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), *sizes)
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(title, total=None)

    def report(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        if at_once:
            progress.start()
        yield report
    finally:
        progress.stop()


@contextmanager
def _line(title: str, at_once: bool) -> Iterator[OnProgress]:
    said = at_once
    if at_once:
        print(f"pelton: {title}", file=sys.stderr)

    def report(done: int, total: int) -> None:
        nonlocal said
        if not said:
            print(f"pelton: {title} ({total / 1e6:,.0f} MB)", file=sys.stderr)
            said = True

    yield report
