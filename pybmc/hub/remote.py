"""A GGUF on a server: its header and tensor table are fetched as they are read, the weights are not.

Each part lies in a sparse file of the part's size, so that the reader of local files reads it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import FormatError
from ..files.gguf import GGUF, File
from ..models.bind import ROPE_TENSORS

CHUNK = 1 << 20                         # bytes of the first request; each next one fetches twice as many
CHUNK_MAX = 1 << 24
HEADER_MAX = 1 << 28                    # bytes of a header; the largest vocabularies take 2^25

Fetch = Callable[[int, int], bytes]     # (begin, end) -> these bytes


class RemoteGGUF(GGUF):
    """A GGUF whose parts are (name, size, fetch), the first one first. Tensors' data are zeros, but those of
    a few that the configuration is read from."""

    def __init__(self, parts: list[tuple[str, int, Fetch]]):
        self._parts = {os.path.basename(name): (size, fetch) for name, size, fetch in parts}
        with tempfile.TemporaryDirectory(prefix="pybmc-") as folder:    # a mapping stays without its name
            for name, (size, _) in self._parts.items():
                with open(Path(folder, name), "wb") as file:
                    file.truncate(size)
            super().__init__(Path(folder, os.path.basename(parts[0][0])))
        self.ends = []                  # nothing to see there

    def _file(self, path: Path) -> File:
        return _RemoteFile(path, self._parts[path.name][1])


class _RemoteFile(File):
    """A sparse file that is filled from its beginning, up to where it was read."""

    def __init__(self, path: Path, fetch: Fetch):
        self.fetch, self.loaded, self.chunk, self.target = fetch, 0, CHUNK, path
        super().__init__(path)

    def _read_magic(self) -> None:
        self.load(min(64, self.size))
        super()._read_magic()

    def need(self, count: int, what: str) -> int:
        position = super().need(count, what)
        self.load(self.position)
        return position

    def _walk_strings(self, count: int, what: str) -> np.ndarray:
        """A length that was not fetched is 0 or too small, so a walk never ends too late: fetch up to there
        and walk again, until nothing was missing."""
        start = self.position
        while True:
            ends = super()._walk_strings(count, what)
            if self.position <= self.loaded:
                return ends
            self.load(self.position)
            self.position = start

    def read_tensors(self):
        tensors = super().read_tensors()
        base = np.frombuffer(self.buffer, np.uint8).ctypes.data
        for tensor in tensors:
            if any(name in tensor.name for name in ROPE_TENSORS) and tensor.nbytes <= CHUNK:
                begin = tensor.data.ctypes.data - base
                self._put(begin, begin + tensor.nbytes)
        return tensors

    def load(self, end: int) -> None:
        """Fetch what is missing of the first `end` bytes, and more at once."""
        if end > HEADER_MAX:
            raise self.error(f"expected a header of at most {HEADER_MAX} bytes, "
                             f"found one that goes on to {end}")
        if end > self.loaded:
            begin, self.loaded = self.loaded, min(self.size, max(end, self.loaded + self.chunk))
            self.chunk = min(2 * self.chunk, CHUNK_MAX)
            self._put(begin, self.loaded)

    def _put(self, begin: int, end: int) -> None:
        data = self.fetch(begin, end)
        if len(data) != end - begin:
            raise FormatError(f"{self.path.name}: expected bytes {begin} to {end}, found {len(data)} of them")
        with open(self.target, "r+b") as file:
            file.seek(begin)
            file.write(data)
