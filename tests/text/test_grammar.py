"""Constraints become grammars, and malformed ones are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from pelton.errors import RequestError
from pelton.text.grammar import compile_grammar
from pelton.types import StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAGS = '{"structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}], "triggers": ["<f"]}'


@pytest.mark.parametrize(
    "constraint",
    [{"json": SCHEMA}, {"json": '{"type": "array"}'}, {"json": SCHEMA, "disable_any_whitespace": True},
     {"json": SCHEMA, "disable_additional_properties": True}, {"json_object": True}, {"regex": "[0-9]{3}"},
     {"choice": ["yes", 'say "no"', "é"]}, {"grammar": 'root ::= "a" | "b"'}, {"grammar": 'start: "a" | "b"'},
     {"structural_tag": TAGS}],
    ids=str,
)
def test_what_can_be_used(constraint: dict[str, Any]) -> None:
    assert compile_grammar(StructuredOutputsParams(**constraint))


@pytest.mark.parametrize(
    "constraint",
    [{"json": '{"type": 5}'}, {"json": {"type": 5}}, {"json": "[1]"}, {"json": "{"}, {"json": "[" * 100_000},
     {"json": {"$ref": "#/nowhere"}}, {"regex": "(a+"}, {"regex": "a" * 5000},
     {"choice": []}, {"choice": [""]}, {"choice": [1]}, {"grammar": "%%%"}, {"grammar": 'start: missing "a"'},
     {"structural_tag": "5"}, {"structural_tag": '{"structures": [1], "triggers": []}'},
     {"structural_tag": '{"structures": [{"begin": "<f>"}], "triggers": ["<g"]}'}, {"json": {"enum": ["x" * 300_000]}}],
    ids=lambda constraint: str(constraint)[:40],
)
def test_what_cannot_be_used_is_refused_in_one_line(constraint: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        compile_grammar(StructuredOutputsParams(**constraint))
    assert caught.value.param == "structured_outputs"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
