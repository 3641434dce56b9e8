"""Many requests through one model: their passes are one pass, so the weights are read once for all of them.

A step admits requests, plans how much of each prompt is read, and lets the library make rounds (native/round.c), which guess,
verify, choose and accept for all sequences together. What comes out for a request does not depend on its company.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Tokens
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple
from weakref import ref

import numpy as np

from .. import checks
from .._native import check, ffi, lib
from ..errors import ArgumentError, BmcError, BusyError, ClosedError, ContextFullError, OutOfMemoryError
from ..spec.speculation import Drafter, Speculation
from .model import Model
from .prefixes import Match, Prefixes, common
from .sampler import Sampler, check_bias
from .schedule import Turns
from .schema import Masks, Schema
from .score import Score, Scorer
from .session import Session
from .text import Ending, NoText, StopStrings, Token

ROOM = 128                              # tokens that one call of the library may give a sequence
FINE = 16                               # rows that a session grows by where memory is narrow
ANSWER = 256                            # tokens of an answer that admission keeps rows for
CALL_SECONDS = 0.016                    # rounds that are one call: so long, so that tokens come evenly
PASS_SECONDS, PASS_SECONDS_ALONE = 0.1, 0.25        # what a pass with pieces of prompts may take: while others write, and otherwise
SOURCES = (None, None, "ngram", "draft", "self")    # by bmc_item.drafted
PIECE, LEAST = 64, 16                   # tokens of the first piece, while nothing is known of costs; and of the smallest


@dataclass(frozen=True)
class Request:
    """What to write: the prompt's token ids, and how.

    session: continue in this one, and keep it: what the prompt has in common with its tokens is not evaluated again.
    stop: strings that end the text; stop_ids: ids that do. top: how many of the likeliest ids each token tells. priority: of
    two that wait, the one with the higher goes first. client: whose request it is; clients get equal shares. context caps a
    new session's rows. schema: what the text has to follow, a Schema of its own. progress is called with (done, total) while the
    prompt is read. reuse: rows of an earlier request with the same beginning may serve this one. score: None, or how many of the
    likeliest ids to tell for each token of the prompt, with the log-probability of the token itself (Sequence.scores). hint: ids
    that the text may repeat, as an earlier version of it: what is guessed by them changes the time, never the text. A drafter
    that is kept with a session does without.
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
    client: Hashable = None
    reuse: bool = True
    score: int | None = None
    hint: Tokens[int] = ()


