"""What this machine was found to be able to do, kept by `pybmc tune` in the user's cache directory.

A file that is missing, broken or another machine's is as good as none: then the numbers below hold, those of two cores
of a Zen 4 server in a virtual machine.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from math import isfinite
from pathlib import Path

from . import cache

VERSION = 1


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
    read_bytes_s: float = 3e10          # bytes a second, all threads
    int8_ops_s: float = 0.0             # operations a second of the weight kernels, two a product; 0: not measured
    f32_ops_s: float = 0.0
    # Attention by queries that share a KV head: width of a pass -> seconds for each byte of keys and values.
    attention: dict[int, dict[int, float]] = field(default_factory=lambda: {
        1: {1: 3.5e-11, 2: 3.5e-11, 4: 3.7e-11, 8: 5e-11, 16: 1e-10},
        4: {1: 3.7e-11, 2: 5e-11, 4: 1e-10, 8: 2e-10, 16: 4e-10}})
    measured: str = ""                  # the day; empty: never

    def touch(self, huge: bool) -> float:
        return self.touch_huge if huge else self.touch_small

    def unmap(self, huge: bool) -> float:
        return self.unmap_huge if huge else self.unmap_small

    def remap(self, huge: bool) -> float:
        return self.remap_huge if huge else self.remap_small

    def attention_s(self, group: int, width: int) -> float:
        """Seconds a byte for `group` query heads a KV head: those of the group measured that is nearest to it."""
        curve = self.attention[min(self.attention, key=lambda known: abs(known - group))]
        below = max((w for w in curve if w <= width), default=min(curve))
        above = min((w for w in curve if w >= width), default=below)
        if above <= below:
            return curve[below] * max(1.0, width / below)
        return curve[below] + (curve[above] - curve[below]) * (width - below) / (above - below)


def identity(threads: int) -> dict:
    """Whose numbers these are."""
    return {"version": VERSION, "host": platform.node(), "machine": platform.machine(), "threads": threads,
            "cpu": os.environ.get("PYBMC_CPU", "")}


def path_of(threads: int) -> Path | None:
    return cache.path_of("machine", identity(threads))


@lru_cache(maxsize=None)
def known(threads: int) -> Machine:
    """What is kept about this machine, or the numbers of another one."""
    try:
        kept = json.loads(path_of(threads).read_text(encoding="utf-8"))
        if kept.pop("key") != identity(threads):
            return Machine()
        kept["attention"] = {int(group): {int(width): float(t) for width, t in curve.items()}
                             for group, curve in kept["attention"].items()}
        machine = Machine(**kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Machine()
    return machine if _sound(machine) else Machine()


def _sound(machine: Machine) -> bool:
    numbers = [getattr(machine, f.name) for f in fields(machine) if f.type == "float"]
    times = [t for curve in machine.attention.values() for t in curve.values()]
    return (all(isinstance(x, (int, float)) and isfinite(x) and x >= 0 for x in numbers)
            and all(map(bool, [machine.attention, *machine.attention.values()]))
            and all(isfinite(t) and t > 0 for t in times) and machine.copy > 0 and machine.read_bytes_s > 0)


def keep(machine: Machine, threads: int) -> Path | None:
    """Keep it for the next time. Where it is; None where it cannot be kept, which is no failure."""
    path = path_of(threads)
    kept = cache.replace(path, json.dumps({"key": identity(threads)} | asdict(machine), indent=1))
    known.cache_clear()
    return path if kept else None
