"""Model and Session: one Python object for each C handle.

A Model is a file's weights, packed once and shared; a Session is one sequence. Passes of several threads over one model
take turns; a session serves one thread at a time and says so with a BusyError.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from . import arch, checks
from ._native import as_array, check, ffi, last_error, lib, owned, pointer
from .errors import ArgumentError, BusyError, ClosedError, FormatError, OutOfMemoryError
from .gguf import GGUF
from .sampling import Sampler

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]       # called with what is done and how much there is

_NORMS = {arch.RMS: lib.BMC_NORM_RMS, arch.LAYER: lib.BMC_NORM_LAYER}
_ACTS = {arch.SILU: lib.BMC_ACT_SILU, arch.GELU: lib.BMC_ACT_GELU}
_ROPES = {arch.NONE: lib.BMC_ROPE_NONE, arch.PAIRS: lib.BMC_ROPE_PAIRS, arch.HALVES: lib.BMC_ROPE_HALVES}
_WANTS = {"none": lib.BMC_WANT_NONE, "last": lib.BMC_WANT_LAST, "all": lib.BMC_WANT_ALL,
          "argmax": lib.BMC_WANT_ALL, "best": lib.BMC_WANT_ALL}


@dataclass(frozen=True)
class ArenaStats:
    """A session's KV arena. row_bytes: keys and values of one token, all layers; r: rows added at a time."""

    rows_reserved: int
    rows_used: int
    bytes_reserved: int
    row_bytes: int
    r: int


@dataclass
class Profile:
    """Where the time of a `with model.profile()` went, in seconds: all of it, in calls of the library, and in the steps
    of its passes, which together make up the passes (the mean of the threads, whose waiting is a step too)."""

    wall_s: float = 0.0
    calls_s: float = 0.0
    passes: int = 0
    steps: dict[str, float] = field(default_factory=dict)


class Best(NamedTuple):
    """The best next id after each token, int32 (n,), and its log-probability, float32 (n,)."""

    ids: np.ndarray
    logprobs: np.ndarray


class Model:
    """The weights of a GGUF file, checked and packed into the layout that the kernels read.

    threads: None for all cores that this process may use. progress is called with bytes packed and bytes in all.
    repack=False leaves the weights in the file and lays them out again at every pass: much slower, the same bits, and
    no memory but the pages of the file that the system can spare.
    Raises FormatError if the file is not a model that pybmc runs, OSError if it cannot be opened, OutOfMemoryError.
    """

    def __init__(self, path, threads: int | None = None, progress: Progress | None = None,
                 repack: bool = True):
        self._begin(threads)
        self._file = GGUF(path)
        try:
            self.config = arch.read_config(self._file)
            self._handle = _bound(self._file, self.config, self.threads)
            if repack:
                self._pack(progress)
            elif lib.bmc_model_map(self._handle):
                raise OutOfMemoryError(last_error())
        except BaseException:
            self.close()
            raise

    def _begin(self, threads: int | None) -> None:
        self._handle = ffi.NULL
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._locks = defaultdict(threading.Lock)       # process id -> lock of _sessions; a forked one needs its own
        self._long = False                              # a context beyond the training was noted
        self.threads = _thread_count(threads)

    def _pack(self, progress: Progress | None) -> None:
        """The panels are made beside the tokenizer; a vocabulary that is broken shows here too."""
        status: list[tuple[int, str]] = []
        worker = threading.Thread(target=lambda: status.append((lib.bmc_model_pack(self._handle), last_error())))
        worker.start()
        try:
            self.tokenizer  # noqa: B018
            total = ffi.new("int64_t *")
            while progress and worker.is_alive():
                worker.join(0.05)
                progress(lib.bmc_model_packed(self._handle, total), total[0])
        finally:
            worker.join()
        if status[0][0] < 0:
            raise OutOfMemoryError(status[0][1])

    @property
    def path(self) -> str:
        return str(self._file.path)

    @property
    def metadata(self) -> dict[str, object]:
        return self._file.metadata

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights that a token reads, packed or in the file."""
        total = ffi.new("int64_t *")
        lib.bmc_model_packed(self._live(), total)
        return total[0]

    def coarsen(self) -> bool:
        """Give the head a coarse copy of two bits a weight, with which draft() chooses the few ids that the head itself
        decides among. Once; drafting does it. False where that would not save much. Raises OutOfMemoryError."""
        return check(lib.bmc_model_coarsen(self._live())) == 1

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Take times of every pass inside the with; the Profile it gives is filled at its end. One at a time."""
        handle, profile, times = self._live(), Profile(), ffi.new("bmc_times *")
        check(lib.bmc_model_profile(handle, 1))
        started = time.perf_counter()
        try:
            yield profile
        finally:
            profile.wall_s = time.perf_counter() - started
            check(lib.bmc_model_times(handle, times))
            check(lib.bmc_model_profile(handle, 0))
            profile.calls_s, profile.passes = times.calls, times.n_passes
            profile.steps = {ffi.string(lib.bmc_step_name(i)).decode(): s for i, s in enumerate(times.steps)}

    @cached_property
    def tokenizer(self):
        """The file's Tokenizer; None if the file has no vocabulary."""
        from .tokenizers import Tokenizer

        return Tokenizer(self._file) if "tokenizer.ggml.model" in self._file.metadata else None

    def session(self, context: int | None = None, rows: int | str = "auto", kv_type: str = "f16") -> Session:
        """A new, empty sequence.

        context: the most rows it may hold (a cap, not an allocation); None for what the model was trained for. More than
        that works and is noted in the log: text beyond it gets worse.
        rows: how many rows of keys and values are added at a time, rounded up to 16; "auto": about 4 MB of them.
        """
        return Session(self, context, rows, kv_type)

    def close(self) -> None:
        """Free the weights and close every session. Twice is fine. Raises BusyError while one is in use."""
        with self._locks[os.getpid()]:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        self._handle = ffi.NULL
        self._file.close()

    def _live(self):
        if self._handle == ffi.NULL:
            raise ClosedError(f"the model {self.path} is closed")
        return self._handle

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pybmc.Model {self.path} {self.config.arch}, {self.threads} threads>"


