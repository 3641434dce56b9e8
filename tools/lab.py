"""What native/lab/bmc_lab.h declares: growth, noise, probes and limits, for measuring."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pybmc._native import check, declare, ffi, lib

declare(Path(__file__).parents[1] / "native" / "lab" / "bmc_lab.h")


class Cost(NamedTuple):
    """Seconds of a growth, by what they were spent on, and what it copied."""

    allocate: float
    copy: float
    touch: float
    bytes_copied: int


def grow(session, growth: int, rows: int, touch: bool) -> Cost:
    """Room for this number of rows in all, in one of the ways of enum bmc_growth."""
    cost = ffi.new("bmc_growth_cost *")
    with session._claimed(moves=False) as handle:
        check(lib.bmc_session_grow(handle, growth, rows, touch, cost))
    return Cost(cost.allocate, cost.copy, cost.touch, cost.bytes_copied)


def fill(session, rows: int) -> None:
    """Rows of noise after those in use."""
    with session._claimed() as handle:
        check(lib.bmc_session_fill(handle, rows))


def attend_unused(session, n_tok: int) -> tuple[float, int]:
    """What kernels over whole arrays do besides for the last n tokens, attention on unused rows:
    its seconds, and how many pairs of a query and a row there were."""
    seconds = ffi.new("double *")
    with session._claimed(moves=False) as handle:
        pairs = check(lib.bmc_session_attend_unused(handle, n_tok, seconds))
    return seconds[0], pairs


def memory_seconds(probe: int, n_bytes: int) -> float:
    """Seconds of one of enum bmc_probe."""
    seconds = ffi.new("double *")
    check(lib.bmc_memory_seconds(probe, n_bytes, seconds))
    return seconds[0]


def read_bandwidth(threads: int) -> float:
    """Bytes a second that the threads read from memory together, measured now on 528 MB."""
    rate = ffi.new("double *")
    check(lib.bmc_read_bandwidth(threads, rate))
    return rate[0]


def arithmetic(type_id: int, threads: int) -> float:
    """Operations a second, two a product, of the kernel of a type, measured now from the cache."""
    rate = ffi.new("double *")
    check(lib.bmc_arithmetic(type_id, threads, rate))
    return rate[0]


def arithmetic_rate(threads: int) -> tuple[float, float]:
    """Products a second that the threads sum up from registers, of 8-bit integers and of floats,
    measured now."""
    int8, f32 = ffi.new("double *"), ffi.new("double *")
    check(lib.bmc_arithmetic_rate(threads, int8, f32))
    return int8[0], f32[0]
