"""Complete one prompt (streamed to stdout), or a file of prompts to JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pelton.cli.console import AnswerWriter
from pelton.cli.flags import SAMPLING_FLAGS, add_engine_flags, add_flags, engine_args, sampling_fields
from pelton.cli.parser import Parser
from pelton.errors import ConfigError
from pelton.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from pelton.llm import LLM

RUN_FLAGS = SAMPLING_FLAGS | {"n": "completions of each prompt", "logprobs": "log-probabilities for each token"}


def add_arguments(parser: Parser) -> None:
    """The model, where prompts come from, where completions go."""
    add_engine_flags(parser, skip=("seed",))
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    group.add_argument("--input", metavar="FILE", help=(
        "a .jsonl file, each line a text or an object with prompt or messages and, if wanted, sampling fields; "
        "or a text file, each line a prompt; - is stdin, as JSON lines"))
    group.add_argument("--output", metavar="FILE", help="write JSON lines here [stdout]")
    group.add_argument("--chat", action="store_true", help="give each prompt to the chat template as a user message")
    add_flags(parser, "sampling", SamplingParams, RUN_FLAGS)


@dataclass(frozen=True)
class Job:
    """One prompt, as text or as messages, with its own sampling fields."""

    prompt: str | None
    messages: list[dict[str, Any]] | None
    fields: dict[str, Any]


def run(options: argparse.Namespace) -> int:
    """Read all prompts, then load the model, then complete."""
    args, given = engine_args(options), sampling_fields(options, RUN_FLAGS)
    jobs = read_jobs(options)
    from pelton.cli.loading import load

    streams = options.input is None and options.output is None and len(jobs) == 1 and given.get("n", 1) == 1
    with opened(options.output) as out:
        llm = load(args)
        params = [llm.get_default_sampling_params().clone(**given | job.fields) for job in jobs]
        if streams:
            stream_one(llm, jobs[0], params[0])
            return 0
        outputs = complete(llm, jobs, params)
        with writing_to(options.output):
            for job, output in zip(jobs, outputs, strict=True):
                print(json.dumps(record(job, output), ensure_ascii=False), file=out)
    return 0


def read_jobs(options: argparse.Namespace) -> list[Job]:
    """The prompts. ConfigError names the line that cannot be read."""
    if (options.prompt is None) == (options.input is None):
        raise ConfigError("give either --prompt TEXT or --input FILE")
    if options.prompt is not None:
        values: list[Any] = options.prompt
    else:
        values = list(_read_values(options.input))
    jobs = [_job(number, value, options.chat) for number, value in enumerate(values, 1)]
    if not jobs:
        raise ConfigError(f"{options.input} holds no prompts")
    return jobs


def _read_values(name: str) -> Iterator[Any]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {name}: {error}; give a text file in UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line) if name == "-" or name.endswith((".jsonl", ".json")) else line
        except ValueError as error:
            raise ConfigError(f"{name} line {number} is not JSON: {error}") from error


def _job(number: int, value: Any, chat: bool) -> Job:
    fields = dict(value) if isinstance(value, dict) else {"prompt": value}
    prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    if (prompt is None) == (messages is None) or not isinstance(prompt if messages is None else messages, (str, list)):
        raise ConfigError(f"prompt {number} is neither a text nor an object with prompt (text) or messages (list)")
    unknown = sorted(fields.keys() - SamplingParams.__dataclass_fields__.keys())
    if unknown:
        raise ConfigError(f"prompt {number}: {unknown[0]} is no sampling field")
    if chat and messages is None:
        prompt, messages = None, [{"role": "user", "content": prompt}]
    return Job(prompt, messages, fields)


@contextmanager
def opened(name: str | None) -> Iterator[TextIO]:
    """The file to write to, before any work is done, or stdout."""
    if name is None:
        yield sys.stdout
        return
    with writing_to(name):
        file = Path(name).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        yield file
    finally:
        with writing_to(name):
            file.close()


@contextmanager
def writing_to(name: str | None) -> Iterator[None]:
    """ConfigError where --output cannot be opened, written or closed."""
    try:
        yield
    except OSError as error:
        if name is None:
            raise
        raise ConfigError(f"cannot write {name}: {error.strerror}; choose another --output") from error


def complete(llm: LLM, jobs: Sequence[Job], params: Sequence[SamplingParams]) -> list[RequestOutput]:
    """The outputs in the order of `jobs`; texts and conversations are batched apart."""
    outputs: dict[int, RequestOutput] = {}
    texts = [i for i, job in enumerate(jobs) if job.messages is None]
    chats = [i for i, job in enumerate(jobs) if job.messages is not None]
    if texts:
        done = llm.generate([jobs[i].prompt or "" for i in texts], [params[i] for i in texts])
        outputs.update(zip(texts, done, strict=True))
    if chats:
        done = llm.chat([jobs[i].messages or [] for i in chats], [params[i] for i in chats])
        outputs.update(zip(chats, done, strict=True))
    return [outputs[i] for i in range(len(jobs))]


def stream_one(llm: LLM, job: Job, params: SamplingParams) -> None:
    """Write one completion to stdout as it comes."""
    writer = AnswerWriter()
    if job.messages is None:
        stream = llm.generate(job.prompt or "", params, stream=True)
    else:
        stream = llm.chat(job.messages, params, stream=True)
    for output in stream:
        writer.write(output.outputs[0].text)
    writer.end()


def record(job: Job, output: RequestOutput) -> dict[str, Any]:
    """One line of the output file."""
    asked = {"prompt": job.prompt} if job.messages is None else {"messages": job.messages}
    completions = []
    for completion in output.outputs:
        entry: dict[str, Any] = {"text": completion.text, "finish_reason": completion.finish_reason,
                                 "num_tokens": len(completion.token_ids)}
        if completion.logprobs is not None:
            entry["logprobs"] = [{str(token_id): logprob.logprob for token_id, logprob in position.items()}
                                 for position in completion.logprobs]
        completions.append(entry)
    error = {"error": output.error} if output.error else {}
    return asked | {"num_prompt_tokens": len(output.prompt_token_ids), "outputs": completions} | error
