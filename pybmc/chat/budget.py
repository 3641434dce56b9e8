"""A limit on how long a model thinks: behind a number of tokens its end is forced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..engine.schema import Schema
from ..tokenizers import Tokenizer
from .reasoning import Marks


class Place(NamedTuple):
    """Where a text is. kind: "before" a thought, "inside" one, in its forced "end", or "after" it. seen: the
    last bytes; n: tokens of thoughts so far, or of the end."""

    kind: str
    seen: bytes = b""
    n: int = 0


class Budget:
    """A pybmc.engine.Schema: a limit on the tokens of a thought; its end follows at the latest behind them.

    size: ids of the model. end: ids of the end. inside: the text begins within a thought. again: thoughts may
    begin anywhere in the text, else only at its beginning. inner: what else the text has to follow.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, most: int, marks: Marks, end: Sequence[int],
                 inside: bool = False, again: bool = False, inner: Schema | None = None):
        self._tokenizer, self._most, self._end = tokenizer, most, list(end)
        self._again, self._inner = again, inner
        self._opens, self._closes = (mark.encode() for mark in marks)
        self._place = Place("inside" if inside else "before")
        self._row = np.empty((size + 31) // 32, np.uint32)

    def mask(self, tokens: Sequence[int]) -> np.ndarray | None:
        place = self._place
        for token in tokens:
            place = self._next(place, token)
        forced = self._forced(place)
        if not forced:
            return self._inner.mask(tokens) if self._inner else None
        self._row[:] = 0
        self._row[forced[0] // 32] = np.uint32(1 << forced[0] % 32)
        return self._row

    def accept(self, token: int) -> None:
        self._place = self._next(self._place, token)
        if self._inner:
            self._inner.accept(token)

    def forced(self) -> Sequence[int]:
        return self._forced(self._place) or (self._inner.forced() if self._inner else [])

    def _forced(self, place: Place) -> list[int]:
        if place.kind == "end":
            return self._end[place.n:]
        return self._end if place.kind == "inside" and place.n >= self._most else []

    def _next(self, place: Place, token: int) -> Place:
        if self._forced(place):
            n = place.n + 1 if place.kind == "end" else 1
            return Place("end", n=n) if n < len(self._end) else self._after(self._most)
        if place.kind == "after":
            return place
        seen = place.seen + (self._tokenizer.piece(token) if token < self._tokenizer.vocab_size else b"")
        return self._inside(place.n + 1, seen) if place.kind == "inside" else self._before(place, seen)

    def _before(self, place: Place, seen: bytes) -> Place:
        """The token that opens a thought counts as none of it."""
        at = seen.find(self._opens)
        if at >= 0 and (self._again or not seen[:at].strip()):
            return self._inside(place.n, seen[at + len(self._opens):])
        if self._again:
            return Place("before", seen[-len(self._opens):], place.n)
        begun = self._opens.startswith(seen.lstrip())
        return Place("before", seen) if begun else Place("after")

    def _inside(self, n: int, seen: bytes) -> Place:
        return self._after(n) if self._closes in seen else Place("inside", seen[-len(self._closes):], n)

    def _after(self, n: int) -> Place:
        return Place("before", n=n) if self._again else Place("after")

