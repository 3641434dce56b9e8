"""Many requests through one model: their passes are one pass, so the weights are read once for all of them.

A step admits requests, plans how much of each prompt is read, and lets the library make rounds (native/round.c), which guess,
verify, choose and accept for all sequences together. What comes out for a request does not depend on its company.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple
from weakref import ref

from .. import checks
from .._native import check, ffi, lib
from ..errors import ArgumentError, BmcError, BusyError, ContextFullError
from ..spec.speculation import Drafter, Speculation
from .model import Model
from .sampler import Sampler, check_bias
from .schema import Masks, Schema
from .session import Session
from .text import Ending, NoText, StopStrings, Token

ROOM = 128                              # tokens that one call of the library may give a sequence
CALL_SECONDS = 0.016                    # rounds that are one call: so long, so that tokens come evenly
PIECE_SECONDS, PIECE_SECONDS_ALONE = 0.1, 0.25      # what a piece of a prompt may take: beside others that write, and otherwise
PIECE = 64                              # tokens of the first piece, while nothing is known of costs


@dataclass(frozen=True)
class Request:
    """What to write: the prompt's token ids, and how.

    session: continue in this one, and keep it: what the prompt has in common with its tokens is not evaluated again.
    stop: strings that end the text; stop_ids: ids that do. top: how many of the likeliest ids each token tells. priority: of
    two that wait, the one with the higher goes first. context caps a new session's rows. schema: what the text has to follow,
    a Schema of its own. progress is called with (done, total) while the prompt is read.
    """

    tokens: Tokens[int]
    max_tokens: float = 256
    sampler: Sampler = Sampler()
    stop: Tokens[str] = ()
    stop_ids: frozenset[int] = frozenset()
    session: Session | None = None
    top: int = 0
    priority: int = 0
    context: int | None = None
    speculate: bool = True
    schema: Schema | None = None
    progress: Callable[[int, int], None] | None = None


def checked(request: Request, model: Model) -> Request:
    """The request with plain values. Raises an ArgumentError for one that the model cannot serve."""
    size = model.config.vocab_size
    tokens = checks.ids("tokens", request.tokens, size)
    if not tokens:
        raise ArgumentError("the prompt is empty")
    if not isinstance(request.sampler, Sampler):
        checks.refuse("sampler", "a Sampler", request.sampler)
    check_bias(request.sampler.logit_bias, size)
    if request.schema is not None and not isinstance(request.schema, Schema):
        checks.refuse("schema", "an object with mask(), accept() and forced()", request.schema)
    if request.session is not None and getattr(request.session, "model", None) is not model:
        checks.refuse("session", "a session of the same model", request.session)
    if request.max_tokens != inf:
        checks.whole("max_tokens", request.max_tokens)
    if request.context is not None:
        checks.whole("context", request.context, 1, 1 << 30)
    checks.number("priority", request.priority)
    return replace(request, tokens=tokens, stop=checks.strings("stop", request.stop),
                   stop_ids=frozenset(checks.ids("stop_ids", request.stop_ids, size)),
                   top=checks.whole("top", request.top, 0, size))


@dataclass
class Stats:
    """Counts and seconds of a generation. The first token comes with the prompt: its time is the prompt's."""

    prompt_tokens: int = 0
    reused_tokens: int = 0          # of the prompt: already in the session
    prompt_s: float = 0.0
    predicted_tokens: int = 0
    predicted_s: float = 0.0
    draft_n: int = 0                # guesses that were verified
    draft_n_accepted: int = 0
    rounds: int = 0                 # passes after the prompt
    draft_s: float = 0.0            # of predicted_s: guessing and verifying
    verify_s: float = 0.0
    plain_s: float = 0.0            # what plain decoding would have taken, as far as is known
    lengths: dict[int, int] = field(default_factory=dict)       # guesses in a pass -> how many passes

    @property
    def mean_k(self) -> float:
        return self.draft_n / self.rounds if self.rounds else 0.0

    @property
    def plain_tok_s(self) -> float:
        """What plain decoding would have given, as far as is known; 0 without guesses."""
        return (self.predicted_tokens - 1) / self.plain_s if self.plain_s else 0.0

    @property
    def accepted_share(self) -> float:
        return self.draft_n_accepted / self.draft_n if self.draft_n else 0.0

    @property
    def prompt_tok_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_s if self.prompt_s else 0.0

    @property
    def predicted_tok_s(self) -> float:
        return (self.predicted_tokens - 1) / self.predicted_s if self.predicted_s else 0.0


class Event(NamedTuple):
    sequence: Sequence
    token: Token