class Session:
    """One sequence: its rows of keys and values, and its position. Made by Model.session."""

    def __init__(self, model: Model, context: int | None, rows: int | str, kv_type: str):
        self._handle = ffi.NULL
        self._user: dict[str, tuple] = {}   # "thread": (process, thread) that is using the session
        self.uses = 0                       # calls that moved rows on or back
        checks.choice("kv_type", kv_type, ("f16",))
        config = model.config
        r = _rows_at_a_time(rows)
        cap = config.n_ctx if context is None else checks.whole("context", context, 1, 1 << 30)
        long_factors = bool(config.original_ctx) and cap > config.original_ctx
        model_handle = model._live()
        handle = ffi.new("bmc_session **")
        check(lib.bmc_session_new(model_handle, cap, r, int(long_factors), handle))
        self._handle = owned(handle[0], "bmc_session_free", model_handle)
        self.model = model
        self.context = cap
        self.writer = self.drafter = self.speculation = None        # the engine's: who writes here, and who guesses
        if cap > config.n_ctx and not model._long:
            model._long = True
            log.warning("a context of %d tokens is more than the %d that %s was trained for; text beyond gets worse",
                        cap, config.n_ctx, model.path)
        with model._locks[os.getpid()]:
            model._sessions.add(self)

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

        logits: "last" gives float32 (vocab_size,) of the last token, "all" (len(tokens), vocab_size), "argmax" the best
        next id of each token, int32 (len(tokens),), "best" those with their log-probabilities (Best), "none" None. What
        the numbers are does not depend on how tokens are cut into calls. sampler: "argmax" and "best" are what it chooses,
        and the model's log-probabilities of that. last: 0, or how many last rows attention sees, besides the first 256. Raises
        ArgumentError, ContextFullError beyond the cap, OutOfMemoryError; then nothing has changed.
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
        if user and user[0] != os.getpid():             # a thread of the process that this one was forked from
            self._handle = ffi.NULL
        if self._handle != ffi.NULL:
            with suppress(ClosedError), self._claimed(moves=False):
                self._handle = ffi.NULL

    def _live(self):
        if self._handle == ffi.NULL:
            raise ClosedError("this session is closed")
        return self._handle

    @contextmanager
    def _claimed(self, moves: bool = True):
        """One thread at a time. A thread that an interrupt threw out too early to say so may come back: with a lock
        in this place, Ctrl-C could leave the session locked for good. moves: the call moves rows on or back."""
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

    def __exit__(self, *exc) -> None:
        self.close()


