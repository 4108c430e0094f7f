"""A Jinja environment for templates nobody vouches for: no way out of it, and a bound on time, output and sizes.

Jinja's own sandbox keeps templates away from Python's internals. What it leaves open is work without end; here every
loop turn, call, filter and operation on text checks the clock, and what can make something large is measured first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 1.0  # of processor time, for one rendering
MAX_OUTPUT = 16 << 20  # characters given out, inner blocks included
MAX_SIZE = 1 << 26  # bytes that one operation may make, about
POINTER_BYTES = 8
MAX_RANGE = 100_000
_WIDE_FORMAT = re.compile(r"[0-9]{5,}|%[^a-zA-Z%]*\*")  # a field's width of 5 digits, or one given as an argument


class TemplateLimitError(jinja2.TemplateError):
    """A template does more than is allowed."""


class TemplateRefusal(jinja2.TemplateError):
    """A template says, with raise_exception(), that it does not take these messages."""


class _Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.deadline = time.thread_time() + MAX_SECONDS
        self.output = 0

    def tick(self, written: int = 0) -> None:
        self.output += written
        if self.output > MAX_OUTPUT:
            raise TemplateLimitError(f"it writes more than {MAX_OUTPUT >> 20} Mi characters")
        if time.thread_time() > self.deadline:
            raise TemplateLimitError(f"it runs for more than {MAX_SECONDS:g} seconds")


_meter: ContextVar[_Meter] = ContextVar("meter")


@contextlib.contextmanager
def metered() -> Iterator[None]:
    """Within it templates can be rendered, with fresh limits."""
    token = _meter.set(_Meter())
    try:
        yield
    finally:
        _meter.reset(token)


def _tick(written: int = 0) -> None:
    _meter.get().tick(written)


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, (list, tuple, dict)):
        return POINTER_BYTES * len(value)
    return abs(value) if isinstance(value, int) else 1


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateLimitError("it makes a value that is too large")


def _check_call(name: str, receiver: Any, args: Iterable[Any]) -> None:
    """Refuse a text operation whose result could be too large: as large as its sizes multiplied, or added up."""
    args = list(args)
    if name == "replace" and len(args) >= 2 and isinstance(receiver, str) and isinstance(args[0], str):
        _check_size(len(receiver) + (receiver.count(args[0]) + 1) * _size(args[1]))
    elif name == "translate":
        raise TemplateLimitError("it calls translate(), which templates here may not")
    else:
        _check_size(_size(receiver) * max(1, sum(map(_size, args))))
    if name in ("format", "format_map") and isinstance(receiver, str):
        _check_format(receiver)


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateLimitError("it formats with a width that is too large")


class SandboxedTemplates(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for: transformers' functions and settings, within limits."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationBlock],
            finalize=_finalize,
            optimized=False,  # constant expressions are computed within the limits too
            cache_size=0,
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _limited(function) for name, function in self.filters.items()}
        self.filters |= {"_turns": _turns, "_concat": _concat, "_same": _same}
        self.globals |= {"range": _range, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _AddLimits().visit(super()._parse(source, name, filename))
        return tree

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _tick()
        receiver = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # Jinja wraps str.format
        if isinstance(receiver, (str, bytes, int)):
            _check_call(obj.__name__, receiver, [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, op: str, left: Any, right: Any) -> Any:
        _tick()
        if op == "+":
            _check_size(max(_size(left), 1) + max(_size(right), 1))
        elif op == "%" and isinstance(left, str):
            _check_format(left)
        elif op == "*":
            _check_size(max(_size(left), 1) * max(_size(right), 1))
        elif op == "**":
            _check_size(1 << min(_size(right) * _size(left).bit_length(), 64))
        return super().call_binop(context, op, left, right)


class _AddLimits(NodeTransformer):
    """Puts the limits' functions into a template's tree, as filters of what is looped over, compared or sliced,
    and in place of `~`: there Jinja has no hook."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_turns", nodes.Const(written))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "_same")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, "_same")
        return node


def _filtered(value: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant wrote; rendering shows it as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _finalize(value: Any) -> Any:
    """Called for each {{ expression }}."""
    _tick(len(value) if isinstance(value, str) else 1)
    if isinstance(value, int) and value.bit_length() > 10_000:
        raise TemplateLimitError("it writes a number that is too large")
    return value


def _turns(iterable: Any, written: int) -> Iterator[Any]:
    """The items to loop over; each turn counts, with the literal text it writes."""
    for item in iterable:
        _tick(written)
        yield item


def _same(value: Any) -> Any:
    _tick()
    return value


def _concat(values: list[Any]) -> str:
    _tick()
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks the clock and what goes into it. Its mark for Jinja (pass_environment ...) is kept."""
    skip = int(hasattr(function, "jinja_pass_arg"))
    name = function.__name__.removeprefix("do_")
    grows = name in ("center", "indent", "replace", "join", "batch", "slice", "wordwrap", "format", "_tojson")

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _tick()
        if grows and len(args) > skip:
            _check_call(name, args[skip], [*args[skip + 1 :], *kwargs.values()])
        return function(*args, **kwargs)

    return limited


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _range(*args: int) -> range:
    numbers = range(*map(operator.index, args))
    if len(numbers) > MAX_RANGE:
        raise TemplateLimitError(f"it counts further than {MAX_RANGE}")
    return numbers


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def _strftime_now(format: str) -> str:
    _check_size(64 * len(format))
    return datetime.now().strftime(format)
