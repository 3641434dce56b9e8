"""GGUF files: header, metadata and tensor table over an mmap. Knows no model.

A file is, little-endian throughout:

    "GGUF" | version u32 | n_tensors u64 | n_pairs u64
    n_pairs   x  key string | type u32 | value
    n_tensors x  name string | n_dims u32 | dims u64 each | type u32 | offset u64
    padding to the alignment | tensor data, each tensor at its offset, a multiple of the alignment

A string is its length (u64) and that many bytes of UTF-8; an array is its element type (u32), its count (u64)
and its elements. Nothing a file says is believed before it is held against the file's size, in Python's
integers, which do not overflow. What is wrong becomes a FormatError that names the file, the place, what was
expected and what was found.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError, FormatError, printable

if TYPE_CHECKING:
    from .types import QuantType

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {          # value type -> numpy's spelling
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "|b1",
    10: "<u8", 11: "<i8", 12: "<f8",
}
# bytes a value takes at least
_MIN_SIZE = {_STRING: 8, _ARRAY: 12} | {t: int(spelling[2:]) for t, spelling in _NUMBERS.items()}
_MIN_PAIR = 8 + 4 + 1                   # an empty key, a type, one byte
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8         # an empty name, one dimension

_MAX_NAME = 65535                       # bytes of a key or a tensor name
# strings (or arrays) in one array; the largest vocabularies have 2^19 merges
_MAX_STRINGS = 1 << 24
_MAX_DEPTH = 4                          # arrays of arrays
_MAX_DIMS = 4
_ALIGNMENTS = [1 << n for n in range(3, 31)]

SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

# What begins a file that is taken for GGUF. Text is compared in lower case, without white space before it.
_OTHERS = {
    b"lmgg": "an old GGML file; convert the model to GGUF",
    b"tjgg": "an old GGML (ggjt) file; convert the model to GGUF",
    b"fmgg": "an old GGML (ggmf) file; convert the model to GGUF",
    b"algg": "an old GGML adapter; convert it to GGUF",
    b"FUGG": "a byte-swapped GGUF file; only little-endian files are supported",
    b"PK\x03\x04": "a zip archive, as PyTorch saves them; unpack it, or convert the model to GGUF",
    b"\x80\x02": "a Python pickle, as PyTorch saves them; convert the model to GGUF",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself (git lfs pull)",
    b"\0\0\0\0\0\0\0\0": "zeros, as when a download broke off",
}
_OTHER_TEXTS = {
    b"<!doctype": "a web page; the download went wrong",
    b"<html": "a web page; the download went wrong",
    b"<?xml": "an XML document; the download went wrong",
    b"{": "a JSON document; the download went wrong",
    b"entry not found": "a server's error message; the download went wrong",
    b"invalid username or password": "a server's error message; the download went wrong",
}

# Numbers of tensor types in files that people have and no current llama.cpp reads.
_OTHER_TYPES = {
    4: "Q4_2 of 2023", 5: "Q4_3 of 2023",
    31: "Q4_0_4_4 of 2024; take a Q4_0 file",
    32: "Q4_0_4_8 of 2024; take a Q4_0 file",
    33: "Q4_0_8_8 of 2024; take a Q4_0 file",
    36: "I2_S of bitnet.cpp, or IQ4_NL_4_4 of 2024; take a TQ1_0, TQ2_0 or IQ4_NL file",
    37: "IQ4_NL_4_8 of 2024; take an IQ4_NL file",
    38: "TL1 of bitnet.cpp, or IQ4_NL_8_8 of 2024; take another file",
    **dict.fromkeys((*range(97, 99), *range(133, 159), *range(200, 400)),
                    "a type of ik_llama.cpp's own; take a file for llama.cpp"),
}

_INCOMPLETE = "it is incomplete, as when a download broke off"

# Text that only people read may be in any encoding; what is computed with has to be UTF-8.
_EXACT_KEYS = ("tokenizer.", "general.architecture", "split.")


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of the file. data are its bytes: a read-only uint8 view (nbytes,) on the mapped file."""

    name: str
    type: QuantType
    shape: tuple[int, ...]              # GGUF's order: a row's values first; no dimensions of 1 at the end
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class GGUF:
    """An opened GGUF file, or all parts of a split one (`name-00001-of-00003.gguf`, whichever part is given).

    metadata: dict[str, value]; a value is an int, float, bool, str, a numpy array (arrays of numbers), a list
    of str, or a list of such values (arrays of arrays). Text that is only shown, such as a name or a licence,
    need not be UTF-8: what is not becomes U+FFFD. tensors: dict[str, Tensor], in the file's order; empty with
    vocabulary_only, which does not read the tensor table and so needs no C library.

    Raises FormatError where the file is not what it should be, and an OSError (FileNotFoundError,
    IsADirectoryError, PermissionError) with the path in its sentence where it cannot be opened. close() is
    optional, may be repeated, and leaves views alive that were taken before: the mapping goes when the last
    of them does. A file that is cut short by someone else while it is open ends the process, as with every
    mmap.
    """

    def _file(self, path: Path) -> File:
        """One file, opened. A subclass whose files are elsewhere opens another kind."""
        return File(path)

    def __init__(self, path, vocabulary_only: bool = False):
        self._files: list[File] = []
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, Tensor] = {}
        self.ends: list[Tensor] = []                            # of each part, the tensor at its end
        try:
            self._open(_checked_path(path), vocabulary_only)
        except BaseException:
            self.close()
            raise
        self.path = self._files[0].path
        self.paths = [file.path for file in self._files]
        self.size = sum(file.size for file in self._files)      # bytes, all parts
        self.version = self._files[0].version
        self.alignment = self._files[0].alignment

    def _open(self, path: Path, vocabulary_only: bool) -> None:
        given = self._file(path)
        self._files = [given]
        paths = _part_paths(given)
        if vocabulary_only:
            del paths[1:]                                       # the first part has all of the metadata
        self._files = [given if part == path else self._file(part) for part in paths]
        if given not in self._files:
            given.close()
        self.metadata = self._files[0].metadata
        if not vocabulary_only:
            self._collect_tensors()

    def _collect_tensors(self) -> None:
        n_parts = len(self._files)
        for number, file in enumerate(self._files):
            if n_parts > 1:
                file.expect("split.no", number)
                file.expect("split.count", n_parts)
            tensors = file.read_tensors()
            self.ends += sorted(tensors, key=lambda tensor: tensor.data.ctypes.data)[-1:]
            for tensor in tensors:
                if tensor.name in self.tensors:
                    raise file.error(f"tensor {tensor.name!r} is there twice")
                self.tensors[tensor.name] = tensor
        if n_parts > 1:
            self._files[0].expect("split.tensors.count", len(self.tensors))

    def close(self) -> None:
        """Gives the mapping back, at once or with the last view on it."""
        self.tensors, self.ends = {}, []
        for file in self._files:
            file.close()

    @property
    def closed(self) -> bool:
        return all(file.closed for file in self._files)

    def __enter__(self) -> GGUF:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUF {str(self.path)!r}: {len(self.metadata)} pairs, {len(self.tensors)} tensors>"


