"""Text that knows where it comes from: which of its characters stand in the template's own source.

A control token counts in a rendered chat only where all of its characters are the template's own, so no
message can spell one. Tags that models write around thoughts and calls count where the assistant wrote them,
too; in other messages they are text. Those are plain str, and every operation that is not followed here gives
a plain str: its text counts as a message's, and is never control.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Traced(str):
    """A str with a byte for each character: 1 where it is the template's own, 2 where the assistant wrote it,
    else 0. Traced(text): all are 0."""

    __slots__ = ("_own",)

    def __new__(cls, text: str = "", own: bytes | None = None):
        self = super().__new__(cls, text)
        self._own = bytes(len(self)) if own is None else own
        return self

    def __str__(self) -> Traced:
        return self

    def __add__(self, other):
        # a Markup adds in its own way: it escapes
        if not isinstance(other, str) or hasattr(other, "__html__"):
            return NotImplemented
        return Traced(str.__add__(self, other), self._own + own_of(other))

    def __radd__(self, other):
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(other, self), own_of(other) + self._own)

    def __mul__(self, n):
        return Traced(str.__mul__(self, n), self._own * n)

    __rmul__ = __mul__

    def __mod__(self, args):
        text = str.__mod__(self, args)
        if any(one.width == "*" for one in conversions(self)):
            return text
        pieces = Traced().join(self._formatted(args))
        return pieces if str.__eq__(pieces, text) else text

    def __getitem__(self, key):
        own = self._own[key]
        return Traced(str.__getitem__(self, key), own if isinstance(own, bytes) else bytes([own]))

    def __iter__(self) -> Iterator[Traced]:
        return (self[at] for at in range(len(self)))

    def join(self, items: Iterable[str], /) -> Traced:
        items = list(items)
        return Traced(str.join(self, items), self._own.join(map(own_of, items)))

    def split(self, sep=None, maxsplit=-1) -> list[Traced]:
        return self._parts(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep=None, maxsplit=-1) -> list[Traced]:
        return self._parts(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends=False) -> list[Traced]:
        lines, at = [], 0
        for line, whole in zip(str.splitlines(self), str.splitlines(self, True)):
            lines.append(self[at:at + len(whole if keepends else line)])
            at += len(whole)
        return lines

    def partition(self, sep, /) -> tuple:
        head, found, _ = str.partition(self, sep)
        return self[:len(head)], self[len(head):len(head) + len(found)], self[len(head) + len(found):]

    def rpartition(self, sep, /) -> tuple:
        head, found, _ = str.rpartition(self, sep)
        return self[:len(head)], self[len(head):len(head) + len(found)], self[len(head) + len(found):]

    def lstrip(self, chars=None, /) -> Traced:
        return self[len(self) - len(str.lstrip(self, chars)):]

    def rstrip(self, chars=None, /) -> Traced:
        return self[:len(str.rstrip(self, chars))]

    def strip(self, chars=None, /) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix, /) -> Traced:
        return self[len(self) - len(str.removeprefix(self, prefix)):]

    def removesuffix(self, suffix, /) -> Traced:
        return self[:len(str.removesuffix(self, suffix))]

    def replace(self, old, new, count=-1, /) -> str:
        if not old:
            return str.replace(self, old, new, count)
        return Traced(new, own_of(new)).join(self.split(old, count))

    # -- inside

    def _parts(self, parts: list[str], sep: str | None) -> list[Traced]:
        """Parts of a split, in order: between two of them is sep, or white space."""
        found, at = [], 0
        for part in parts:
            at = self.find(part, at) if sep is None else at
            found.append(self[at:at + len(part)])
            at += len(part) + len(sep or "")
        return found

    def _formatted(self, args) -> Iterator[str]:
        """The pieces of self % args: the format's own text, and what is put in."""
        place, at, given = 0, 0, args if isinstance(args, tuple) else (args,)
        for one in conversions(self):
            yield self[at:one.start]
            at = one.end
            if one.kind == "%":
                yield self[at - 1:at]
                continue
            if one.key is not None:
                arg = args[one.key]
            else:
                arg, place = given[place], place + 1
            yield str(arg) if one.tail == "s" else str.__mod__("%" + one.tail, (arg,))
        yield self[at:]


def _letters(name: str, alone: bool):
    """A method that changes letters, each into one or more.
    alone: how many does not depend on its neighbours."""
    change = getattr(str, name)

    def method(self) -> str:
        text = change(self)
        if len(text) == len(self):
            return Traced(text, self._own)
        if not alone:
            return text
        chars = enumerate(str.__str__(self))
        return Traced(text, b"".join(self._own[at:at + 1] * len(change(char)) for at, char in chars))

    method.__name__ = name
    return method


for _name in ("upper", "lower", "title", "capitalize", "casefold", "swapcase"):
    setattr(Traced, _name, _letters(_name, alone=_name not in ("title", "capitalize")))


def own(text: str) -> Traced:
    """Text of the template's source."""
    return Traced(text, b"\1" * len(text))


def said(text: str) -> Traced:
    """Text of the assistant's message: the model wrote it, or the client says so."""
    return Traced(text, b"\2" * len(text))


def own_of(text: str) -> bytes:
    """The byte of each character of any str."""
    return text._own if isinstance(text, Traced) else bytes(len(text))


class Conversion(NamedTuple):
    """One %-conversion of a format: where it stands, its key or None, and the rest, such as "-5.2f"."""

    start: int
    end: int
    key: str | None
    tail: str
    width: str                  # digits, * or nothing; the larger of width and precision
    kind: str                   # the last character


_TAIL = re.compile(r"[-+ #0]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?[hlL]?(.?)", re.DOTALL)


def conversions(format: str) -> Iterator[Conversion]:
    """The conversions of a %-format, read as Python reads them."""
    format = str.__str__(format)
    end = 0
    while (start := format.find("%", end)) >= 0:
        at, key = start + 1, None
        if format[at:at + 1] == "(":
            close = _closing(format, at)
            key, at = format[at + 1:close], close + 1
        found = _TAIL.match(format, at)
        end = found.end()
        width = max(found[1], found[2] or "", key=lambda part: (part == "*", len(part)))
        yield Conversion(start, end, key, found[0], width, found[3])


def _closing(format: str, at: int) -> int:
    """Where the parenthesis that opens at a place closes; the end where it does not."""
    depth = 0
    for place in range(at, len(format)):
        depth += {"(": 1, ")": -1}.get(format[place], 0)
        if not depth:
            return place
    return len(format)
