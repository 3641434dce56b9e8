"""Who guesses how a text goes on: a small model with the same vocabulary, or the text itself.

A drafter is asked before each pass of the target model, with every token so far. What it proposes is checked in
that pass: a wrong guess costs time and never changes the text. So a drafter may be interrupted, closed or mistaken
at any time; it only has to follow the text.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from math import exp, isfinite, log
from typing import NamedTuple

import numpy as np

from ._native import check, ffi, last_error, lib, owned, pointer
from .decode import common_prefix, eval_prompt
from .errors import ArgumentError, OutOfMemoryError
from .model import Round, Session, speculate
from .sampling import Sampler, uniforms_of


class Draft(NamedTuple):
    """Tokens that may come next, and a mark for each: how sure the drafter was, from 0 up to its n_marks - 1."""

    ids: list[int]
    marks: list[int]

    def cut(self, n: int) -> Draft:
        return Draft(self.ids[:n], self.marks[:n])


NOTHING = Draft([], [])


# ---- a text as its own drafter -----------------------------------------------------------------------------


class NgramDrafter:
    """Proposes what followed when the last tokens were there before: the longest match, the latest of equals.

    A token's mark is the length of the match that it would go on, so a copy that runs well is trusted more and
    more; 1 where it only stands near the place at which an edit interrupted a copy. The library keeps the index (native/ngram.c).
    """

    name = "ngram"
    n_marks = 25
    edges = tuple(range(1, n_marks))    # of marks: where a length begins

    def __init__(self):
        handle = lib.bmc_ngrams_new()
        if handle == ffi.NULL:
            raise OutOfMemoryError(last_error())
        self._handle = owned(handle, "bmc_ngrams_free")
        self._text: list[int] | None = []       # what the index knows; None: not sure, an interrupt may have come in between

    def follow(self, text: Sequence[int]) -> None:
        """Take up a text that may begin otherwise than the one before."""
        if self._text is not None and common_prefix(self._text, text) < len(self._text):
            self._text = None
        self._extend(text)

    def _extend(self, text: Sequence[int]) -> None:
        known = self._text
        if known is None:
            check(lib.bmc_ngrams_clear(self._handle))
            known = self._text = []
        new = list(text[len(known):])
        if new:
            self._text = None
            check(lib.bmc_ngrams_add(self._handle, pointer(np.array(new, np.int32)), len(new)))
            known += new
            self._text = known

    def propose(self, text: Sequence[int], k: int) -> Draft:
        """At most k tokens; text goes on where the one before ended."""
        self._extend(text)
        ids, lengths = ffi.new("int32_t[]", k), ffi.new("double[]", k)
        n = check(lib.bmc_ngrams_propose(self._handle, k, ids, lengths))
        return Draft(ffi.unpack(ids, n), self.marks(ffi.unpack(lengths, n))) if n else NOTHING

    def marks(self, lengths: Sequence[float]) -> list[int]:
        return [int(length) for length in lengths]

    def bulk(self, target) -> bool:
        """Whether the library may draft and check by itself."""
        return isinstance(target, Session)

    def rounds(self, target, text: Sequence[int], k: int, n_tokens: int, sampler: Sampler, **terms) -> list[Round]:
        """Rounds with a target's session, which lacks the text's last token; terms are speculate()'s."""
        self._extend(text)
        known, self._text = self._text, None
        found = speculate(target, None, text[-1:], k, n_tokens, sampler=None if sampler.plain_greedy else sampler,
                          ngrams=self._handle, **terms)
        self._text = [*known, *(id for round in found for id in round.ids)]
        return found

    def close(self) -> None:
        pass


# ---- a small model -----------------------------------------------------------------------------------------

EDGES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)     # of marks
LAG = 16                                # tokens behind that are fed apart from a draft


def mark(probability: float) -> int:
    return bisect_right(EDGES, probability)


