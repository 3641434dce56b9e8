"""Rows that finished requests leave behind, for requests whose texts begin alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .session import Session


@dataclass(eq=False)
class Kept:
    session: Session
    tokens: np.ndarray                  # int32, those of its rows
    rows: int                           # reserved

    def common(self, tokens: np.ndarray) -> int:
        """How many tokens both begin with."""
        n = min(len(self.tokens), len(tokens))
        differ = np.flatnonzero(self.tokens[:n] != tokens[:n])
        return int(differ[0]) if differ.size else n


class Prefixes:
    """Sessions that nobody writes in, the least recently used first."""

    def __init__(self):
        self._kept: list[Kept] = []

    @property
    def rows(self) -> int:
        return sum(kept.rows for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def match(self, tokens, context: int) -> Kept | None:
        """The session that holds most of a text's beginning. None where more rows would be lost than used again."""
        wanted = np.asarray(tokens, np.int32)
        found = [(kept.common(wanted), kept) for kept in self._kept if kept.session.context == context]
        common, best = max(found, key=lambda pair: pair[0], default=(0, None))
        return best if best is not None and 2 * common >= max(len(best.tokens), 1) else None

    def take(self, kept: Kept) -> Session:
        """A session that match() found; it is the caller's from now on."""
        self._kept.remove(kept)
        return kept.session

    def give(self, session: Session) -> None:
        """Keep a session."""
        tokens = np.array(session.tokens, np.int32)
        if tokens.size:
            self._kept.append(Kept(session, tokens, session.rows))
        else:
            session.close()

    def evict(self, but: Kept | None = None) -> bool:
        """Close the session that was not used for longest, but not a given one. False where there is none."""
        kept = next((kept for kept in self._kept if kept is not but), None)
        if kept is not None:
            self._kept.remove(kept)
            kept.session.close()
        return kept is not None

    def close(self) -> None:
        while self.evict():
            pass