def eval_batch(parts: Sequence[tuple]) -> list[np.ndarray | Best | None]:
    """Evaluate tokens of several sessions of one model in one pass: [(session, tokens, logits)] with Session.eval's meaning,
    and its `last` and `sampler` behind them, if need be.

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


def _fill(span, handle, session: Session, tokens, want: str, last: int = 0, sampler: Sampler | None = None) -> tuple:
    """A span of a claimed session. Returns where its results go, and what has to live as long as the call."""
    checks.choice("logits", want, _WANTS)
    ids, position = _ids(tokens), session.position
    room = want if position + len(ids) <= session.context else "none"       # too long: the library says so
    span.session, span.tokens, span.n_tok, span.want = handle, pointer(ids), len(ids), _WANTS[want]
    span.last, span.sampler = checks.whole("last", last), _native(sampler)
    result = None
    if room == "best":
        result = Best(np.empty(len(ids), np.int32), np.empty(len(ids), np.float32))
        span.next, span.logprob = pointer(result.ids), pointer(result.logprobs)
    elif room == "argmax":
        result = np.empty(len(ids), np.int32)
        span.next = pointer(result)
    elif room != "none":
        vocab_size = session.model.config.vocab_size
        result = np.empty(vocab_size if want == "last" else (len(ids), vocab_size), np.float32)
        span.logits = pointer(result)
    return result, ids


def _native(sampler: Sampler | None):
    if sampler is not None and not isinstance(sampler, Sampler):
        checks.refuse("sampler", "a Sampler or None", sampler)
    return ffi.NULL if sampler is None else sampler.native


def _me() -> tuple[int, int]:
    """This process and thread."""
    return os.getpid(), threading.get_ident()


def _ids(tokens) -> np.ndarray:
    if type(tokens) is list and len(tokens) < 64 and set(map(type, tokens)) == {int}:
        with suppress(OverflowError):           # as_array says what is wrong
            return np.array(tokens, np.int32)
    ids = as_array(tokens, np.int32, (None,), "tokens")
    if not ids.size:
        raise ArgumentError("tokens: expected at least one, found none")
    return ids


def check_model(file: GGUF, config: arch.Config) -> None:
    """Raise the FormatError that loading would: every tensor is bound and its shape checked, none is packed."""
    _bound(file, config, 1)


def _bound(file: GGUF, config: arch.Config, threads: int):
    """A C model whose tensors are bound."""
    return _bound_roles(file.path, config, arch.bind(file, config), threads)


def _bound_roles(path, config: arch.Config, roles: list[arch.Role], threads: int, mapped: bool = True):
    """The same from roles; mapped: their data lies in a file mapping, whose pages may be dropped."""
    settings, tensors, kept = _settings(config), *_tensors(roles, mapped)
    handle = ffi.new("bmc_model **")
    try:
        check(lib.bmc_model_new(settings.pointer, tensors, len(tensors), threads, handle))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return owned(handle[0], "bmc_model_free", kept)


def _thread_count(threads: int | None) -> int:
    cores = lib.bmc_cpu_count()
    if threads is None:
        return cores
    threads = checks.whole("threads", threads, 1, 1024)
    if threads > cores:
        _note_threads(threads, cores)
    return threads


@lru_cache(maxsize=None)            # once: a model and its draft are opened alike
def _note_threads(threads: int, cores: int) -> None:
    log.warning("%d threads are asked for, this process may use %d cores: that is slower than %d threads",
                threads, cores, cores)


def _rows_at_a_time(rows: int | str) -> int:
    """The library's r: 0 leaves it to the library."""
    if not isinstance(rows, str):
        return checks.whole("rows", rows, 1, 1 << 30)
    if rows != "auto":
        checks.refuse("rows", '"auto" or a whole number', rows)
    return 0


class _settings:
    """A Config as the C struct, with the arrays it points to."""

    def __init__(self, config: arch.Config):
        spec = config.spec
        self.kept = [np.asarray(config.windows, np.int32), np.asarray(config.layer_rope or [0] * config.n_layers, np.int32),
                     *(np.asarray(table, np.float32) for table in config.rope_freq)]
        self.pointer = c = ffi.new("bmc_config *")
        for name in ("dim", "hidden_dim", "head_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "n_ctx", "rope_dim", "norm_eps"):
            setattr(c, name, getattr(config, name))
        c.norm, c.act, c.rope = _NORMS[spec.norm], _ACTS[spec.act], _ROPES[spec.rope]
        c.embedding_scale, c.attn_scale = spec.embedding_scale(config), spec.attn_scale(config)
        c.layer_window, c.layer_rope = pointer(self.kept[0]), pointer(self.kept[1])
        c.n_ropes = len(config.rope_freq)
        for i, mscale in enumerate(config.rope_mscale):
            c.rope_mscale[i] = mscale
            c.rope_freq[i] = pointer(self.kept[2 + i])


def _tensors(roles: list[arch.Role], mapped: bool):
    """The roles as a C array, and what must stay alive while the model lives."""
    tensors, kept = ffi.new("bmc_tensor[]", len(roles)), []
    for tensor, role in zip(tensors, roles):
        name, data = ffi.new("char[]", role.name.encode()), ffi.from_buffer(role.data)
        kept += [name, data, role.data]
        tensor.role, tensor.layer, tensor.type, tensor.mapped = name, role.layer, role.tensor.type.id, mapped
        tensor.n_cols, tensor.n_rows, tensor.data = role.n_cols, role.n_rows, data
    return tensors, kept
