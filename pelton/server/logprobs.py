"""Log-probabilities in the three shapes clients know: chat, completions, and vLLM's prompt_logprobs.

They are natural logarithms of the model's own distribution, before temperature and penalties. JSON has no -inf:
what is less likely than FLOOR is FLOOR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pelton.server.backend import TokenizerView
from pelton.types import Logprob, PositionLogprobs

FLOOR = -9999.0


class TokenNames:
    """How tokens are named in a reply: by their text, or as "token_id:123"."""

    def __init__(self, tokenizer: TokenizerView, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self.as_ids = as_ids

    def name(self, token_id: int, entry: Logprob) -> str:
        """A token's name."""
        if self.as_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.token_text(token_id) if entry.decoded_token is None else entry.decoded_token


class TextOffsets:
    """Where each token begins in the text, in characters. A token inside a character begins where that one does.

    Give `text` where it is known (an echoed prompt): tokens are then held against it, so that those which the
    tokenizer added, and which therefore do not stand in the text, take no room.
    """

    def __init__(
        self, tokenizer: TokenizerView, skip_special_tokens: bool, start: int = 0, text: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.special_tokens.values())
        self.skip_special_tokens = skip_special_tokens
        self.position = start
        self.text = None if text is None else text.encode()
        self.num_bytes = 0  # of `text`, passed so far

    def place(self, token_id: int) -> int:
        """The offset of the next token."""
        data = self._visible(token_id)
        inside = bool(data) and data[0] & 0xC0 == 0x80 and self.position > 0
        start = self.position - inside
        self.position += sum(byte & 0xC0 != 0x80 for byte in data)  # one for each first byte of a character
        return start

    def _visible(self, token_id: int) -> bytes:
        """The token's bytes in the text."""
        data, special = self.tokenizer.token_bytes(token_id), token_id in self.special
        if self.text is None:
            return b"" if special and self.skip_special_tokens else data
        if not self.text.startswith(data, self.num_bytes):
            if special:
                return b""
            if data[:1] == b" " and self.text.startswith(data[1:], self.num_bytes):
                data = data[1:]  # SentencePiece puts a space in front of a text
        self.num_bytes += len(data)
        return data


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs], num_top: int | None, names: TokenNames
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: the chosen token of each position, and its `num_top` most likely
    entries (None: all)."""

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": names.name(token_id, logprob),
            "logprob": floored(logprob),
            "bytes": list(names.tokenizer.token_bytes(token_id)),
        }

    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = sorted(position.items(), key=lambda item: -item[1].logprob)[:num_top]
        content.append({**entry(token_id, position[token_id]), "top_logprobs": [entry(*item) for item in top]})
    return {"content": content}


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    names: TokenNames,
    offsets: TextOffsets,
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. `None` stands for the first token of an echoed prompt."""
    reply: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token_id, position in zip(token_ids, positions, strict=True):
        reply["text_offset"].append(offsets.place(token_id))
        chosen = position[token_id] if position is not None else None
        reply["tokens"].append(names.name(token_id, chosen or Logprob(FLOOR)))
        reply["token_logprobs"].append(None if chosen is None else floored(chosen))
        if position is None:
            reply["top_logprobs"].append(None)
            continue
        top: dict[str, float] = {}
        for other_id, logprob in position.items():
            top.setdefault(names.name(other_id, logprob), floored(logprob))
        reply["top_logprobs"].append(top)
    return reply


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None, names: TokenNames) -> list[Any] | None:
    """vLLM's `prompt_logprobs`: for each prompt token, id -> logprob, rank and text; null for the first."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": floored(logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in position.items()
        }
        for position in positions
    ]


def floored(logprob: Logprob) -> float:
    """A number JSON can hold."""
    return max(logprob.logprob, FLOOR)
