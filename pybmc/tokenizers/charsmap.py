"""SentencePiece's precompiled map of characters: sequences of them, and what replaces each.

    | n u32 | trie: n bytes, 32-bit units | replacements, a zero byte after each |

The trie is a double array (https://github.com/s-yata/darts-clone). A unit has a label in bits 0-7, an offset
in bits 10-30, shifted by 8 more where bit 9 is set, and bit 8 where a key ends. The children of unit i are
the units i ^ offset ^ byte that have this byte as label; where a key ends, unit i ^ offset is its value, the
place of a replacement, with bit 31 set.
"""

from __future__ import annotations

import numpy as np

_LABEL = 1 << 31 | 0xFF                 # bit 31: no value is taken for a label
_VALUE = (1 << 31) - 1
_CHUNK = 1 << 12                        # units looked at together: 8 MB of temporary arrays


class Charsmap:
    """Replaces the longest sequence at each place of a text; without data, nothing.
    Broken data: ValueError."""

    def __init__(self, data: bytes | None = None):
        self._labels: list[int] = []
        self._children: list[int] = []                  # of unit i: where they are, before ^ byte
        self._replacements: dict[int, str] = {}         # by the unit with which a key ends
        if data is not None:
            self._load(data)

    def _load(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        if len(data) < 4 or size % 4 or not 0 < size < len(data) - 4:
            found = f"{len(data)} bytes with a trie of {size}"
            raise ValueError(f"expected a trie and replacements, found {found}")
        units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
        children = np.arange(len(units)) ^ (units >> 10 & 0x1FFFFF) << (units >> 6 & 8)
        labels = units & _LABEL
        used = _reachable(labels, children)
        ends = used[units[used] >> 8 & 1 == 1]
        values = units[children[ends]] & _VALUE
        texts = {value: _text(data, 4 + size + value) for value in set(values.tolist())}
        self._replacements = {end: texts[value] for end, value in zip(ends.tolist(), values.tolist())}
        self._labels, self._children = labels.tolist(), children.tolist()

    def replace(self, text: str) -> str:
        if not self._labels:
            return text
        data = text.encode()
        parts, start, kept = [], 0, 0                   # data[kept:start] stays as it is
        while start < len(data):
            stop, replacement = self._longest(data, start)
            if replacement is not None:
                parts += [data[kept:start].decode(), replacement]
                kept = stop
            start = stop
        return "".join(parts) + data[kept:].decode()

    def _longest(self, data: bytes, start: int) -> tuple[int, str | None]:
        """Where the longest sequence at a place ends and what replaces it, or where its character ends."""
        labels, children, replacements = self._labels, self._children, self._replacements
        stop, replacement, unit, at = start, None, 0, start
        while at < len(data):
            unit = children[unit] ^ data[at]
            if not data[at] or labels[unit] != data[at]:
                break
            at += 1
            if unit in replacements and _begins(data, at):
                stop, replacement = at, replacements[unit]
        if replacement is None:
            stop += 1
            while not _begins(data, stop):
                stop += 1
        return stop, replacement


def _begins(data: bytes, at: int) -> bool:
    """Whether a character begins at a place of UTF-8, or the text ends there."""
    return at == len(data) or data[at] & 0xC0 != 0x80


def _reachable(labels: np.ndarray, children: np.ndarray) -> np.ndarray:
    """The units that some bytes lead to. Each has its children within the trie, so that no text leaves it."""
    seen = np.zeros(len(labels), bool)
    todo, seen[0] = [0], True
    while todo:
        units, todo = np.array(todo[:_CHUNK]), todo[_CHUNK:]
        found = children[units][:, None] ^ np.arange(256)
        if found.max() >= len(labels):
            unit = int(units[found.max(axis=1).argmax()])
            raise ValueError(f"expected children within the trie's {len(labels)} units, "
                             f"found those of unit {unit} at {int(found.max())}")
        found = found[(labels[found] == np.arange(256)) & (np.arange(256) > 0)]
        new = np.unique(found[~seen[found]])
        seen[new] = True
        todo += new.tolist()
    return np.flatnonzero(seen)


def _text(data: bytes, start: int) -> str:
    stop = data.find(b"\0", start)
    if stop < 0:
        where = f"at byte {start} of {len(data)}"
        raise ValueError(f"expected a replacement with a zero byte after it, found none {where}")
    try:
        return data[start:stop].decode()
    except UnicodeDecodeError:
        raise ValueError(f"expected UTF-8, found the replacement {data[start:stop]!r}") from None
