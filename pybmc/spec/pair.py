"""Whether a draft model goes with a target, and how their vocabularies correspond."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from ..errors import ArgumentError
from ..tokenizers import Tokenizer
from .interfaces import Model


class PairError(ArgumentError):
    """Two models that cannot work together."""


class Overlap(NamedTuple):
    """Two vocabularies that share tokens under other ids."""

    to_draft: list[int]                 # the draft's id for each of the target's; 0 where it has none
    to_target: np.ndarray               # int64: the target's id for each of the draft's, or -1


SHARED = 0.8                            # of either vocabulary, for ids to be mapped
TEXT = "text"                           # the link of a pair without a vocabulary in common


def connect(target: Model, draft: Model) -> Overlap | str | None:
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


def check_pair(target: Model, draft: Model) -> Overlap | None:
    """None if both vocabularies have the same bytes under the same ids;
    how ids correspond, if most tokens are in both.

    Sizes may differ: vocabularies are padded. What only one of them has is never proposed, or not understood.
    Raises a PairError that names the first token that differs.
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
        raise PairError(f"the draft has another vocabulary: token {id} is {ours.piece(id)!r} in "
                        f"{target.path} and {theirs.piece(id)!r} in {draft.path}; "
                        f"{shared} of {n} and {m} tokens are in both")
    if min(n, m) < SHARED * max(n, m):
        raise PairError(f"the draft has another vocabulary: {n} tokens in {target.path}, {m} in {draft.path}")
    return None


def overlap(ours: Tokenizer, theirs: Tokenizer, n_logits: int) -> tuple[Overlap, int]:
    """Tokens with the same bytes, control tokens with the same name; and how many there are. n_logits: ids
    the draft knows."""
    def spelled(tokenizer: Tokenizer, id: int) -> tuple[bytes, bool]:
        return tokenizer.piece(id), tokenizer.is_control(id)

    ids = {spelled(theirs, id): id for id in range(theirs.vocab_size - 1, -1, -1)}
    found = [ids.get(spelled(ours, id), -1) for id in range(ours.vocab_size)]
    to_target = np.full(n_logits, -1, np.int64)
    for id, other in enumerate(found):
        if other >= 0 and to_target[other] < 0:
            to_target[other] = id
    return Overlap([max(other, 0) for other in found], to_target), int((to_target >= 0).sum())


def first_difference(ours: Tokenizer, theirs: Tokenizer) -> int | None:
    """The first id whose bytes differ, among those that both have."""
    n = min(ours.vocab_size, theirs.vocab_size)
    spelled, others = getattr(ours, "tokens", None), getattr(theirs, "tokens", None)
    if spelled and others and type(ours._codec) is type(theirs._codec) and spelled[:n] == others[:n]:
        return None                     # spelled and read alike: to look at each piece takes 100 ms
    return next((id for id in range(n) if ours.piece(id) != theirs.piece(id)), None)
