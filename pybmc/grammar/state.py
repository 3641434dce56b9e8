"""A grammar's state in one text: one matcher, which reads guesses and takes them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UnsupportedSchemaError
from .compiler import sentence
from .vocabulary import Vocabulary


class State:
    """A pybmc.engine.Schema. Tokens that only mask() was given are read ahead,
    and taken back where others follow."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any):
        self._vocabulary, self._matcher = vocabulary, matcher
        self._ahead: list[int] = []
        self._ended = False             # an end token was accepted
        self._row = np.zeros((vocabulary.size + 31) // 32, np.uint32)

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        """The ids that may follow; the array is the same in each call."""
        if self._ended or not self._vocabulary.stops.isdisjoint(tokens):        # nothing else follows an end
            self._row[:] = 0
            for id in self._vocabulary.ends:
                self._row[id // 32] |= np.uint32(1 << id % 32)
            return self._row
        self._read(tokens)
        self._matcher.unsafe_compute_mask_ptr(self._row.ctypes.data, self._row.nbytes)
        self._check()
        return self._row

    def accept(self, token: int) -> None:
        if self._ended or token in self._vocabulary.stops:
            self._ended = True
        elif self._ahead and self._ahead[0] == token:
            del self._ahead[0]
        else:
            self._read((token,))
            self._ahead.clear()

    def forced(self) -> list[int]:
        """Tokens of the text that has to follow, as the vocabulary would cut it;
        an end token where nothing else can."""
        if self._ended:
            return []
        self._read(())
        found = self._matcher.compute_ff_tokens()
        found = found[:self._matcher.validate_tokens(found)]    # a tokenizer may change what it cuts
        self._read(found)
        ends = self._matcher.is_stopped()
        self._check()
        return [*found, self._vocabulary.end] if ends else found

    @property
    def accepts(self) -> bool:
        """Whether the text may end here."""
        self._read(())
        return self._ended or self._matcher.is_accepting()

    def _read(self, tokens: Sequence[int]) -> None:
        """Bring the matcher behind these."""
        n = 0
        while n < min(len(tokens), len(self._ahead)) and self._ahead[n] == tokens[n]:
            n += 1
        if n < len(self._ahead):
            self._matcher.rollback(len(self._ahead) - n)
            del self._ahead[n:]
        for token in tokens[n:]:
            self._matcher.consume_token(token)
            self._ahead.append(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnsupportedSchemaError("the grammar cannot be followed further: "
                                         f"{sentence(self._matcher.get_error())}")
