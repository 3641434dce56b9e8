"""GGUF files byte by byte, wrong ones included.

    Raw(pairs={"general.architecture": "llama"}, tensors=[Entry("a", (32,), data=bytes(128))]).save(path)

Values get their GGUF type from Python's: bool, int (u32, or i64 where it does not fit), float (f32), str,
list of str, numpy array. Typed(kind, payload) is a value with its bytes as they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = {
    "u1": U8,
    "i1": I8,
    "u2": U16,
    "i2": I16,
    "u4": U32,
    "i4": I32,
    "f4": F32,
    "b1": BOOL,
    "u8": U64,
    "i8": I64,
    "f8": F64,
}


@dataclass
class Typed:
    kind: int
    payload: bytes


@dataclass
class Entry:
    """A line of the tensor table; offset None: after the tensor before it. Type 0 is F32."""

    name: str | bytes
    dims: tuple[int, ...]
    type: int = 0
    offset: int | None = None
    data: bytes = b""
    n_dims: int | None = None


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return u64(len(data)) + data


def array(kind: int, payload: bytes, count: int) -> Typed:
    return Typed(ARRAY, u32(kind) + u64(count) + payload)


def typed(value) -> Typed:
    if isinstance(value, Typed):
        return value
    if isinstance(value, bool):
        return Typed(BOOL, bytes([value]))
    if isinstance(value, int):
        return Typed(U32, u32(value)) if 0 <= value < 1 << 32 else Typed(I64, struct.pack("<q", value))
    if isinstance(value, float):
        return Typed(F32, struct.pack("<f", value))
    if isinstance(value, (str, bytes)):
        return Typed(STRING, string(value))
    if isinstance(value, np.ndarray):
        return array(NUMBERS[value.dtype.str[1:]], value.tobytes(), len(value))
    if value and not isinstance(value[0], (str, bytes)):
        return typed(np.array(value, np.float32 if isinstance(value[0], float) else np.int32))
    return array(STRING, b"".join(map(string, value)), len(value))


@dataclass
class Raw:
    pairs: dict | list = field(default_factory=dict)        # a list of (key, value) may repeat itself
    tensors: list[Entry] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    n_pairs: int | None = None
    n_tensors: int | None = None

    def header(self) -> bytes:
        pairs = list(self.pairs.items() if isinstance(self.pairs, dict) else self.pairs)
        out = [
            self.magic,
            u32(self.version),
            u64(len(self.tensors) if self.n_tensors is None else self.n_tensors),
            u64(len(pairs) if self.n_pairs is None else self.n_pairs),
        ]
        for key, value in pairs:
            value = typed(value)
            out += [string(key), u32(value.kind), value.payload]
        offset = 0
        for tensor in self.tensors:
            offset = offset if tensor.offset is None else tensor.offset
            out += [string(tensor.name), u32(len(tensor.dims) if tensor.n_dims is None else tensor.n_dims),
                    b"".join(map(u64, tensor.dims)), u32(tensor.type), u64(offset % (1 << 64))]
            offset += self.padded(len(tensor.data))
        return b"".join(out)

    def padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    def bytes(self) -> bytes:
        out = self.header()
        for tensor in self.tensors:
            if tensor.data:
                out = out.ljust(self.padded(len(out)), b"\0") + tensor.data
        return out

    def save(self, path: Path) -> Path:
        path.unlink(missing_ok=True)        # ext4 waits for the disk where a file is cut and written again
        path.write_bytes(self.bytes())
        return path
