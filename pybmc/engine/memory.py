"""A bound on the memory of an engine's sessions, in rows and bytes."""

from __future__ import annotations

from .free import free_memory
from .gpu import gpus
from .model import Model
from .prefixes import Match
from .sequence import Sequence

FINE = 16                               # rows that a session grows by where memory is narrow
SHARE, GPU_SHARE = 0.5, 0.8             # of the free memory, by default: others use the machine's too


def usual_memory(model: Model) -> float:
    """Bytes that sessions of a model may take together where nobody says how many: what is free of the
    machine's memory, and of its GPU's, each bounds the rows that are there."""
    on_gpu = model.gpu_rows()
    bound = SHARE * free_memory() / (1 - on_gpu) if on_gpu < 1 else float("inf")
    if model.gpu is not None and on_gpu:
        bound = min(bound, GPU_SHARE * gpus()[model.gpu].available / on_gpu)
    return bound


class Room:
    """A bound on memory. Sessions grow by `grain` rows: as the library likes it, or finely where the bound is
    narrow. head: they keep hidden states for a draft head. fixed_bytes: of a session without rows;
    snapshot_bytes: of a copy of its states, which are there twice and with a log."""

    def __init__(self, model: Model, memory: float, parallel: int, head: bool = False):
        with model.session() as session:
            stats = session.arena_stats()
        self.memory, self.snapshot_bytes = memory, stats.state_bytes / 2
        usual = stats.r * stats.row_bytes + stats.state_bytes
        self.grain = stats.r if 4 * parallel * usual <= memory else FINE
        with model.session(rows=self.grain) as session:
            session.reserve(0)
            if head:
                session.keep_hidden()
            self.fixed_bytes = session.arena_stats().bytes_reserved
            session.reserve(1)
            self.grain_bytes = session.arena_stats().bytes_reserved - self.fixed_bytes

    @property
    def most(self) -> int:
        """Tokens that one session has room for."""
        return max(self.rows(self.memory - self.fixed_bytes), 0)

    def rows(self, size: float) -> int:
        """Rows by which sessions can grow within this number of bytes."""
        return int(size // max(self.grain_bytes, 1)) * self.grain

    def whole(self, n: float) -> float:
        """Rows that a session of n rows takes."""
        return -(-n // self.grain) * self.grain

    def bytes(self, n: float, held: float) -> float:
        """What they take beyond `held` rows."""
        return max(self.whole(n) - held, 0) / self.grain * self.grain_bytes

    def held(self, s: Sequence) -> float:
        """Rows that a running sequence's text has, or will have."""
        return max(s.session.rows, self.whole(len(s.text)))

    def growth(self, s: Sequence, n: float) -> float:
        """Bytes that a running sequence takes more once it has n rows."""
        return self.bytes(n, s.session.rows)

    def first_growth(self, s: Sequence, match: Match | None) -> float:
        """Bytes that one takes more which starts with a match."""
        if s.session is not None:
            return self.growth(s, s.wanted) + s.session.arena_stats().bytes_reserved
        if match is not None and match.whole:
            return self.bytes(s.wanted, match.session.rows)
        return self.bytes(s.wanted, match.n // self.grain * self.grain if match else 0) + self.fixed_bytes
