"""The shapes of answers: from RequestOutput to the choices of a chat or a completion, whole and in chunks.

A chunk's finish_reason is null until the last one of its choice: some typed clients insist on the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pelton.server.logprobs import (
    TextOffsets,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from pelton.types import CompletionOutput, RequestOutput

Choice = dict[str, Any]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the engine takes it, and as it was written (None: it came as token ids)."""

    token_ids: list[int]
    text: str | None = None


class Reply(Protocol):
    """One request's answer in the making; for a stream it remembers what each choice has shown."""

    object_name: str
    chunk_name: str

    def deltas(self, prompt_index: int, output: RequestOutput) -> Iterator[Choice]:
        """The choices of the chunks that `output`, which holds only what is new, gives rise to."""
        ...

    def choices(self, prompt_index: int, output: RequestOutput) -> list[Choice]:
        """The choices of a whole answer."""
        ...

    def extras(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """What a whole answer holds beside its choices."""
        ...


class ChatReply:
    """chat.completion and chat.completion.chunk"""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self, names: TokenNames, *, n: int, role: str, logprobs: bool, num_top: int | None, echo: str
    ) -> None:
        self.names = names
        self.n = n
        self.role = role
        self.logprobs = logprobs
        self.num_top = num_top  # None: all
        self.echo = echo  # stands before each answer
        self.begun = False

    def deltas(self, prompt_index: int, output: RequestOutput) -> Iterator[Choice]:
        """First the role of every choice, then text."""
        if not self.begun:
            self.begun = True
            for index in range(self.n):
                yield self._delta(index, {"role": self.role, "content": ""})
            if self.echo:
                for index in range(self.n):
                    yield self._delta(index, {"content": self.echo})
        for one in output.outputs:
            if one.text or one.finish_reason or (self.logprobs and one.token_ids):
                choice = self._delta(one.index, {"content": one.text}, self._logprobs(one))
                yield choice | _ending(one)

    def choices(self, prompt_index: int, output: RequestOutput) -> list[Choice]:
        """One message for each sample."""
        return [
            {
                "index": one.index,
                "message": {"role": self.role, "content": self.echo + one.text, "refusal": None, "tool_calls": []},
                "logprobs": self._logprobs(one),
                **_ending(one),
            }
            for one in output.outputs
        ]

    def extras(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The prompt's log-probabilities stand at the top: a chat has one prompt."""
        return {"prompt_logprobs": prompt_logprobs(outputs[0].prompt_logprobs, self.names)}

    def _delta(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> Choice:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, one: CompletionOutput) -> dict[str, Any] | None:
        if not self.logprobs or one.logprobs is None:
            return None
        return chat_logprobs(one.token_ids, one.logprobs, self.num_top, self.names)


class CompletionReply:
    """text_completion, whole and in chunks. A choice's index is prompt_index * n + sample."""

    object_name = chunk_name = "text_completion"

    def __init__(
        self,
        names: TokenNames,
        prompts: Sequence[EncodedPrompt],
        *,
        n: int,
        logprobs: bool,
        prompt_logprobs: bool,
        echo: bool,
        skip_special_tokens: bool,
    ) -> None:
        self.names = names
        self.n = n
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs  # shown in their own field
        self.echo = echo
        self.skip_special_tokens = skip_special_tokens
        decode = names.tokenizer.decode
        self.echoes = [
            "" if not echo else decode(p.token_ids, skip_special_tokens=False) if p.text is None else p.text
            for p in prompts
        ]
        self.offsets: dict[int, TextOffsets] = {}  # by choice

    def deltas(self, prompt_index: int, output: RequestOutput) -> Iterator[Choice]:
        """Where it is asked for, first the prompt of every choice, then text."""
        if self.echo and prompt_index * self.n not in self.offsets:
            for sample in range(self.n):
                index = prompt_index * self.n + sample
                self._start(index, prompt_index)
                yield {
                    "index": index,
                    "text": self.echoes[prompt_index],
                    "logprobs": self._echo_logprobs(prompt_index, output),
                    "finish_reason": None,
                }
        for one in output.outputs:
            if one.text or one.finish_reason or (self.logprobs and one.token_ids):
                index = prompt_index * self.n + one.index
                logprobs = self._logprobs(one, self._start(index, prompt_index))
                yield {"index": index, "text": one.text, "logprobs": logprobs, **_ending(one)}

    def choices(self, prompt_index: int, output: RequestOutput) -> list[Choice]:
        """One text for each sample."""
        shown = prompt_logprobs(output.prompt_logprobs, self.names) if self.prompt_logprobs else None
        choices = []
        for one in output.outputs:
            index = prompt_index * self.n + one.index
            logprobs = self._logprobs(one, self._start(index, prompt_index))
            if self.echo and logprobs is not None:
                before = self._echo_logprobs(prompt_index, output) or {}
                logprobs = {key: before[key] + logprobs[key] for key in logprobs}
            text = self.echoes[prompt_index] + one.text
            choices.append({"index": index, "text": text, "logprobs": logprobs, **_ending(one),
                            "prompt_logprobs": shown})
        return choices

    def extras(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _start(self, index: int, prompt_index: int) -> TextOffsets:
        start = len(self.echoes[prompt_index])
        if index not in self.offsets:
            self.offsets[index] = TextOffsets(self.names.tokenizer, self.skip_special_tokens, start)
        return self.offsets[index]

    def _logprobs(self, one: CompletionOutput, offsets: TextOffsets) -> dict[str, Any] | None:
        if not self.logprobs or one.logprobs is None:
            return None
        return completion_logprobs(one.token_ids, one.logprobs, self.names, offsets)

    def _echo_logprobs(self, prompt_index: int, output: RequestOutput) -> dict[str, Any] | None:
        if not self.logprobs or output.prompt_logprobs is None:
            return None
        offsets = TextOffsets(self.names.tokenizer, False, text=self.echoes[prompt_index])
        return completion_logprobs(output.prompt_token_ids, output.prompt_logprobs, self.names, offsets)


def _ending(one: CompletionOutput) -> dict[str, Any]:
    """How a choice ended; vLLM's stop_reason comes with the end alone."""
    if one.finish_reason is None:
        return {"finish_reason": None}
    return {"finish_reason": one.finish_reason, "stop_reason": one.stop_reason}
