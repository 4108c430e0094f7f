"""A request's body: bytes to JSON, strictly. What this lets through, every later stage can encode and compare."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from pelton.errors import RequestError

SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes, max_depth: int) -> Any:
    """The value in `body`.

    Raises RequestError for what is not UTF-8 or not JSON, and for what JSON leaves open: NaN and infinities,
    numbers beyond 64 bits, duplicate keys, half a surrogate pair, nesting deeper than `max_depth`.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise RequestError(f"the body is nested deeper than {max_depth} levels") from None
    _check_depth(value, max_depth)
    if SURROGATE_ESCAPE.search(body):
        _check_surrogates(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise RequestError("the body holds an object with the same key twice")
    return result


def _parse_int(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise RequestError("the body holds an integer beyond 64 bits")
    return value


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RequestError("the body holds a number that is not finite")
    return value


def _refuse_constant(name: str) -> None:
    raise RequestError(f"the body holds {name}, which is not JSON")


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise RequestError(f"the body is nested deeper than {max_depth} levels")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("the body holds half of a surrogate pair, which is not text") from None