class ModelDrafter:
    """A small model with its own session, which holds the text's tokens: all but the last, before a draft.

    A draft is one native call, sampled with the target's settings and noise: where the two models agree, their choices do
    too.
    """

    name = "draft"
    n_marks = len(EDGES) + 1

    def __init__(self, model, target_size: int, overlap: Overlap | None = None):
        self.model, self.target_size, self.overlap = model, target_size, overlap
        self.size = model.config.vocab_size
        self.session = model.session()
        self._agreed = 0                # rows known to be the text's

    def follow(self, text: Sequence[int]) -> None:
        """Take up a text, which may have much in common with the one before. Nothing is evaluated yet."""
        self._agreed = self.session.agreement(self._known(text))

    def warm(self) -> None:
        """A first draft takes longer: its memory is touched for the first time."""
        if self.session.position == 0:
            self.session.draft([0], 2)
            self.session.rewind(0)

    def read(self, text: Sequence[int]) -> None:
        """Evaluate what is missing, all but the last token."""
        self._catch_up(self._known(text), 0)

    def _known(self, text: Sequence[int]) -> Sequence[int]:
        """The text in the draft's vocabulary: token 0 stands for those that it does not have."""
        if self.overlap:
            return [self.overlap.to_draft[token] for token in text]
        if self.size >= self.target_size:
            return text
        return [token if token < self.size else 0 for token in text]

    def _catch_up(self, text: Sequence[int], lag: int) -> int:
        self._agreed = catch_up(self.session, text, self._agreed, lag)
        return self._agreed

    def lag(self, text: Sequence[int]) -> int:
        """Tokens that are missing before a draft, beyond the usual few."""
        return max(0, len(text) - self._agreed - LAG)

    def marks(self, probs: Sequence[float]) -> list[int]:
        return [mark(p) for p in probs]

    def bulk(self, target) -> bool:
        """Whether the library may draft and check by itself."""
        return self.overlap is None and isinstance(self.session, Session) and isinstance(target, Session)

    def rounds(self, target, text: Sequence[int], k: int, n_tokens: int, sampler: Sampler, **terms) -> list[Round]:
        """Rounds with a target's session, which lacks the text's last token; terms are speculate()'s."""
        at = self._catch_up(self._known(text), LAG)
        if len(text) - at > LAG + 1:            # the draft's context is full
            return []
        found = speculate(target, self.session, text[at:], k, n_tokens, sampler=None if sampler.plain_greedy else sampler, **terms)
        self._agreed = self.session.position
        return found

    def propose(self, text: Sequence[int], k: int, p_min: float, sampler: Sampler) -> Draft:
        """At most k tokens; the last one is the first that is less probable than p_min, if there is one."""
        known = self._known(text)
        at = self._catch_up(known, LAG)
        if self.session.context is not None:
            k = min(k, self.session.context - len(text) + 1)
        if k < 1:
            return NOTHING
        if sampler.plain_greedy or not sampler.alters and not self.overlap:
            ids, probs = drafted(self.session, known[at:], k, p_min, sampler)
        else:
            names = self.overlap.to_target if self.overlap else None
            ids, probs = sampled(self.session.eval, known, at, k, p_min, sampler, names)
        if self.overlap:
            ids = [int(self.overlap.to_target[id]) for id in ids]
        fits = next((i for i, id in enumerate(ids) if not 0 <= id < self.target_size), len(ids))
        return Draft(ids, self.marks(probs)).cut(fits)

    def close(self) -> None:
        self.session.close()


def catch_up(session, text: Sequence[int], agreed: int, lag: int) -> int:
    """Drop the rows that are not the text's, and evaluate those missing if they are more than lag; the position.

    agreed: rows known to be the text's. Its last token is left for the draft.
    """
    n, cap = max(0, min(session.agreement(text, agreed), len(text) - 1)), session.context
    session.rewind(n)
    if len(text) - 1 - n > lag and (cap is None or len(text) <= cap):
        eval_prompt(session, text[n:-1], logits="none")
        n = len(text) - 1
    return n


def drafted(session, tokens: Sequence[int], k: int, p_min: float, sampler: Sampler, last: int = 0) -> tuple[list[int], list[float]]:
    """What the library guesses after tokens that the session lacks, and how sure it is."""
    ids, logs = session.draft(tokens, k, p_min, last, None if sampler.plain_greedy else sampler)
    return ids.tolist(), [exp(p) if isfinite(p) else 0.0 for p in logs.tolist()]


