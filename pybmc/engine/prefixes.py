"""Rows that other requests have read, for requests whose texts begin alike."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .session import Session


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


class Kept:
    """A session that nobody writes in. tokens: int32, those of its rows."""

    def __init__(self, session: Session):
        self.session = session
        self.tokens = np.array(session.tokens, np.int32)
        self.order = order(self.tokens)


def order(tokens: np.ndarray) -> bytes:
    """Texts sorted by this stand beside those that begin alike."""
    return tokens.astype(">i4").tobytes()


class Match(NamedTuple):
    """A session that holds the beginning of a text. n: tokens that need not be read again; kept: None where a
    sequence writes in the session."""

    session: Session
    n: int
    kept: Kept | None = None

    @property
    def whole(self) -> bool:
        """Whether the session holds nothing else."""
        return self.kept is not None and self.n == len(self.kept.tokens)


class Prefixes:
    """Sessions that nobody writes in, and forks of them."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []             # the least recently used first
        self._sorted: list[Kept] = []           # by Kept.order
        self._bytes: float | None = 0.0

    @property
    def bytes(self) -> float:
        """Memory that they take; what they share with others counts in parts."""
        if self._bytes is None:
            self._bytes = float(sum(kept.session.arena_stats().bytes_reserved for kept in self._kept))
        return self._bytes

    def recount(self) -> None:
        """Sessions were forked or closed: their parts of shared memory are others."""
        self._bytes = None

    @property
    def rows(self) -> int:
        """Rows of all of them, shared ones counted each time."""
        return sum(len(kept.tokens) for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def match(self, tokens: np.ndarray, context: int) -> Match | None:
        """Where most of a text's beginning need not be read again."""
        at, best = self._place(tokens), None
        for neighbours in (reversed(self._sorted[:at]), iter(self._sorted[at:])):
            best = self._best(neighbours, tokens, context, best)
        return best

    def common(self, tokens: np.ndarray) -> int:
        """How many tokens it has in common with the text most like it."""
        at = self._place(tokens)
        return max((common(kept.tokens, tokens) for kept in self._sorted[max(at - 1, 0):at + 1]), default=0)

    def _place(self, tokens: np.ndarray) -> int:
        return bisect_left(self._sorted, order(tokens), key=lambda kept: kept.order)

    @staticmethod
    def _best(neighbours: Iterator[Kept], tokens: np.ndarray, context: int,
              best: Match | None) -> Match | None:
        """neighbours: those that begin alike the longest come first."""
        for kept in neighbours:
            n = common(kept.tokens, tokens)
            if n <= (best.n if best else 0):
                break
            found = kept.session.nearest(n) if kept.session.context == context else 0
            if found > (best.n if best else 0):
                best = Match(kept.session, found, kept)
        return best

    def take(self, match: Match) -> Session:
        """A session of the caller's own with the first tokens that match() found: the kept one where it holds
        nothing else, or a fork. Raises OutOfMemoryError."""
        self.recount()
        if match.kept and match.whole:
            self._remove(match.kept)
            return match.session
        if match.kept:
            self._kept.append(self._kept.pop(self._kept.index(match.kept)))
        return match.session.fork(match.n)

    def give(self, session: Session) -> None:
        """Keep a session, which is nobody's from now on."""
        session.writer = None
        if not session.position:
            session.close()
            return
        kept = Kept(session)
        self._kept.append(kept)
        insort(self._sorted, kept, key=lambda other: other.order)
        self.recount()

    def evict(self, but: Kept | None = None) -> bool:
        """Close the session that was not used for longest, but not a given one. False where there is none."""
        kept = next((kept for kept in self._kept if kept is not but), None)
        if kept is not None:
            self._remove(kept)
            kept.session.close()
        return kept is not None

    def _remove(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._sorted.remove(kept)
        self.recount()

    def close(self) -> None:
        while self.evict():
            pass
