"""Chat messages before they reach a template: plain data, one shape, and no way to forge a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pelton.errors import RequestError
from pelton.text.tokenizer import Tokenizer

MAX_DEPTH = 64
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def plain_data(value: Any, param: str, depth: int = 0) -> Any:
    """A copy of JSON-like data made of dict, list, str, int, float, bool and None alone."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{param} is nested more than {MAX_DEPTH} levels deep", param)
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{param} must have text as keys", param)
        return {str(key): plain_data(item, param, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, param, depth + 1) for item in value]
    raise RequestError(f"{param} must be made of JSON values, got {type(value).__name__}", param)


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Content parts become one string, tool-call arguments a dict, `reasoning` also `reasoning_content`, and fields
    that are None are left out.
    """
    data = plain_data(messages, "messages")
    if not isinstance(data, list) or not data:
        raise RequestError("messages must be a non-empty list", "messages")
    normal = []
    for index, message in enumerate(data):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] must be an object with a role", "messages")
        message = {key: value for key, value in message.items() if value is not None}
        if "content" in message:
            message["content"] = _flatten(message["content"], index)
        if "reasoning" in message:
            message.setdefault("reasoning_content", message["reasoning"])
        if "tool_calls" in message:
            message["tool_calls"] = [_parse_call(call, index) for call in _list(message["tool_calls"], index)]
        normal.append(message)
    return normal


def _flatten(content: Any, index: int) -> str:
    """Content as one string; parts are joined by newlines."""
    if isinstance(content, str):
        return content
    texts = []
    for part in _list(content, index):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise RequestError(
                f"this model takes text only, but messages[{index}] has content of type {kind!r}", "messages"
            )
        texts.append(text)
    return "\n".join(texts)


def _parse_call(call: Any, index: int) -> dict[str, Any]:
    """A tool call whose `arguments` are a dict: clients send back the JSON text they were given."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(f"messages[{index}].tool_calls must hold objects with a function", "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = plain_data(json.loads(arguments) if arguments.strip() else {}, "messages")
        except (ValueError, RecursionError) as error:
            problem = f"messages[{index}]: a tool call's arguments are not JSON: {error}"
            raise RequestError(problem, "messages") from None
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _list(value: Any, index: int) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"messages[{index}] has {type(value).__name__} where text or a list is due", "messages")
    return value


class SpecialTokenShield:
    """Keeps text that spells a special token from becoming one.

    The tokenizer's separator is put behind the first character of each such text: nothing is matched or merged
    across it, and the tokenizer leaves it out of the ids. The template writes its own special tokens as ever.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._separator = tokenizer.separator
        self._specials = {token for token in tokenizer.special_tokens if len(token) > 1}
        by_start: dict[str, set[int]] = {}
        width = min(3, min(map(len, self._specials), default=1))
        for token in self._specials:
            by_start.setdefault(token[:width], set()).add(len(token))
        # One look at the text finds where a special token may begin; then its possible lengths are tried.
        self._lengths = {start: sorted(lengths) for start, lengths in by_start.items()}
        starts = "|".join(map(re.escape, self._lengths))
        self._start = re.compile(f"(?=({starts}))") if starts else None

    def apply(self, data: Any) -> Any:
        """`data` (plain data) with every string made harmless."""
        if isinstance(data, str):
            return self._separate(data)
        if isinstance(data, dict):
            return {self._separate(key): self.apply(value) for key, value in data.items()}
        if isinstance(data, list):
            return [self.apply(item) for item in data]
        return data

    def remove(self, text: str) -> str:
        """`text` without the separators."""
        return text.replace(self._separator, "")

    def _separate(self, text: str) -> str:
        if self._start is None:
            return text
        cuts = [
            match.start() + 1
            for match in self._start.finditer(text)
            if any(text[match.start() : match.start() + length] in self._specials for length in self._lengths[match[1]])
        ]
        if not cuts:
            return text
        edges = [0, *cuts, len(text)]
        return self._separator.join(text[start:end] for start, end in zip(edges, edges[1:], strict=False))
