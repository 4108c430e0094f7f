"""Typed fields: each wrong value is an error that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pelton.errors import ModelFormatError
from pelton.weights.fields import Fields, parse_json_object, read_json

GOOD: dict[str, Any] = {"i": 3, "f": 0.5, "s": "x", "b": False, "l": ["x"], "o": {"i": 4}, "null": None, "ids": [1, 2]}


def test_good_values() -> None:
    fields = Fields(GOOD)
    assert (fields.int("i"), fields.float("f"), fields.float("i"), fields.str("s")) == (3, 0.5, 3.0, "x")
    assert fields.bool("b") is False
    assert fields.str_list("l", length=1) == ["x"]
    assert (fields.optional_ints("ids"), fields.optional_ints("i"), fields.optional_ints("none")) == ([1, 2], [3], None)
    nested = fields.optional_object("o")
    assert nested is not None
    assert nested.int("i") == 4


def test_absent_and_null_take_the_default() -> None:
    fields = Fields(GOOD)
    for name in ("null", "none"):
        assert fields.int(name, 7) == 7
        assert fields.bool(name, False) is False
        assert fields.optional_int(name) is None
        assert fields.optional_float(name) is None
        assert fields.optional_str(name) is None
        assert fields.optional_object(name) is None
        with pytest.raises(ModelFormatError, match=f"config.json: field {name} is missing"):
            fields.int(name)


@pytest.mark.parametrize("value", ["8", 8.0, True, [8], {}, -1, 1 << 31, 10**400])
def test_integers(value: Any) -> None:
    with pytest.raises(ModelFormatError, match="field hidden_size must be"):
        Fields({"hidden_size": value}).int("hidden_size", low=1, high=1 << 20)


def test_defaults_lie_in_the_range_too() -> None:
    with pytest.raises(ModelFormatError, match="field head_dim must be at least 1, got 0"):
        Fields({}).int("head_dim", 0, low=1)
    with pytest.raises(ModelFormatError, match="field eps must be at most 1"):
        Fields({}).float("eps", 2.0, high=1.0)


@pytest.mark.parametrize("value", ["1", True, [1.0], float("nan"), float("inf"), 10**400, -0.1, 2.5])
def test_floats(value: Any) -> None:
    with pytest.raises(ModelFormatError, match="field eps must be"):
        Fields({"eps": value}).float("eps", low=0, high=2)


@pytest.mark.parametrize("value", [1, [], "x", True, None])
def test_objects(value: Any) -> None:
    with pytest.raises(ModelFormatError, match="field rope (must be an object|is missing)"):
        Fields({"rope": value}).object("rope")


def test_a_string_is_unicode() -> None:
    with pytest.raises(ModelFormatError, match="field act must be valid Unicode"):
        Fields({"act": "\ud800"}).optional_str("act")


def test_known_strings() -> None:
    fields = Fields({"kinds": ["a", "b"]})
    assert fields.str_list("kinds", known=("a", "b")) == ["a", "b"]
    with pytest.raises(ModelFormatError, match="field kinds holds 'b'; known are a, c"):
        fields.str_list("kinds", known=("a", "c"))


@pytest.mark.parametrize("value", [1, [], {}, True])
def test_strings(value: Any) -> None:
    with pytest.raises(ModelFormatError, match="field act must be a string"):
        Fields({"act": value}).str("act")


@pytest.mark.parametrize("value", [1, 0, "true", []])
def test_booleans(value: Any) -> None:
    with pytest.raises(ModelFormatError, match="field tied must be true or false"):
        Fields({"tied": value}).bool("tied")


@pytest.mark.parametrize("value", ["full", [1], [None], {}, ["a", "b"]])
def test_lists(value: Any) -> None:
    with pytest.raises(ModelFormatError, match="field kinds must"):
        Fields({"kinds": value}).str_list("kinds", length=1)


@pytest.mark.parametrize("value", ["1", [True], [1.5], [-1], -1, True])
def test_integer_or_list(value: Any) -> None:
    with pytest.raises(ModelFormatError, match="field eos must be"):
        Fields({"eos": value}).optional_ints("eos")


def test_nested_fields_say_where_they_are() -> None:
    nested = Fields({"rope": {"factor": "x"}}).optional_object("rope")
    assert nested is not None
    with pytest.raises(ModelFormatError, match="config.json: rope: field factor must be a number, got 'x'"):
        nested.float("factor")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b'"x"', b"null", b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "b": 2}}', b"\xff{}",
             b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}", "{}".encode("utf-16")]
)
def test_json(text: bytes) -> None:
    with pytest.raises(ModelFormatError, match=r"^config.json") as caught:
        parse_json_object(text, "config.json")
    assert len(str(caught.value)) < 250


def test_json_file_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.weights.fields.MAX_JSON_BYTES", 10)
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a":   1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes(b'{"a":    1}')
    with pytest.raises(ModelFormatError, match="larger than"):
        read_json(path)
