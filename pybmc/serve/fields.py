"""A request's body: strict JSON, and its fields as checked values. What is null is absent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import inf, isfinite
from typing import NoReturn, overload

from .. import checks
from ..errors import ArgumentError
from .errors import Refused, unsupported, wrong

DEPTH = 64                              # nesting of lists and objects
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(data: bytes) -> Fields:
    """The object in a body. Refused: what is not UTF-8, not JSON, nested too deep, or no object."""
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _broken(f"the body is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise _broken(f"the body is nested deeper than {DEPTH}") from None
    except json.JSONDecodeError as error:
        raise _broken(f"the body is not JSON: {error}") from None
    except ValueError:
        raise _broken("a number has too many digits") from None
    if not isinstance(value, dict):
        raise _broken(f"expected a JSON object, found {_kind(value)}")
    _check(value)
    return Fields(value)


def _broken(message: str) -> Refused:
    return Refused(400, "invalid_json", message)


def _refuse_constant(name: str) -> NoReturn:
    raise _broken(f"the body is not JSON: {name} is no number of JSON")


def _check(value) -> None:
    """Depth, half surrogate pairs and numbers beyond floats; without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        inner = []
        for item in level:
            if isinstance(item, str) and _SURROGATE.search(item):
                raise _broken("a string has half a surrogate pair")
            if isinstance(item, float) and not isfinite(item):
                raise _broken("a number is too large")
            if isinstance(item, (dict, list)) and depth > DEPTH:
                raise _broken(f"the body is nested deeper than {DEPTH}")
            if isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
        level = inner


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


class Fields(dict):
    """Fields by name, without those that are null. where: what stands before a name in messages."""

    def __init__(self, given: dict, where: str = ""):
        super().__init__((name, value) for name, value in given.items() if value is not None)
        self.where = where

    def refuse(self, names) -> None:
        """Refuse fields that ask for something: null, false,
        an empty list and an empty text ask for nothing."""
        for name in names:
            if self.get(name):
                raise unsupported(self.where + name)

    def wrong(self, name: str, why: str) -> Refused:
        """A refusal of a field; why: what is said behind its name."""
        return wrong(self.where + name, why)

    def missing(self, name: str, expected: str) -> Refused:
        return self.wrong(name, f"is missing; expected {expected}")

    def needed(self, name: str) -> str:
        """A text that is there, and not empty."""
        found = self.text(name)
        if not found:
            raise self.missing(name, "a text")
        return found

    def bad(self, name: str, expected: str) -> NoReturn:
        value = json.dumps(self[name], ensure_ascii=False)
        shown = value if len(value) <= 60 else value[:60] + ".."
        raise self.wrong(name, f"is {shown}; expected {expected}")

    def _checked(self, check: Callable, name: str, default, expected: str, *bounds):
        if name not in self:
            return default
        try:
            return check(name, self[name], *bounds)
        except ArgumentError:
            self.bad(name, expected + _range(*bounds))

    def number(self, name: str, default=None, low: float = -inf, high: float = inf):
        return self._checked(checks.number, name, default, "a number", low, high)

    def whole(self, name: str, default=None, low: float = 0, high: float = inf):
        return self._checked(checks.whole, name, default, "a whole number", low, high)

    def _of(self, kind: type, name: str, default, expected: str):
        if name in self and not isinstance(self[name], kind):
            self.bad(name, expected)
        return self.get(name, default)

    @overload
    def flag(self, name: str, default: bool = False) -> bool: ...
    @overload
    def flag(self, name: str, default: None) -> bool | None: ...
    def flag(self, name: str, default: bool | None = False) -> bool | None:
        return self._of(bool, name, default, "true or false")

    @overload
    def text(self, name: str) -> str | None: ...
    @overload
    def text(self, name: str, default: str) -> str: ...
    def text(self, name: str, default: str | None = None) -> str | None:
        return self._of(str, name, default, "a text")

    def listed(self, name: str, most: float = inf) -> list:
        found = self._of(list, name, [], "a list")
        if len(found) > most:
            raise self.wrong(name, f"has {len(found)} elements; expected at most {most}")
        return found

    def object(self, name: str) -> Fields:
        return Fields(self._of(dict, name, {}, "an object"), f"{self.where}{name}.")

    def texts(self, name: str, most: float = inf) -> list[str]:
        """A text, or a list of them, none of them empty."""
        value = self.get(name, [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
            self.bad(name, "a text or a list of texts, none of them empty")
        if len(found) > most:
            raise self.wrong(name, f"has {len(found)} texts; expected at most {most}")
        return found

    def choice(self, name: str, options, default=None):
        if name in self and self[name] not in options:
            self.bad(name, "one of " + ", ".join(map(str, options)))
        return self.get(name, default)


def _range(low: float, high: float) -> str:
    if high == inf:
        return "" if low == -inf else f", {low:g} or more"
    return f" from {low:g} to {high:g}"
