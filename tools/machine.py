"""What memory and attention cost on this machine, measured now: the constants of the model of growth."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from pybmc._native import lib
from pybmc.errors import ArgumentError

from .growth import GrowingSession, Growth
from .lab import memory_seconds

MB = 1 << 20
MAPPED = 4 * MB                         # what a growth maps, about
PAGES = 128 * MB                        # touched, moved, copied and released at a time: more than caches hold
REPS = 5


@dataclass(frozen=True)
class Machine:
    """Seconds a byte unless it says otherwise; huge is of 2 MB pages, small of the usual ones."""

    map_s: float = 1.7e-5               # seconds of making a mapping and undoing it, untouched
    touch_small: float = 2.8e-10        # a fault and the zeroing of its page
    touch_huge: float = 2.2e-11
    unmap_small: float = 5e-11
    unmap_huge: float = 2e-12
    remap_small: float = 1e-11          # moving pages to other addresses
    remap_huge: float = 1e-13
    copy: float = 1.2e-10               # by one thread, to pages that are there

    def touch(self, huge: bool) -> float:
        return self.touch_huge if huge else self.touch_small

    def unmap(self, huge: bool) -> float:
        return self.unmap_huge if huge else self.unmap_small

    def remap(self, huge: bool) -> float:
        return self.remap_huge if huge else self.remap_small


def measure_machine() -> Machine:
    """About two seconds."""
    def per_byte(probe: int) -> float:
        return memory_seconds(probe, PAGES) / PAGES

    def moved(probe: int) -> float:
        try:
            return per_byte(probe)
        except ArgumentError:
            return 0.0                          # this system moves no pages, and refuses to grow so

    return Machine(
        memory_seconds(lib.BMC_PROBE_MAP, MAPPED), per_byte(lib.BMC_PROBE_TOUCH_SMALL),
        per_byte(lib.BMC_PROBE_TOUCH), per_byte(lib.BMC_PROBE_UNMAP_SMALL), per_byte(lib.BMC_PROBE_UNMAP),
        moved(lib.BMC_PROBE_REMAP_SMALL), moved(lib.BMC_PROBE_REMAP), per_byte(lib.BMC_PROBE_COPY))


def attention_times(model, widths, rows,
                    reference: Callable[[], float] = lambda: 1.0) -> dict[tuple[int, int], float]:
    """(rows held, width of a pass) -> seconds of its attention, over those of a reference beside it."""
    times = {}
    with GrowingSession(model, Growth("chunk", touch=True), max(rows) + max(widths)) as session:
        for n in rows:
            session.fill(n - session.position)
            for width in widths:
                times[n, width] = attention_seconds(session, width, reference)
    return times


def attention_seconds(session: GrowingSession, width: int, reference: Callable[[], float]) -> float:
    """Of a pass, the median of a few after one to warm up."""
    seconds, beside = [], []
    for _ in range(REPS + 1):
        seconds.append(session.evaluate(width)["attention"])
        beside.append(reference())
    return statistics.median(seconds[1:]) / statistics.median(beside[1:])


def lines_through(times: dict[tuple[int, int], float]) -> dict[int, tuple[float, float]]:
    """Width -> seconds over no rows, and over each row: the line through the least and the most rows
    measured. Where few rows still fit the cache, the first may be below zero: it is a line, and holds between
    the two."""
    low, high = min(n for n, _ in times), max(n for n, _ in times)
    lines = {}
    for width in sorted({width for _, width in times}):
        u = max(1e-12, (times[high, width] - times[low, width]) / (high - low))
        lines[width] = times[low, width] - u * low, u
    return lines
