"""`pelton bench quality`: what the chosen numerics cost, against float32 throughout.

Windows of real text are read by two engines, one after the other, and their distributions of each next token are
compared: the Kullback-Leibler divergence KL(float32 || configured), how often both find the same token likeliest, and
the perplexity of the text. A model's quality as such is not measured: the text is any text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from pelton.cli import loading
from pelton.cli.bench import positive, summarize
from pelton.cli.console import log_as_notes
from pelton.cli.flags import add_engine_flags, engine_args
from pelton.cli.parser import Parser
from pelton.config import EngineArgs
from pelton.door import BUILDER, log_choices
from pelton.engine.host import load_builder
from pelton.engine.step import EngineRequest
from pelton.errors import ConfigError, RequestFailedError
from pelton.text.tokenizer import Tokenizer, load_tokenizer
from pelton.types import SamplingParams
from pelton.weights.files import open_model

if TYPE_CHECKING:
    from torch import Tensor

    from pelton.runner.model_runner import ModelRunner

ROWS = 32  # distributions compared at a time: 32 x 262,144 float32 are 34 MB
SHORTEST_PARAGRAPH = 200  # characters; what is shorter is rarely prose


def add_arguments(parser: Parser, kind: str) -> None:
    """The text, and how much of it."""
    parser.add_argument("--text", metavar="FILE", help="what is read [Python's documentation of itself]")
    parser.add_argument("--num-windows", type=positive, default=4, metavar="N", help="places of the text [4]")
    parser.add_argument("--window", type=positive, default=512, metavar="N", help="tokens read at each place [512]")
    add_engine_flags(parser)


def measure(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Read the text in float32, then as configured, and compare."""
    asked = engine_args(options)
    args = loading.fetch(asked)
    args = replace(args, max_model_len=options.window + 1, max_num_seqs=1, enable_prefix_caching=False)
    exact = replace(args, dtype="float32", cpu_activations="fp32", kv_cache_dtype="auto")
    text = Path(options.text).read_text("utf-8", "replace") if options.text else documentation()
    tokenizer = load_tokenizer(open_model(Path(args.model)), args.tokenizer)
    windows = cut(text, tokenizer, options.num_windows, options.window)
    with tempfile.TemporaryFile() as file:  # 4 bytes for each token of the text and each of the vocabulary
        exact_scores = read(exact, windows, partial(write_logprobs, file), "reading in float32")
        file.seek(0)
        comparison = Comparison(file)
        scores = read(args, windows, comparison.add, "reading as configured")
    return {
        "model": asked.model,
        "num_tokens": len(scores),
        "same_likeliest_token": float(np.mean(comparison.agree)),
        "perplexity": perplexity(scores),
        "perplexity_in_float32": perplexity(exact_scores),
        "kl_divergence_nats": summarize(comparison.divergences),
    }


def documentation() -> str:
    """Prose that is on every machine: the paragraphs of Python's language reference that ship with it."""
    from pydoc_data.topics import topics

    paragraphs = [paragraph for _, topic in sorted(topics.items()) for paragraph in topic.split("\n\n")]
    prose = [
        " ".join(paragraph.split()) for paragraph in paragraphs
        if len(paragraph) >= SHORTEST_PARAGRAPH and paragraph[0].isalpha() and paragraph.endswith(".")
    ]
    return "\n\n".join(prose)


def cut(text: str, tokenizer: Tokenizer, num_windows: int, window: int) -> list[list[int]]:
    """Windows of the text, spread evenly, each of `window` tokens and begun as the model expects of a text."""
    first, token_ids = tokenizer.encode(""), tokenizer.encode(text, add_special_tokens=False)
    size = window - len(first)
    if size < 2:
        raise ConfigError(f"--window {window} is too short to predict anything; use {len(first) + 2} or more")
    if len(token_ids) < num_windows * size:
        raise ConfigError(
            f"the text has {len(token_ids)} tokens, too few for {num_windows} windows of {size}; give a longer --text, "
            "or lower --num-windows or --window"
        )
    step = len(token_ids) // num_windows
    return [first + token_ids[start : start + size] for start in range(0, num_windows * step, step)]


def read(
    args: EngineArgs, windows: Sequence[list[int]], on_logits: Callable[[Tensor], None], title: str
) -> list[float]:
    """Read the windows one by one with an engine that lives as long; what it computes goes through `on_logits`.

    Returns the log-probability of each token but the first of each window. Raises RequestFailedError if the model
    computes nonsense.
    """
    with loading.bar(title, at_once=True) as report, log_as_notes():
        engine = load_builder(BUILDER)(args, report)
        log_choices(engine.info)
    runner = getattr(engine.core.runner, "runner", engine.core.runner)  # of several ranks the first
    cast("ModelRunner", runner).on_prompt_logits = on_logits
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    scores = []
    for request_id, window in enumerate(windows):
        engine.core.submit(EngineRequest(request_id, window, params))
        while engine.core.has_work():
            for update in engine.core.step():
                if update.error is not None:
                    raise RequestFailedError(update.error)
                scores += [entry.logprobs[0] for entry in update.prompt_logprobs or () if entry is not None]
    return scores


def logprobs(logits: Tensor) -> Iterator[npt.NDArray[np.float32]]:
    """The distributions of logits [n, V], a few at a time."""
    for start in range(0, len(logits), ROWS):
        yield logits[start : start + ROWS].log_softmax(-1).cpu().numpy()


def write_logprobs(file: IO[bytes], logits: Tensor) -> None:
    """Append the distributions of logits [n, V] to the file."""
    for rows in logprobs(logits):
        rows.tofile(file)


class Comparison:
    """Holds distributions against those in a file, row by row in the same order."""

    def __init__(self, file: IO[bytes]) -> None:
        self.divergences: list[float] = []  # KL(file || given), nats
        self.agree: list[bool] = []  # whether both find the same token likeliest
        self._file = file

    def add(self, logits: Tensor) -> None:
        """The next rows, [n, V]."""
        for given in logprobs(logits):
            expected = np.fromfile(self._file, np.float32, given.size).reshape(given.shape)
            self.divergences += (np.exp(expected) * (expected - given)).sum(-1, dtype=np.float64).tolist()
            self.agree += (expected.argmax(-1) == given.argmax(-1)).tolist()


def perplexity(scores: Sequence[float]) -> float:
    """Of tokens with these log-probabilities."""
    return float(np.exp(-np.mean(scores)))
