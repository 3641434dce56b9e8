"""`pybmc tune`: what this machine can do, measured once and kept, for whatever plans with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from . import balance
from ._native import check, ffi, lib, read_bandwidth
from .errors import ArgumentError
from .growth import Growth
from .machine import Machine
from .show import size

MB = 1 << 20
MAPPED = 4 * MB                         # what a growth maps, about
PAGES = 128 * MB                        # what is touched, moved, copied and released at a time: more than caches hold
WIDTHS = (1, 2, 4, 8, 16)
TUNED = ("7b-mha", "1b-gqa")            # shapes whose attention stands for those of others: groups of 1 and 4
REPS = 5


def tune(threads: int, progress: Callable[[int, int], None] | None = None) -> Machine:
    """Measure everything, about half a minute; nothing is kept yet."""
    from .synthetic import SHAPES

    found, steps = {}, list(_steps(threads))
    for i, (name, measure) in enumerate(steps):
        found[name] = measure()
        if progress:
            progress(i + 1, len(steps))
    attention = {SHAPES[name].group: found.pop(name) for name in TUNED}
    return replace(Machine(**found), attention=attention, measured=time.strftime("%Y-%m-%d"))


def _steps(threads: int) -> Iterator[tuple[str, Callable]]:
    """Fields of Machine, and shapes, with what measures them."""
    def per_byte(probe: int, n_bytes: int):
        return lambda: memory_seconds(probe, n_bytes) / n_bytes

    def moved(probe: int):
        try:
            return memory_seconds(probe, PAGES) / PAGES
        except ArgumentError:
            return 0.0                          # nothing here that could move pages, so nothing will be planned with it

    yield "map_s", lambda: memory_seconds(lib.BMC_PROBE_MAP, MAPPED)
    yield "touch_small", per_byte(lib.BMC_PROBE_TOUCH_SMALL, PAGES)
    yield "touch_huge", per_byte(lib.BMC_PROBE_TOUCH, PAGES)
    yield "unmap_small", per_byte(lib.BMC_PROBE_UNMAP_SMALL, PAGES)
    yield "unmap_huge", per_byte(lib.BMC_PROBE_UNMAP, PAGES)
    yield "remap_small", lambda: moved(lib.BMC_PROBE_REMAP_SMALL)
    yield "remap_huge", lambda: moved(lib.BMC_PROBE_REMAP)
    yield "copy", per_byte(lib.BMC_PROBE_COPY, PAGES)
    yield "read_bytes_s", lambda: read_bandwidth(threads)
    yield "int8_ops_s", lambda: arithmetic(Q8_0, threads)
    yield "f32_ops_s", lambda: arithmetic(F32, threads)
    for name in TUNED:
        yield name, lambda name=name: attention_of(name, threads)


F32, Q8_0 = 0, 8


def memory_seconds(probe: int, n_bytes: int) -> float:
    seconds = ffi.new("double *")
    check(lib.bmc_memory_seconds(probe, n_bytes, seconds))
    return seconds[0]


def arithmetic(type_id: int, threads: int) -> float:
    rate = ffi.new("double *")
    check(lib.bmc_arithmetic(type_id, threads, rate))
    return rate[0]


def attention_of(name: str, threads: int) -> dict[int, float]:
    from .synthetic import SyntheticModel

    with SyntheticModel(name, threads) as model:
        row_bytes = model.config.kv_row_bytes
        return {width: u / row_bytes for width, (_, u) in lines_through(attention_times(model)).items()}


def attention_times(model, widths=WIDTHS, rows=(512, 2048),
                    reference: Callable[[], float] = lambda: 1.0) -> dict[tuple[int, int], float]:
    """(rows held, width of a pass) -> seconds of its attention, over those of a reference beside it."""
    times = {}
    with model.session(context=max(rows) + max(widths), rows=Growth("chunk", touch=True)) as session:
        for n in rows:
            session._fill(n - session.position)
            for width in widths:
                times[n, width] = attention_seconds(session, width, reference)
    return times


def lines_through(times: dict[tuple[int, int], float]) -> dict[int, tuple[float, float]]:
    """Width -> seconds over no rows, and over each row: the line through the least and the most rows measured. Where
    few rows still fit the cache, the first may be below zero: it is a line, and holds between the two."""
    low, high = min(n for n, _ in times), max(n for n, _ in times)
    lines = {}
    for width in sorted({width for _, width in times}):
        u = max(1e-12, (times[high, width] - times[low, width]) / (high - low))
        lines[width] = times[low, width] - u * low, u
    return lines


def attention_seconds(session, width: int, reference: Callable[[], float]) -> float:
    """Of a pass, the median of a few after one to warm up."""
    position, seconds, beside = session.position, [], []
    for _ in range(REPS + 1):
        before = session.arena_stats().attention_s
        session.eval([1] * width, logits="argmax")
        seconds.append(session.arena_stats().attention_s - before)
        session.rewind(position)
        beside.append(reference())
    return statistics.median(seconds[1:]) / statistics.median(beside[1:])


def tune_model(model) -> dict[int, float]:
    """What passes of this model cost by their width: measured for decoding that checks guesses, and kept."""
    from . import cache
    from .speculate import calibrate

    for kind in ("all", "sampled", "best"):
        seconds = calibrate(model, kind, time.perf_counter)
        cache.save(cache.identity(model, kind), seconds)
    return seconds


# ---- in words ------------------------------------------------------------------------------------------------


def sentences(machine: Machine, threads: int) -> list[str]:
    """What was found, and what will be done with it."""
    huge, small = machine.touch_huge, machine.touch_small
    lines = [
        f"Memory is read at {machine.read_bytes_s / 1e9:.1f} GB/s by {threads} threads: a model of 800 MB writes "
        f"{machine.read_bytes_s / 8e8:.0f} tokens a second at most.",
        f"The weight kernels compute {machine.int8_ops_s / 1e9:.0f} GOP/s in 8 bits and {machine.f32_ops_s / 1e9:.0f} "
        f"GFLOP/s in floats: that limits prompts.",
        f"New memory costs {small * 1e9:.3f} ns a byte in small pages, {huge * 1e9:.3f} in huge ones"
        + (f", {small / huge:.0f} times less." if huge * 1.5 < small else ": this system gives none."),
        f"Copying costs {machine.copy * 1e9:.3f} ns a byte ({1 / machine.copy / 1e9:.1f} GB/s), a mapping "
        f"{machine.map_s * 1e6:.0f} us" + (f", moving pages {machine.remap_huge * 1e9:.4f} ns a byte."
                                           if machine.remap_huge else "; pages cannot be moved here."),
    ]
    for name, s, group in (("a 1B model with grouped heads", 32 << 10, 4), ("a 7B model without", 512 << 10, 1)):
        u = s * machine.attention_s(group, 1)
        lines.append(f"For {name}, {size(s)} a row: --rows auto takes chunks of {balance.chunk_rows(machine, s)} rows. "
                     f"A cache that is copied, with kernels that compute unused rows, would do best with "
                     f"{balance.best_r(machine, s, u, balance.USUAL_ROWS)} rows at {balance.USUAL_ROWS} rows, "
                     f"{balance.best_r(machine, s, u, 4096)} at 4096.")
    wide = machine.attention_s(4, 8) / machine.attention_s(4, 1)
    lines.append(f"Attention of a pass of 8 tokens costs {wide:.1f} times that of one (grouped heads).")
    return lines


def curve_sentence(name: str, seconds: dict[int, float]) -> str:
    ratios = ", ".join(f"{width}: {t / seconds[1]:.2f}" for width, t in seconds.items() if width > 1)
    return (f"{name}: a token takes {seconds[1] * 1e3:.2f} ms; a pass of so many, compared with that: {ratios}. Drafts "
            "are as long as this curve says that they pay.")
