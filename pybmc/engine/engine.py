"""Many requests through one model: their passes are one pass, so the weights are read once for all of them.

A step admits requests, plans how much of each prompt is read, and lets the library make rounds
(native/round.c), which guess, verify, choose and accept for all sequences together. What comes out for a
request does not depend on its company.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import numpy as np

from .. import checks
from .._native import check, ffi, lib
from ..errors import ArgumentError, BmcError, BusyError, OutOfMemoryError
from ..spec.speculation import Speculation
from .gpu import uncut
from .memory import Room
from .model import Model
from .prefixes import Match, Prefixes, common
from .request import Request, checked
from .schedule import Turns
from .score import Scorer
from .sequence import CALL_TOKENS, Event, Sequence
from .session import Session

CALL_SECONDS = 0.016                    # rounds that are one call: so long, so that tokens come evenly
PASS_SECONDS = 0.1                      # what a pass with pieces of prompts may take while others write ..
PASS_SECONDS_ALONE = 0.25               # .. and otherwise
PIECE = 64                              # tokens of the first piece, while nothing is known of costs ..
LEAST = 16                              # .. and of the smallest


class Engine:
    """Requests of one model, `parallel` of them at a time, the others waiting.

    draft, spec, draft_max and draft_min are Speculation's.
    memory: bytes that sessions may take together, None for no bound. A request that does not fit beside the
    others waits; where memory runs out later, the youngest is put aside and reads what it lost of its text
    again when there is room; one that does not fit alone ends with an OutOfMemoryError.
    keep: rows of finished requests stay for requests that begin alike, as far as the memory goes.
    pass_seconds: how long a pass may take while somebody writes.

    Requests that begin alike share the rows of their beginning: it is read once, and the others wait for
    that. add() and cancel() may be called between steps; one thread at a time uses an engine.
    """

    def __init__(self, model: Model, draft: Model | None = None, spec: str = "auto", draft_max: int = 16,
                 draft_min: int = 0, parallel: int = 8, memory: float | None = None,
                 speculation: Speculation | None = None, keep: bool = False,
                 pass_seconds: float = PASS_SECONDS):
        parallel = checks.whole("parallel", parallel, 1)
        if memory is not None:
            memory = checks.number("memory", memory, infinite=True)
        if keep and memory is None:
            raise ArgumentError("keep is True; expected memory to bound what is kept, found None")
        self.model, self.parallel, self.memory, self.keep = model, parallel, memory, keep
        self.speculation = speculation or Speculation(model, draft, spec, draft_max, draft_min)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefixes = Prefixes()
        self.lent: set[Session] = set()         # kept sessions that others use for a while, as to save them
        self._room = None if memory is None else Room(model, memory, parallel, bool(self.speculation.head))
        self.put_aside = 0              # how often sequences were
        self._pass_seconds = pass_seconds
        self._turns = Turns()
        self._scorer = Scorer(model)
        self._added = 0
        self._events: list[Event] = []  # tokens that were taken in a step that an interrupt ended
        self._prompt_rate = 0.0         # tokens a second of prompts
        self._limits = ffi.new("bmc_limits *")
        self._limits.policy = self.speculation.policy

    # ---- requests

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises ArgumentError for one that cannot be served, BusyError where its session
        serves another."""
        request = checked(request, self.model)
        taken = [s.session for s in (*self.waiting, *self.running)]
        if request.session is not None and request.session in taken:
            raise BusyError("the session serves another request")
        sequence = Sequence(self, request, self._added)
        self._added += 1
        self._turns.enter(request.client)
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Give up a request; its rows are free at once. Nothing happens to one that is done."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                self._end(queue, sequence)

    def close(self) -> None:
        """Cancel all requests, and keep what was learned for the next run."""
        for sequence in (*self.running, *self.waiting):
            self.cancel(sequence)
        self.prefixes.close()
        self.speculation.save()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- steps

    def step(self) -> list[Event]:
        """Read pieces of prompts and make a few rounds of decoding; the tokens that came. A request that
        cannot go on is done and has an error; the others go on. Raises what concerns all, such as
        OutOfMemoryError: relieve() helps, and the step can be repeated."""
        self._admit()
        for sequence in self.running:
            sequence.check_session()
        self._let_go()
        seconds = 0.0
        if not any(s.item.native.n for s in self.running):      # else an interrupt came before take()
            seconds = self._round(self._make_room())
        for sequence in [s for s in self.running if not s.done]:
            tokens = sequence.take(seconds)
            self._turns.charge(sequence.request.client, written=len(tokens))
            self._events += [Event(sequence, token) for token in tokens]
        self._let_go()
        events, self._events = self._events, []
        return events

    def _let_go(self) -> None:
        for sequence in [s for s in self.running if s.done]:
            self._end(self.running, sequence, self.keep)

    def _end(self, queue: list[Sequence], sequence: Sequence, keep: bool = False) -> None:
        sequence.finish(keep)
        queue.remove(sequence)
        self._turns.leave(sequence.request.client)

    def _order(self, sequences: list[Sequence]) -> list[Sequence]:
        """Who is admitted first, and whose prompt is read first."""
        now = time.perf_counter()

        def key(s: Sequence) -> tuple:
            turn = self._turns.key(s.request.client, len(s.text), now - s.since, s.number)
            return -s.request.priority, *turn

        keys = {sequence: key(sequence) for sequence in sequences}
        for sequence in self.waiting:           # who is waited for goes first in the place of those that wait
            if sequence.awaits in keys:
                keys[sequence.awaits] = min(keys[sequence.awaits], key(sequence))
        return sorted(sequences, key=keys.__getitem__)

    def _admit(self) -> None:
        for sequence in self._order(self.waiting):
            if len(self.running) == self.parallel:
                break
            if self._waits(sequence):
                continue
            fits = self._fits(sequence)
            if not fits and self.running:
                break
            try:
                n = len(sequence.text)
                if self._room and not fits and n >= (most := self._room.most):
                    raise OutOfMemoryError(f"{n} tokens do not fit the memory, which has room for {most}")
                sequence.start()
                self.running.append(sequence)
                self.waiting.remove(sequence)
            except BmcError as error:
                sequence.error = error
                self._end(self.waiting, sequence)

    # ---- texts that begin alike

    def session_for(self, sequence: Sequence) -> Session:
        """A session for a sequence that brings none: with most of its text, or a new one."""
        match = self._match(sequence)
        sequence.marks.add(self._parting(sequence))
        if match is not None:
            with suppress(OutOfMemoryError):
                return self.prefixes.take(match)
        session = self.model.session(sequence.request.context, rows=self.grain)
        with suppress(OutOfMemoryError):        # the round says so
            session.reserve(0)                  # its states
        return session

    def _match(self, sequence: Sequence) -> Match | None:
        """The session in which it finds most of its text."""
        if not self._may_share(sequence):
            return None
        tokens, context = sequence.ids[:-1], sequence.context
        best = self.prefixes.match(tokens, context)
        for other in self._like(sequence):
            n, least = common(tokens, other.ids), best.n if best else 0
            if n > least and (n := other.session.nearest(min(n, other.session.position))) > least:
                best = Match(other.session, n)
        return best

    def _parting(self, sequence: Sequence) -> int:
        """Where its text becomes another than those that are known: others may part there too."""
        if not self._may_share(sequence):
            return 0
        tokens = sequence.ids[:-1]
        return max([self.prefixes.common(tokens), *(common(tokens, s.ids) for s in self._like(sequence))])

    @staticmethod
    def _may_share(s: Sequence) -> bool:
        return s.session is None and s.request.reuse and not s.unscored and not s.bare

    def _like(self, sequence: Sequence) -> list[Sequence]:
        """Running sequences with such a session as it would take."""
        return [s for s in self.running if s.owned and s.context == sequence.context]

    def _waits(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to read the beginning of its text. Fewer tokens than the
        smallest piece are not worth a pass."""
        before, sequence.awaits = sequence.awaits, None
        if not self._may_share(sequence):
            return False
        tokens = sequence.ids[:-1]
        found = [(common(tokens, s.ids), s) for s in self._like(sequence) if s.reading]
        n, first = max(found, key=lambda pair: pair[0], default=(0, None))
        least = 1 if first is before else LEAST
        if first is None or n < first.session.position + least:
            return False
        match = self._match(sequence)
        if match is not None and n < match.n + least:
            return False
        first.marks.add(n)
        sequence.awaits = first
        return True

    # ---- memory

    @property
    def used(self) -> float:
        """Bytes that all sessions take."""
        others = [*self.lent, *(s.session for s in self.running)]
        return self.prefixes.bytes + sum(session.arena_stats().bytes_reserved for session in others)

    @property
    def grain(self) -> int | str:
        """Rows by which its sessions grow."""
        return self._room.grain if self._room else "auto"

    def make_way(self, size: float) -> bool:
        """Let kept rows make way for this number of bytes. False where there is no room even so."""
        while self.memory is not None and self.used + size > self.memory:
            if not self.prefixes.evict():
                return False
        return True

    def lend(self, tokens: np.ndarray, context: int) -> Session | None:
        """A kept session with these tokens, until give_back(); None where none has them all."""
        match = self.prefixes.match(tokens, context)
        if match is None or match.n < len(tokens):
            return None
        session = self.prefixes.take(match)
        self.lent.add(session)
        return session

    def give_back(self, session: Session) -> None:
        """Keep a session that was lent."""
        self.lent.discard(session)
        self.prefixes.give(session)

    def forget(self, tokens: np.ndarray, context: int) -> int:
        """Close a kept session of these tokens; how many they are, 0 where there is none."""
        match = self.prefixes.match(tokens, context)
        if match is None or not match.whole or match.n < len(tokens):
            return 0
        self.prefixes.take(match).close()
        return match.n

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there is memory for its text and the beginning of its answer; kept rows make way."""
        if self._room is None:
            return True
        match = self._match(sequence)
        grows = sum(self._room.growth(s, s.wanted) for s in self.running)
        while self.used + grows + self._room.first_growth(sequence, match) > self._room.memory:
            if self.prefixes.evict(match.kept if match else None):
                continue
            if match is None or match.kept is None or match.whole:
                return False
            self.prefixes.evict()
            match = self._match(sequence)
        return True

    def _make_room(self) -> Callable[[Sequence], float]:
        """Tokens that a sequence may add to its text in the next call.
        Kept rows make way, then the youngest sequences."""
        room = self._room
        while room is not None:
            owned = [s for s in self.running if s.owned]
            certain = {s: room.growth(s, s.rows_for(0)) for s in self.running}
            free = room.memory - self.used - sum(certain.values())
            if free >= sum(room.growth(s, s.rows_for(CALL_TOKENS)) - certain[s] for s in owned):
                break
            if self.prefixes.evict():
                continue
            if not owned:                       # sessions that were given may be larger than the memory
                break
            share = room.rows(free / len(owned))
            if all(room.held(s) + share > len(s.text) for s in owned):
                return lambda s: room.held(s) + share - len(s.text) if s.owned else CALL_TOKENS
            self._drop_youngest(owned)
        return lambda s: CALL_TOKENS

    def has_room_for_snapshot(self) -> bool:
        """Whether a session may keep a copy of its states; kept rows make way."""
        size = self._room.snapshot_bytes if self._room else 0
        return not size or self.make_way(size)

    def _drop_youngest(self, owned: list[Sequence], bounded: bool = True) -> None:
        """Put the youngest sequence aside. One that is alone begins anew without snapshots; then it ends.
        bounded: for the engine's own bound, not for a system that has no memory left."""
        sequence, alone = max(owned, key=lambda s: s.number), len(self.running) == 1
        if alone and (sequence.bare or not (self._room and self._room.snapshot_bytes)):
            n = len(sequence.text)
            room = f", which has room for {self._room.most}" if self._room and bounded else " that is left"
            sequence.error = OutOfMemoryError(f"{n} tokens fill the memory{room}")
            self._end(self.running, sequence)
            return
        sequence.bare |= alone
        self.running.remove(sequence)
        sequence.put_aside()
        self.put_aside += 1
        self.waiting.append(sequence)

    def relieve(self) -> bool:
        """Give memory back to a system that has none left: kept rows, or those of the youngest sequence.
        False: there are none."""
        if self.prefixes.evict():
            return True
        owned = [s for s in self.running if s.owned]
        if owned:
            self._drop_youngest(owned, bounded=False)
            self.prefixes.evict()
        return bool(owned)

    # ---- one call of the library

    def _round(self, share: Callable[[Sequence], float]) -> float:
        """One call of the library for all running sequences; its seconds.
        share: tokens that each may add to its text."""
        writing = [s for s in self.running if not s.reading]
        reading = self._order([s for s in self.running if s.reading])
        room, items, read = self._piece(bool(writing)), [], 0
        started = time.perf_counter()
        scored = self._score([s for s in reading if s.unscored], room)
        room -= scored
        for sequence in writing + [s for s in reading if not s.unscored]:
            if sequence.reading and room < 1:
                continue
            n = sequence.ask(room, share(sequence))
            self._turns.charge(sequence.request.client, read=n)
            room, read = room - n, read + n
            items.append(sequence)
        self._limits.seconds = 0.0 if read or scored else CALL_SECONDS
        with ExitStack() as claims, self.speculation.locks[os.getpid()]:
            items = [sequence for sequence in items if sequence.claim(claims)]
            if items:
                pointers = ffi.new("bmc_item *[]", [sequence.item.native for sequence in items])
                if check(lib.bmc_round(pointers, len(items), self._limits)) == 0:
                    for sequence in items:
                        if sequence.item.native.wanted:
                            sequence.answer_wanted()
                    check(lib.bmc_round(pointers, len(items), self._limits))
        seconds = time.perf_counter() - started
        if read or scored:
            rate = (read + scored) / seconds
            self._prompt_rate = rate if read + scored >= PIECE or not self._prompt_rate else self._prompt_rate
        return seconds

    def _score(self, sequences: list[Sequence], room: int) -> int:
        """Read pieces of prompts whose tokens are scored, in a pass of their own; how many tokens. The last
        token of a prompt is left to the round."""
        read = 0
        for sequence in sequences:
            n, at = min(room - read, sequence.unscored), len(sequence.scores)
            if n < 1:
                break
            n = uncut(at, n, at + sequence.unscored, self.model.prompt_chunk)
            with ExitStack() as claims:
                if not sequence.claim(claims):
                    continue
                text, n_top = sequence.text[at:at + n + 1], sequence.request.score or 0
                sequence.scores += self._scorer(sequence.item.native.session, text, n_top)
            self._turns.charge(sequence.request.client, read=n)
            read += n
        return read

    def _piece(self, writing: bool) -> int:
        """Tokens of prompts in the next pass. Where the weights go through a GPU,
        it takes about as long for few tokens as for many."""
        least = self.model.pass_tokens if self.model.streams else LEAST
        if not self._prompt_rate:
            return max(PIECE, least)
        seconds = self._pass_seconds if writing else PASS_SECONDS_ALONE
        return max(least, int(self._prompt_rate * seconds) // LEAST * LEAST)

