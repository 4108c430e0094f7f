"""Token ids to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from pelton.text.tokenizer import Tokenizer
from pelton.types import SamplingParams

MAX_CHARACTER_BYTES = 4  # UTF-8


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one push added."""

    text: str  # new text that is final
    num_tokens: int  # how many of the pushed tokens belong to the completion: fewer than pushed after a stop string
    stop: str | None = None  # the stop string that was found; nothing comes after it


class Detokenizer:
    """The text of one completion. Work per token does not depend on how long the text is.

    The deltas, put together, are `tokenizer.decode(all ids)` up to the end or the first stop string, but without a
    character that the end cuts: a text never shows half of one.

    `spaces_between_special_tokens` needs nothing here: no decoder that pelton reads puts spaces between them.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._finder = StopFinder(params.stop_strings)
        self._held = ""  # text that is not given out yet: it may be the beginning of a stop string
        self._num_tokens = 0
        self._stopped = not params.detokenize
        # A prompt may end within a character; the completion's first bytes then complete it.
        for token_id in prompt_token_ids[-MAX_CHARACTER_BYTES:]:
            self._decoder.decode(self._token_bytes(token_id))

    def push(self, token_ids: Sequence[int], finished: bool = False, hide_last: bool = False) -> TextDelta:
        """Add tokens.

        finished: these are the last ones, so all text comes out. hide_last: the last token ended the text (end of
        text, stop token) and is not shown, unless `include_stop_str_in_output` asks for it.
        """
        if self._stopped:
            return TextDelta("", len(token_ids))
        hidden = int(hide_last and not self._params.include_stop_str_in_output)
        given: list[str] = []
        for used, token_id in enumerate(token_ids[: len(token_ids) - hidden], 1):
            self._num_tokens += 1
            text = self._decoder.decode(self._token_bytes(token_id))
            if self._add(text, given):
                return TextDelta("".join(given), used, self._finder.found)
        self._num_tokens += hidden
        if finished:  # what the decoder still holds is the beginning of a character
            given.append(self._held)
            self._held = ""
        return TextDelta("".join(given), len(token_ids), self._finder.found)

    def _add(self, text: str, given: list[str]) -> bool:
        """Move what is final of the held text and `text` to `given`; True if a stop string was found."""
        if not text:
            return False
        count_matches = self._num_tokens > self._params.min_tokens
        end = self._finder.feed(text, count_matches)
        known = self._held + text
        found = self._finder.found
        if found is not None:
            self._stopped = True
            end += len(self._held)
            given.append(known[: end if self._params.include_stop_str_in_output else end - len(found)])
            self._held = ""
            return True
        keep = len(known) - self._finder.num_held
        given.append(known[:keep])
        self._held = known[keep:]
        return False

    def _token_bytes(self, token_id: int) -> bytes:
        if self._params.skip_special_tokens and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)


class StopFinder:
    """Finds the first of some strings to be complete in a text that comes in parts (Knuth, Morris and Pratt, 1977).

    Of strings that end at the same character the longest wins, so the answer depends on the text alone, not on how
    it was cut. Each character costs constant time, averaged, for each string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        # (string, failure): failure[k] is the longest beginning of string, shorter than k, that string[:k] ends with.
        self._patterns = [(string, _failure(string)) for string in sorted(strings, key=len, reverse=True)]
        self._matched = [0] * len(strings)  # for each string, how many of its characters the text ends with
        self.found: str | None = None

    @property
    def num_held(self) -> int:
        """How many characters at the end of the text may be the beginning of one of the strings."""
        return max(self._matched, default=0)

    def feed(self, text: str, count_matches: bool = True) -> int:
        """Add text; if a string is complete, set `found` and return where in `text` it ends.

        count_matches: whether strings that end in this part of the text count.
        """
        if not self._patterns:
            return len(text)
        for position, char in enumerate(text, 1):
            for index, (string, failure) in enumerate(self._patterns):
                length = self._matched[index]
                while length and string[length] != char:
                    length = failure[length]
                length += string[length] == char
                if length == len(string):
                    if count_matches:
                        self.found = string
                        return position
                    length = failure[length]
                self._matched[index] = length
        return len(text)


def _failure(string: str) -> list[int]:
    table = [0, 0]
    length = 0
    for char in string[1:]:
        while length and string[length] != char:
            length = table[length]
        length += string[length] == char
        table.append(length)
    return table
