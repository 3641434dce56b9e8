"""A request that an engine serves: its session, its part of each call of the library,
and the tokens that came of it."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from math import inf
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

import numpy as np

from .._native import ffi
from ..errors import ArgumentError, BmcError, BusyError, ClosedError, ContextFullError
from ..spec.rounds import Item
from ..spec.speculation import Drafter
from .gpu import uncut
from .request import Request, Stats
from .schema import Masks
from .score import Score
from .session import Session
from .text import Ending, NoText, StopStrings, Token

if TYPE_CHECKING:
    from .engine import Engine

CALL_TOKENS = 128                       # that one call of the library may give a sequence
ANSWER = 256                            # tokens of an answer that admission keeps rows for
SOURCES = (None, "schema", "ngram", "draft", "self")        # by bmc_item.drafted


class Event(NamedTuple):
    sequence: Sequence
    token: Token


class Sequence:
    """A request in an engine. done: it gives no more tokens; error: why, if it failed. stats: its Stats so
    far. started: it was admitted. scores: those of the prompt's tokens from the second on, where the request
    asks for them. since: when it was added.
    """

    def __init__(self, engine: Engine, request: Request, number: int):
        self.engine, self.request, self.number = engine, request, number
        self.prompt = list(request.tokens)
        self.text = list(self.prompt)   # and the tokens given
        self.ids = np.array(self.prompt, np.int32)      # the text that start() begins with
        self.marks: set[int] = set()    # positions where other texts leave this one: reading stops there
        self.awaits: Sequence | None = None             # who reads the beginning of its text
        self.bare = False               # memory is too short to share rows and to keep snapshots
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
            n = len(self.prompt)
            raise ContextFullError(f"the prompt has {n} tokens, the context has room for {context}")
        kept = session.sync([] if self.unscored else self.text[:-1])
        before = session.writer() if session.writer else None
        if before not in (None, self):
            before.lose("another one began in its session")
        session.writer = ref(self)
        self._uses = session.uses
        if not self.started:
            self._began, self.stats.reused_tokens = time.perf_counter(), kept
            self._begin(context - len(self.prompt) + 1)
        if not self.engine.speculation.off and request.speculate and self._limit > 1:
            self.drafter = self._drafter()
        self._tokens = ffi.new("int32_t[]", self.text)
        self.started = self.reading = True

    def _begin(self, room: int) -> None:
        """room: tokens that the context has room for."""
        request, tokenizer = self.request, self.engine.model.tokenizer
        decoder = tokenizer.stream(shown=request.shown) if tokenizer else NoText()
        stop_strings = StopStrings(request.stop, tokenizer, request.shown)
        self._ending = Ending(decoder, request.max_tokens, room, stop_strings, request.stop_ids)
        self._limit = min(request.max_tokens, room)
        n = int(min(CALL_TOKENS, max(1, self._limit)))
        self.item = Item(n, request.sampler, request.top, request.stop_ids)
        self.item.native.as_drawn = request.as_drawn
        self._last = ffi.new("int32_t *")
        if request.schema is not None:
            size = self.engine.model.config.vocab_size
            self._masks = Masks(request.schema, self.item.native, size, request.stop_ids)

    def _drafter(self) -> Drafter:
        """Who guesses: in a session that was given, the one who did so before."""
        session, speculation = self.session, self.engine.speculation
        if self.owned:
            return speculation.drafter(session, self.request.hint)
        if session.drafter is None or session.drafter.made is not speculation:
            session.drafter = speculation.drafter(session)
        return session.drafter

    def put_aside(self) -> None:
        """Give up the session. The text stays, and start() reads what is gone of it again: what comes after
        is the same."""
        self._close_drafter()
        self.engine.prefixes.give(self.session)
        self.session = None             # type: ignore[assignment]      # until start()
        self.ids = np.array(self.text, np.int32)
        if self.unscored:
            self.scores.clear()

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
            self.item.native.session = claims.enter_context(self.session._claimed())
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
        """Rows for its text and the beginning of its answer."""
        return self.rows_for(ANSWER)

    def rows_for(self, n: float) -> float:
        """Rows for its text and n tokens more; for all that may come where the session was given, which is
        never taken away."""
        return len(self.text) + (min(self.left, n) if self.owned else self.left)

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

    def ask(self, piece: int, most: float = CALL_TOKENS) -> int:
        """Prepare the item for a step that gives `most` tokens at most;
        how many tokens of the text it reads, `piece` at most."""
        item, drafter = self.item, self.drafter.native if self.drafter else ffi.NULL
        max_tokens = int(min(CALL_TOKENS, most, self._limit - self._written))
        if not self.reading:
            item.read(self._last, 1, max_tokens)
            item.native.drafter = drafter
            if self._masks and (forced := self._masks.forced()):
                item.guess(forced)
            return 0
        at = self.session.position
        n = min([piece, len(self.text) - at, *(mark - at for mark in self.marks if mark > at)])
        n = uncut(at, n, len(self.text), self.engine.model.prompt_chunk)
        choose = at + n == len(self.text) and self._limit > 0
        item.read(self._tokens + at, n, max_tokens, choose)
        item.native.drafter = ffi.NULL if choose else drafter       # the text's last piece is without guesses
        return n

    def answer_wanted(self) -> None:
        """Guesses through text, where the library asks for some."""
        text = [*self.session.tokens, self._last[0]]
        started = time.perf_counter()
        assert self.drafter is not None
        ids, sure = self.drafter.propose(text, self.item.native.wanted)
        self.item.guess(ids, sure, time.perf_counter() - started)
        self.item.native.drafter = self.drafter.native

    def take(self, seconds: float) -> list[Token]:
        """The tokens that a round gave; also those of a call after which an interrupt came."""
        if self.reading:
            self._note_progress()
            if self.session.position in self.marks:
                self._snapshot()
        if self.drafter:
            self.drafter.note_failure()
        if not self.item.native.n:
            self.done = self._limit < 1 and self.session.position == len(self.prompt)
            return []
        try:
            return self._take(seconds)
        except BaseException:           # an interrupt: the session holds tokens that nobody was given
            self.lose("it was interrupted")
            raise

    def _note_progress(self) -> None:
        if self.request.progress and not self._written:
            self.request.progress(min(self.session.position, len(self.prompt)), len(self.prompt))

    def _take(self, seconds: float) -> list[Token]:
        ids, logprobs, drafted = self.item.take()
        self._last[0] = ids[-1]
        if self._masks:
            self._masks.accept(ids)
        self._time(seconds)
        if self.reading and (self.engine.keep or not self.owned):
            self._snapshot()
        self.reading = False
        found = []
        for i, (id, logprob, by) in enumerate(zip(ids, logprobs, drafted)):
            if id < 0 or logprob != logprob or logprob == -inf:
                self.done = True
                self.error = (self._masks and self._masks.error()) or self._stuck()
                break
            token = self._ending.token(id, logprob, bool(by), self.item.top(i), SOURCES[by])
            self._written += 1
            self.text.append(id)
            self.stats.predicted_tokens += 1
            found.append(token)
            if token.finish_reason:
                self.take_back(0)
                self.done = True
                break
        return found

    def _stuck(self) -> BmcError:
        """The error where no token is left; the request's own where it bans some."""
        kind = ArgumentError if -inf in self.request.sampler.logit_bias.values() else BmcError
        return kind(f"no token can be chosen at position {len(self.prompt) + self._written}: "
                    "its logits are not numbers, or all tokens are banned")

    def take_back(self, unread: int) -> None:
        """Let a session that was given hold the text without its last token, and without tokens that nobody
        has read or that came after a stop string."""
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
        stats, counts = self.stats, self.item.native.stats
        if not self._written:
            stats.prompt_s = time.perf_counter() - self._began
            ffi.buffer(ffi.addressof(counts))[:] = bytes(ffi.sizeof("bmc_item_stats"))
            return
        stats.predicted_s += seconds
        stats.rounds, stats.draft_n, stats.draft_n_accepted = counts.rounds, counts.checked, counts.accepted
        stats.draft_s, stats.verify_s, stats.plain_s = counts.draft_s, counts.verify_s, counts.plain_s
        stats.lengths = {i: count for i, count in enumerate(counts.lengths) if count}

    def finish(self, keep: bool = False) -> None:
        """Let go of what the sequence used; a session that was given stays.
        keep: the engine may use the rows again."""
        self.done = True
        if self.started and (keep or not self.owned):
            self.item.native.n = 0
            self.take_back(0)
            self._snapshot()
        self._close_drafter()
        if not self.owned or self.session is None:
            return
        if keep and not self.error:
            session = self.session
            self.session = None         # type: ignore[assignment]      # nobody asks for it any more
            if self.request.ended:
                self.engine.lent.add(session)
                self.request.ended(session)
            else:
                self.engine.prefixes.give(session)
        else:
            self.session.close()
            self.engine.prefixes.recount()

    def _close_drafter(self) -> None:
        if self.drafter is not None and self.owned:
            self.drafter.close()
            self.drafter = None
