"""Sessions in files. What is new is appended; of a file that was cut or damaged the last whole save is read.

    MAGIC, version and length u32, JSON about the model, crc32
    one record a save:
        HEAD        tokens of the save before that still hold, how many follow, and what else there is
        front       a PART for each part, ids, notes as JSON
        crc32       of head and front, going on from the checksum that the record before ends with
        parts       as the library exports them: rows by tiles of 16 tokens, states
        crc32       of the parts

All numbers are little-endian.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import numpy as np

from .. import checks
from .._native import check, ffi, lib, pointer
from ..errors import ArgumentError, FormatError, printable

if TYPE_CHECKING:
    from .model import Model
    from .session import Session

log = logging.getLogger(__name__)

MAGIC, VERSION = b"pybmc session\n", 1
OPENING = struct.Struct("<II")                  # version, length
# SAVE, context, kept, tokens, first row of windows, parts, length of notes; bytes of all parts
HEAD = struct.Struct("<4sIIIIIIQ")
SAVE = b"save"
PART = struct.Struct("<iii")
CRC = struct.Struct("<I")
BOTH = 4                                        # a part of states that are a snapshot too
PIECE = 4 << 20                                 # bytes copied at a time
SLACK = 1 << 20                                 # bytes of old saves that are not worth a new file
OPEN = os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True)
class Saved:
    """A file that holds a session. end: of the last whole save, which ends with `checksum`; size: of the
    file, where more may follow."""

    device: int
    inode: int
    size: int
    end: int
    checksum: int
    tokens: int
    snapshots: frozenset[int]
    notes: bytes


class Part(NamedTuple):
    """Rows or states of a session; kind: of enum bmc_part_kind, or BOTH."""

    kind: int
    start: int
    end: int


class Layout:
    """How many bytes parts of a model's sessions take."""

    def __init__(self, handle: Any):
        layout = ffi.new("bmc_layout *")
        check(lib.bmc_session_layout(handle, layout))
        self.tile = {lib.BMC_PART_ROWS: layout.tile_bytes, lib.BMC_PART_WINDOWS: layout.window_bytes}
        self.state, self.log = layout.state_bytes, layout.log_bytes

    @property
    def numbers(self) -> list[int]:
        return [*self.tile.values(), self.state, self.log]

    def size(self, part: Part) -> int:
        n = part.end - part.start
        return n // 16 * self.tile[part.kind] if part.kind in self.tile else self.state + n * self.log

    def pieces(self, parts: list[Part]) -> Iterator[tuple[Part, memoryview]]:
        """Parts in parts of about PIECE bytes, as far as they can be cut, with room for each: the same."""
        pieces = [piece for part in parts for piece in self._cut(part)]
        room = memoryview(bytearray(max(map(self.size, pieces), default=0)))
        return ((piece, room[:self.size(piece)]) for piece in pieces)

    def _cut(self, part: Part) -> Iterator[Part]:
        step = part.end - part.start + 1
        if part.kind in self.tile:
            step = max(1, PIECE // max(self.tile[part.kind], 1)) * 16
        for start in range(part.start, max(part.end, part.start + 1), step):
            yield Part(part.kind, start, min(start + step, part.end))


@dataclass
class Record:
    """A save: `tokens` after the first `kept` ones.
    at, end: where its parts begin in the file, and where it ends."""

    context: int
    kept: int
    tokens: np.ndarray
    window: int
    parts: list[Part]
    notes: bytes
    at: int = 0
    end: int = 0
    checksum: int = 0

    def front(self, layout: Layout) -> bytes:
        """Everything before the parts, but the checksum."""
        head = HEAD.pack(SAVE, self.context, self.kept, len(self.tokens), self.window, len(self.parts),
                         len(self.notes), self.bytes(layout))
        parts = b"".join(PART.pack(*part) for part in self.parts)
        return head + parts + self.tokens.astype("<i4").tobytes() + self.notes

    def is_whole(self, layout: Layout) -> bool:
        """Whether its parts are all that a session needs to go on after its tokens."""
        end, rows, windows = self.kept + len(self.tokens), lib.BMC_PART_ROWS, lib.BMC_PART_WINDOWS
        first, last = self.kept // 16 * 16, -(-end // 16) * 16
        starts = {rows: first, windows: max(first, self.window)}
        wanted = [Part(kind, starts[kind], last) for kind in starts if layout.tile[kind] and len(self.tokens)]
        found = [part for part in self.parts if part.kind in layout.tile]
        states = any(part.kind in (lib.BMC_PART_STATES, BOTH) and part.end == end for part in self.parts)
        return found == wanted and (states or not layout.state or not end)

    def bytes(self, layout: Layout) -> int:
        """Of all parts."""
        return sum(map(layout.size, self.parts))

    def size(self, layout: Layout) -> int:
        front = HEAD.size + PART.size * len(self.parts) + 4 * len(self.tokens) + len(self.notes)
        return front + self.bytes(layout) + 2 * CRC.size


# ---- saving ------------------------------------------------------------------------------------------------


def save(session: Session, path: str | os.PathLike, dir_fd: int | None = None) -> None:
    """Session.save; with dir_fd the path is a name in that folder."""
    session.model.check_writes()
    path = os.fspath(path) if dir_fd is not None else os.path.realpath(os.fsdecode(path))
    notes = _encoded(session.notes)
    with _named_errors(path), session._claimed(moves=False) as handle:
        layout = Layout(handle)
        if session.saved and _append(session, session.saved, handle, layout, path, dir_fd, notes):
            return
        record = _record(session, handle, 0, frozenset(), notes)
        session.saved = _write_anew(session, handle, layout, path, dir_fd, record)
        check(lib.bmc_session_mark(handle))


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Errors of writing, which have no name, get that of the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def _encoded(notes: Any) -> bytes:
    try:
        return b"" if notes is None else json.dumps(notes, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        checks.refuse("notes", "a value that JSON has", notes)


def _record(session: Session, handle: Any, kept: int, known: frozenset[int], notes: bytes) -> Record:
    """What a save has to write. known: snapshots that are in the file."""
    found = ffi.new("bmc_part[]", lib.BMC_PARTS)
    n, position = check(lib.bmc_session_parts(handle, kept, found)), lib.bmc_session_position(handle)
    parts = [Part(part.kind, part.start, part.end) for part in found[0:n]]
    new = {part.start for part in parts if part.kind == lib.BMC_PART_SNAPSHOT} - known
    states = [part for part in parts if part.kind == lib.BMC_PART_STATES]
    both = {part.start for part in states} & new
    parts = [part for part in parts if part.kind != lib.BMC_PART_SNAPSHOT or part.start in new - both]
    parts = [part._replace(kind=BOTH) if part in states and both else part for part in parts]
    window = next((part.start for part in parts if part.kind == lib.BMC_PART_WINDOWS), 0)
    ids = ffi.buffer(lib.bmc_session_tokens(handle), 4 * position) if position else b""
    tokens = np.frombuffer(ids, np.int32)[kept:].copy()
    return Record(session.context, kept, tokens, window, parts, notes)


def _append(session: Session, saved: Saved, handle: Any, layout: Layout, path: str, dir_fd: int | None,
            notes: bytes) -> bool:
    """Add what is new to the file that the session was saved to or loaded from. False where that is another
    one, or was changed since, or where most of it would be old."""
    kept = lib.bmc_session_unchanged(handle)
    known = frozenset(at for at in saved.snapshots if at <= kept)
    record = _record(session, handle, kept, known, notes)
    whole = _record(session, handle, 0, frozenset(), notes)
    if saved.end + record.size(layout) > 2 * whole.size(layout) + SLACK:
        return False
    with suppress(FileNotFoundError), _locked(path, os.O_RDWR, dir_fd) as fd:
        if not _is_at(saved, fd):
            return False
        position = lib.bmc_session_position(handle)
        nothing_new = kept == saved.tokens == position and not _snapshots(record) - known
        if nothing_new and notes == saved.notes:
            return True
        try:
            os.ftruncate(fd, saved.end)
            _write_record(fd, handle, layout, record, saved.end, saved.checksum)
            os.fsync(fd)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(fd, saved.end)
            raise
        session.saved = _saved(fd, record, known)
        check(lib.bmc_session_mark(handle))
        return True
    return False


def _is_at(saved: Saved, fd: int) -> bool:
    """Whether a file is as it was when the session was saved to it or loaded from it."""
    found, last = os.fstat(fd), os.pread(fd, CRC.size, saved.end - CRC.size)
    same = (found.st_dev, found.st_ino, found.st_size) == (saved.device, saved.inode, saved.size)
    return same and last == CRC.pack(saved.checksum)            # a new file may have the number of an old one


def _snapshots(record: Record) -> frozenset[int]:
    return frozenset(part.start for part in record.parts if part.kind in (lib.BMC_PART_SNAPSHOT, BOTH))


def _saved(fd: int, record: Record, known: frozenset[int]) -> Saved:
    found = os.fstat(fd)
    return Saved(found.st_dev, found.st_ino, found.st_size, record.end, record.checksum,
                 record.kept + len(record.tokens), known | _snapshots(record), record.notes)


def _write_anew(session: Session, handle: Any, layout: Layout, path: str, dir_fd: int | None,
                record: Record) -> Saved:
    """Write a new file beside and rename it."""
    _check_old(path, dir_fd)
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name}.new")
    with _locked(beside, os.O_RDWR | os.O_CREAT, dir_fd) as fd:
        try:
            os.ftruncate(fd, 0)
            os.fchmod(fd, 0o600)
            opening = _opening(_described(session, layout))
            _write(fd, opening, 0)
            _write_record(fd, handle, layout, record, len(opening), 0)
            os.fsync(fd)
            os.rename(beside, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside, dir_fd=dir_fd)
            raise
        _sync_folder(folder, dir_fd)
        return _saved(fd, record, frozenset())


def _check_old(path: str, dir_fd: int | None) -> None:
    """Raise FormatError where there is a file that is no saved session."""
    with suppress(FileNotFoundError), _opened(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.pread(fd, len(MAGIC), 0) != MAGIC:
            raise FormatError(f"{path} is no saved session: it stays as it is")


def _sync_folder(folder: str, dir_fd: int | None) -> None:
    flags = os.O_RDONLY         # not every file system syncs folders
    with suppress(OSError), _opened(folder or ".", flags, dir_fd) as fd:
        os.fsync(fd)


def _write_record(fd: int, handle: Any, layout: Layout, record: Record, at: int, checksum: int) -> None:
    front = record.front(layout)
    _write(fd, front + CRC.pack(crc32(front, checksum)), at)
    record.at = at = at + len(front) + CRC.size
    checksum = 0
    for piece, view in layout.pieces(record.parts):
        check(lib.bmc_session_export(handle, _native(piece), ffi.from_buffer(view), len(view)))
        at, checksum = _write(fd, view, at), crc32(view, checksum)
    record.checksum, record.end = checksum, _write(fd, CRC.pack(checksum), at)


def _write(fd: int, data: bytes | memoryview, at: int) -> int:
    """Write all of it; where it ends."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n
    return at


def _native(part: Part) -> Any:
    kind = lib.BMC_PART_STATES if part.kind == BOTH else part.kind
    return ffi.new("bmc_part *", (kind, part.start, part.end))


# ---- the opening -------------------------------------------------------------------------------------------


def _described(session: Session, layout: Layout) -> dict:
    """What a file says of the model. Sessions fit where all but the name is the same."""
    return _identity(session.model) | {"long_factors": session.long_factors, "kv_type": "f16",
                                       "layout": layout.numbers}


def _identity(model: Model) -> dict:
    return {"name": Path(model.path).name, "arch": model.config.arch, "fingerprint": model.fingerprint}


def _opening(described: dict) -> bytes:
    data = json.dumps(described, separators=(",", ":")).encode()
    data = MAGIC + OPENING.pack(VERSION, len(data)) + data
    return data + CRC.pack(crc32(data))


def _read_opening(fd: int, path: str) -> tuple[dict, int]:
    """What a file says of its model, and where its saves begin."""
    start = len(MAGIC) + OPENING.size
    head = os.pread(fd, start, 0)
    if head[:len(MAGIC)] != MAGIC:
        raise FormatError(f"{path} is no saved session")
    damaged = FormatError(f"{path} is a damaged session: what it says of its model cannot be read")
    if len(head) < start:
        raise damaged
    version, length = OPENING.unpack(head[len(MAGIC):])
    data = head + os.pread(fd, min(length, 1 << 20) + CRC.size, start)
    if len(data) < start + length + CRC.size or CRC.pack(crc32(data[:-CRC.size])) != data[-CRC.size:]:
        raise damaged
    if version != VERSION:
        raise FormatError(f"{path}: expected a session of version {VERSION}, found version {version}")
    found = _decoded(data[start:-CRC.size], path)
    if not isinstance(found, dict):
        raise damaged
    return found, len(data)


def _decoded(data: bytes, path: str) -> Any:
    try:
        return json.loads(data) if data else None
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is a damaged session: expected JSON, found something else") from None


def _check_model(path: str, found: dict, model: Model) -> None:
    """Raise FormatError where a file holds a session of another model."""
    if found.get("fingerprint") != model.fingerprint:
        wanted = _named(_identity(model))
        raise FormatError(f"{path}: expected a session of {wanted}, found one of {_named(found)}")


def _check_kind(path: str, found: dict, session: Session, layout: Layout) -> None:
    """Raise FormatError where rows of the same model are others than the session's."""
    wanted = _described(session, layout)
    for key, what in (("long_factors", "rope factors of long contexts"), ("kv_type", "KV type"),
                      ("layout", "bytes of rows and states")):
        told = printable(str(found.get(key)), 60)
        if found.get(key) != wanted[key]:
            raise FormatError(f"{path}: {what}: expected {wanted[key]}, found {told}")


def _named(described: dict) -> str:
    name, arch, digits = (printable(str(described.get(key)), 100) for key in ("name", "arch", "fingerprint"))
    return f"{name} ({arch}, {digits[:12]})"


# ---- loading -----------------------------------------------------------------------------------------------


def load(model: Model, path: str | os.PathLike, context: int | None = None, rows: int | str = "auto",
         dir_fd: int | None = None) -> Session:
    """Model.load_session; with dir_fd the path is a name in that folder."""
    model.check_writes()
    context = None if context is None else checks.whole("context", context, 1, 1 << 30)
    path = os.fspath(path) if dir_fd is not None else os.path.realpath(os.fsdecode(path))
    with _opened(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FormatError(f"{path} is no saved session: it is no regular file")
        fcntl.flock(fd, fcntl.LOCK_SH)
        described, start = _read_opening(fd, path)
        _check_model(path, described, model)
        records = _records(fd, start)
        while records:
            session = model.session(context or min(max(records[-1].context, 1), 1 << 30), rows)
            try:
                n = _fill(session, fd, path, described, records)
            except BaseException:
                session.close()
                raise
            if n == len(records):
                if records[-1].end < os.fstat(fd).st_size:
                    log.warning("%s: what comes after its last whole save, of %d tokens, "
                                "is cut off or damaged", path, session.position)
                return session
            session.close()
            records = records[:n]
    raise FormatError(f"{path} is a damaged session: no save in it is whole")


def _records(fd: int, at: int) -> list[Record]:
    """The saves of a file, up to the first one that is cut off or wrong; their parts are not looked at."""
    records: list[Record] = []
    checksum, size, tokens = 0, os.fstat(fd).st_size, 0
    while (record := _read_front(fd, at, size, checksum)) and record.kept <= tokens:
        records.append(record)
        at, checksum, tokens = record.end, record.checksum, record.kept + len(record.tokens)
    return records


def _read_front(fd: int, at: int, size: int, checksum: int) -> Record | None:
    """The save that begins at a place; None where none does."""
    head = os.pread(fd, HEAD.size, at)
    if len(head) < HEAD.size or not head.startswith(SAVE):
        return None
    _, context, kept, n, window, n_parts, n_notes, length = HEAD.unpack(head)
    more = n_parts * PART.size + 4 * n + n_notes
    body = at + HEAD.size + more + CRC.size
    end = body + length + CRC.size
    if end > size:
        return None
    front = head + _read(fd, more, at + HEAD.size)
    if CRC.pack(crc32(front, checksum)) != os.pread(fd, CRC.size, body - CRC.size):
        return None
    ids, notes = HEAD.size + n_parts * PART.size, len(front) - n_notes
    parts = [Part(*part) for part in PART.iter_unpack(front[HEAD.size:ids])]
    if any(not 0 <= part.start <= part.end for part in parts):
        return None
    tokens = np.frombuffer(front[ids:notes], "<i4").astype(np.int32)
    (checksum,) = CRC.unpack(os.pread(fd, CRC.size, end - CRC.size))
    return Record(context, kept, tokens, window, parts, front[notes:], body, end, checksum)


def _fill(session: Session, fd: int, path: str, described: dict, records: list[Record]) -> int:
    """Give a new session what saves hold; how many of them are whole. The session is of use where all are."""
    known: frozenset[int] = frozenset()
    unfit = f"{path} is no session that this model can have"
    with session._claimed() as handle:
        layout = Layout(handle)
        _check_kind(path, described, session, layout)
        for i, record in enumerate(records):
            try:
                ids, n = pointer(record.tokens), len(record.tokens)
                check(lib.bmc_session_extend(handle, record.kept, ids, n, record.window))
                if not _read_parts(fd, handle, layout, record, last=i == len(records) - 1):
                    return i
            except ArgumentError as error:
                raise FormatError(f"{unfit}: {error}") from None
            known = frozenset(at for at in known if at <= record.kept) | _snapshots(record)
        end = lib.bmc_session_position(handle)
        if check(lib.bmc_session_nearest(handle, end)) != end:
            raise FormatError(f"{unfit}: rows of windows are missing before {record.window}")
        check(lib.bmc_session_mark(handle))
        session.saved = _saved(fd, record, known)
        session.notes = _decoded(record.notes, path)
    return len(records)


def _read_parts(fd: int, handle: Any, layout: Layout, record: Record, last: bool) -> bool:
    """Import the parts of a save; states that a later one replaces are left out. False where the checksum is
    not theirs."""
    if not record.is_whole(layout) or record.bytes(layout) != record.end - record.at - CRC.size:
        raise ArgumentError(f"its rows and states are not those of {record.kept + len(record.tokens)} tokens")
    at, checksum = record.at, 0
    for piece, view in layout.pieces(record.parts):
        _read_into(fd, view, at)
        at, checksum = at + len(view), crc32(view, checksum)
        if piece.kind != lib.BMC_PART_STATES or last:
            check(lib.bmc_session_import(handle, _native(piece), ffi.from_buffer(view), len(view)))
        if piece.kind == BOTH:              # states are one piece
            check(lib.bmc_session_snapshot(handle))
    return checksum == record.checksum


def _read(fd: int, n: int, at: int) -> bytes:
    data = bytearray(n)
    _read_into(fd, memoryview(data), at)
    return bytes(data)


def _read_into(fd: int, view: memoryview, at: int) -> None:
    """Fill a buffer; what the file does not have stays as it is, and a checksum tells."""
    os.lseek(fd, at, os.SEEK_SET)
    while view and (n := os.readv(fd, [view])):
        view = view[n:]


# ---- files -------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str, flags: int, dir_fd: int | None) -> Iterator[int]:
    """A file that is no symbolic link; a new one is its owner's alone."""
    fd = os.open(path, flags | OPEN, 0o600, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _locked(path: str, flags: int, dir_fd: int | None) -> Iterator[int]:
    """The same, for one writer at a time."""
    while True:
        with _opened(path, flags, dir_fd) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
                if os.path.samestat(found, os.fstat(fd)):       # else it was renamed while this waited
                    yield fd
                    return
