"""Speculative decoding for one model: the sources of guesses, and what is known of them."""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Sequence as Tokens
from contextlib import suppress
from typing import Any

from .. import checks
from .._native import check, ffi, last_error, lib, owned
from ..errors import ArgumentError, BmcError, OutOfMemoryError
from . import store
from .bridge import TextDrafter
from .interfaces import Model, Session
from .pair import TEXT, Overlap, PairError, connect
from .rounds import plain

log = logging.getLogger(__name__)

SPECS = ("auto", "draft", "mtp", "ngram", "self", "off")
WIDEST = 32                             # guesses in a pass, at most
SELF_WINDOW = 512                       # last rows that the model's own drafts see, besides the first 256
BYTES_A_SECOND = 3e10                   # that a first guess at a pass's time goes by
NGRAMS, MODEL = 1, 2                    # numbers of sources in native/round.h


class Speculation:
    """Who guesses for the sequences of a model, and what was learned of costs and of guesses;
    shared by all of them.

    draft: a smaller Model, or None. One whose vocabulary cannot be compared is left out with a warning.
    spec: who guesses:
        "draft"     the draft model
        "mtp"       the draft head in the model's file
        "ngram"     repetitions in the text
        "self"      the model itself with less attention: in long texts
        "auto"      repetitions, and the draft model if there is one, else the draft head if there is one
        "off"       nobody
    most, least: bounds on the guesses in a pass.
    fixed: how many there are in every pass, for proofs and comparisons; 0: as many as pay.
    Raises ArgumentError.
    """

    def __init__(self, model: Model, draft: Model | None = None, spec: str = "auto", most: int = 16,
                 least: int = 0, fixed: int = 0):
        checks.choice("spec", spec, SPECS)
        if spec == "draft" and draft is None:
            raise ArgumentError("spec is 'draft', but there is no draft")
        if spec == "mtp" and model.head is None:
            raise ArgumentError(f"spec is 'mtp', but {model.path} has no draft head")
        most, least = checks.draft_bounds(most, least)
        for one in (model, draft):
            if one is not None and spec != "off":
                one.check_writes()
        self.model, self.spec = model, spec if most else "off"
        self.most, self.least, self.fixed = min(most, WIDEST), min(least, WIDEST), min(fixed, WIDEST)
        self.head = self.spec == "mtp" or (self.spec == "auto" and draft is None and model.head is not None)
        self.draft = model.head if self.head else draft if self.spec in ("auto", "draft") else None
        # Of each process: one call of the library at a time learns.
        self.locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self.link = self._connect()
        self._key = store.identity(model, self.draft)
        if self.draft is not None:
            with suppress(OutOfMemoryError):            # without it, drafts take longer
                self.draft.coarsen()
        self.policy = self._policy()

    def _connect(self) -> Overlap | str | None:
        try:
            return connect(self.model, self.draft) if self.draft is not None and not self.head else None
        except PairError as error:
            log.warning("%s; decoding goes on without it", error)
            self.draft = None
            return None

    def _policy(self) -> Any:
        policy = ffi.new("bmc_policy **")
        of_pass = self.model.packed_bytes / BYTES_A_SECOND
        of_guess = of_pass if self.spec == "self" else seconds_of_guess(self.draft) if self.draft else 0.0
        check(lib.bmc_policy_new(of_pass, of_guess, policy))
        policy = owned(policy[0], "bmc_policy_free")
        record = store.load(self._key)
        if record:
            lib.bmc_policy_load(policy, record, len(record))        # one that does not fit is as good as none
        return policy

    @property
    def off(self) -> bool:
        return self.spec == "off"

    def drafter(self, session: Session | None = None, hint: Tokens[int] = ()) -> Drafter:
        """For one sequence of the model, in this session: without one a draft head makes no guesses.
        hint: ids that its text may repeat though they are not in it."""
        if self.head and session is not None:
            with suppress(OutOfMemoryError):            # decoding goes on without the draft head
                session.keep_hidden()
        return Drafter(self, hint)

    def save(self) -> None:
        """Keep what was learned for the next run."""
        n = lib.bmc_policy_save(self.policy, ffi.NULL, 0)
        record = ffi.new("double[]", n)
        with self.locks[os.getpid()]:
            lib.bmc_policy_save(self.policy, record, n)
        if lib.bmc_policy_seconds(self.policy, 0, 1) and not self.off:
            store.save(self._key, ffi.unpack(record, n))

    def seconds(self, width: float, of_draft: bool = False) -> float:
        """Of a pass of `width` tokens; 0 if unknown."""
        return lib.bmc_policy_seconds(self.policy, of_draft, width)

    def chance(self, source: int, confidence: float = -1.0) -> float:
        """How often guesses of a source come true: of this confidence, or all."""
        return lib.bmc_policy_chance(self.policy, source, confidence)


def seconds_of_guess(model: Model) -> float:
    """Of a guess of a draft model, measured now."""
    seconds = ffi.new("double *")
    with model.session(context=16) as session, session._claimed() as handle:
        check(lib.bmc_draft_seconds(handle, seconds))
    return seconds[0]


class Drafter:
    """Who guesses for one sequence. native is a bmc_drafter;
    bridge a TextDrafter where the draft model's vocabulary is another."""

    def __init__(self, made: Speculation, hint: Tokens[int] = ()):
        self.made, self._noted = made, False
        self.bridge: TextDrafter | None = None
        self._session: Session | None = None
        self._kept: list = []           # what options point to
        self._options = options = ffi.new("bmc_drafter_options *")
        options.most, options.least, options.fixed = made.most, made.least, made.fixed
        options.ngrams = made.spec in ("auto", "ngram")
        self._hint = ffi.new("int32_t[]", list(hint))
        options.hint, options.n_hint = self._hint, len(self._hint)
        options.self_window = SELF_WINDOW if made.spec == "self" else 0
        if made.draft is not None:
            self._session = session = made.draft.session()
            if made.link == TEXT:
                options.external = 1
                ours, theirs = made.model.tokenizer, made.draft.tokenizer
                assert ours and theirs          # connect() has compared them
                self.bridge = TextDrafter(ours, theirs, session, plain)
            else:
                options.draft = handle = session._live()
                self._kept = [handle]
                if isinstance(made.link, Overlap):
                    tables = made.link.to_draft, made.link.to_target.tolist()
                    self._kept += [ffi.new("int32_t[]", ids) for ids in tables]
                    options.to_draft, options.to_target = self._kept[1:]
        self.native = self._make()

    def _make(self) -> Any:
        handle = ffi.new("bmc_drafter **")
        check(lib.bmc_drafter_new(self._options, self.made.model.config.vocab_size, handle))
        return owned(handle[0], "bmc_drafter_free", self._kept)

    def note_failure(self) -> None:
        """Say once that the draft model had an error and is not asked any more."""
        if not self._noted and lib.bmc_drafter_failed(self.native):
            self._note(last_error())

    def _note(self, why: str) -> None:
        self._noted = True
        log.warning("the draft model failed (%s); decoding goes on without it", why)

    def propose(self, text: list[int], k: int) -> tuple[list[int], list[float]]:
        """Guesses through text, and how sure they are; none if the draft model fails, which ends its use."""
        assert self.bridge is not None
        try:
            return self.bridge.propose(text, k)
        except BmcError as error:
            self._note(str(error))
            self._options.external = 0
            self.native = self._make()
            return [], []

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