def _checked_path(path) -> Path:
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise ArgumentError(f"expected the path of a GGUF file, found {path!r:.60}") from None
    if not text:
        raise ArgumentError("expected the path of a GGUF file, found an empty one")
    return Path(text)


def _part_paths(given: File) -> list[Path]:
    """Where the parts of a file are, the first one first."""
    count = given.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [given.path]
    match = SPLIT_NAME.fullmatch(given.path.name)
    if match is None:
        raise given.error(
            f"part of a file split in {count}: expected a name such as name-00001-of-{count:05d}.gguf"
        )
    if int(match[3]) != count:
        raise given.error(f"its name says {int(match[3])} parts, its split.count {count}")
    given.expect("split.no", int(match[2]) - 1)
    names = [f"{match[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    if given.path.name not in names:
        raise given.error(f"part {int(match[2])} of {count}: there can be no such part")
    paths = [given.path.with_name(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise given.error(f"one of {count} parts; {path.name} is missing beside it")
    return paths


class File:
    """One file: its mapping, its metadata, and a cursor that checks before it moves."""

    def __init__(self, path: Path):
        self.path = path
        self.buffer, self.size = _map(path)
        self.position = 0
        self.closed = False
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.closed = True
        try:
            self.buffer.close()
        except BufferError:                 # somebody holds a view: the mapping goes with it
            pass

    def error(self, what: str, at: int | None = None) -> FormatError:
        return FormatError(f"{self.path}: {printable(what)}" + ("" if at is None else f" (at byte {at})"))

    def expect(self, key: str, value: int) -> None:
        found = self.metadata.get(key)
        if not isinstance(found, int) or found != value:
            raise self.error(f"{key}: expected {value}, found {found!r}")

    # -- the cursor

    def need(self, count: int, what: str) -> int:
        """The position of the next count bytes, which are then behind the cursor."""
        position = self.position
        if count > self.size - position:
            raise self.error(
                f"truncated in {what}: expected {count} more bytes, found {self.size - position}", position
            )
        self.position += count
        return position

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.buffer, self.need(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.buffer, self.need(8, what))[0]

    def count(self, what: str, min_size: int) -> int:
        """A number of things that take min_size bytes at least."""
        at = self.position
        count = self.u64(what)
        if count * min_size > self.size - self.position:
            raise self.error(
                f"{what}: {count} cannot be right, {self.size - self.position} bytes are left", at
            )
        return count

    def string(self, what: str, exact: bool = True) -> str:
        length = self.u64(what)
        at = self.need(length, what)
        return self.decode(at, length, what, exact)

    def name(self, what: str) -> str:
        at = self.position
        name = self.string(what)
        if self.position - at - 8 > _MAX_NAME:
            raise self.error(
                f"{what}: expected at most {_MAX_NAME} bytes, found {self.position - at - 8}", at
            )
        return name

    def decode(self, at: int, length: int, what: str, exact: bool = True) -> str:
        try:
            return str(self.buffer[at:at + length], "utf-8", "strict" if exact else "replace")
        except UnicodeDecodeError as error:
            raise self.error(f"{what}: not UTF-8: {error.reason}", at + error.start) from None

    # -- the header

    def _read_header(self) -> None:
        self._read_magic()
        self.version = self._read_version()
        self.n_tensors = self.count("number of tensors", _MIN_TENSOR)
        n_pairs = self.count("number of metadata pairs", _MIN_PAIR)
        self.metadata = self._read_metadata(n_pairs)
        self.alignment = self._read_alignment()

    def _read_magic(self) -> None:
        magic = self.buffer[:4]
        if magic != b"GGUF":
            kind = _other_kind(self.buffer[:64])
            raise self.error(f"not a GGUF file: it begins with {magic!r}" + f", {kind}" * bool(kind))
        self.position = 4

    def _read_version(self) -> int:
        version = self.u32("version")
        if version not in (2, 3):
            if version & 0xFFFF == 0 and version:
                raise self.error("a big-endian GGUF file; only little-endian files are supported", 4)
            again = "; convert the model again" if version == 1 else ""
            raise self.error(f"GGUF version {version} is not supported: expected 2 or 3{again}", 4)
        return version

    def _read_metadata(self, n_pairs: int) -> dict[str, object]:
        metadata: dict[str, object] = {}
        for number in range(n_pairs):
            at = self.position
            key = self.name(f"key {number} of {n_pairs}")
            if key in metadata:
                raise self.error(f"metadata key {key!r} is there twice", at)
            metadata[key] = self._read_value(self.u32(key), key, key.startswith(_EXACT_KEYS))
        return metadata

    def _read_alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in _ALIGNMENTS:
            raise self.error(
                f"general.alignment: expected a power of two from 8 to {_ALIGNMENTS[-1]}, found {alignment!r}"
            )
        return alignment

    def _read_value(self, kind: int, what: str, exact: bool):
        if kind == _STRING:
            return self.string(what, exact)
        if kind == _ARRAY:
            return self._read_array(what, 1, exact)
        return self._read_numbers(kind, 1, what)[0].item()

    def _read_array(self, what: str, depth: int, exact: bool):
        at = self.position
        if depth > _MAX_DEPTH:
            raise self.error(f"{what}: arrays nested deeper than {_MAX_DEPTH}", at)
        kind = self.u32(what)
        count = self.count(what, _MIN_SIZE.get(kind, 1))
        if kind not in (_STRING, _ARRAY):
            return self._read_numbers(kind, count, what)
        if count > _MAX_STRINGS:
            raise self.error(f"{what}: expected at most {_MAX_STRINGS} elements, found {count}", at)
        if kind == _STRING:
            return self._read_strings(count, what, exact)
        return [self._read_array(f"{what}[{index}]", depth + 1, exact) for index in range(count)]

    def _read_numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in _NUMBERS:
            raise self.error(f"{what}: unknown value type {kind}", self.position - 4)
        dtype = np.dtype(_NUMBERS[kind])
        at = self.need(count * dtype.itemsize, what)
        values = np.frombuffer(self.buffer, np.uint8, count * dtype.itemsize, at).copy()
        if kind == _BOOL and count and values.max() > 1:
            raise self.error(f"{what}: expected a bool, 0 or 1, found {values.max()}", at)
        return values.view(dtype)

    def _read_strings(self, count: int, what: str, exact: bool) -> list[str]:
        """A vocabulary has 10^5 strings, so: one tight loop over the lengths, then everything at once."""
        if not count:
            return []
        start = self.position
        ends = self._walk_strings(count, what)
        begins = np.concatenate(([start], ends[:-1])) - start
        text = np.frombuffer(self.buffer, np.uint8, ends[-1] - start, start).copy()
        keep = np.ones(len(text), bool)
        for byte in range(7):
            keep[begins + byte] = False
        text[begins + 7] = 0                # a length becomes one NUL
        joined = text[keep].tobytes()
        if joined.count(0) == count:
            try:
                return str(joined, "utf-8").split("\0")[1:]
            except UnicodeDecodeError:
                pass                        # say below where it is
        lengths = (ends - start - begins - 8).tolist()
        return [self.decode(start + begin + 8, length, f"{what}[{index}]", exact)
                for index, (begin, length) in enumerate(zip(begins.tolist(), lengths))]

    def _walk_strings(self, count: int, what: str) -> np.ndarray:
        """Where each of the next strings ends: int64 (count,)."""
        length_at, buffer, position = _U64.unpack_from, self.buffer, self.position
        ends: list[int] = []
        try:
            for _ in range(count):
                position += 8 + length_at(buffer, position)[0]
                ends.append(position)
        except (struct.error, OverflowError):       # the string before it, or its own length, leaves the file
            pass
        if position > self.size or len(ends) < count:
            inside = [end for end in ends[-2:] if end <= self.size]
            index = len(ends) - (position > self.size)
            at = inside[-1] if inside else self.position
            raise self.error(
                f"truncated in {what}[{index}] of {count}: it ends beyond the file's {self.size} bytes", at
            )
        self.position = position
        return np.array(ends, np.int64)

    # -- the tensor table

    def read_tensors(self) -> list[Tensor]:
        """The tensors of this file, all of them inside it and apart from each other."""
        entries = [self._read_entry(number) for number in range(self.n_tensors)]
        data_start = -(-self.position // self.alignment) * self.alignment
        end, last = max(((data_start + offset + nbytes, name) for name, _, _, offset, nbytes in entries),
                        default=(0, ""))
        if end > self.size:
            raise self.error(f"tensor {last!r} ends at byte {end}, the file at {self.size}: {_INCOMPLETE}")
        places = sorted((offset, offset + nbytes, name) for name, _, _, offset, nbytes in entries)
        for (_, end, one), (offset, _, other) in zip(places, places[1:]):
            if offset < end:
                raise self.error(f"tensors {one!r} and {other!r} overlap: "
                                 f"the second begins at {offset}, the first ends at {end}")
        everything = np.frombuffer(self.buffer, np.uint8)
        return [Tensor(name, kind, shape, everything[data_start + offset:data_start + offset + nbytes])
                for name, kind, shape, offset, nbytes in entries]

    def _read_entry(self, number: int) -> tuple[str, QuantType, tuple[int, ...], int, int]:
        """(name, type, shape, offset, nbytes) of the next entry; places are checked when all are known."""
        from .types import type_info  # here, so that a vocabulary needs no C library

        name = self.name(f"name of tensor {number} of {self.n_tensors}")
        what = f"tensor {name!r}"
        at = self.position
        n_dims = self.u32(what)
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.error(f"{what}: expected 1 to {_MAX_DIMS} dimensions, found {n_dims}", at)
        shape = tuple(self.u64(what) for _ in range(n_dims))
        type_id = self.u32(what)
        offset = self.u64(what)
        kind = type_info(type_id) if type_id < 1 << 31 else None
        if kind is None:
            other = f" ({_OTHER_TYPES[type_id]})" if type_id in _OTHER_TYPES else ""
            raise self.error(f"{what}: unknown tensor type {type_id}{other}", self.position - 12)
        nbytes = self._nbytes(what, kind, shape, offset, at)
        while len(shape) > 1 and shape[-1] == 1:
            shape = shape[:-1]
        return name, kind, shape, offset, nbytes

    def _nbytes(self, what: str, kind: QuantType, shape: tuple[int, ...], offset: int, at: int) -> int:
        if 0 in shape:
            raise self.error(f"{what}: a dimension is zero in shape {shape}", at)
        if shape[0] % kind.block_size:
            raise self.error(
                f"{what}: rows of {shape[0]} values: expected a multiple of {kind.name}'s {kind.block_size}",
                at,
            )
        if offset % self.alignment:
            raise self.error(
                f"{what}: expected an offset that is a multiple of {self.alignment}, found {offset}", at
            )
        nbytes = shape[0] // kind.block_size * kind.type_size
        for dim in shape[1:]:
            nbytes *= dim
        if nbytes > self.size:
            raise self.error(f"{what}: {kind.name} {shape} takes {nbytes} bytes, the file has {self.size}: "
                             f"{_INCOMPLETE}", at)
        return nbytes


def _other_kind(beginning: bytes) -> str | None:
    """What a file is that begins like this, as far as that is easy to see."""
    for start, kind in _OTHERS.items():
        if beginning.startswith(start):
            return kind
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") < 1 << 30:
        return "a safetensors file; convert the model to GGUF"
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for start, kind in _OTHER_TEXTS.items() if text.startswith(start)), None)


def _map(path: Path) -> tuple[mmap.mmap, int]:
    """The bytes of a regular file and their number. Waits for nothing: a pipe is refused, not read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise ArgumentError(f"{str(path)!r} is no path: {error}") from None
    except OSError as error:
        raise type(error)(f"{path}: {(error.strerror or str(error)).lower()}") from None
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{path}: is a directory, not a GGUF file")
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path}: not a regular file")
        if status.st_size == 0:
            raise FormatError(f"{path}: the file is empty")
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ), status.st_size
    finally:
        os.close(descriptor)
