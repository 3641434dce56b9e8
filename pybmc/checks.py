"""Checks of arguments. Each returns the value as a plain Python one, or raises an ArgumentError that names
the argument, what was expected and what was found."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping
from math import inf, isnan
from numbers import Real
from typing import NoReturn

from .errors import ArgumentError, printable

INT32_MAX = (1 << 31) - 1


def shown(found) -> str:
    """A value in a message."""
    try:
        return printable(repr(found), 60)
    except ValueError:                      # Python writes no whole number of some thousand digits
        return "a number with too many digits"


def refuse(name: str, expected: str, found) -> NoReturn:
    raise ArgumentError(f"{name}: expected {expected}, found {shown(found)}")


def whole(name: str, value, low: float = 0, high: float = INT32_MAX) -> int:
    """A whole number from low to high. numpy's integers and 5.0 are whole numbers, True is none."""
    number = _index(value)
    if number is not None and low <= number <= high:
        return number
    refuse(name, f"a whole number{_range(low, high)}", value)


def number(name: str, value, low: float = -inf, high: float = inf, infinite: bool = False) -> float:
    """A real number from low to high, never NaN, and infinite only where that is allowed."""
    real = None
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            real = float(value)
        except OverflowError:
            real = inf if value > 0 else -inf      # type: ignore[operator]
    if real is None or isnan(real) or not low <= real <= high or (abs(real) == inf and not infinite):
        refuse(name, f"a number{_range(low, high)}", value)
    return real


def draft_bounds(draft_max, draft_min) -> tuple[int, int]:
    draft_max = whole("draft_max", draft_max)
    return draft_max, whole("draft_min", draft_min, 0, draft_max)


def choice(name: str, value, options: Iterable[str]) -> str:
    if not isinstance(value, str) or value not in options:
        refuse(name, f"one of {', '.join(options)}", value)
    return value


def strings(name: str, value) -> list[str]:
    """A string, several of them, or None for none. An empty one is a mistake."""
    expected = "a string or a list of strings, none of them empty"
    if value is None:
        return []
    items = [value] if isinstance(value, str) else _items(name, expected, value)
    if not all(isinstance(item, str) and item for item in items):
        refuse(name, expected, value)
    return items


def ids(name: str, value, size: int | None = None) -> list[int]:
    """Token ids: a list, an array or another iterable of whole numbers. size: of the vocabulary, if known."""
    items = _items(name, "a list of token ids", value)
    if set(map(type, items)) - {int}:
        items = [_id(name, item) for item in items]
    if items and size is not None and not 0 <= min(items) <= max(items) < size:
        refuse(name, f"token ids from 0 to {size - 1}", next(id for id in items if not 0 <= id < size))
    return items


def settings(given: Iterable[str], known: Iterable[str], arguments: Iterable[str] = ()) -> None:
    """Refuse an unknown setting, and name the nearest one.
    arguments: other names that could have been meant."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *arguments], 1)
            raise ArgumentError(f"{name}: there is no such setting; "
                                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"))


def _index(value) -> int | None:
    """A whole number as an int; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        if not isinstance(value, Real):
            return None
        whole = abs(value) < inf and value == int(value)        # type: ignore[operator, call-overload]
        return int(value) if whole else None                    # type: ignore[call-overload]


def _id(name: str, value) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    refuse(name, "whole numbers as token ids", value)


def _items(name: str, expected: str, value) -> list:
    """The elements of what is a list in the widest sense: text and bytes are none."""
    if hasattr(value, "tolist"):            # numpy's elements as Python's
        value = value.tolist()
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(value, Iterable):
        refuse(name, expected, value)
    return list(value)


def _range(low: float, high: float) -> str:
    if low == -inf and high == inf:
        return ""
    if high in (inf, INT32_MAX) and low != -inf:
        return f" from {low:g} up"
    return f" from {low:g} to {high:g}" if low != -inf else f" up to {high:g}"
