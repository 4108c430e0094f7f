"""From a constraint on the text (JSON schema, regex, choice, grammar) to one grammar for the runner.

The library llguidance compiles and checks it; what is refused here never reaches the engine.
"""

from __future__ import annotations

import importlib.util
import json

from pelton.errors import RequestError
from pelton.types import StructuredOutputsParams

MAX_GRAMMAR_CHARS = 256 * 1024
MAX_REGEX_CHARS = 4096


def compile_grammar(constraint: StructuredOutputsParams) -> str:
    """The constraint in llguidance's form. RequestError in one line if it is malformed or too large."""
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError(
            "structured outputs need the package llguidance, which is not installed; run 'pip install llguidance'",
            "structured_outputs",
        )
    from llguidance import LLMatcher

    try:
        grammar = _lower(constraint)
    except (ValueError, TypeError) as error:
        raise _refusal(str(error)) from None
    except RecursionError:
        raise _refusal("it is nested too deeply") from None
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise _refusal(f"it has {len(grammar)} characters, the limit is {MAX_GRAMMAR_CHARS}")
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        raise _refusal(problem)
    return grammar


def _lower(constraint: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher, grammar_from

    if constraint.json is not None:
        schema = json.loads(constraint.json) if isinstance(constraint.json, str) else constraint.json
        if not isinstance(schema, dict):
            raise ValueError("a JSON schema must be an object")
        if constraint.disable_additional_properties:
            schema = {"additionalProperties": False, **schema}
        compact: dict[str, bool | str] = {"whitespace_flexible": False} if constraint.disable_any_whitespace else {}
        if constraint.whitespace_pattern is not None:
            compact = {"whitespace_pattern": constraint.whitespace_pattern}
        return LLMatcher.grammar_from_json_schema({**schema, "x-guidance": compact} if compact else schema)
    if constraint.json_object is not None:
        return LLMatcher.grammar_from_json_schema({"type": "object"})
    if constraint.regex is not None:
        if len(constraint.regex) > MAX_REGEX_CHARS:
            raise ValueError(f"the regex has {len(constraint.regex)} characters, the limit is {MAX_REGEX_CHARS}")
        return LLMatcher.grammar_from_regex(constraint.regex)
    if constraint.choice is not None:
        if not constraint.choice or not all(isinstance(text, str) and text for text in constraint.choice):
            raise ValueError("choice must be a list of non-empty texts")
        choices = [json.dumps(text, ensure_ascii=False) for text in constraint.choice]
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(choices)}")
    if constraint.grammar is not None:
        return grammar_from("grammar", constraint.grammar)
    return _structural_tag(str(constraint.structural_tag))


def _structural_tag(text: str) -> str:
    """vLLM's structural tags: free text until a trigger, then a begin tag, JSON by a schema, and an end tag."""
    from llguidance import StructTag

    tags = json.loads(text)
    if not isinstance(tags, dict) or not isinstance(tags.get("structures"), list):
        raise ValueError("structural_tag must be a JSON object with 'structures' and 'triggers'")
    triggers = [trigger for trigger in tags.get("triggers", []) if isinstance(trigger, str)]
    structures = []
    for tag in tags["structures"]:
        if not isinstance(tag, dict):
            raise ValueError("each of 'structures' must be an object with begin, schema and end")
        begin, end = tag.get("begin", ""), tag.get("end", "")
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            raise ValueError(f"no trigger is a prefix of the begin tag {begin!r}")
        structures.append(StructTag(trigger=trigger, begin=begin, grammar=tag.get("schema", {}), end=end))
    return StructTag.to_grammar(structures)


def _refusal(problem: str) -> RequestError:
    reason = next((line.strip() for line in problem.splitlines() if line.strip()), "it cannot be compiled")
    return RequestError(f"structured_outputs cannot be used: {reason[:300]}", "structured_outputs")
