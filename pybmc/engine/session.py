"""Session: one sequence. It serves one thread at a time and says so with a BusyError."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from .._native import as_array, check, ffi, lib, owned, pointer
from ..errors import ArgumentError, BusyError, ClosedError
from .sampler import Sampler
from .session_file import Saved, save

log = logging.getLogger(__name__)

_WANTS = {"none": lib.BMC_WANT_NONE, "last": lib.BMC_WANT_LAST, "all": lib.BMC_WANT_ALL,
          "argmax": lib.BMC_WANT_ALL, "best": lib.BMC_WANT_ALL,
          "hidden": lib.BMC_WANT_ALL, "first hidden": lib.BMC_WANT_FIRST, "last hidden": lib.BMC_WANT_LAST}


@dataclass(frozen=True)
class ArenaStats:
    """A session's memory. row_bytes: keys and values of one token, all layers; r: rows added at a time;
    state_bytes: what recurrent layers keep besides, whatever the length. bytes_reserved includes it, and
    snapshots."""

    rows_reserved: int
    rows_used: int
    bytes_reserved: int
    row_bytes: int
    r: int
    state_bytes: int


class Best(NamedTuple):
    """The best next id after each token, int32 (n,), and its log-probability, float32 (n,)."""

    ids: np.ndarray
    logprobs: np.ndarray


class Session:
    """One sequence: its rows of keys and values, and its position. Made by Model.session. notes: a JSON value
    that save() writes too."""

    def __init__(self, model: Any, context: int | None, rows: int | str, kv_type: str):
        self._handle = ffi.NULL
        checks.choice("kv_type", kv_type, ("f16",))
        config = model.config
        r = _rows_at_a_time(rows)
        cap = config.n_ctx if context is None else checks.whole("context", context, 1, 1 << 30)
        long_factors = bool(config.original_ctx) and cap > config.original_ctx
        model_handle = model._live()
        handle = ffi.new("bmc_session **")
        check(lib.bmc_session_new(model_handle, cap, r, int(long_factors), handle))
        self._begin(model, cap, long_factors, owned(handle[0], "bmc_session_free", model_handle))
        if cap > config.n_ctx and not model._long:
            model._long = True
            log.warning("a context of %d tokens is more than the %d that %s was trained for; "
                        "text beyond gets worse", cap, config.n_ctx, model.path)

    def _begin(self, model: Any, cap: int, long_factors: bool, handle: Any) -> None:
        self._handle = handle
        self._user: dict[str, tuple] = {}   # "thread": (process, thread) that is using the session
        self.uses = 0                       # calls that moved rows on or back
        self.model = model
        self.context, self.long_factors = cap, long_factors
        self.notes: Any = None
        self.saved: Saved | None = None     # the file that holds this session as it was saved or loaded last
        self.writer: Any = None             # the engine's: who writes here ..
        self.drafter: Any = None            # .. and who guesses
        self.speculation: Any = None
        with model._locks[os.getpid()]:
            model._sessions.add(self)

    def fork(self, position: int | None = None) -> Session:
        """A new session with the first `position` tokens of this one (all of them by default). They share the
        memory of those rows, and neither changes the other. Raises ArgumentError, OutOfMemoryError."""
        with self._claimed(moves=False) as handle:
            at = lib.bmc_session_position(handle) if position is None else checks.whole("position", position)
            fork = ffi.new("bmc_session **")
            check(lib.bmc_session_fork(handle, at, fork))
            owner = owned(fork[0], "bmc_session_free", self.model._live())
            other = Session.__new__(Session)
            other._begin(self.model, self.context, self.long_factors, owner)
            other.saved = self.saved
        return other

    def nearest(self, position: int) -> int:
        """The last position up to this one to which rewind() and fork() go without reading tokens again: this
        one, but for recurrent layers, which need a snapshot, and for windows, whose rows may be gone."""
        with self._claimed(moves=False) as handle:
            return check(lib.bmc_session_nearest(handle, checks.whole("position", position)))

    @property
    def position(self) -> int:
        """Rows in use: the tokens evaluated so far, less those rewound."""
        return lib.bmc_session_position(self._live())

    @property
    def tokens(self) -> list[int]:
        """The tokens evaluated so far, less those rewound."""
        handle = self._live()
        n = lib.bmc_session_position(handle)
        return ffi.unpack(lib.bmc_session_tokens(handle), n) if n else []

    def sync(self, tokens: Sequence[int] | np.ndarray) -> int:
        """Keep the rows that a text begins with, forget the others; how many are kept."""
        ids = as_array(tokens, np.int32, (None,), "tokens")
        with self._claimed() as handle:
            return check(lib.bmc_session_sync(handle, pointer(ids), len(ids)))

    @property
    def rows(self) -> int:
        """Rows reserved."""
        return self.arena_stats().rows_reserved

    def eval(self, tokens: Sequence[int] | np.ndarray, logits: str = "last", last: int = 0,
             sampler: Sampler | None = None) -> np.ndarray | Best | None:
        """Evaluate tokens after the ones before.

        logits: what comes back:
            "last"          float32 (vocab_size,), of the last token
            "all"           float32 (len(tokens), vocab_size)
            "argmax"        the best next id of each token, int32 (len(tokens),)
            "best"          those with their log-probabilities, a Best
            "hidden"        what the head would read, after the last norm, float32 (len(tokens), dim)
            "first hidden"  that of the first token, (dim,)
            "last hidden"   that of the last
            "none"          None
        An encoder gives hidden states only, and reads a text in one call, in an empty session.
        last: 0, or how many last rows attention sees, besides the first 256.
        sampler: "argmax" and "best" are what it chooses, and the model's log-probabilities of that.

        What the numbers are does not depend on how tokens are cut into calls. Raises ArgumentError,
        ContextFullError beyond the cap, OutOfMemoryError; then nothing has changed.
        """
        span = ffi.new("bmc_span *")
        with self._claimed() as handle:
            result, kept = _fill(span, handle, self, tokens, logits, last, sampler)
            check(lib.bmc_eval(span, 1))
        return result

    def rewind(self, position: int) -> None:
        """Forget the rows from `position` on. Raises ArgumentError beyond the position."""
        with self._claimed() as handle:
            check(lib.bmc_session_rewind(handle, checks.whole("position", position)))

    def snapshot(self) -> None:
        """Keep the states of recurrent blocks as they are about here: to go back to this position will need
        at most 48 tokens again. Of more than eight those stay that save the most tokens. Models without such
        blocks need none. Raises OutOfMemoryError."""
        with self._claimed(moves=False) as handle:
            check(lib.bmc_session_snapshot(handle))

    def save(self, path: str | os.PathLike) -> None:
        """Write the session to a file, for Model.load_session: its tokens, rows and snapshots, and its notes.
        To the file that it was saved to or loaded from last only what is new is appended; any other one is
        written beside and renamed. A save that fails or is cut off leaves the one before. Raises OSError,
        DeviceError where a GPU that has layers fails, and FormatError where the file is there and no saved
        session."""
        save(self, path)

    def keep_hidden(self) -> None:
        """Keep the hidden states of the last tokens from now on, for a draft head.
        Raises OutOfMemoryError."""
        with self._claimed(moves=False) as handle:
            check(lib.bmc_session_keep_hidden(handle))

    def reserve(self, rows: int) -> None:
        """Make room for `rows` tokens more, so that the next ones do not wait for memory."""
        with self._claimed(moves=False) as handle:
            check(lib.bmc_session_reserve(handle, checks.whole("rows", rows)))

    def arena_stats(self) -> ArenaStats:
        stats = ffi.new("bmc_arena_stats *")
        check(lib.bmc_session_stats(self._live(), stats))
        return ArenaStats(**{field.name: getattr(stats, field.name) for field in fields(ArenaStats)})

    def close(self) -> None:
        """Free the rows. Twice is fine. Raises BusyError while another thread uses the session."""
        user = self._user.get("thread")
        if user and user[0] != os.getpid():             # a thread of the process that this one is a fork of
            self._handle = ffi.NULL
        if self._handle != ffi.NULL:
            with suppress(ClosedError), self._claimed(moves=False):
                self._handle = ffi.NULL

    def _live(self) -> Any:
        if self._handle == ffi.NULL:
            raise ClosedError("this session is closed")
        return self._handle

    @contextmanager
    def _claimed(self, moves: bool = True) -> Iterator[Any]:
        """One thread at a time. A thread that an interrupt threw out too early to say so may come back: with
        a lock in this place, Ctrl-C could leave the session locked for good. moves: the call moves rows on or
        back."""
        me = _me()
        user = self._user.setdefault("thread", me)
        if user != me:
            raise BusyError("this session is in use by another thread" if user[0] == me[0] else
                            "this session was in use when the process was forked; make a new one")
        try:
            handle = self._live()
            self.uses += moves
            yield handle
        finally:
            self._user.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def eval_batch(parts: Sequence[tuple]) -> list[np.ndarray | Best | None]:
    """Evaluate tokens of several sessions of one model in one pass: [(session, tokens, logits)] with
    Session.eval's meaning, and its `last` and `sampler` behind them, if need be.

    Every result equals what the session gives alone. Either all sessions move on or none does.
    """
    parts = list(parts)
    if not parts:
        return []
    for part in parts:
        if not isinstance(part, tuple) or not 3 <= len(part) <= 5 or not isinstance(part[0], Session):
            checks.refuse("parts", "tuples of a session, tokens and logits", part)
    if len({id(part[0]) for part in parts}) < len(parts):
        raise BusyError("a session is there twice in one call")
    spans, filled = ffi.new("bmc_span[]", len(parts)), []
    with ExitStack() as claims:
        for span, (session, *rest) in zip(spans, parts):
            filled.append(_fill(span, claims.enter_context(session._claimed()), session, *rest))
        check(lib.bmc_eval(spans, len(parts)))
    return [result for result, _ in filled]


def _fill(span: Any, handle: Any, session: Session, tokens: Any, want: str, last: int = 0,
          sampler: Sampler | None = None) -> tuple:
    """A span of a claimed session. Returns where its results go, and what has to live as long as the call."""
    checks.choice("logits", want, _WANTS)
    ids, position = _ids(tokens), session.position
    room = want if position + len(ids) <= session.context else "none"       # too long: the library says so
    span.session, span.tokens, span.n_tok, span.want = handle, pointer(ids), len(ids), _WANTS[want]
    span.last, span.sampler = checks.whole("last", last), _native(sampler)
    result: Any = None
    if room == "best":
        result = Best(np.empty(len(ids), np.int32), np.empty(len(ids), np.float32))
        span.next, span.logprob = pointer(result.ids), pointer(result.logprobs)
    elif room == "argmax":
        result = np.empty(len(ids), np.int32)
        span.next = pointer(result)
    elif room.endswith("hidden"):
        dim = session.model.config.dim
        result = np.empty((len(ids), dim) if room == "hidden" else dim, np.float32)
        span.hidden = pointer(result)
    elif room != "none":
        vocab_size = session.model.config.vocab_size
        result = np.empty(vocab_size if want == "last" else (len(ids), vocab_size), np.float32)
        span.logits = pointer(result)
    return result, ids


def _native(sampler: Sampler | None) -> Any:
    if sampler is not None and not isinstance(sampler, Sampler):
        checks.refuse("sampler", "a Sampler or None", sampler)
    return ffi.NULL if sampler is None else sampler.native


def _me() -> tuple[int, int]:
    """This process and thread."""
    return os.getpid(), threading.get_ident()


def _ids(tokens: Any) -> np.ndarray:
    if type(tokens) is list and len(tokens) < 64 and set(map(type, tokens)) == {int}:
        with suppress(OverflowError):           # as_array says what is wrong
            return np.array(tokens, np.int32)
    ids = as_array(tokens, np.int32, (None,), "tokens")
    if not ids.size:
        raise ArgumentError("tokens: expected at least one, found none")
    return ids


def _rows_at_a_time(rows: int | str) -> int:
    """The library's r: 0 leaves it to the library."""
    if not isinstance(rows, str):
        return checks.whole("rows", rows, 1, 1 << 30)
    if rows != "auto":
        checks.refuse("rows", '"auto" or a whole number', rows)
    return 0