def checked(request: Request, model: Model) -> Request:
    """The request with plain values. Raises an ArgumentError for one that the model cannot serve."""
    model.check_writes()
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
    if request.score is not None:
        checks.whole("score", request.score, 0, size)
    return replace(request, tokens=tokens, stop=checks.strings("stop", request.stop),
                   stop_ids=frozenset(checks.ids("stop_ids", request.stop_ids, size)), hint=checks.ids("hint", request.hint, size),
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
    """A request in an engine. done: it gives no more tokens; error: why, if it failed. stats: its Stats so far. started: it was
    admitted. scores: those of the prompt's tokens from the second on, where the request asks for them. since: when it was added.
    """

    def __init__(self, engine: Engine, request: Request, number: int):
        self.engine, self.request, self.number = engine, request, number
        self.prompt = list(request.tokens)
        self.text = list(self.prompt)   # and the tokens given
        self.ids = np.array(self.prompt, np.int32)      # the text that start() begins with
        self.marks: set[int] = set()    # positions where other texts leave this one: reading stops there for them
        self.awaits: Sequence | None = None             # who reads the beginning of its text
        self.bare = False               # it shares nothing and keeps no snapshots: memory is too short for them
        self.scores: list[Score] = []
        self.stats = Stats(prompt_tokens=len(self.prompt))
        self.owned = request.session is None            # the session is the engine's, not the caller's
        self.session: Session = request.session         # type: ignore[assignment]      # None until start()
        self.drafter: Drafter | None = None
        self._masks: Masks | None = None
        self.done = self.started = False
        self.reading = True             # its text, until the next token comes
        self.error: BmcError | None = None
        self.lost = ""                  # why the session is not its own any more
        self._written = 0               # tokens given
        self.since = time.perf_counter()

    # ---- the life of a sequence

    def start(self) -> None:
        """Take a session, and keep what it holds of the text. A sequence that wrote there before is ended."""
        request, self.awaits = self.request, None
        if self.session is None:
            self.session = self.engine.session_for(self)
        session, context = self.session, self.session.context
        if len(self.prompt) > context:
            raise ContextFullError(f"the prompt has {len(self.prompt)} tokens, the context has room for {context}")
        kept = session.sync([] if self.unscored else self.text[:-1])
        before = session.writer() if session.writer else None
        if before not in (None, self):
            before.lose("another one began in its session")
        session.writer = ref(self)
        self._uses = session.uses
        if not self.started:
            self._began, self.stats.reused_tokens = time.perf_counter(), kept
            self._begin(context - len(self.prompt) + 1)
        speculation = self.engine.speculation
        if not speculation.off and request.speculate and self._limit > 1:
            self.drafter = self.engine._drafter(self)
        self._tokens = ffi.new("int32_t[]", self.text)
        self.started = self.reading = True

    def _begin(self, room: int) -> None:
        """room: tokens that the context has room for."""
        request, tokenizer = self.request, self.engine.model.tokenizer
        decoder = tokenizer.stream() if tokenizer else NoText()
        self._ending = Ending(decoder, request.max_tokens, room, StopStrings(request.stop, tokenizer), request.stop_ids)
        self._limit = min(request.max_tokens, room)
        self._make_item()

    def put_aside(self) -> None:
        """Give up the session. The text stays, and start() reads what is gone of it again: what comes after is the
        same."""
        self._close_drafter()
        self.engine.prefixes.give(self.session)
        self.session = None             # type: ignore[assignment]      # until start()
        self.ids = np.array(self.text, np.int32)
        if self.unscored:
            self.scores.clear()

    def _make_item(self) -> None:
        n, top = int(min(ROOM, max(1, self._limit))), self.request.top
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
        try:
            self.session._live()
        except ClosedError as error:
            self.done, self.error = True, error
        if self.session.uses != self._uses:
            self.lose("the session was used by other calls meanwhile")

    def check_unread(self) -> None:
        """Raise where tokens that nobody has read yet are not the text of the session any more."""
        if not self.owned:
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
    def left(self) -> float:
        """Tokens that may still come."""
        return min(self.request.max_tokens, self.context - len(self.prompt) + 1) - self._written

    @property
    def wanted(self) -> float:
        """Rows for the beginning of its answer; all of it where the session was given, which is never taken away."""
        return len(self.text) + (min(self.left, ANSWER) if self.owned else self.left)

    @property
    def certain(self) -> float:
        """Rows that it will need: those of the text so far; of all of it where the session was given."""
        return len(self.text) + (0 if self.owned else self.left)

    @property
    def context(self) -> int:
        return (self.request.session or self.request).context or self.engine.model.config.n_ctx

    @property
    def unscored(self) -> int:
        """Tokens of the prompt, but the last, whose next ones are still to be scored."""
        return len(self.prompt) - 1 - len(self.scores) if self.request.score is not None else 0

    @property
    def stop_string(self) -> str | None:
        """The string that ended the text."""
        return self._ending.stop_strings.found if self.started else None

    def ask(self, piece: int, most: float = ROOM) -> int:
        """Prepare the item for a step that gives `most` tokens at most; how many tokens of the text it reads, `piece` at most."""
        item = self.item
        item.guesses, item.confidence, item.n_guesses, item.guess_s = ffi.NULL, ffi.NULL, 0, 0.0
        item.drafter = self.drafter.native if self.drafter else ffi.NULL
        item.max_tokens = int(min(ROOM, most, self._limit - self._written))
        if not self.reading:
            item.pending, item.n_pending, item.choose = self._last, 1, 1
            if self._masks:
                self._guess(self._masks.forced())
            return 0
        at = self.session.position
        n = min([piece, len(self.text) - at, *(mark - at for mark in self.marks if mark > at)])
        item.pending, item.n_pending = self._tokens + at, n
        item.choose = at + n == len(self.text) and self._limit > 0
        if item.choose:                 # the first token comes with the text before it, without guesses
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
        if self.reading:
            self._note_progress()
            if self.session.position in self.marks:
                self._snapshot()
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

    def _note_progress(self) -> None:
        if self.request.progress and not self._written:
            self.request.progress(min(self.session.position, len(self.prompt)), len(self.prompt))

    def _tokens_of(self, n: int, seconds: float) -> list[Token]:
        ids, logprobs, drafted = (ffi.unpack(array, n) for array in (self._ids, self._logprobs, self._drafted))
        self._last[0] = ids[-1]
        if self._masks:
            self._masks.accept(ids)
        self._time(seconds)
        if self.reading and (self.engine.keep or not self.owned):
            self._snapshot()
        self.reading = False
        found = []
        for i, (id, logprob) in enumerate(zip(ids, logprobs)):
            if id < 0 or logprob != logprob or logprob == -inf:
                self.done = True
                self.error = (self._masks and self._masks.error()) or BmcError(
                    f"no token can be chosen at position {len(self.prompt) + self._written}: "
                    "its logits are not numbers, or all tokens are banned")
                break
            token = self._ending.token(id, logprob, bool(drafted[i]), self._top(i), SOURCES[drafted[i]])
            self._written += 1
            self.text.append(id)
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
        if not self.started or self.session is None or self.session.uses != self._uses:
            return
        end = len(self.prompt) + max(self._written - unread, 0) - 1
        with suppress(BmcError):
            if self.session.position > end:
                self.session.rewind(end)
            self._uses = self.session.uses

    def _snapshot(self) -> None:
        """At ends of prompts and answers, and at marks: to where other texts will leave this one."""
        if self.owned and (self.bare or not self.engine.has_room_for_snapshot()):
            return
        with suppress(BmcError):
            self.session.snapshot()

    def _time(self, seconds: float) -> None:
        stats, counts = self.stats, self.item.stats
        if not self._written:
            stats.prompt_s = time.perf_counter() - self._began
            ffi.buffer(ffi.addressof(counts))[:] = bytes(ffi.sizeof("bmc_item_stats"))
            return
        stats.predicted_s += seconds
        stats.rounds, stats.draft_n, stats.draft_n_accepted = counts.rounds, counts.checked, counts.accepted
        stats.draft_s, stats.verify_s, stats.plain_s = counts.draft_s, counts.verify_s, counts.plain_s
        stats.lengths = {i: count for i, count in enumerate(counts.lengths) if count}

    def finish(self, keep: bool = False) -> None:
        """Let go of what the sequence used; a session that was given stays. keep: the engine may use the rows again."""
        self.done = True
        if self.started and (keep or not self.owned):
            self.item.n = 0
            self.take_back(0)
            self._snapshot()
        self._close_drafter()
        if not self.owned or self.session is None:
            return
        if keep and not self.error:
            self.engine.prefixes.give(self.session)
            self.session = None         # type: ignore[assignment]      # nobody asks for it any more
        else:
            self.session.close()
            self.engine.prefixes.recount()

    def _close_drafter(self) -> None:
        if self.drafter is not None and self.owned:
            self.drafter.close()
            self.drafter = None


class Engine:
    """Requests of one model, `parallel` of them at a time, the others waiting.

    draft, spec, draft_max and draft_min are Speculation's. memory: bytes that sessions may take together, None for no bound. A
    request that does not fit beside the others waits; where memory runs out later, the youngest is put aside and reads what it
    lost of its text again when there is room; one that does not fit alone ends with an OutOfMemoryError. Requests that begin
    alike share the rows of their beginning: it is read once, and the others wait for that. keep: rows of finished requests
    stay for such requests, as far as the memory goes. pass_seconds: how long a pass may take while somebody writes. add() and
    cancel() may be called between steps; one thread at a time uses an engine.
    """

    def __init__(self, model: Model, draft: Model | None = None, spec: str = "auto", draft_max: int = 16,
                 draft_min: int = 0, parallel: int = 8, memory: float | None = None,
                 speculation: Speculation | None = None, keep: bool = False, pass_seconds: float = PASS_SECONDS):
        if parallel < 1:
            raise ArgumentError(f"parallel is {parallel}; expected 1 or more")
        if keep and memory is None:
            raise ArgumentError("keep is True; expected memory to bound what is kept, found None")
        self.model, self.parallel, self.memory, self.keep = model, parallel, memory, keep
        self.speculation = speculation or Speculation(model, draft, spec, draft_max, draft_min)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefixes = Prefixes()
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
        """Read pieces of prompts and make a few rounds of decoding; the tokens that came. A request that cannot go on is done
        and has an error; the others go on. Raises what concerns all, such as OutOfMemoryError: relieve() helps, and the step
        can be repeated."""
        self._admit()
        for sequence in self.running:
            sequence.check_session()
        self._let_go()
        seconds = 0.0
        if not any(sequence.item.n for sequence in self.running):       # else an interrupt came before these were taken
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
            return -s.request.priority, *self._turns.key(s.request.client, len(s.text), now - s.since, s.number)

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
                if self._room and not fits and len(sequence.text) >= self._room.most:
                    n = len(sequence.text)
                    raise OutOfMemoryError(f"{n} tokens do not fit the memory, which has room for {self._room.most}")
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
        session = self.model.session(sequence.request.context, rows=self._room.grain if self._room else "auto")
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
            n = common(tokens, other.ids)
            found = other.session.nearest(min(n, other.session.position)) if n > (best.n if best else 0) else 0
            if found > (best.n if best else 0):
                best = Match(other.session, found)
        return best

    def _parting(self, sequence: Sequence) -> int:
        """Where its text becomes another than those that are known: others may part there too."""
        if not self._may_share(sequence):
            return 0
        tokens = sequence.ids[:-1]
        return max([self.prefixes.common(tokens), *(common(tokens, s.ids) for s in self._like(sequence))])

    def _may_share(self, sequence: Sequence) -> bool:
        return sequence.session is None and sequence.request.reuse and not sequence.unscored and not sequence.bare

    def _like(self, sequence: Sequence) -> list[Sequence]:
        """Running sequences with such a session as it would take."""
        return [s for s in self.running if s.owned and s.context == sequence.context]

    def _waits(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to read the beginning of its text. Fewer tokens than the smallest
        piece are not worth a pass."""
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
        return self.prefixes.bytes + sum(s.session.arena_stats().bytes_reserved for s in self.running)

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
        """Tokens that a sequence may add to its text in the next call. Kept rows make way, then the youngest sequences."""
        room = self._room
        while room is not None:
            owned = [s for s in self.running if s.owned]
            free = room.memory - self.used - sum(room.growth(s, s.certain) for s in self.running)
            if free >= sum(room.growth(s, len(s.text) + min(ROOM, s.left)) - room.growth(s, s.certain) for s in owned):
                break
            if self.prefixes.evict():
                continue
            if not owned:                       # sessions that were given may be larger than the memory
                break
            share = room.rows(free / len(owned))
            if all(room.held(s) + share > len(s.text) for s in owned):
                return lambda s: room.held(s) + share - len(s.text) if s.owned else ROOM
            self._drop_youngest(owned)
        return lambda s: ROOM

    def has_room_for_snapshot(self) -> bool:
        """Whether a session may keep a copy of its states; kept rows make way."""
        room = self._room
        if room and room.snapshot_bytes:
            while self.used + room.snapshot_bytes > room.memory:
                if not self.prefixes.evict():
                    return False
        return True

    def _drop_youngest(self, owned: list[Sequence]) -> None:
        """Put the youngest sequence aside. One that is alone begins anew without snapshots; then it ends."""
        sequence, alone = max(owned, key=lambda s: s.number), len(self.running) == 1
        if alone and (sequence.bare or not (self._room and self._room.snapshot_bytes)):
            n = len(sequence.text)
            room = f", which has room for {self._room.most}" if self._room else ""
            sequence.error = OutOfMemoryError(f"{n} tokens fill the memory{room}")
            self._end(self.running, sequence)
            return
        sequence.bare |= alone
        self.running.remove(sequence)
        sequence.put_aside()
        self.put_aside += 1
        self.waiting.append(sequence)

    def relieve(self) -> bool:
        """Give memory back to a system that has none left: kept rows, or those of the youngest sequence. False: there are none."""
        if self.prefixes.evict():
            return True
        owned = [s for s in self.running if s.owned]
        if owned:
            self._drop_youngest(owned)
            self.prefixes.evict()
        return bool(owned)

    # ---- one call of the library

    def _round(self, share: Callable[[Sequence], float]) -> float:
        """One call of the library for all running sequences; its seconds. share: tokens that each may add to its text."""
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
                pointers = ffi.new("bmc_item *[]", [sequence.item for sequence in items])
                if check(lib.bmc_round(pointers, len(items), self._limits)) == 0:
                    for sequence in items:
                        if sequence.item.wanted:
                            sequence.answer_wanted()
                    check(lib.bmc_round(pointers, len(items), self._limits))
        seconds = time.perf_counter() - started
        if read or scored:
            rate = (read + scored) / seconds
            self._prompt_rate = rate if read + scored >= PIECE or not self._prompt_rate else self._prompt_rate
        return seconds

    def _score(self, sequences: list[Sequence], room: int) -> int:
        """Read pieces of prompts whose tokens are scored, in a pass of their own; how many tokens. The last token of a prompt
        is left to the round."""
        read = 0
        for sequence in sequences:
            n = min(room - read, sequence.unscored)
            if n < 1:
                break
            with ExitStack() as claims:
                if not sequence.claim(claims):
                    continue
                at = len(sequence.scores)
                text, n_top = sequence.text[at:at + n + 1], sequence.request.score or 0
                sequence.scores += self._scorer(sequence.item.session, text, n_top)
            self._turns.charge(sequence.request.client, read=n)
            read += n
        return read

    def _piece(self, writing: bool) -> int:
        """Tokens of prompts in the next pass."""
        if not self._prompt_rate:
            return PIECE
        seconds = self._pass_seconds if writing else PASS_SECONDS_ALONE
        return max(LEAST, int(self._prompt_rate * seconds) // LEAST * LEAST)

    def _drafter(self, sequence: Sequence) -> Drafter:
        """Who guesses for a sequence: in a session that was given, the one who did so before."""
        session = sequence.session
        if sequence.owned:
            return self.speculation.drafter(session, sequence.request.hint)
        if session.drafter is None or session.drafter.made is not self.speculation:
            session.drafter = self.speculation.drafter(session)
        return session.drafter


class Room:
    """A bound on memory. Sessions grow by `grain` rows: as the library likes it, or finely where the bound is
    narrow. head: they keep hidden states for a draft head. fixed_bytes: of a session without rows; snapshot_bytes:
    of a copy of its states, which are there twice and with a log."""

    def __init__(self, model: Model, memory: float, parallel: int, head: bool = False):
        with model.session() as session:
            stats = session.arena_stats()
        self.memory, self.snapshot_bytes = memory, stats.state_bytes / 2
        usual = stats.r * stats.row_bytes + stats.state_bytes
        self.grain = stats.r if 4 * parallel * usual <= memory else FINE
        with model.session(rows=self.grain) as session:
            session.reserve(0)
            if head:
                session.keep_hidden()
            self.fixed_bytes = session.arena_stats().bytes_reserved
            session.reserve(1)
            self.grain_bytes = session.arena_stats().bytes_reserved - self.fixed_bytes

    @property
    def most(self) -> int:
        """Tokens that one session has room for."""
        return max(self.rows(self.memory - self.fixed_bytes), 0)

    def rows(self, size: float) -> int:
        """Rows by which sessions can grow within this number of bytes."""
        return int(size // max(self.grain_bytes, 1)) * self.grain

    def whole(self, n: float) -> float:
        """Rows that a session of n rows takes."""
        return -(-n // self.grain) * self.grain

    def bytes(self, n: float, held: float = 0) -> float:
        """What they take, where it does not have `held` of them."""
        return max(self.whole(n) - held, 0) / self.grain * self.grain_bytes

    def held(self, s: Sequence) -> float:
        """Rows that a running sequence's text has, or will have."""
        return max(s.session.rows, self.whole(len(s.text)))

    def growth(self, s: Sequence, n: float) -> float:
        """Bytes that a running sequence takes more once it has n rows."""
        return self.bytes(n, s.session.rows)

    def first_growth(self, s: Sequence, match: Match | None) -> float:
        """Bytes that one takes more which starts with a match."""
        if s.session is not None:
            return self.growth(s, s.wanted) + s.session.arena_stats().bytes_reserved
        if match is not None and match.whole:
            return self.bytes(s.wanted, match.session.rows)
        return self.bytes(s.wanted, match.n // self.grain * self.grain if match else 0) + self.fixed_bytes