def sampled(evaluate, text: Sequence[int], at: int, k: int, p_min: float, sampler: Sampler,
            names: np.ndarray | None = None) -> tuple[list[int], list[float]]:
    """What a model whose rows are text[:at] guesses that the sampler chooses, and how sure it is."""
    history, feed = list(text) if sampler.penalizes else [], text[at:]
    ids, probs = [], []
    for position in range(len(text), len(text) + k):
        id, sure = guess(sampler, evaluate(feed), position, history, names)
        ids.append(id)
        probs.append(sure)
        if sure < p_min:
            break
        history.append(id)
        feed = [id]
    return ids, probs


class SelfDrafter:
    """The target itself, seeing a text's first 256 and last `last` rows only (MagicDec, arXiv 2408.11049; SPIRe, arXiv
    2504.06419). Its drafts stand in the session's spare rows until the pass that checks them writes the true ones.

    It pays where reading the rows costs more than reading the weights: below `shortest` tokens it is not asked.
    """

    name = "self"
    n_marks = ModelDrafter.n_marks

    def __init__(self, model, last: int = 512, shortest: int | None = None):
        self.model, self.last = model, last
        self.session = None             # the target's, once there is a text
        self._shortest = shortest

    @property
    def shortest(self) -> int:
        """Tokens from which on a draft's token costs at most SELF of a plain one, by the bytes that both read."""
        if self._shortest is None:
            weights, row = self.model.packed_bytes, self.session.arena_stats().row_bytes
            self._shortest = int(((1 - SELF) * weights / row + self.last + 256) / SELF)
        return self._shortest

    def follow(self, text: Sequence[int]) -> None:
        pass

    def lag(self, text: Sequence[int]) -> int:
        return 0

    def propose(self, text: Sequence[int], k: int, p_min: float, sampler: Sampler) -> Draft:
        """At most k tokens; the last one is the first that is less probable than p_min, if there is one."""
        session, at = self.session, len(text) - 1
        if session.context is not None:
            k = min(k, session.context - at)
        if k < 1 or session.position != at:
            return NOTHING
        try:
            if not sampler.alters:
                ids, probs = drafted(session, text[at:], k, p_min, sampler, self.last)
            else:
                ids, probs = sampled(partial(session.eval, last=self.last), text, at, k, p_min, sampler)
        finally:
            session.rewind(at)
        return Draft(ids, [mark(p) for p in probs])

    def close(self) -> None:
        pass


SELF = 0.7                              # of a plain token: what a draft's may cost for SelfDrafter to be asked


FAR = 9.0                               # what is e^-9 times as likely as the best is not looked at


def guess(sampler: Sampler, logits: np.ndarray, position: int, history: Sequence[int],
          names: np.ndarray | None = None) -> tuple[int, float]:
    """What the sampler would most likely choose if these were the target's logits, and how sure that is, from 0 to 1.

    names: the target's id for each id, where they differ: the noise is the target's.

    Quicker than the sampler and nearly always the same: of the filters only top-p is a little off. How far the best is
    ahead of the second, noise included, tells more about the target's choice than its probability does.
    """
    logits = sampler.adjust(logits, history)
    best = logits.max()
    if sampler.temperature == 0 or sampler.top_k == 1:
        first, second = int(logits.argmax()), np.partition(logits, -2)[-2] if len(logits) > 1 else -np.inf
        return first, ahead(best - second)
    reach = FAR * max(sampler.temperature, 0.1)
    ids = np.flatnonzero(logits >= best - min(reach, -log(sampler.min_p) if sampler.min_p else reach))
    if sampler.top_k and len(ids) > sampler.top_k:
        ids = ids[np.argpartition(logits[ids], -sampler.top_k)[-sampler.top_k:]]
    some = logits[ids]
    if sampler.top_p < 1 and len(ids) > 1:
        order = np.argsort(-some)
        mass = np.cumsum(np.exp(some[order] - best))
        kept = order[:int(np.searchsorted(mass, sampler.top_p * mass[-1])) + 1]
        ids, some = ids[kept], some[kept]
    if len(ids) < 2:
        return (int(ids[0]), 1.0) if len(ids) else (0, 0.0)         # none: not a number is among the logits
    x = uniforms_of(sampler.seed, position, ids if names is None else names[ids])
    score = some / max(sampler.temperature, 1e-6) - np.log(-np.log1p(-x))
    second, first = np.argpartition(score, -2)[-2:] if len(score) > 2 else np.argsort(score)
    return int(ids[first]), ahead(score[first] - score[second])


