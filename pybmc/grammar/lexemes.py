"""GBNF to llguidance's Lark.

llguidance reads a text by lexemes: regular expressions, of which the longest match counts. That is fast, and other than GBNF, where each
way to read a text counts. So what is regular in a grammar becomes a lexeme only where the longest match is the only one that may
go on: where no character that may follow one of its matches makes a longer one, of itself or of a lexeme that may stand in its place. Other
expressions become smaller lexemes, down to single characters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import SchemaError, UnsupportedSchemaError
from .gbnf import MOST, Chars, Either, Name, Node, Repeat, Sequence, parse

STATES = 20_000                         # of the automaton of all lexemes
SETS = 3_000                            # .. of them, that a text may lead to; with more all lexemes become smaller
PLACES = 500                            # sets of lexemes that may stand side by side; with more all of them may
COPIES = 8                              # of a part that is repeated: beyond, any number stands for it


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


# ---- layouts: rules made of lexemes


@dataclass(eq=False)
class Lexeme:
    """node: what it matches; a text is no lexeme where it is empty. optional: whether the node matches that too."""

    number: int
    node: Node
    optional: bool


@dataclass(eq=False)
class Rule:
    """A name where it stands in a rule."""

    name: str


@dataclass(eq=False)
class Series:
    parts: list[Layout]


@dataclass(eq=False)
class Choice:
    parts: list[Layout]


@dataclass(eq=False)
class Times:
    part: Layout
    least: int
    most: int | None


Layout = Lexeme | Rule | Series | Choice | Times


def _times(least: int, most: int | None) -> str:
    return {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most), f"{{{least},{'' if most is None else most}}}")


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
        while found := _Conflicts(self).found():
            self.split |= found
            self._lay_all()
        lines = ["%llguidance {}", "start: " + self._spelled(self.laid["root"])]
        lines += [f"r{self.numbers[name]}: {self._spelled(layout)}" for name, layout in self.laid.items() if name != "root"]
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


# ---- conflicts: where a longer match is not the only one that may go on


class _Conflicts:
    """Sets of lexemes are bits by their numbers, sets of characters bits by the ranges between all bounds."""

    def __init__(self, grammar: _Lexemes):
        self.grammar, self.lexemes = grammar, list(grammar.lexemes.values())
        self.bounds = sorted({MOST + 1}.union(*map(_bounds, grammar.rules.values())))
        self.auto = _Automaton(grammar.rules, self.bounds)
        self.starts = [self.auto.add(lexeme.node, lexeme.number) for lexeme in self.lexemes]
        self.first = [self._characters(start) for start in self.starts]
        self._order()

    def found(self) -> set[str]:
        """Texts of lexemes that have to become smaller."""
        self.small, self.places, todo = 0, {self.begin}, [self.begin]
        while todo:
            for place in self._in(todo.pop()) - self.places:
                self.places.add(place)
                todo.append(place)
            if len(self.places) > PLACES:               # one place for all of them
                self._in((1 << len(self.lexemes)) - 1)
                break
        texts = list(self.grammar.lexemes)
        return {texts[i] for i in _bits(self.small)}

    def _characters(self, start: int) -> int:
        found = 0
        for state in self.auto.closure([start]):
            for chars, _ in self.auto.moves[state]:
                found |= chars
        return found

    # -- which lexemes may stand behind which

    def _order(self) -> None:
        """begin: those at the beginning; next: those behind each."""
        laid = self.grammar.laid
        self._firsts: dict[str, tuple[int, bool]] = dict.fromkeys(laid, (0, False))
        while (found := {name: self._first(layout) for name, layout in laid.items()}) != self._firsts:
            self._firsts = found
        self.next, self._behind = [0] * len(self.lexemes), dict.fromkeys(laid, 0)
        before = None
        while before != (before := (tuple(self.next), tuple(self._behind.values()))):
            for name, layout in laid.items():
                self._follow(layout, self._behind[name])
        self.begin = self._firsts["root"][0]

    def _first(self, layout: Layout) -> tuple[int, bool]:
        """Lexemes with which it begins, and whether it may be empty."""
        if isinstance(layout, Lexeme):
            return 1 << layout.number, layout.optional
        if isinstance(layout, Rule):
            return self._firsts[layout.name]
        if isinstance(layout, Times):
            found, empty = self._first(layout.part)
            return (0, True) if layout.most == 0 else (found, empty or layout.least == 0)
        found, empties = 0, []
        for part in layout.parts:
            first, empty = self._first(part)
            found |= first
            empties.append(empty)
            if isinstance(layout, Series) and not empty:
                break
        return found, (all if isinstance(layout, Series) else any)(empties)

    def _follow(self, layout: Layout, behind: int) -> None:
        if isinstance(layout, Lexeme):
            self.next[layout.number] |= behind
        elif isinstance(layout, Rule):
            self._behind[layout.name] |= behind
        elif isinstance(layout, Times):
            self._follow(layout.part, behind | (self._first(layout.part)[0] if layout.most is None or layout.most > 1 else 0))
        elif isinstance(layout, Choice):
            for part in layout.parts:
                self._follow(part, behind)
        else:
            for part in reversed(layout.parts):
                self._follow(part, behind)
                first, empty = self._first(part)
                behind = first | (behind if empty else 0)

    # -- longest matches

    def _in(self, place: int) -> set[int]:
        """Note which of the lexemes that may stand in a place have to become smaller; the places behind it. A text may have
        matched several lexemes: what may stand behind any of them may follow."""
        places: set[int] = set()
        seen: set[frozenset[int]] = set()
        todo = [self.auto.closure(self.starts[i] for i in _bits(place))]
        while todo:
            for _, states in self.auto.steps(todo.pop()):
                if states in seen:
                    continue
                seen.add(states)
                todo.append(states)
                ended = {self.auto.ends[state] for state in states if state in self.auto.ends}
                if ended:
                    behind = 0
                    for lexeme in ended:
                        behind |= self.next[lexeme]
                    places.add(behind)
                    self._compare(states, ended)
            if len(seen) > SETS:
                self.small |= self._splittable(place)
                break
        return places

    def _compare(self, states: frozenset[int], ended: set[int]) -> None:
        """Where a text ends lexemes, those that end or go on with a character that may follow one become smaller."""
        for chars, behind in self.auto.steps(states):
            for lexeme in ended:
                if any(self.first[other] & chars for other in _bits(self.next[lexeme])):
                    longer = 0
                    for state in behind:
                        longer |= 1 << self.auto.owner[state]
                    self.small |= self._splittable(1 << lexeme) or self._splittable(longer)

    def _splittable(self, lexemes: int) -> int:
        found = 0
        for i in _bits(lexemes):
            node = self.lexemes[i].node
            while isinstance(node, (Sequence, Either)) and len(node.parts) == 1:
                node = node.parts[0]
            found |= 0 if isinstance(node, Chars) else 1 << i
        return found


def _bits(number: int) -> Iterable[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def _bounds(node: Node) -> set[int]:
    if isinstance(node, Name):
        return set()
    if isinstance(node, Chars):
        return {bound for first, last in node.ranges for bound in (first, last + 1)}
    return _bounds(node.part) if isinstance(node, Repeat) else set().union(*map(_bounds, node.parts))


class _Automaton:
    """Of all lexemes, each with states of its own. A part that is repeated often may be repeated any number of times here."""

    def __init__(self, rules: dict[str, Node], bounds: list[int]):
        self.rules, self.bounds = rules, bounds
        self.free: list[list[int]] = []                 # states that each leads to without a character ..
        self.moves: list[list[tuple[int, int]]] = []    # .. and with one of some
        self.owner: list[int] = []                      # the lexeme of each
        self.ends: dict[int, int] = {}                  # where lexemes are matched
        self._steps: dict[frozenset[int], list[tuple[int, frozenset[int]]]] = {}

    def add(self, node: Node, lexeme: int) -> int:
        """The state where a lexeme begins."""
        self._lexeme = lexeme
        begin = self._state()
        self.ends[self._build(node, begin)] = lexeme
        return begin

    def _state(self) -> int:
        if len(self.free) == STATES:
            raise UnsupportedSchemaError(f"the grammar is too large: its rules without recursion have more than {STATES} characters")
        self.free.append([])
        self.moves.append([])
        self.owner.append(self._lexeme)
        return len(self.free) - 1

    def _build(self, node: Node, begin: int) -> int:
        """Add what leads from a state through a node; the state behind it."""
        if isinstance(node, Name):
            return self._build(self.rules[node.name], begin)
        if isinstance(node, Sequence):
            for part in node.parts:
                begin = self._build(part, begin)
            return begin
        if isinstance(node, Repeat):
            return self._repeat(node, begin)
        end = self._state()
        if isinstance(node, Chars):
            self.moves[begin].append((self._set(node), end))
        else:
            for part in node.parts:
                self.free[self._build(part, self._from(begin))].append(end)
        return end

    def _from(self, begin: int) -> int:
        """A new state behind another."""
        state = self._state()
        self.free[begin].append(state)
        return state

    def _repeat(self, node: Repeat, begin: int) -> int:
        least, most = node.least, node.most
        if max(least, most or 0) > COPIES:
            least, most = min(least, 1), None
        for _ in range(least):
            begin = self._build(node.part, begin)
        end = self._from(begin)
        if most is None:
            again = self._from(end)
            self.free[self._build(node.part, again)].append(end)
        else:
            for _ in range(most - least):
                begin = self._build(node.part, self._from(begin))
                self.free[begin].append(end)
        if most is None:
            return self._from(end)
        return end

    def _set(self, node: Chars) -> int:
        found = 0
        for first, last in node.ranges:
            low, high = bisect_left(self.bounds, first), bisect_left(self.bounds, last + 1)
            found |= (1 << high) - (1 << low)
        return found

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        found, todo = set(states), []
        todo = list(found)
        while todo:
            for state in self.free[todo.pop()]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)

    def steps(self, states: frozenset[int]) -> list[tuple[int, frozenset[int]]]:
        """Sets of characters that lead on, and where to; the sets have nothing in common."""
        if states not in self._steps:
            parts: list[tuple[int, set[int]]] = []
            for chars, target in (move for state in states for move in self.moves[state]):
                split = []
                for known, targets in parts:
                    if both := known & chars:
                        split.append((both, targets | {target}))
                    if rest := known & ~chars:
                        split.append((rest, targets))
                    chars &= ~known
                parts = split + ([(chars, {target})] if chars else [])
            self._steps[states] = [(chars, self.closure(targets)) for chars, targets in parts]
        return self._steps[states]
