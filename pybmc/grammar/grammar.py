"""Grammar: a JSON schema, a grammar or a regular expression, compiled for a model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, TypeGuard

from .. import checks
from ..engine.model import Model
from ..errors import ArgumentError, SchemaError, UnsupportedSchemaError, printable
from .after import After
from .compiler import in_time
from .lexemes import lark_of
from .state import State
from .vocabulary import Vocabulary, llguidance, vocabulary_of

log = logging.getLogger(__name__)

SIZE, DEPTH = 256 * 1024, 64            # bytes of a schema or grammar, and how deep a schema is nested
LARGEST = 9e18                          # of bounds: llguidance has no expression for larger ones, and
                                        # a maximum near -2^63 ends the process by recursion
MULTIPLE = 100_000                      # digits of multipleOf as a number: time and memory grow with it,
                                        # without an end from 10^6 on
RULES = 1000                            # of a grammar: what compiling takes may grow with their square
LARK = "%llguidance"                    # a grammar that begins so is llguidance's Lark; others are GBNF
VALUES = ("const", "enum", "default", "examples")      # keywords whose values are no schemas
OPTIONS = "x-guidance"                  # llguidance's own, in a schema
# Of Lark; texts, comments and regular expressions are matched to be left out.
_JSON = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<json>%json\s*\{)')
_SCHEMA = re.compile(r"%json\s*(?=\{)")
_RULE = re.compile(r"^[ \t]*[!?]*[\w-]+(?:\[[^\]\n]*\])?(?:\.-?\d+)?\s*:", re.MULTILINE)


class Grammar:
    """What a text has to follow, compiled for a model's vocabulary.
    It does not change: start() gives a state for a text.

    ignored: keywords of a schema that have no effect. Raises SchemaError for what is no schema or grammar,
    UnsupportedSchemaError with llguidance's words for what it refuses.
    """

    def __init__(self, vocabulary: Vocabulary, source: str):
        self.vocabulary = vocabulary
        self._matcher, warnings = vocabulary.compile(source)
        self.ignored = tuple(dict.fromkeys(word for warning in warnings for word in _ignored(warning)))

    @classmethod
    def json(cls, schema: Mapping | str | bool, model: Model, strict: bool = False) -> Grammar:
        """Compact JSON of a schema: an object, its text, or true for any JSON.
        strict: refuse keywords that would be ignored."""
        return cls(vocabulary_of(model), _schema(schema, strict))

    @classmethod
    def json_object(cls, model: Model) -> Grammar:
        """Any JSON object."""
        return cls.json({"type": "object"}, model)

    @classmethod
    def lark(cls, text: str, model: Model) -> Grammar:
        """llguidance's form of Lark: its rule `start` is the text.
        JSON of its schemas (%json) is compact too."""
        return cls(vocabulary_of(model),
                   llguidance().LLMatcher.grammar_from_lark(_compact(_checked("grammar", text))))

    @classmethod
    def gbnf(cls, text: str, model: Model) -> Grammar:
        """llama.cpp's grammars: the rule `root` is the text."""
        lark = in_time(lambda: lark_of(_checked("grammar", text)))
        return cls(vocabulary_of(model), llguidance().LLMatcher.grammar_from_lark(lark))

    @classmethod
    def text(cls, text: str, model: Model) -> Grammar:
        """GBNF, or Lark after %llguidance."""
        lark = isinstance(text, str) and text.lstrip().startswith(LARK)
        return cls.lark(text, model) if lark else cls.gbnf(text, model)

    @classmethod
    def regex(cls, pattern: str, model: Model) -> Grammar:
        """The whole text matches a regular expression, in the syntax of Rust's regex."""
        return cls(vocabulary_of(model),
                   llguidance().LLMatcher.grammar_from_regex(_checked("pattern", pattern)))

    def note_ignored(self) -> None:
        """Log what of the schema has no effect."""
        if self.ignored:
            log.warning("without effect in the schema: %s", printable(", ".join(self.ignored)))

    def start(self) -> State:
        """The state of a new text."""
        return State(self.vocabulary, self._matcher.deep_copy())

    def after(self, mark: str | bytes, opens: str | bytes = b"", gap: str | bytes = b"",
              ends: bool = True) -> After:
        """The state of a new text that is free until a mark and follows the grammar behind it.
        opens, gap, ends: After's."""
        given = [text.encode() if isinstance(text, str) else text for text in (mark, opens, gap)]
        if not given[0]:
            checks.refuse("mark", "a text that is not empty", mark)
        return After(given[0], self.start(), given[1], given[2], ends)


def grammar_of(model: Model, schema: Any = None, grammar: Any = None) -> Grammar | None:
    """What callers ask for: a JSON schema, or the text of a grammar, or one that is compiled.
    None: neither."""
    if schema is not None and grammar is not None:
        raise ArgumentError("schema and grammar: expected one of them, found both")
    for given in (schema, grammar):
        if isinstance(given, Grammar):
            if given.vocabulary is not vocabulary_of(model):
                checks.refuse("grammar", "a grammar of the same model", given)
            return given
    if schema is None:
        return None if grammar is None else Grammar.text(grammar, model)
    found = Grammar.json(schema, model)
    found.note_ignored()
    return found


