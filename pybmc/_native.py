"""The C library: declarations, loading, status codes and arrays. The only file that imports cffi."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI

from .errors import (
    ArgumentError,
    BmcError,
    BusyError,
    ContextFullError,
    DeviceError,
    FormatError,
    OutOfMemoryError,
)

_HERE = Path(__file__).parent
_LIBRARY = _HERE / ("libpybmc.dylib" if sys.platform == "darwin" else "libpybmc.so")
_HEADERS = (_HERE / "bmc.h", _HERE.parent / "native" / "bmc.h")      # a wheel's copy, a checkout's original


def _header() -> Path:
    for path in _HEADERS:
        if path.is_file():
            return path
    raise BmcError(f"pybmc is incomplete: {_HEADERS[0]} is missing; install it again")


def _declarations(path: Path) -> str:
    """What stands in a header between its marks."""
    _, marked = re.split(r"/\* <cffi>.*?\*/", path.read_text(), flags=re.DOTALL)
    return marked.partition("/* </cffi> */")[0]


def declare(path: Path) -> None:
    """Add a header's functions and types to lib and ffi; twice is fine."""
    if path not in _declared:
        ffi.cdef(_declarations(path))
        _declared.add(path)


def _load(ffi: FFI):
    if not _LIBRARY.is_file():
        raise BmcError(f"the C library is missing: {_LIBRARY}; run make, or install pybmc again")
    try:
        lib = ffi.dlopen(str(_LIBRARY))
        version = lib.bmc_version()
    except (OSError, AttributeError) as error:
        raise BmcError(f"the C library does not load: {error}; run make, or install pybmc again") from error
    if version != lib.BMC_VERSION:
        raise BmcError(f"{_LIBRARY} has version {version}, pybmc needs {lib.BMC_VERSION}; "
                       "run make, or install pybmc again")
    return lib


ffi = FFI()
_declared: set[Path] = set()
declare(_header())
lib = _load(ffi)
if hasattr(os, "register_at_fork"):     # a child must not begin while another thread holds cffi's lock
    os.register_at_fork(before=ffi._lock.acquire, after_in_parent=ffi._lock.release,
                        after_in_child=ffi._lock.release)

ERRORS = {
    lib.BMC_EINVAL: ArgumentError,
    lib.BMC_EFORMAT: FormatError,
    lib.BMC_ENOMEM: OutOfMemoryError,
    lib.BMC_EFULL: ContextFullError,
    lib.BMC_EBUSY: BusyError,
    lib.BMC_EDEVICE: DeviceError,
}


def last_error() -> str:
    """This thread's sentence about the last call that failed."""
    return ffi.string(lib.bmc_error()).decode("utf-8", "replace")


def check(status: int) -> int:
    """Return a count or 0 as it is; raise what a negative status means."""
    if status < 0:
        raise_status(status, last_error())
    return status


def raise_status(status: int, text: str) -> None:
    """Raise what a negative status of another thread's call means."""
    if status < 0:
        raise ERRORS.get(status, BmcError)(text)


def owned(handle, free: str, kept=None):
    """A handle that is freed, and after it what it needs, when nobody uses it:
    a close() leaves a call beside it whole."""
    freeing: Any = partial(getattr(lib, free))      # in a function of Python's an interrupt would be lost
    freeing.kept = lib, kept                        # lib: at exit it would go first
    return ffi.gc(handle, freeing)


def as_array(x, dtype, shape=None, name="array") -> np.ndarray:
    """Return x as a C-contiguous array of dtype, itself where it is one already.

    shape is a tuple in which None stands for any length. Integers that dtype cannot hold, floats where
    integers belong and other kinds of values raise ArgumentError.
    """
    dtype = np.dtype(dtype)
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ArgumentError(f"{name}: {error}") from None
    if array.size == 0 and not isinstance(x, np.ndarray):
        array = array.astype(dtype)             # [] has no kind of its own
    if shape is not None and not (array.ndim == len(shape)
                                  and all(want in (None, n) for want, n in zip(shape, array.shape))):
        raise ArgumentError(f"{name}: expected shape {_spell(shape)}, got {_spell(array.shape)}")
    if array.dtype != dtype:
        if array.dtype.kind not in ("iu" if dtype.kind in "iu" else "iuf"):
            raise ArgumentError(f"{name}: expected {dtype} values, got {array.dtype}")
        if dtype.kind in "iu" and array.size:
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
            if int(array.min()) < low or int(array.max()) > high:
                raise ArgumentError(f"{name}: {int(array.min())}..{int(array.max())} does not fit {dtype}")
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


def pointer(array: np.ndarray):
    """A C pointer to a contiguous array's values; it keeps the array alive."""
    return ffi.from_buffer(_CTYPES[array.dtype.char], array)


_CTYPES = {np.dtype(name).char: ffi.typeof(f"{ctype}[]") for name, ctype in
           (("f4", "float"), ("f8", "double"), ("i4", "int32_t"), ("i8", "int64_t"),
            ("u1", "uint8_t"), ("u2", "uint16_t"), ("u4", "uint32_t"))}


def _spell(shape) -> str:
    lengths = ", ".join("n" if n is None else str(n) for n in shape)
    return f"({lengths},)" if len(shape) == 1 else f"({lengths})"


def cpu_levels() -> list[str]:
    """The instruction sets of this CPU that there are kernels for, "ref" first:
    what PYBMC_CPU can name here."""
    names = takewhile(lambda name: name != ffi.NULL, map(lib.bmc_cpu_level, count()))
    return [ffi.string(name).decode() for name in names]
