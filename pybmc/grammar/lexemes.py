"""GBNF to llguidance's Lark.

llguidance reads a text by lexemes: regular expressions, of which the longest match counts. That is fast, and
other than GBNF, where each way to read a text counts. So what is regular in a grammar becomes a lexeme only
where the longest match is the only one that may go on: where no character that may follow one of its matches
makes a longer one, of itself or of a lexeme that may stand in its place. Other expressions become smaller
lexemes, down to single characters.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from time import monotonic

from ..errors import SchemaError, UnsupportedSchemaError
from .gbnf import Chars, Either, Name, Node, Repeat, Sequence, parse
from .layouts import Choice, Layout, Lexeme, Rule, Series, Times
from .longest import SECONDS, Conflicts


@lru_cache(maxsize=64)
def lark_of(text: str) -> str:
    """The Lark of a grammar. Raises SchemaError."""
    try:
        return _Lexemes(_possible_rules(parse(text))).lark()
    except RecursionError:
        raise SchemaError("grammar: its rules are nested too deeply") from None


# ---- what no text fits: a text must never lead there


def _possible_rules(rules: dict[str, Node]) -> dict[str, Node]:
    """The rules that some text fits, without their parts that none does."""
    names: set[str] = set()
    while (found := {name for name, node in rules.items() if _possible(node, names)}) != names:
        names = found
    possible = {name: _possible(node, names) for name, node in rules.items()}
    if not possible["root"]:
        raise UnsupportedSchemaError("no text fits it")
    return {name: node for name, node in possible.items() if node}


def _possible(node: Node, names: set[str]) -> Node | None:
    if isinstance(node, Chars):
        return node if node.ranges else None
    if isinstance(node, Name):
        return node if node.name in names else None
    if isinstance(node, Repeat):
        part = _possible(node.part, names)
        if part is None:
            return None if node.least else Sequence([])
        return Repeat(part, node.least, node.most)
    parts = [_possible(part, names) for part in node.parts]
    left = [part for part in parts if part]
    if isinstance(node, Sequence):
        return Sequence(left) if len(left) == len(parts) else None
    return Either(left) if left else None


# ---- the Lark


def _times(least: int, most: int | None) -> str:
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most))
    return short or f"{{{least},{'' if most is None else most}}}"


def _class(ranges: list[tuple[int, int]]) -> str:
    return "[" + "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges) + "]"


class _Lexemes:
    def __init__(self, rules: dict[str, Node]):
        self.rules, self.numbers = rules, {name: i for i, name in enumerate(rules)}
        self.regular = _regular(rules)
        self.split: set[str] = set()                    # texts of nodes that are no lexemes as a whole
        self._empty: dict[str, bool] = {}
        self._lay_all()

    def lark(self) -> str:
        """The smallest lexemes that it takes."""
        deadline = monotonic() + SECONDS
        while found := Conflicts(self.rules, self.lexemes, self.laid, deadline).found():
            self.split |= found
            self._lay_all()
        lines = ["%llguidance {}", "start: " + self._spelled(self.laid["root"])]
        lines += [f"r{self.numbers[name]}: {self._spelled(layout)}" for name, layout in self.laid.items()
                  if name != "root"]
        for text, lexeme in self.lexemes.items():
            lines.append(f"L{lexeme.number}: ({text})" + (" & /(?s:.)+/" if lexeme.optional else ""))
        return "\n".join([*lines, *self._terminals()]) + "\n"

    def _lay_all(self) -> None:
        self.lexemes: dict[str, Lexeme] = {}
        self.laid: dict[str, Layout] = {}
        self._wanted = ["root"]
        while self._wanted:
            name = self._wanted.pop()
            if name not in self.laid:
                self.laid[name] = self._lay(self.rules[name])

    def _lay(self, node: Node) -> Layout:
        if self._is_regular(node):
            text = self.text(node)
            if text not in self.split:
                return self._lexeme(text, node)
        if isinstance(node, Sequence):
            return Series(list(self._runs(node.parts)))
        if isinstance(node, Either):
            return Choice([self._lay(part) for part in node.parts])
        if isinstance(node, Repeat):
            return Times(self._lay(node.part), node.least, node.most)
        assert isinstance(node, Name)
        self._wanted.append(node.name)
        return Rule(node.name)

    def _runs(self, parts: list[Node]) -> Iterable[Layout]:
        """Parts of a sequence; neighbours that are regular make one lexeme."""
        run: list[Node] = []
        for part in [*parts, None]:
            if part is not None and self._is_regular(part):
                run.append(part)
                continue
            whole = Sequence(run)
            if len(run) > 1 and self.text(whole) not in self.split:
                yield self._lexeme(self.text(whole), whole)
            else:
                yield from map(self._lay, run)
            run = []
            if part is not None:
                yield self._lay(part)

    def _lexeme(self, text: str, node: Node) -> Layout:
        if text == '""':
            return Series([])
        if text not in self.lexemes:
            self.lexemes[text] = Lexeme(len(self.lexemes), node, self._is_empty(node))
        return self.lexemes[text]

    def _is_regular(self, node: Node) -> bool:
        if isinstance(node, Name):
            return node.name in self.regular
        if isinstance(node, Repeat):
            return self._is_regular(node.part)
        return isinstance(node, Chars) or all(map(self._is_regular, node.parts))

    def _is_empty(self, node: Node) -> bool:
        """Whether a regular expression matches the empty text."""
        if isinstance(node, Name):
            if node.name not in self._empty:
                self._empty[node.name] = self._is_empty(self.rules[node.name])
            return self._empty[node.name]
        if isinstance(node, Chars):
            return False
        if isinstance(node, Repeat):
            return node.least == 0 or self._is_empty(node.part)
        return (all if isinstance(node, Sequence) else any)(map(self._is_empty, node.parts))

    # -- texts

    def text(self, node: Node) -> str:
        """A regular expression as Lark has it in terminals."""
        if isinstance(node, Chars):
            return f"/{_class(node.ranges)}/"
        if isinstance(node, Name):
            return f"R{self.numbers[node.name]}"
        if isinstance(node, Repeat):
            return f"({self.text(node.part)}){_times(node.least, node.most)}"
        if isinstance(node, Either):
            return f"({' | '.join(map(self.text, node.parts))})"
        parts = [self.text(part) for part in node.parts]
        return " ".join(parts).replace("/ /", "") or '""'

    def _terminals(self) -> Iterable[str]:
        """The rules that lexemes name."""
        names, known = [lexeme.node for lexeme in self.lexemes.values()], set()
        while names:
            for name in _names(names.pop()):
                if name not in known:
                    known.add(name)
                    names.append(self.rules[name])
                    yield f"R{self.numbers[name]}: {self.text(self.rules[name])}"

    def _spelled(self, layout: Layout) -> str:
        """A layout as Lark has it in rules."""
        if isinstance(layout, Lexeme):
            return f"L{layout.number}" + "?" * layout.optional
        if isinstance(layout, Rule):
            return "start" if layout.name == "root" else f"r{self.numbers[layout.name]}"
        if isinstance(layout, Times):
            return f"({self._spelled(layout.part)}){_times(layout.least, layout.most)}"
        parts = list(map(self._spelled, layout.parts))
        return f"({' | '.join(parts)})" if isinstance(layout, Choice) else " ".join(parts) or '""'


def _names(node: Node) -> set[str]:
    if isinstance(node, Name):
        return {node.name}
    if isinstance(node, Chars):
        return set()
    return _names(node.part) if isinstance(node, Repeat) else set().union(*map(_names, node.parts))


def _regular(rules: dict[str, Node]) -> set[str]:
    """Rules that lead to none that contains itself."""
    waits = {name: _names(node) for name, node in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, needed in waits.items():
        for other in needed:
            users[other].append(name)
    ready, found = [name for name, needed in waits.items() if not needed], set()
    while ready:
        name = ready.pop()
        found.add(name)
        for user in users[name]:
            waits[user].discard(name)
            if not waits[user]:
                ready.append(user)
    return found
