"""Rounds of the library (native/round.c): a sequence's part of a call, and calls for one sequence alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .._native import check, ffi, lib
from .interfaces import Session


class Item:
    """A sequence's part of a call: `native`, a bmc_item, and the arrays that it points to.

    n: tokens that a call may give; top: how many of the likeliest ids each tells; stops: ids that end it.
    """

    def __init__(self, n: int, sampler: Any = None, top: int = 0, stops: Collection[int] = ()):
        self.native = native = ffi.new("bmc_item *")
        self._given = [ffi.new(f"{kind}[]", n) for kind in ("int32_t", "float", "uint8_t")]
        native.ids, native.logprobs, native.drafted = self._given
        self._top = ffi.new("int32_t[]", n * top), ffi.new("float[]", n * top)
        native.n_top, native.top_ids, native.top_logprobs = top, *self._top
        self._stops = ffi.new("int32_t[]", list(stops))
        native.stops, native.n_stops = self._stops, len(self._stops)
        if sampler is not None and not sampler.greedy:
            native.sampler = sampler.native

    def read(self, tokens: Any, n: int, max_tokens: int, choose: bool = True) -> None:
        """Evaluate n tokens of an array; then, with choose, give up to max_tokens. Nothing is guessed yet."""
        native, self._tokens = self.native, tokens
        native.pending, native.n_pending = tokens, n
        native.choose, native.max_tokens = choose, max_tokens
        native.guesses, native.confidence, native.n_guesses, native.guess_s = ffi.NULL, ffi.NULL, 0, 0.0

    def guess(self, ids: list[int], sure: list[float] | None = None, seconds: float = 0.0) -> None:
        """Guesses for the next round, how sure each is, and what they took. No ids: there are none."""
        native, self._guesses = self.native, (ffi.new("int32_t[]", ids or 1), ffi.new("float[]", sure or 1))
        native.guesses, native.n_guesses, native.guess_s = self._guesses[0], len(ids), seconds
        native.confidence = ffi.NULL if sure is None else self._guesses[1]

    def take(self) -> tuple[list[int], list[float], list[int]]:
        """What a call gave, once: ids, log-probabilities, and who guessed each (bmc_item.drafted)."""
        n, self.native.n = self.native.n, 0
        ids, logprobs, drafted = (ffi.unpack(array, n) for array in self._given)
        return ids, logprobs, drafted

    def top(self, i: int) -> tuple[tuple[int, float], ...]:
        """The likeliest (id, log-probability) where token i of the call was chosen."""
        n, (ids, logprobs) = self.native.n_top, self._top
        return tuple((ids[j], logprobs[j]) for j in range(i * n, (i + 1) * n) if ids[j] >= 0)


def verify(session: Session, pending: list[int], guesses: list[int], max_tokens: int, sampler: Any = None,
           n_rounds: int = 1) -> tuple[list[int], list[float], list[bool]]:
    """Rounds of one sequence without a policy: evaluate the pending tokens and the guesses, all of which are
    checked in the first round. What they gave: ids, log-probabilities, and whether each was guessed."""
    item, limits = Item(max_tokens, sampler), ffi.new("bmc_limits *", {"n_rounds": n_rounds, "seconds": 1e9})
    item.read(ffi.new("int32_t[]", pending), len(pending), max_tokens)
    item.guess(guesses)
    with session._claimed() as item.native.session:
        check(lib.bmc_round(ffi.new("bmc_item *[]", [item.native]), 1, limits))
    ids, logprobs, drafted = item.take()
    return ids, logprobs, list(map(bool, drafted))


def plain(session: Session, tokens: list[int], k: int) -> tuple[list[int], list[float]]:
    """Evaluate tokens, then the k likeliest next ones, one by one; them and their log-probabilities."""
    first, logprob, _ = verify(session, tokens, [], 1)
    if k == 1:
        return first, logprob
    ids, logprobs, _ = verify(session, first, [], k - 1, n_rounds=0)
    return first + ids, logprob + logprobs