def ahead(margin: float) -> float:
    return 1 - exp(-margin) if margin < 50 else 1.0


# ---- pairs -------------------------------------------------------------------------------------------------


class PairError(ArgumentError):
    """Two models that cannot work together."""


class Overlap(NamedTuple):
    """Two vocabularies that share tokens under other ids."""

    to_draft: list[int]                 # the draft's id for each of the target's; 0 where it has none
    to_target: np.ndarray               # int64: the target's id for each of the draft's, or -1


SHARED = 0.8                            # of either vocabulary, for ids to be mapped
TEXT = "text"                           # the link of a pair without a vocabulary in common


def connect(target, draft) -> Overlap | str | None:
    """What check_pair() finds, or TEXT if the vocabularies are too different: then guesses go through text.

    Raises a PairError if there is no vocabulary to compare.
    """
    try:
        return check_pair(target, draft)
    except PairError as error:
        if target.tokenizer is None or draft.tokenizer is None:
            raise
        logging.getLogger(__name__).warning("%s; what it guesses is cut into the target's tokens", error)
        return TEXT


def drafter_of(target, draft, link: Overlap | str | None):
    """The drafter for a pair, by what connect() said of it."""
    if link == TEXT:
        from .bridge import TextDrafter
        return TextDrafter(target, draft)
    return ModelDrafter(draft, target.config.vocab_size, link)


def check_pair(target, draft) -> Overlap | None:
    """None if both vocabularies have the same bytes under the same ids; how ids correspond, if most tokens are in both.

    Sizes may differ: vocabularies are padded. What only one of them has is never proposed, or not understood. Raises a
    PairError that names the first token that differs.
    """
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is None or theirs is None:
        raise PairError(f"{(target if ours is None else draft).path} has no vocabulary to compare")
    id = first_difference(ours, theirs)
    n, m = ours.vocab_size, theirs.vocab_size
    if id is not None:
        found, shared = overlap(ours, theirs, draft.config.vocab_size)
        if shared >= SHARED * max(n, m):
            return found
        raise PairError(f"the draft has another vocabulary: token {id} is {ours.piece(id)!r} in {target.path} and "
                        f"{theirs.piece(id)!r} in {draft.path}; {shared} of {n} and {m} tokens are in both")
    if min(n, m) < SHARED * max(n, m):
        raise PairError(f"the draft has another vocabulary: {n} tokens in {target.path}, {m} in {draft.path}")
    return None


def overlap(ours, theirs, n_logits: int) -> tuple[Overlap, int]:
    """Tokens with the same bytes, control tokens with the same name; and how many there are. n_logits: ids the draft
    knows."""
    def spelled(tokenizer, id):
        return tokenizer.piece(id), tokenizer.is_control(id)

    ids = {spelled(theirs, id): id for id in range(theirs.vocab_size - 1, -1, -1)}
    found = [ids.get(spelled(ours, id), -1) for id in range(ours.vocab_size)]
    to_target = np.full(n_logits, -1, np.int64)
    for id, other in enumerate(found):
        if other >= 0 and to_target[other] < 0:
            to_target[other] = id
    return Overlap([max(other, 0) for other in found], to_target), int((to_target >= 0).sum())


def first_difference(ours, theirs) -> int | None:
    """The first id whose bytes differ, among those that both have."""
    n = min(ours.vocab_size, theirs.vocab_size)
    spelled, others = getattr(ours, "tokens", None), getattr(theirs, "tokens", None)
    if spelled and others and type(ours._codec) is type(theirs._codec) and spelled[:n] == others[:n]:
        return None                     # the same spelling, read by the same rules: a look at each piece takes 100 ms
    return next((id for id in range(n) if ours.piece(id) != theirs.piece(id)), None)