class Sequence:
    """A request in an engine. done: it gives no more tokens; error: why, if it failed. stats: its Stats so far."""

    def __init__(self, engine: Engine, request: Request, number: int):
        self.engine, self.request, self.number = engine, request, number
        self.prompt = list(request.tokens)
        self.stats = Stats(prompt_tokens=len(self.prompt))
        self._owned = request.session is None
        self.session: Session = request.session         # type: ignore[assignment]      # None until start()
        self.drafter: Drafter | None = None
        self._masks: Masks | None = None
        self.done = self._started = False
        self.error: BmcError | None = None
        self.lost = ""                  # why the session is not its own any more
        self._written = 0               # tokens given
        self._since = time.perf_counter()

    # ---- the life of a sequence

    def start(self) -> None:
        """Take a session, and keep what it holds of the prompt. A sequence that wrote there before is ended."""
        request = self.request
        if self.session is None:
            self.session = self.engine.model.session(request.context)
        session, context = self.session, self.session.context
        if len(self.prompt) > context:
            raise ContextFullError(f"the prompt has {len(self.prompt)} tokens, the context has room for {context}")
        self.stats.reused_tokens = session.sync(self.prompt[:-1])
        before = session.writer() if session.writer else None
        if before not in (None, self):
            before.lose("another one began in its session")
        session.writer = ref(self)
        self._uses = session.uses
        room = context - len(self.prompt) + 1
        model = self.engine.model
        decoder = model.tokenizer.stream() if model.tokenizer else NoText()
        self._ending = Ending(decoder, request.max_tokens, room, StopStrings(request.stop, model.tokenizer), request.stop_ids)
        self._limit = min(request.max_tokens, room)
        speculation = self.engine.speculation
        if not speculation.off and request.speculate and self._limit > 1:
            self.drafter = self.engine._drafter(self)
        self._make_item()
        self._started = True

    def _make_item(self) -> None:
        n, top = int(min(ROOM, max(1, self._limit))), self.request.top
        self._tokens = ffi.new("int32_t[]", self.prompt)
        self._ids, self._logprobs, self._drafted = (ffi.new(f"{kind}[]", n) for kind in ("int32_t", "float", "uint8_t"))
        self._top_ids, self._top_logprobs = ffi.new("int32_t[]", n * top), ffi.new("float[]", n * top)
        self._stops = ffi.new("int32_t[]", list(self.request.stop_ids))
        self._last = ffi.new("int32_t *")
        self.item = item = ffi.new("bmc_item *")
        item.ids, item.logprobs, item.drafted = self._ids, self._logprobs, self._drafted
        item.n_top, item.top_ids, item.top_logprobs = top, self._top_ids, self._top_logprobs
        item.stops, item.n_stops = self._stops, len(self.request.stop_ids)
        if not self.request.sampler.greedy:
            item.sampler = self.request.sampler.native
        if self.request.schema is not None:
            size = self.engine.model.config.vocab_size
            self._masks = Masks(self.request.schema, item, size, self.request.stop_ids)

    def lose(self, why: str) -> None:
        """End it, since its session is not its own any more."""
        self.lost = self.lost or f"this generation cannot go on: {why}"
        if not self.done:
            self.done, self.error = True, BusyError(self.lost)

    def check_session(self) -> None:
        if self.session.uses != self._uses:
            self.lose("the session was used by other calls meanwhile")

    def check_unread(self) -> None:
        """Raise where tokens that nobody has read yet are not the text of the session any more."""
        if not self._owned:
            self.session._live()
            self.check_session()
            if self.lost:
                raise BusyError(self.lost)

    def claim(self, claims: ExitStack) -> bool:
        """Hold the session for a call. False where it is closed or in use: that ends the sequence."""
        try:
            self.item.session = claims.enter_context(self.session._claimed())
            self._uses = self.session.uses
        except BmcError as error:
            self.done, self.error = True, error
        return not self.done

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is still to be read."""
        return self._written == 0

    def ask(self, piece: int) -> int:
        """Prepare the item for a step; how many tokens of the prompt it reads, `piece` at most."""
        item = self.item
        item.guesses, item.confidence, item.n_guesses, item.guess_s = ffi.NULL, ffi.NULL, 0, 0.0
        item.drafter = self.drafter.native if self.drafter else ffi.NULL
        item.max_tokens = int(min(ROOM, self._limit - self._written))
        if not self.reading:
            item.pending, item.n_pending, item.choose = self._last, 1, 1
            if self._masks:
                self._guess(self._masks.forced())
            return 0
        at = self.session.position
        n = min(piece, len(self.prompt) - at)
        item.pending, item.n_pending = self._tokens + at, n
        item.choose = at + n == len(self.prompt) and self._limit > 0
        if item.choose:                 # the first token comes with the prompt, without guesses
            item.drafter = ffi.NULL
        return n

    def answer_wanted(self) -> None:
        """Guesses through text, where the library asks for some."""
        text = [*self.session.tokens, self._last[0]]
        started = time.perf_counter()
        assert self.drafter is not None
        ids, sure = self.drafter.propose(text, self.item.wanted)
        self._guess(ids)
        self._sure = ffi.new("float[]", sure or 1)
        self.item.guesses, self.item.confidence = self._guesses, self._sure
        self.item.guess_s = time.perf_counter() - started
        self.item.drafter = self.drafter.native

    def _guess(self, ids: list[int]) -> None:
        """Guesses for the next round; without any the library makes its own."""
        self._guesses = ffi.new("int32_t[]", ids or 1)
        self.item.guesses, self.item.n_guesses = self._guesses if ids else ffi.NULL, len(ids)

    def take(self, seconds: float) -> list[Token]:
        """The tokens that a round gave; also those of a call after which an interrupt came."""
        item = self.item
        if self.reading and self.request.progress:
            self.request.progress(min(self.session.position, len(self.prompt)), len(self.prompt))
        n, item.n = item.n, 0
        if self.drafter:
            self.drafter.note_failure()
        if not n:
            self.done = self._limit < 1 and self.session.position == len(self.prompt)
            return []
        try:
            return self._tokens_of(n, seconds)
        except BaseException:           # an interrupt: the session holds tokens that nobody was given
            self.lose("it was interrupted")
            raise

    def _tokens_of(self, n: int, seconds: float) -> list[Token]:
        ids, logprobs, drafted = (ffi.unpack(array, n) for array in (self._ids, self._logprobs, self._drafted))
        self._last[0] = ids[-1]
        if self._masks:
            self._masks.accept(ids)
        self._time(seconds, n)
        if self.reading:
            self._snapshot()
        found = []
        for i, (id, logprob) in enumerate(zip(ids, logprobs)):
            if id < 0 or logprob != logprob or logprob == -inf:
                self.done = True
                self.error = (self._masks and self._masks.error()) or BmcError(
                    f"no token can be chosen at position {len(self.prompt) + self._written}: "
                    "its logits are not numbers, or all tokens are banned")
                break
            token = self._ending.token(id, logprob, bool(drafted[i]), self._top(i))
            self._written += 1
            self.stats.predicted_tokens += 1
            found.append(token)
            if token.finish_reason:
                self.take_back(0)
                self.done = True
                break
        return found

    def _top(self, i: int) -> tuple[tuple[int, float], ...]:
        k = self.request.top
        return tuple((self._top_ids[i * k + j], self._top_logprobs[i * k + j]) for j in range(k))

    def take_back(self, unread: int) -> None:
        """Let a session that was given hold the text without its last token, and without tokens that nobody has read or
        that came after a stop string."""
        if not self._started or self._owned or self.session.uses != self._uses:
            return
        end = len(self.prompt) + max(self._written - unread, 0) - 1
        with suppress(BmcError):
            if self.session.position > end:
                self.session.rewind(end)
            self._uses = self.session.uses

    def _snapshot(self) -> None:
        """At ends of prompts and answers: to where other texts will leave this one. A session of our own is closed before that."""
        if not self._owned:
            with suppress(BmcError):
                self.session.snapshot()

    def _time(self, seconds: float, n: int) -> None:
        stats, counts = self.stats, self.item.stats
        if self.reading:
            stats.prompt_s = time.perf_counter() - self._since
            ffi.buffer(ffi.addressof(counts))[:] = bytes(ffi.sizeof("bmc_item_stats"))
            return
        stats.predicted_s += seconds
        stats.rounds, stats.draft_n, stats.draft_n_accepted = counts.rounds, counts.checked, counts.accepted
        stats.draft_s, stats.verify_s, stats.plain_s = counts.draft_s, counts.verify_s, counts.plain_s
        stats.lengths = {i: count for i, count in enumerate(counts.lengths) if count}

    def finish(self) -> None:
        """Let go of what the sequence used; a session that was given stays."""
        self.done = True
        if self._started and not self._owned:
            self.item.n = 0
            self.take_back(0)
            self._snapshot()
        if self.drafter is not None and self._owned:
            self.drafter.close()
        if self._owned and self.session is not None:
            self.session.close()


class Engine:
    """Requests of one model, `parallel` of them at a time, the others waiting.

    draft, spec, draft_max and draft_min are Speculation's. memory: bytes that the sessions of running requests may take
    together, None for no bound. add() and cancel() may be called between steps; one thread at a time uses an engine.
    """

    def __init__(self, model: Model, draft: Model | None = None, spec: str = "auto", draft_max: int = 16,
                 draft_min: int = 0, parallel: int = 8, memory: float | None = None,
                 speculation: Speculation | None = None):
        if parallel < 1:
            raise ArgumentError(f"parallel is {parallel}; expected 1 or more")
        self.model, self.parallel, self.memory = model, parallel, memory
        self.speculation = speculation or Speculation(model, draft, spec, draft_max, draft_min)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._added = 0
        self._events: list[Event] = []  # tokens that were taken in a step that an interrupt ended
        self._row_bytes = self._state_bytes = 0         # of a session
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
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Give up a request; its rows are free at once. Nothing happens to one that is done."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
                sequence.finish()

    def close(self) -> None:
        """Cancel all requests, and keep what was learned for the next run."""
        for sequence in (*self.running, *self.waiting):
            self.cancel(sequence)
        self.speculation.save()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- steps

    def step(self) -> list[Event]:
        """Read pieces of prompts and make a few rounds of decoding; the tokens that came. A request that cannot go on is done
        and has an error; the others go on. Raises what concerns all, such as OutOfMemoryError."""
        self._admit()
        for sequence in self.running:
            sequence.check_session()
        self._let_go()
        seconds = 0.0
        if not any(sequence.item.n for sequence in self.running):       # else an interrupt came before these were taken
            seconds = self._round()
        for sequence in [s for s in self.running if not s.done]:
            self._events += [Event(sequence, token) for token in sequence.take(seconds)]
        self._let_go()
        events, self._events = self._events, []
        return events

    def _let_go(self) -> None:
        for sequence in [s for s in self.running if s.done]:
            self.running.remove(sequence)
            sequence.finish()

    def _admit(self) -> None:
        self.waiting.sort(key=lambda s: (-s.request.priority, s.number))
        while self.waiting and len(self.running) < self.parallel and self._fits(self.waiting[0]):
            sequence = self.waiting[0]
            try:
                sequence.start()
                stats = sequence.session.arena_stats()
                self._row_bytes, self._state_bytes = stats.row_bytes, stats.state_bytes
                self.running.append(sequence)
            except BmcError as error:
                sequence.error = error
                sequence.finish()
            self.waiting.remove(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        if self.memory is None or not self.running:
            return True

        def rows(s: Sequence) -> float:
            return min(len(s.prompt) + s.request.max_tokens, s.request.context or self.model.config.n_ctx)

        return sum(self._row_bytes * rows(s) + self._state_bytes for s in (*self.running, sequence)) <= self.memory

    def _round(self) -> float:
        """One call of the library for all running sequences; its seconds."""
        writing = any(not s.reading for s in self.running)
        room, items, read = self._piece(writing), [], 0
        for sequence in self.running:
            if sequence.reading and room < 1:
                continue
            n = sequence.ask(room)
            room, read = room - n, read + n
            items.append(sequence)
        self._limits.seconds = 0.0 if read else CALL_SECONDS
        started = time.perf_counter()
        with ExitStack() as claims, self.speculation.locks[os.getpid()]:
            items = [sequence for sequence in items if sequence.claim(claims)]
            if not items:
                return 0.0
            pointers = ffi.new("bmc_item *[]", [sequence.item for sequence in items])
            if check(lib.bmc_round(pointers, len(items), self._limits)) == 0:
                for sequence in items:
                    if sequence.item.wanted:
                        sequence.answer_wanted()
                check(lib.bmc_round(pointers, len(items), self._limits))
        seconds = time.perf_counter() - started
        if read:
            rate = read / seconds
            self._prompt_rate = rate if read >= PIECE or not self._prompt_rate else self._prompt_rate
        return seconds

    def _piece(self, writing: bool) -> int:
        """Tokens of prompts in the next pass."""
        if not self._prompt_rate:
            return PIECE
        return max(16, int(self._prompt_rate * (PIECE_SECONDS if writing else PIECE_SECONDS_ALONE)) // 16 * 16)

    def _drafter(self, sequence: Sequence) -> Drafter:
        """Who guesses for a sequence: in a session that was given, the one who did so before."""
        session = sequence.session
        if sequence._owned:
            return self.speculation.drafter(session)
        if session.drafter is None or session.drafter.made is not self.speculation:
            session.drafter = self.speculation.drafter(session)
        return session.drafter
