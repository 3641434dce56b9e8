"""What a text has to follow, token by token: the interface of a grammar, and the masks made from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .. import checks
from .._native import as_array, ffi, pointer
from ..errors import BmcError
from ..spec.speculation import WIDEST

ALL = 0xFFFFFFFF


@runtime_checkable
class Schema(Protocol):
    """A grammar's state in one text. A request has one of its own, and only the engine's thread calls it."""

    def mask(self, tokens: Sequence[int]) -> np.ndarray | None:
        """Which ids may come after the tokens accepted so far and these: uint32 ((vocab_size + 31) // 32,),
        for id i bit i % 32 of word i // 32. None: all. The masks before them allow the tokens; accept() has
        not had them."""

    def accept(self, token: int) -> None:
        """The text goes on with this token."""

    def forced(self) -> Sequence[int]:
        """Tokens that have to come next, as far as is known: one pass verifies them. [] is always right."""


class Masks:
    """A request's schema, as a bmc_item asks it (bmc_allow in native/bmc.h). failure: what its methods
    raised; then no token is allowed."""

    def __init__(self, schema: Schema, item: Any, vocab_size: int, stop_ids: frozenset[int]):
        self._schema, self._item, self._size, self._stop_ids = schema, item, vocab_size, stop_ids
        self._rows = np.empty((WIDEST + 1, (vocab_size + 31) // 32), np.uint32)
        self._pointer = pointer(self._rows)
        self.failure: BaseException | None = None
        self._handle = ffi.new_handle(self)
        item.allow, item.allow_for = _allow, self._handle

    def forced(self) -> list[int]:
        """The next tokens, as far as they are known."""
        try:
            return checks.ids("schema.forced()", self._schema.forced(), self._size)[:WIDEST]
        except Exception as error:
            self.failure = error
            return []

    def allow(self, guesses: Any, n: int) -> int:
        """Set the masks of a pass, and tell how many guesses they allow."""
        try:
            if self.failure is None:
                return self._fill(ffi.unpack(guesses, n) if n else [])
        except BaseException as error:  # an interrupt as well: C cannot pass it on, accept() does
            self.failure = error
        self._rows[0] = 0
        self._item.masks = self._pointer
        return 0

    def accept(self, tokens: list[int]) -> None:
        """The text goes on with these. Raises an interrupt that came during the call that gave them."""
        try:
            for token in tokens:
                if self.failure is None and token >= 0:
                    self._schema.accept(token)
        except Exception as error:
            self.failure = error
        if self.failure is not None and not isinstance(self.failure, Exception):
            raise self.failure

    def error(self) -> BmcError | None:
        """Why the schema allows no token, if it failed."""
        if self.failure is None or isinstance(self.failure, BmcError):
            return self.failure
        return BmcError(f"the schema failed: {type(self.failure).__name__}: {self.failure}")

    def _fill(self, guesses: list[int]) -> int:
        masked = self._fill_row(0, ())
        kept = 0
        while kept < len(guesses) and self._has(kept, guesses[kept]):
            kept += 1
            if guesses[kept - 1] in self._stop_ids:             # nothing behind it counts
                self._rows[kept] = ALL
                break
            masked |= self._fill_row(kept, tuple(guesses[:kept]))
        self._item.masks = self._pointer if masked else ffi.NULL
        return kept

    def _fill_row(self, i: int, tokens: tuple[int, ...]) -> bool:
        mask = self._schema.mask(tokens)
        if mask is None:
            self._rows[i] = ALL
            return False
        self._rows[i] = as_array(mask, np.uint32, self._rows.shape[1:], "schema.mask()")
        return True

    def _has(self, row: int, id: int) -> bool:
        return bool(self._rows[row, id // 32] >> id % 32 & 1)


def _interrupted(kind: type, error: BaseException, traceback: Any) -> None:
    """An interrupt that came before allow() could catch it."""
    ffi.from_handle(traceback.tb_frame.f_locals["handle"]).failure = error


@ffi.callback("bmc_allow", onerror=_interrupted)
def _allow(handle: Any, guesses: Any, n: int) -> int:
    return ffi.from_handle(handle).allow(guesses, n)
