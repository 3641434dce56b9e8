"""Who goes first: clients get equal shares of an engine's work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

WRITTEN = 4                             # a written token counts as this many read ones
LONG = 512                              # a prompt of more tokens lets shorter ones go ahead ..
PATIENCE = 2.0                          # .. until it has waited for this many seconds


class Turns:
    """What each client was given so far, in tokens. A client that comes back starts at the least
    of those present."""

    def __init__(self):
        self._given: dict[Hashable, float] = {}
        self._present: Counter[Hashable] = Counter()

    def enter(self, client: Hashable) -> None:
        """A request of a client begins."""
        if not self._present[client]:
            least = min((self._given[other] for other in +self._present), default=0.0)
            self._given[client] = least
        self._present[client] += 1

    def leave(self, client: Hashable) -> None:
        """A request ends."""
        self._present[client] -= 1
        if not self._present[client]:
            del self._present[client], self._given[client]

    def charge(self, client: Hashable, read: int = 0, written: int = 0) -> None:
        if client in self._given:
            self._given[client] += read + WRITTEN * written

    def key(self, client: Hashable, tokens: int, waited: float, number: int) -> tuple:
        """Requests are served in the order of these: the client with the least first,
        within it the oldest."""
        return self._given.get(client, 0.0), tokens > LONG and waited < PATIENCE, number
