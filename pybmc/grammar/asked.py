"""The fields by which clients ask for a schema or a grammar, in the words of OpenAI,
llama-server and Ollama."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .. import checks
from ..engine.model import Model
from ..errors import ArgumentError
from .grammar import Grammar

FIELDS = ("response_format", "json_schema", "grammar")
OLLAMA = (*FIELDS, "format")
TYPES = ("text", "json_object", "json_schema")          # of a response_format


class Asked(NamedTuple):
    """field: the one that asks. kind: "schema" or "grammar", and its value. strict: no keyword is ignored."""

    field: str
    kind: str
    value: Any
    strict: bool = False

    def compiled(self, model: Model) -> Grammar:
        if self.kind == "grammar":
            return Grammar.text(self.value, model)
        return Grammar.json(self.value, model, self.strict)


def asked(given: Mapping, names: Sequence[str] = FIELDS) -> Asked | None:
    """What the fields of a request ask for, those that are null or empty left out. Raises ArgumentError where
    two of them ask, or where one is not what it has to be."""
    found = [wish for name in names if given.get(name) is not None and (wish := _READERS[name](given[name]))]
    if len(found) > 1:
        raise ArgumentError(f"{found[1].field}: expected one of "
                            f"{' and '.join(wish.field for wish in found)}, found both")
    return found[0] if found else None


def grammar_asked(given: Mapping, model: Model) -> Grammar | None:
    """The same, compiled."""
    wish = asked(given)
    return wish.compiled(model) if wish else None


def format_asked(value: Any, field: str = "response_format") -> Asked | None:
    """What OpenAI's object with a type asks for; None where any text will do."""
    if not isinstance(value, Mapping):
        checks.refuse(field, "an object with a type", value)
    kind = checks.choice(f"{field}.type", value.get("type"), TYPES)
    if kind == "text":
        return None
    wrapped = kind == "json_schema" and (field == "response_format" or "json_schema" in value)
    inner, place = (value.get("json_schema", value), f"{field}.json_schema") if wrapped else (value, field)
    if not isinstance(inner, Mapping):
        checks.refuse(place, "an object with a schema", inner)
    schema, strict = inner.get("schema"), inner.get("strict")
    if kind == "json_object" and schema is None:
        schema = {"type": "object"}
    if not isinstance(schema, (Mapping, bool)):
        checks.refuse(f"{place}.schema", "an object", schema)
    if not isinstance(strict, (bool, type(None))):
        checks.refuse(f"{place}.strict", "true or false", strict)
    return Asked(field, "schema", schema, bool(strict))


def _json_schema(value: Any) -> Asked:
    if not isinstance(value, (Mapping, bool)):
        checks.refuse("json_schema", "an object", value)
    return Asked("json_schema", "schema", value)


def _grammar(value: Any) -> Asked | None:
    if not isinstance(value, str):
        checks.refuse("grammar", "a text", value)
    return Asked("grammar", "grammar", value) if value else None


def _format(value: Any) -> Asked | None:
    """Ollama's."""
    if value == "":
        return None
    if value != "json" and not isinstance(value, Mapping):
        checks.refuse("format", '"json" or a schema', value)
    return Asked("format", "schema", {"type": "object"} if value == "json" else value)


_READERS: Mapping[str, Callable[[Any], Asked | None]] = {
    "response_format": format_asked, "json_schema": _json_schema, "grammar": _grammar, "format": _format}
