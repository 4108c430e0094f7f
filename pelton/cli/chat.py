"""Talk to a model. With a prompt: one answer, streamed. Without: a conversation (/help tells more)."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from pelton.cli.console import AnswerWriter, note
from pelton.cli.flags import SAMPLING_FLAGS, add_engine_flags, add_flags, engine_args, sampling_fields
from pelton.cli.parser import Parser
from pelton.errors import ConfigError, PeltonError
from pelton.types import SamplingParams
from pelton.weights.hub import CATALOGUE

if TYPE_CHECKING:
    from pelton.llm import LLM

# Where neither the checkpoint nor the person says how to sample: careful enough for small models.
CHAT_SAMPLING = {"temperature": 0.6, "top_p": 0.9}
HELP = """/reset  forget the conversation
/exit   leave (also Ctrl-D)
/help   this list
Ctrl-C stops an answer. Several lines: end each but the last with a backslash."""


def add_arguments(parser: Parser) -> None:
    """PROMPT, the model, how to sample."""
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to say; without it, a conversation starts")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    flags = {**SAMPLING_FLAGS, "max_tokens": "most tokens of an answer [as many as the context holds]"}
    add_flags(parser, "sampling", SamplingParams, flags)
    add_engine_flags(parser, skip=("seed",), positional=False)


def parse_prompt(words: Sequence[str]) -> str | None:
    """The one PROMPT that was typed. ConfigError for several, or for the name of a model (serve and run take one)."""
    if words and words[0] in CATALOGUE:
        raise ConfigError(f"{words[0]} is a model; to talk to it use pelton chat --model {words[0]}")
    if len(words) > 1:
        raise ConfigError('put the prompt in quotes: pelton chat "..."; a model is chosen with --model NAME')
    return words[0] if words else None


def run(options: argparse.Namespace) -> int:
    """One answer or a conversation."""
    args, given = engine_args(options), sampling_fields(options)
    prompt = parse_prompt(options.prompt)
    if prompt is None and not sys.stdin.isatty():
        prompt = read_all(sys.stdin) or None
    from pelton.cli.loading import load

    llm = load(args)
    conversation = Conversation(llm, chat_params(llm, given), options.system)
    if prompt is not None:
        conversation.answer(prompt)
        return 0
    note(f"{args.model}. /help for help, Ctrl-D to leave.")
    return converse(conversation)


def read_all(source: TextIO) -> str:
    """What is piped in. ConfigError if it is not UTF-8."""
    try:
        text = source.read()
        text.encode()  # where the locale is C, Python reads other bytes as halves of surrogate pairs
    except UnicodeError as error:
        raise ConfigError(f"stdin is no text in UTF-8 ({error}); convert it, for example with iconv") from error
    return text.strip()


def chat_params(llm: LLM, given: dict[str, Any]) -> SamplingParams:
    """What was typed, else what the checkpoint says, else CHAT_SAMPLING."""
    defaults = llm.get_default_sampling_params()
    base = {} if (defaults.temperature, defaults.top_p, defaults.top_k) != (1.0, 1.0, 0) else CHAT_SAMPLING
    return defaults.clone(**{"max_tokens": None, **base, **given})


@dataclass
class Conversation:
    """The messages so far; each answer is streamed to the terminal and becomes a message."""

    llm: LLM
    params: SamplingParams
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, prompt: str) -> None:
        """Stream the answer to `prompt`. KeyboardInterrupt keeps what was said; an error forgets the prompt."""
        before = len(self.messages)
        self.messages.append({"role": "user", "content": prompt})
        writer, said, num_tokens = AnswerWriter(), "", 0
        start = first = time.monotonic()
        try:
            with contextlib.closing(self.llm.chat(list(self.messages), self.params, stream=True)) as stream:
                for output in stream:
                    completion = output.outputs[0]
                    first = first if num_tokens else time.monotonic()
                    num_tokens += len(completion.token_ids)
                    said += completion.text
                    writer.write(completion.text)
        except PeltonError:
            del self.messages[before:]
            raise
        finally:
            writer.end()
            if said:
                self.messages.append({"role": "assistant", "content": said})
        note(summary(num_tokens, first - start, time.monotonic() - first))


def summary(num_tokens: int, first_s: float, rest_s: float) -> str:
    """Tokens, their rate after the first one, and the time the first one took."""
    rate = f", {(num_tokens - 1) / rest_s:.1f} tokens/s" if num_tokens > 1 and rest_s > 0 else ""
    return f"{num_tokens} token{'s' * (num_tokens != 1)}{rate}, first after {first_s:.2f} s"


def converse(conversation: Conversation) -> int:
    """Prompt and answer, until Ctrl-D or /exit."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has a history and can be edited)
    while True:
        try:
            line = read_prompt()
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except UnicodeError as error:
            note(f"That is no text in UTF-8 ({error}).")
            continue
        if line in ("/exit", "/quit", "/bye"):
            return 0
        if line == "/reset":
            conversation.reset()
            note("The conversation starts anew.")
        elif line.startswith("/"):
            note(HELP if line == "/help" else f"There is no {line}.\n{HELP}")
        elif line:
            _answer_or_say_why_not(conversation, line)


def _answer_or_say_why_not(conversation: Conversation, prompt: str) -> None:
    try:
        conversation.answer(prompt)
    except KeyboardInterrupt:
        note("Stopped.")
    except PeltonError as error:
        note(f"{error} (/reset forgets the conversation)")


def read_prompt() -> str:
    """What the person types; a backslash at the end of a line goes on with the next one."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines).strip()
