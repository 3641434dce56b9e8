"""llama.cpp's grammars, GBNF: their text as rules, trees of characters, sequences, alternatives,
repetitions and names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from ..errors import SchemaError, printable

MOST = 0x10FFFF                         # the last character
SURROGATES = (0xD800, 0xDFFF)           # which are none
DEPTH = 60                              # of parentheses
TIMES = 10_000                          # of a repetition


@dataclass(eq=False)
class Chars:
    """One character, of some ranges: (first, last) each, in order, none of them beside another."""

    ranges: list[tuple[int, int]]


@dataclass(eq=False)
class Sequence:
    parts: list[Node]


@dataclass(eq=False)
class Either:
    parts: list[Node]


@dataclass(eq=False)
class Repeat:
    """most None: without an end."""

    part: Node
    least: int
    most: int | None


@dataclass(eq=False)
class Name:
    name: str


Node = Chars | Sequence | Either | Repeat | Name

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_TIMES = re.compile(r"\{\s*(\d{0,9})\s*(,?)\s*(\d{0,9})\s*\}")
_ESCAPE = re.compile(r'\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([nrt\\"\[\]^.-]))')
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def parse(text: str) -> dict[str, Node]:
    """Rules by name; there is a root, and every name has a rule. Raises SchemaError."""
    return _Parser(text).rules()


class _Parser:
    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0
        self.named: dict[str, None] = {}        # names that stand in rules

    def fail(self, expected: str) -> NoReturn:
        line = self.text.count("\n", 0, self.at) + 1
        found = self.text[self.at:self.at + 20].split("\n")[0]
        raise SchemaError(f"grammar, line {line}: expected {expected}, found {printable(found) or 'the end'}")

    def skip(self, pattern: re.Pattern) -> None:
        self.at = pattern.match(self.text, self.at).end()       # type: ignore[union-attr]  # "" matches too

    def take(self, pattern: re.Pattern) -> re.Match | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def has(self, word: str) -> bool:
        if not self.text.startswith(word, self.at):
            return False
        self.at += len(word)
        return True

    def rules(self) -> dict[str, Node]:
        found: dict[str, Node] = {}
        self.skip(_LINES)
        while self.at < len(self.text):
            name = self.take(_NAME)
            self.skip(_SPACE)
            if not name or not self.has("::="):
                self.fail("a name and ::=")
            if name[0] in found:
                raise SchemaError(f"grammar: the rule {printable(name[0], 60)} is there twice")
            self.skip(_LINES)
            found[name[0]] = self.either(False)
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                self.fail("the end of the line")
            self.skip(_LINES)
        for need in ("root", *self.named):
            if need not in found:
                raise SchemaError(f"grammar: there is no rule {printable(need, 60)}")
        return found

    def either(self, nested: bool) -> Node:
        parts = [self.sequence(nested)]
        while self.has("|"):
            self.skip(_LINES)
            parts.append(self.sequence(nested))
        return parts[0] if len(parts) == 1 else Either(parts)

    def sequence(self, nested: bool) -> Node:
        parts: list[Node] = []
        space = _LINES if nested else _SPACE
        self.skip(space)
        while (part := self.item()) is not None:
            parts.append(self.repeated(part))
            self.skip(space)
        return parts[0] if len(parts) == 1 else Sequence(parts)

    def item(self) -> Node | None:
        if self.has('"'):
            return Sequence([Chars([(ord(char), ord(char))]) for char in iter(self.quoted, None)])
        if self.has("["):
            return self.chars()
        if self.has("."):
            return Chars(_complement([]))
        if self.has("("):
            return self.group()
        name = self.take(_NAME)
        if not name:
            return None
        self.named[name[0]] = None
        return Name(name[0])

    def group(self) -> Node:
        self.depth += 1
        if self.depth > DEPTH:
            self.fail(f"at most {DEPTH} levels of parentheses")
        found = self.either(True)
        if not self.has(")"):
            self.fail(")")
        self.depth -= 1
        return found

    def quoted(self) -> str | None:
        """The next character of a text in quotes; None: it is over."""
        return None if self.has('"') else self.char('"')

    def char(self, end: str) -> str:
        """A character as it is written in quotes or brackets."""
        if self.text[self.at:self.at + 1] in ("", "\n", "\r"):
            self.fail(end)
        if self.text[self.at] != "\\":
            self.at += 1
            return self.text[self.at - 1]
        found = self.take(_ESCAPE)
        if not found:
            self.fail('an escape such as \\n, \\", \\x41 or \\u00e9')
        number = int(found[1] or found[2] or found[3] or "0", 16)
        if number > MOST or SURROGATES[0] <= number <= SURROGATES[1]:
            self.at -= len(found[0])
            self.fail("an escape of a character")
        return _NAMED.get(found[4], found[4]) if found[4] else chr(number)

    def chars(self) -> Chars:
        negated, ranges = self.has("^"), []
        while not self.has("]"):
            first = last = ord(self.char("]"))
            if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                self.at += 1
                last = ord(self.char("]"))
                if last < first:
                    self.fail("a range in order before this")
            ranges.append((first, last))
        return Chars(_complement(ranges) if negated else _united(ranges))

    def repeated(self, part: Node) -> Node:
        for _ in range(DEPTH):
            sign = self.text[self.at:self.at + 1]
            if sign in _REPEATS:
                self.at += 1
                part = Repeat(part, *_REPEATS[sign])
            elif sign == "{":
                part = Repeat(part, *self.times())
            else:
                return part
        self.fail(f"at most {DEPTH} repetitions of a repetition")

    def times(self) -> tuple[int, int | None]:
        found = self.take(_TIMES)
        if not found or not (found[1] or found[3]):
            self.fail("{m}, {m,}, {m,n} or {,n}")
        least = int(found[1] or 0)
        most = least if not found[2] else int(found[3]) if found[3] else None
        if max(least, most or 0) > TIMES or (most is not None and most < least):
            self.at -= len(found[0])
            self.fail(f"a repetition of up to {TIMES} times, the fewer first")
        return least, most


def _united(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same characters in order, without surrogates."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(_without_surrogates(ranges)):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


def _without_surrogates(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for first, last in ranges:
        before, behind = (first, min(last, SURROGATES[0] - 1)), (max(first, SURROGATES[1] + 1), last)
        yield from ((a, b) for a, b in (before, behind) if a <= b)


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    edges = [-1]
    for first, last in _united(ranges):
        edges += [first, last]
    pairs = zip(edges[::2], [*edges[1::2], MOST + 1])
    return _united([(before + 1, behind - 1) for before, behind in pairs if before + 1 < behind])
