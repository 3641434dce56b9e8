"""Iterators over what an engine writes for one request, or for many; and what their arguments mean."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from math import inf
from numbers import Integral
from os import PathLike
from typing import Any

from .. import checks
from ..errors import ArgumentError, BusyError
from ..spec.speculation import SPECS, Speculation
from ..tokenizers import Tokenizer
from .engine import Engine
from .model import Model
from .request import Request, Stats
from .sampler import Sampler, check_bias
from .sequence import Event, Sequence
from .session import Session
from .text import Token

log = logging.getLogger(__name__)


class _Events:
    """Events of an engine's sequences, one by one. Once all are done, or one fails, the engine is closed."""

    def __init__(self, engine: Engine, sequences: list[Sequence]):
        self._engine, self._sequences = engine, sequences
        self._ready: deque[Event] = deque()

    def _next(self) -> Event:
        while not self._ready:
            failed = next((s.error for s in self._sequences if s.error), None)
            if failed or all(s.done for s in self._sequences):
                self._engine.close()
                raise failed or StopIteration
            self._ready.extend(self._engine.step())
        return self._ready.popleft()


class Generation(_Events, Iterator[Token]):
    """An iterator of Token. prompt holds the prompt's ids, stats counts and times so far. close() ends it
    early: a session that was given then holds what was read, without its last token.

    A session given to generate() serves one generation at a time. The next one that begins in it ends this
    one, which then raises BusyError when it is asked for another token. The same happens after other calls
    used the session.
    """

    def __init__(self, engine: Engine, request: Request):
        self.prompt, self._lock = list(request.tokens), threading.Lock()
        super().__init__(engine, [engine.add(request)])
        self._sequence = self._sequences[0]

    @property
    def stats(self) -> Stats:
        return self._sequence.stats

    def __next__(self) -> Token:
        if not self._lock.acquire(blocking=False):
            raise BusyError("this generation is in use by another thread")
        try:
            if self._ready:
                self._sequence.check_unread()
            return self._next().token
        finally:
            self._lock.release()

    def close(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise BusyError("this generation is in use by another thread")
        try:
            unread = len(self._ready)
            self._ready.clear()
            self._engine.close()
            self._sequence.error = None
            if unread and self._sequence.request.session is not None:
                self._sequence.take_back(unread)
        finally:
            self._lock.release()

    def __del__(self) -> None:
        if getattr(self, "_sequence", None) is not None and not (self._sequence.done and not self._ready):
            self.close()


class Batch(_Events, Iterator[tuple[int, Token]]):
    """An iterator of (number of the prompt, Token). stats: each prompt's Stats. close() ends all."""

    @property
    def stats(self) -> dict[int, Stats]:
        return {s.number: s.stats for s in self._sequences}

    def __next__(self) -> tuple[int, Token]:
        sequence, token = self._next()
        return sequence.number, token

    def close(self) -> None:
        self._ready.clear()
        self._engine.close()


# ---- arguments ---------------------------------------------------------------------------------------------


def checked_wishes(model: Model, max_tokens: Any, stop: Any, stop_tokens: Any, settings: Mapping) -> dict:
    """The fields of a Request that generate() and generate_batch() have in common, checked."""
    if not hasattr(model, "tokenizer"):
        checks.refuse("model", "a Model", model)
    if model.tokenizer is None:
        raise ArgumentError(f"{model.path} has no vocabulary: it can evaluate tokens, but not write text")
    sampler, size = Sampler(**settings), model.config.vocab_size
    check_bias(sampler.logit_bias, size)
    limit = inf if max_tokens is None else checks.whole("max_tokens", max_tokens, 0, inf)
    return {"max_tokens": limit, "sampler": sampler, "stop": checks.strings("stop", stop),
            "stop_ids": stop_ids(model.tokenizer, stop_tokens, size)}


def stop_ids(tokenizer: Tokenizer, stop_tokens: Any, size: int) -> frozenset[int]:
    if stop_tokens is None:
        return tokenizer.stop_ids
    one = isinstance(stop_tokens, Integral) and not isinstance(stop_tokens, bool)
    return frozenset(checks.ids("stop_tokens", [stop_tokens] if one else stop_tokens, size))


def encode_text(tokenizer: Tokenizer, prompt: str | list) -> list[int]:
    """Token ids of a text, in which control tokens count, or of a list of ids."""
    if isinstance(prompt, str):
        return filled(one_bos(tokenizer, tokenizer.encode(prompt, special=True)))
    return filled(checks.ids("prompt", prompt, tokenizer.vocab_size))


def filled(tokens: list[int]) -> list[int]:
    if not tokens:
        raise ArgumentError("the prompt is empty")
    return tokens


def one_bos(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The tokens of a text without a second BOS: a text copied from a model card may begin with it."""
    bos = tokenizer.bos_id
    if not tokenizer.add_bos or bos is None or tokens[:2] != [bos, bos]:
        return tokens
    log.warning("the prompt begins with the BOS token %r, which every text gets; it is not added again",
                tokenizer.piece(bos).decode("utf-8", "replace"))
    return tokens[1:]


def speculation_of(session: Session | None, model: Model, draft: Any, spec: str, most: int,
                   least: int) -> Speculation:
    """The Speculation of these wishes, the same for all texts of a model: what was learned serves the next
    one. draft: a Model, the path of one, a Speculation, or None."""
    if isinstance(draft, Speculation):
        if draft.model is not model:
            checks.refuse("draft", "a Speculation of the same model", draft)
        return draft
    if not (draft is None or is_path(draft) or isinstance(draft, Model)):
        checks.refuse("draft", "a Model or a path", draft)
    checks.choice("spec", spec, SPECS)
    most, least = checks.draft_bounds(most, least)
    if draft is not None and spec in ("auto", "draft"):
        small = opened(model, draft) if is_path(draft) else draft
    else:
        small = None
    for asked, made in list(model.speculations.items()):
        if made.draft is not None and made.draft.closed:
            del model.speculations[asked]
    made = model.speculations.get((small, spec, most, least))
    if made is None:
        made = model.speculations[small, spec, most, least] = Speculation(model, small, spec, most, least)
    if session is not None:
        session.speculation = made
    return made


def opened(model: Model, path: str | PathLike) -> Model:
    """The draft model of a path, opened once for a model, and on its GPU as far as it fits there."""
    known = model.drafts.get(str(path))
    if known is None or known.closed:
        known = model.drafts[str(path)] = Model(path, threads=model.threads, gpu=model.gpu)
    return known


def is_path(draft: object) -> bool:
    return isinstance(draft, str) or hasattr(draft, "__fspath__")