def _ignored(warning: str) -> list[str]:
    """The keywords that a warning of llguidance is about."""
    kind, _, rest = warning.partition(": ")
    if kind == "Unimplemented keys":
        return re.findall(r'"([^"]*)"', rest)
    if kind == "Unknown format":
        return [f"format={rest}"]
    first = warning.split()[0]
    return ["minProperties", "maxProperties"] if first == "min/maxProperties" else [first]


def _schema(schema: Any, strict: bool) -> str:
    """llguidance's grammar of a schema."""
    value = _parsed(schema) if isinstance(schema, str) else schema
    value = dict(value) if isinstance(value, Mapping) else value
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise SchemaError(f"schema: expected an object, found {checks.shown(value)}")
    _check_depth(value)
    _check_numbers(value)
    options = {"whitespace_flexible": False, "lenient": not strict}
    try:
        text = json.dumps(narrowed(value), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise SchemaError(f"schema: {printable(str(error))}") from None
    _check_size("schema", text)
    try:
        return llguidance().LLMatcher.grammar_from_json_schema(text, overrides=options)
    except ValueError as error:
        raise SchemaError(f"schema: {printable(str(error))}") from None


def _compact(lark: str) -> str:
    """A grammar in Lark whose schemas ask for compact JSON, unless they have options of their own."""
    for found in _SCHEMA.finditer(lark):        # in texts and comments too: nothing tells these for certain
        _check_inline(lark, found.end())

    def with_options(found: re.Match) -> str:
        if not found["json"]:
            return found[0]
        try:
            schema, _ = json.JSONDecoder().raw_decode(lark, found.end() - 1)
        except (ValueError, RecursionError):
            return found[0]                     # llguidance says what is wrong
        more = "," * bool(schema)
        if OPTIONS in schema:
            return found[0]
        return f'{found[0]}"{OPTIONS}":{{"whitespace_flexible":false}}{more}'

    return _JSON.sub(with_options, lark)


def _parsed(text: str) -> Any:
    _check_size("schema", text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"schema: expected JSON: {error}") from None


def _levels(value: Any) -> Iterator[list]:
    """The values of a schema, level by level."""
    level = [value]
    while level:
        yield level
        level = [inner for item in level if isinstance(item, (dict, list, tuple))
                 for inner in (item.values() if isinstance(item, dict) else item)]


def _check_depth(value: Any) -> None:
    for depth, _ in enumerate(_levels(value)):
        if depth > DEPTH:
            raise SchemaError(f"schema: expected at most {DEPTH} levels, found more")


def _check_numbers(value: Any) -> None:
    """Refuse numbers that llguidance does not survive."""
    for item in (item for level in _levels(value) for item in level if isinstance(item, dict)):
        for key in ("maximum", "exclusiveMaximum"):
            if _is_number(item.get(key)) and item[key] < -LARGEST:
                raise UnsupportedSchemaError(f"schema: expected {key} to be {-LARGEST:g} or more, "
                                             f"found {checks.shown(item[key])}")
        step = item.get("multipleOf")
        if _is_number(step) and _digits(step) > MULTIPLE:
            raise UnsupportedSchemaError(f"schema: expected multipleOf with digits up to {MULTIPLE}, zeros "
                                         f"at the end not counted, found {checks.shown(step)}")


def narrowed(schema: Any) -> Any:
    """A schema whose numbers are between -LARGEST and LARGEST where it allows more, as for all of int64."""
    if isinstance(schema, Mapping):
        return {key: value if key in VALUES else _bound(key, value) if _is_number(value) else narrowed(value)
                for key, value in schema.items()}
    return [narrowed(item) for item in schema] if isinstance(schema, (list, tuple)) else schema


def _bound(key: str, value: float) -> float:
    if key in ("minimum", "exclusiveMinimum"):
        return max(value, -LARGEST)
    return min(value, LARGEST) if key in ("maximum", "exclusiveMaximum") else value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _digits(number: float) -> int:
    """A number's digits as a whole number, without zeros at the end and the decimal point."""
    exact = Decimal(number if isinstance(number, int) else repr(number))
    digits = "".join(map(str, exact.as_tuple().digits)).rstrip("0")
    return int(digits or "0") if len(digits) < 20 else 10 ** len(digits)


def _check_inline(lark: str, at: int) -> None:
    """The same for a schema within a grammar."""
    try:
        schema, _ = json.JSONDecoder(parse_int=float, strict=False).raw_decode(lark, at)
    except RecursionError:
        raise SchemaError(f"schema: expected at most {DEPTH} levels, found more") from None
    except ValueError:
        return                                  # llguidance says what is wrong
    _check_numbers(schema)


def _check_size(name: str, text: str) -> None:
    n = len(text.encode("utf-8", "replace"))
    if n > SIZE:
        raise SchemaError(f"{name}: expected at most {SIZE} bytes, found {n}")


def _checked(name: str, text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        checks.refuse(name, "a text that is not empty", text)
    _check_size(name, text)
    n = len(_RULE.findall(text))
    if n > RULES:
        raise SchemaError(f"{name}: expected at most {RULES} rules, found {n}")
    return text
