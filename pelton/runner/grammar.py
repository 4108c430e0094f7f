"""Keeps the output of a request inside its grammar: a mask of the tokens that may come next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Vocabulary(Protocol):
    """What a grammar needs of a tokenizer."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The tokens that end a text."""

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json."""


class GrammarError(Exception):
    """A request cannot go on within its grammar. One line why, without the grammar and without the text."""


class GrammarState:
    """Where one request stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.num_consumed = 0

    def mask(self, output_ids: Sequence[int]) -> bytes:
        """The tokens that the grammar allows after `output_ids`, at its end only the ends of the text: bit i % 8 of
        byte i / 8 for token i.

        Repeating a step consumes nothing twice. GrammarError if the grammar cannot go on.
        """
        self.matcher.consume_tokens(list(output_ids[self.num_consumed :]))
        self.num_consumed = len(output_ids)
        mask = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            raise GrammarError(f"the grammar cannot go on ({self.matcher.stop_reason()}); try a simpler one")
        return mask

    @property
    def has_ended(self) -> bool:
        """Whether nothing but the end of the text is allowed."""
        return bool(self.matcher.is_stopped())


class Grammars:
    """Makes the grammar states of one model; its tokenizer is prepared when the first is asked for."""

    def __init__(self, load_tokenizer: Callable[[], Vocabulary]) -> None:
        self._load_tokenizer = load_tokenizer
        self._tokenizer: LLTokenizer | None = None

    def start(self, grammar: str, vocab_size: int) -> GrammarState:
        """The state at the beginning of a grammar, for logits of `vocab_size` tokens."""
        from llguidance import LLMatcher, LLTokenizer

        if self._tokenizer is None:
            tokenizer = self._load_tokenizer()
            self._tokenizer = LLTokenizer(tokenizer.to_json(), vocab_size, list(tokenizer.eos_token_ids))
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)  # its warnings show the text
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be used ({matcher.stop_reason()}); try a simpler one")
        return GrammarState(matcher)
