"""Typed reading of a JSON object that somebody else wrote: every wrong field is a ModelFormatError that names it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pelton.errors import ModelFormatError

MAX_JSON_BYTES = 64 << 20
MAX_FLOAT = 1e30  # numbers that are larger are not believed: torch refuses to compute with what float32 cannot hold

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, no text can hold it

T = TypeVar("T")
N = TypeVar("N", int, float)
# The methods of Fields are named after the types they return, so inside the class the types need other names.
Int: TypeAlias = int
Float: TypeAlias = float
Str: TypeAlias = str
Bool: TypeAlias = bool


class Fields:
    """A view of `values`, the object found at `where` (for messages only).

    A field that is absent or null takes its default; without a default it is an error, except with `optional_...`,
    which return None. Numbers, defaults too, must lie in [low, high]; true and false are not numbers.
    """

    def __init__(self, values: Mapping[Str, Any], where: Str = "config.json") -> None:
        self.values = values
        self.where = where

    def int(self, name: Str, default: Int | None = None, *, low: Int = 0, high: Int = 1 << 31) -> Int:
        value = self._required(name, self.optional_int(name, low=low, high=high), default)
        return self._in_range(name, value, low, high)

    def float(
        self, name: Str, default: Float | None = None, *, low: Float = -MAX_FLOAT, high: Float = MAX_FLOAT
    ) -> Float:
        value = self._required(name, self.optional_float(name, low=low, high=high), default)
        return self._in_range(name, value, low, high)

    def str(self, name: Str, default: Str | None = None) -> Str:
        return self._required(name, self.optional_str(name), default)

    def bool(self, name: Str, default: Bool | None = None) -> Bool:
        value: Bool | None = self._typed(name, bool, "true or false")
        return self._required(name, value, default)

    def str_list(
        self, name: Str, default: list[Str] | None = None, *, length: Int | None = None,
        known: Collection[Str] | None = None,
    ) -> list[Str]:
        values: list[Str] = self._required(name, self._list(name, str, "a list of strings", length), default)
        for value in values:
            if known is not None and value not in known:
                raise self.error(name, f"holds {shorten(value)}; known are {', '.join(known)}")
        return values

    def object(self, name: Str) -> Fields:
        return self._required(name, self.optional_object(name), None)

    def optional_int(self, name: Str, *, low: Int = 0, high: Int = 1 << 31) -> Int | None:
        value = self._typed(name, int, "an integer")
        return None if value is None else self._in_range(name, value, low, high)

    def optional_float(self, name: Str, *, low: Float = -MAX_FLOAT, high: Float = MAX_FLOAT) -> Float | None:
        value = self._typed(name, (int, float), "a number")
        if value is None:
            return None
        if isinstance(value, int) and abs(value) > 1 << 1000 or not math.isfinite(value):
            raise self.error(name, "must be a finite number")
        return self._in_range(name, float(value), low, high)

    def optional_str(self, name: Str) -> Str | None:
        value: Str | None = self._typed(name, str, "a string")
        if value is not None and _SURROGATE.search(value):
            raise self.error(name, "must be valid Unicode, but holds half of a surrogate pair")
        return value

    def optional_ints(self, name: Str, *, low: Int = 0, high: Int = 1 << 31) -> list[Int] | None:
        """A list of integers; one integer counts as a list of one (as `eos_token_id` is written)."""
        value = self.values.get(name)
        values = [value] if isinstance(value, int) else self._list(name, int, "an integer or a list of integers", None)
        if values is None:
            return None
        return [Fields({name: value}, self.where).int(name, low=low, high=high) for value in values]

    def optional_object(self, name: Str) -> Fields | None:
        """The nested object of that name."""
        value = self._typed(name, dict, "an object")
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def error(self, name: Str, problem: Str) -> ModelFormatError:
        """The error to raise about the field `name`."""
        return ModelFormatError(f"{self.where}: field {name} {problem}")

    def _required(self, name: Str, value: T | None, default: T | None) -> T:
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        return value

    def _typed(self, name: Str, kind: type | tuple[type, ...], what: Str) -> Any:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, f"must be {what}, got {shorten(value)}")
        return value

    def _in_range(self, name: Str, value: N, low: N, high: N) -> N:
        if value < low:
            raise self.error(name, f"must be at least {low}, got {shorten(value)}")
        if value > high:
            raise self.error(name, f"must be at most {high}, got {shorten(value)}")
        return value

    def _list(self, name: Str, kind: type, what: Str, length: Int | None) -> Any:
        values = self._typed(name, list, what)
        if values is None:
            return None
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise self.error(name, f"must be {what}, but holds {shorten(value)}")
        if length is not None and len(values) != length:
            raise self.error(name, f"must have {length} entries, got {len(values)}")
        return values


def shorten(value: object, limit: int = 60) -> str:
    """`value` as it looks in Python, cut so that a message stays one line."""
    if isinstance(value, int) and not -(1 << 256) < value < 1 << 256:
        return "an integer of more than 256 bits"  # Python refuses to print very long integers
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'object'} of {len(value)} entries"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; ModelFormatError if it is too large, not JSON, or not an object."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ModelFormatError(f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MiB")
    return parse_json_object(data, path.name)


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """`data` as a JSON object without duplicate keys; ModelFormatError otherwise."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ModelFormatError(f"{where}: key {shorten(key)} occurs twice")
            values[key] = value
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{where} is not valid JSON: {shorten(str(error), 120)}") from None
    if not isinstance(values, dict):
        raise ModelFormatError(f"{where} must hold a JSON object, got {shorten(values)}")
    return values
