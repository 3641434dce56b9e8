"""Where the longest match of a lexeme is not the only one that may go on,
so that the lexeme has to become smaller."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from time import monotonic

from ..errors import UnsupportedSchemaError
from .gbnf import MOST, Chars, Either, Name, Node, Repeat, Sequence
from .layouts import Choice, Layout, Lexeme, Rule, Series, Times

STATES = 20_000                         # of the automaton of all lexemes
SETS = 3_000                            # .. that a text may lead to; beyond, all lexemes become smaller
PLACES = 500                            # sets of lexemes that may stand side by side; beyond, all of them may
SECONDS = 10.0                          # for all of that
COPIES = 8                              # of a part that is repeated: beyond, any number stands for it


class Conflicts:
    """Of lexemes by their texts, and the layouts of rules that they make. Sets of lexemes are bits by their
    numbers, sets of characters bits by the ranges between all bounds. deadline: in seconds of monotonic()."""

    def __init__(self, rules: dict[str, Node], lexemes: dict[str, Lexeme], laid: dict[str, Layout],
                 deadline: float):
        self.texts, self.lexemes = list(lexemes), list(lexemes.values())
        self.laid, self.deadline = laid, deadline
        self.auto = _Automaton(rules, sorted({MOST + 1}.union(*map(_bounds, rules.values()))))
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
        return {self.texts[i] for i in _bits(self.small)}

    def _characters(self, start: int) -> int:
        found = 0
        for state in self.auto.closure([start]):
            for chars, _ in self.auto.moves[state]:
                found |= chars
        return found

    # -- which lexemes may stand behind which

    def _order(self) -> None:
        """begin: those at the beginning; next: those behind each."""
        laid = self.laid
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
            repeats = layout.most is None or layout.most > 1
            self._follow(layout.part, behind | (self._first(layout.part)[0] if repeats else 0))
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
        """Note which of the lexemes that may stand in a place have to become smaller; the places behind it. A
        text may have matched several lexemes: what may stand behind any of them may follow."""
        places: set[int] = set()
        seen: set[frozenset[int]] = set()
        todo = [self.auto.closure(self.starts[i] for i in _bits(place))]
        while todo:
            if monotonic() > self.deadline:
                raise UnsupportedSchemaError(f"the grammar takes more than {SECONDS:g} seconds to compile")
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
        """Where a text ends lexemes, those that end or go on with what may follow one become smaller."""
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
    """Of all lexemes, each with states of its own.
    A part that is repeated often may be repeated any number of times here."""

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
            raise UnsupportedSchemaError("the grammar is too large: "
                                         f"its rules without recursion have more than {STATES} characters")
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
