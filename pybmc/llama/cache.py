"""What stays between calls: rows of texts, and states to come back to."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from .. import checks
from .._native import ffi
from ..engine.session import Session


@dataclass
class LlamaState:
    """The tokens of a text, and the seed.
    The rows are evaluated again when they are needed and not there any more."""

    input_ids: np.ndarray
    n_tokens: int
    seed: int


class LlamaRAMCache:
    """Rows of ended texts, for texts that begin alike. The one that was not used for longest goes first; the
    last one stays, however large it is. Llamas, also of different models, may share a cache."""

    def __init__(self, capacity_bytes: int = 2 << 30):
        self.capacity_bytes = checks.whole("capacity_bytes", capacity_bytes, 0, float("inf"))
        self._kept: list[tuple[Session, np.ndarray]] = []       # with int32 tokens; the last used at the end
        self._lock = threading.Lock()

    @property
    def cache_size(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return self._size()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, model, context: int, tokens: list[int]) -> Session | None:
        """The session that holds most of a text's beginning; it is the caller's until give(). None where more
        rows would be lost than used again."""
        wanted = np.asarray(tokens, np.int32)
        with self._lock:
            self._drop_closed()
            found = [(common(its, wanted), i) for i, (session, its) in enumerate(self._kept)
                     if session.model is model and session.context == context]
            n, best = max(found, default=(0, -1))
            if best < 0 or 2 * n < len(self._kept[best][1]):
                return None
            return self._kept.pop(best)[0]

    def give(self, session: Session) -> None:
        """Keep a session, unless it is empty or closed."""
        with self._lock:
            if not is_closed(session) and session.position:
                self._kept.append((session, np.array(session.tokens, np.int32)))
            else:
                session.close()
            self._drop_closed()
            while len(self._kept) > 1 and self._size() > self.capacity_bytes:
                self._kept.pop(0)[0].close()

    def drop(self, model) -> None:
        """Forget the sessions of a model."""
        with self._lock:
            for session, _ in self._kept:
                if session.model is model:
                    session.close()
            self._drop_closed()

    def _size(self) -> int:
        return sum(session.arena_stats().bytes_reserved for session, _ in self._kept)

    def _drop_closed(self) -> None:
        self._kept = [(session, its) for session, its in self._kept if not is_closed(session)]


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def is_closed(session: Session) -> bool:
    return session._handle == ffi.NULL
