"""The types of tensors, as the library's table has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .._native import check, ffi, lib, pointer
from ..errors import ArgumentError


@dataclass(frozen=True)
class QuantType:
    """A tensor type of GGUF: block_size weights take type_size bytes;
    runs tells whether pybmc computes with it."""

    id: int
    name: str
    block_size: int
    type_size: int
    runs: bool

    def __str__(self) -> str:
        return self.name


@lru_cache(maxsize=None)
def type_info(id: int) -> QuantType | None:
    """The type with ggml's number id, or None when there is none."""
    info = ffi.new("bmc_type_info *")
    if not -2**31 <= id < 2**31:
        return None
    check(lib.bmc_type(id, info))
    if info.name == ffi.NULL:
        return None
    return QuantType(id, ffi.string(info.name).decode(), info.block_size, info.type_size, bool(info.runs))


def dequantize(type: QuantType | int, data, n: int) -> np.ndarray:
    """The first n values in a buffer of blocks, as float32 (n,). n is a multiple of the type's block size."""
    quant = type if isinstance(type, QuantType) else type_info(type)
    if quant is None:
        raise ArgumentError(f"there is no tensor type {type}")
    blocks = ffi.from_buffer("uint8_t[]", data)
    needed = n // quant.block_size * quant.type_size
    if len(blocks) < needed:
        raise ArgumentError(f"{n} values of {quant} take {needed} bytes, got {len(blocks)}")
    out = np.empty(max(n, 0), np.float32)
    check(lib.bmc_dequantize(quant.id, blocks, n, pointer(out)))
    return out
