"""Flags of vLLM that have no effect here: accepted, so that commands people have keep working, and said so."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pelton.cli.parser import Parser

# flag -> why it has no effect. A flag that would change what a model answers is never in this table.
SWITCHES = {
    "--disable-log-stats": "statistics are at /metrics and not logged",
    "--disable-frontend-multiprocessing": "the engine always runs in a process of its own",
    "--disable-custom-all-reduce": "there is one device",
    "--disable-async-output-proc": "output is always processed beside the engine",
    "--use-v2-block-manager": "there is one block manager",
    "--enable-hybrid-kv-cache-manager": "sliding-window layers always keep only their window",
    "--disable-hybrid-kv-cache-manager": "sliding-window layers always keep only their window",
    "--async-scheduling": "the schedule is always made beside the device's work",
    "--disable-fastapi-docs": "there are no such pages",
    "--use-tqdm-on-load": "progress is shown in a terminal anyway",
    "--worker-use-ray": "there is one device",
}
VALUES = {
    "--swap-space": "preempted requests are computed again, not swapped",
    "--preemption-mode": "preempted requests are computed again, not swapped",
    "--max-seq-len-to-capture": "graphs are captured as they are needed",
    "--num-scheduler-steps": "each step is scheduled",
    "--max-parallel-loading-workers": "weights are mapped from the file, not read by workers",
    "--distributed-executor-backend": "there is one device",
    "--compilation-config": "nothing is compiled at run time",
    "--max-log-len": "prompts are never logged",
    "--scheduler-delay-factor": "a request is scheduled as soon as there is room",
}
# flag -> the only value it may have: vLLM's default, which is what happens here
ONLY = {
    "--pipeline-parallel-size": "1",
    "--data-parallel-size": "1",
    "--kv-cache-dtype": "auto",
    "--tokenizer-mode": "auto",
    "--config-format": "auto",
    "--model-impl": "auto",
    "--task": "generate",
    "--runner": "generate",
    "--cpu-offload-gb": "0",
}


def add_ignored(parser: Parser) -> None:
    """Accept these flags; none is in the help."""
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for flag in SWITCHES:
        parser.add_argument(flag, action=_Ignored, nargs=0, **hidden)
    for flag in VALUES:
        parser.add_argument(flag, action=_Ignored, **hidden)
    for flag, value in ONLY.items():
        parser.add_argument(flag, action=_Only, choices=(value,), **hidden)


class _Only(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Nothing to do: argparse has checked the value."""


class _Ignored(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        flag = self.option_strings[0]
        print(f"pelton: {flag} has no effect: {(SWITCHES | VALUES)[flag]}", file=sys.stderr)
