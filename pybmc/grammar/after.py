"""Texts in which a grammar begins behind a mark: a thought's end, the beginning of a call of a tool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .state import State
from .vocabulary import Vocabulary

ALL = np.uint32(0xFFFFFFFF)


class Place(NamedTuple):
    """Where a text is. kind: "opening" (what opens the free text may still come), "free", "gap" (behind the
    mark, where some white space may stand) or "inner". seen: the bytes so far of what opens it, of the mark,
    or of the gap. since: tokens before the grammar's first."""

    kind: str
    seen: bytes
    since: int = 0


class After:
    """A pybmc.engine.Schema: the text is free until a mark, in whichever tokens it is spelled, and
    follows a grammar from there on.

    inner: the grammar's state. opens: how the free text begins, if that is told; a text that begins otherwise
    follows the grammar from its first token. gap: white space that may stand between the mark and the
    grammar's text, of which it is no part. ends: whether the text may end before the mark.
    """

    def __init__(self, mark: bytes, inner: State | After, opens: bytes = b"", gap: bytes = b"",
                 ends: bool = True):
        self._mark, self._inner, self._opens, self._gap, self._ends = mark, inner, opens, gap, ends
        self._vocabulary: Vocabulary = inner._vocabulary
        self._place = Place("opening", b"") if opens else Place("free", b"")
        self._row = np.empty((self._vocabulary.size + 31) // 32, np.uint32)

    def mask(self, tokens: Sequence[int]) -> np.ndarray | None:
        place = self._place
        for i, token in enumerate(tokens):
            place = self._next(place, token, i)
        if place.kind == "inner":
            return self._inner.mask(tokens[place.since:])
        if place.kind == "free":
            return self._free(place.seen)
        row = np.uint32(0) if self._is_opening(place) else self._inner.mask(())
        if row is None:
            return None
        self._row[:] = row
        for id in self._begins(place):
            self._row[id // 32] |= np.uint32(1 << id % 32)
        return self._row

    def accept(self, token: int) -> None:
        place = self._next(self._place, token, 0)
        if place.kind == "inner":
            self._inner.accept(token)
        self._place = place._replace(since=0)

    def forced(self) -> Sequence[int]:
        return self._inner.forced() if self._place.kind == "inner" else []

    # ---- places

    def _next(self, place: Place, token: int, at: int) -> Place:
        """The place behind a token, which is the at-th of those that are read ahead."""
        if place.kind == "inner":
            return place
        piece = self._piece(token)
        if place.kind == "free":
            return self._search(place.seen + piece)
        if token not in self._begins(place) and not self._is_opening(place):
            return Place("inner", b"", at)
        if place.kind == "gap":
            return Place("gap", place.seen + piece)
        seen = place.seen + piece
        if len(seen) < len(self._opens):
            return Place("opening", seen)
        return self._search(seen[len(self._opens):])

    def _search(self, text: bytes) -> Place:
        found = text.find(self._mark)
        if found >= 0:
            return Place("gap", text[found + len(self._mark):])
        n = next((n for n in range(min(len(self._mark) - 1, len(text)), 0, -1)
                  if text.endswith(self._mark[:n])), 0)
        return Place("free", text[len(text) - n:])

    def _piece(self, token: int) -> bytes:
        pieces = self._vocabulary.pieces
        return pieces[token] if token < len(pieces) else b""

    @staticmethod
    def _is_opening(place: Place) -> bool:
        """Whether what opens the free text has begun, so that it goes on."""
        return place.kind == "opening" and bool(place.seen)

    def _begins(self, place: Place) -> frozenset[int]:
        """Tokens that keep a text out of the grammar: those of the opening, or of the gap."""
        if place.kind == "gap":
            return self._vocabulary.spelling(self._gap[len(place.seen):])
        return self._vocabulary.spelling(self._opens[len(place.seen):])

    def _free(self, seen: bytes) -> np.ndarray | None:
        """All ids, but those that would pass the mark, and end tokens where the text has to reach it."""
        banned = self._vocabulary.passing(self._mark, seen, self._gap)
        if not self._ends:
            banned = banned.union(self._vocabulary.ends)
        if not banned:
            return None
        self._row[:] = ALL
        for id in banned:
            self._row[id // 32] &= ~np.uint32(1 << id % 32)
        return self._row
