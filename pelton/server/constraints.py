"""The dialects in which clients constrain a text: response_format, structured_outputs, guided_*. All become
StructuredOutputsParams; a request has one of them at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pelton.errors import RequestError
from pelton.types import StructuredOutputsParams

Strings = Annotated[list[str], Field(fail_fast=True)]
GUIDED = ("json", "regex", "choice", "grammar", "json_object")  # vLLM 0.9's guided_json and so on


class JsonSchema(BaseModel):
    """The `json_schema` member of a response format."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = ""
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    """OpenAI's way to constrain a text."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None

    def constraint(self) -> StructuredOutputsParams | None:
        """The same as StructuredOutputsParams."""
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.json_schema is None:
                raise RequestError("response_format json_schema needs json_schema.schema", "response_format")
            return StructuredOutputsParams(json=self.json_schema.json_schema)
        if self.type == "structural_tag":
            return StructuredOutputsParams(structural_tag=self.model_dump_json(exclude_unset=True))
        return None


class StructuredOutputs(BaseModel):
    """vLLM's way to constrain a text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def constraint(self) -> StructuredOutputsParams | None:
        """The same as StructuredOutputsParams."""
        given = self.model_dump(by_alias=True, exclude_unset=True)
        return StructuredOutputsParams(**{name: value for name, value in given.items() if value not in (None, False)})


def guided(fields: Mapping[str, Any], whitespace_pattern: str | None) -> StructuredOutputsParams | None:
    """vLLM 0.9's guided_* fields, by the names in GUIDED."""
    given = {kind: value for kind, value in fields.items() if value is not None and value is not False}
    return StructuredOutputsParams(**given, whitespace_pattern=whitespace_pattern) if given else None


def only_one(constraints: Sequence[StructuredOutputsParams | None]) -> StructuredOutputsParams | None:
    """The one that is set, if any."""
    found = [constraint for constraint in constraints if constraint is not None]
    if len(found) > 1:
        raise RequestError("give one constraint: response_format, structured_outputs or guided_*", "structured_outputs")
    return found[0] if found else None
