"""Random JSON schemas out of what public schemas are made of, and whether a value fits one:
the check is independent of the engine that writes the value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime, time
from fractions import Fraction
from ipaddress import IPv4Address
from random import Random
from typing import Any
from uuid import UUID

NAMES = ("id", "name", "age", "unit", "city name", "kind", "größe", "a/b", 'quo"te', "x")
WORDS = ("red", "green", "Ann", "", "a\nb", "ü", "true", "12")
PATTERNS = ("^[a-z]{1,4}$", "^[A-Z][a-z]+-[0-9]{2}$", "^(yes|no|maybe)$", "^\\d{3}$", "[aeiou]")
TYPES: dict[str, type | tuple] = {"object": dict, "array": list, "string": str, "boolean": bool,
                                  "null": type(None)}


# ---- schemas


def draw(rng: Random, depth: int = 3) -> dict:
    """A schema of a text of bounded length.
    The outermost may have definitions, which may contain themselves."""
    if rng.random() < 0.2:
        node = {"type": "object",
                "properties": {"value": draw_inner(rng, 0),
                               "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["value", "next"], "additionalProperties": False}
        return {"$defs": {"node": node, "leaf": draw_inner(rng, 1)},
                "type": "object",
                "properties": {"list": {"$ref": "#/$defs/node"}, "one": {"$ref": "#/$defs/leaf"}},
                "required": ["list"], "additionalProperties": False}
    return draw_inner(rng, depth)


def draw_inner(rng: Random, depth: int) -> dict:
    flat = (_string, _string, _integer, _number, _words, _constant, _choice)
    return rng.choice(flat if depth == 0
                      else (*flat, _object, _object, _object, _array, _array, _either, _tuple))(rng, depth)


def _object(rng: Random, depth: int) -> dict:
    names = rng.sample(NAMES, rng.randint(0, 4))
    found: dict = {"type": "object", "properties": {name: draw_inner(rng, depth - 1) for name in names},
                   "required": [name for name in names if rng.random() < 0.7], "additionalProperties": False}
    if rng.random() < 0.2:              # such bounds are followed where all names are required
        found |= {"additionalProperties": draw_inner(rng, 0), "required": names, "minProperties": len(names),
                  "maxProperties": len(names) + 1}
    return found


def _array(rng: Random, depth: int) -> dict:
    least = rng.randint(0, 2)
    return {"type": "array", "items": draw_inner(rng, depth - 1), "minItems": least,
            "maxItems": least + rng.randint(0, 2)}


def _tuple(rng: Random, depth: int) -> dict:
    n = rng.randint(1, 3)
    return {"type": "array", "prefixItems": [draw_inner(rng, depth - 1) for _ in range(n)], "items": False,
            "minItems": n}


def _either(rng: Random, depth: int) -> dict:
    return {"anyOf": [draw_inner(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _string(rng: Random, depth: int) -> dict:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12}
    if kind == 1:
        return {"type": "string", "format": rng.choice(list(FORMATS)), "maxLength": 36}
    least = rng.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _integer(rng: Random, depth: int) -> dict:
    low = rng.randint(-200, 200)
    found = {"type": "integer", rng.choice(("minimum", "exclusiveMinimum")): low,
             "maximum": low + rng.randint(5, 1000)}
    return found | ({"multipleOf": rng.choice((2, 5))} if rng.random() < 0.2 else {})


def _number(rng: Random, depth: int) -> dict:
    low = rng.randint(-50, 50) / rng.choice((1, 4))
    return {"type": "number", "minimum": low,
            rng.choice(("maximum", "exclusiveMaximum")): low + rng.randint(1, 40),
            "multipleOf": rng.choice((0.5, 0.25, 1))}


def _words(rng: Random, depth: int) -> dict:
    return {"enum": rng.sample([*WORDS, 1, 2.5, True, None, [1, "a"], {"a": 1}], rng.randint(1, 5))}


def _constant(rng: Random, depth: int) -> dict:
    return {"const": rng.choice([*WORDS, 0, False, None, {"a": [1, 2]}])}


def _choice(rng: Random, depth: int) -> dict:
    return rng.choice(({"type": ["boolean", "null"]}, {"type": "boolean"}, {"type": "null"},
                       {"type": ["string", "null"], "maxLength": 5}))


# ---- values


def fits(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a value fits a schema, as far as draw() goes."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return fits(value, _pointed(root, schema["$ref"]), root)
    return all(check(value, schema, root) for name, check in CHECKS.items() if name in schema)


def _pointed(root: Any, ref: str) -> Any:
    for part in ref.removeprefix("#").split("/")[1:]:
        root = root[part]
    return root


def is_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        whole = name == "number" or not isinstance(value, float) or value.is_integer()
        return isinstance(value, (int, float)) and not isinstance(value, bool) and whole
    return isinstance(value, TYPES[name])


def same(one: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def _about(kind: str, check):
    """A check of values of one type; others pass."""
    return lambda value, schema, root: not is_type(value, kind) or check(value, schema, root)


def _others(value: dict, schema: Mapping) -> list:
    return [inner for name, inner in value.items() if name not in schema.get("properties", {})]


def _is(parse):
    def check(text: str) -> bool:
        try:
            parse(text)
        except ValueError:
            return False
        return True
    return check


FORMATS = {
    "date": lambda text: _is(date.fromisoformat)(text.replace("0000-", "2000-")), "uuid": _is(UUID),
    "ipv4": _is(IPv4Address), "email": re.compile(r"[^@\s]+@[^@\s]+").fullmatch,
    "time": lambda text: _is(time.fromisoformat)(re.sub(r"[Zz]$", "+00:00",
                                                        re.sub(r"\.\d+", "", text)).replace(":60", ":59")),
    "date-time": lambda text: _is(datetime.fromisoformat)(
        re.sub(r"[Zz]$", "+00:00",
               re.sub(r"\.\d+", "", text)).replace(":60", ":59").replace("t", "T").replace("0000-", "2000-")),
}

CHECKS = {
    "type": lambda v, s, r: any(is_type(v, name)
                                for name in ([s["type"]] if isinstance(s["type"], str) else s["type"])),
    "enum": lambda v, s, r: any(same(v, one) for one in s["enum"]),
    "const": lambda v, s, r: same(v, s["const"]),
    "anyOf": lambda v, s, r: any(fits(v, one, r) for one in s["anyOf"]),
    "required": _about("object", lambda v, s, r: set(s["required"]) <= v.keys()),
    "properties": _about("object", lambda v, s, r: all(fits(v[name], inner, r) for name, inner
                                                       in s["properties"].items() if name in v)),
    "additionalProperties": _about("object", lambda v, s, r: all(fits(one, s["additionalProperties"], r)
                                                                 for one in _others(v, s))),
    "minProperties": _about("object", lambda v, s, r: len(v) >= s["minProperties"]),
    "maxProperties": _about("object", lambda v, s, r: len(v) <= s["maxProperties"]),
    "prefixItems": _about("array", lambda v, s, r: all(fits(one, inner, r)
                                                       for one, inner in zip(v, s["prefixItems"]))),
    "items": _about("array", lambda v, s, r: all(fits(one, s["items"], r)
                                                 for one in v[len(s.get("prefixItems", ())):])),
    "minItems": _about("array", lambda v, s, r: len(v) >= s["minItems"]),
    "maxItems": _about("array", lambda v, s, r: len(v) <= s["maxItems"]),
    "minLength": _about("string", lambda v, s, r: len(v) >= s["minLength"]),
    "maxLength": _about("string", lambda v, s, r: len(v) <= s["maxLength"]),
    "pattern": _about("string", lambda v, s, r: re.search(s["pattern"], v) is not None),
    "format": _about("string", lambda v, s, r: bool(FORMATS[s["format"]](v))),
    "minimum": _about("number", lambda v, s, r: v >= s["minimum"]),
    "maximum": _about("number", lambda v, s, r: v <= s["maximum"]),
    "exclusiveMinimum": _about("number", lambda v, s, r: v > s["exclusiveMinimum"]),
    "exclusiveMaximum": _about("number", lambda v, s, r: v < s["exclusiveMaximum"]),
    "multipleOf": _about("number", lambda v, s, r: (Fraction(str(v))
                                                    / Fraction(str(s["multipleOf"]))).denominator == 1),
}
