"""The cost model of a cache that grows: allocation, copies, first touch, unused rows, and the r that balances them.

The idea is BMC's (arXiv 2511.12031); docs/bmc.md derives the formulas. Letters: s bytes of a row over all layers, r
rows added at a time, n rows in use, u seconds that attention takes for a row, tau tokens that a pass brings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .growth import POLICIES, Growth
from .machine import Machine, known

TILE = 16                               # rows that the kernels take at a time
HUGE_PAGE = 2 << 20
USUAL_ROWS = 1024                       # what a text is taken to need while nothing is known of it
CHUNK_BYTES = HUGE_PAGE, 4 * HUGE_PAGE  # bounds of a chunk
MOST_ROWS = 256                         # and of its rows
MAP_SHARE = 0.2                         # of first touch: what mapping a chunk may cost


@dataclass(frozen=True)
class Cost:
    """Seconds a token."""

    allocate: float = 0.0
    copy: float = 0.0
    touch: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.allocate + self.copy + self.touch + self.attention

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.allocate + other.allocate, self.copy + other.copy, self.touch + other.touch,
                    self.attention + other.attention)

    def over(self, n: float) -> Cost:
        return Cost(self.allocate / n, self.copy / n, self.touch / n, self.attention / n)


def tiles(rows: float) -> int:
    """Rows, rounded up to whole tiles."""
    return TILE * max(1, math.ceil(rows / TILE))


# ---- one growth ----------------------------------------------------------------------------------------------


def grown(growth: Growth, rows: int, reserved: int, cap: int) -> int:
    """Rows reserved after a growth to `rows` or more: what native/arena.c does."""
    if not POLICIES[growth.policy].spare:
        return cap
    if growth.policy in ("copy", "geometric"):
        if growth.policy == "geometric":
            rows = max(rows, int((growth.factor or 2) * reserved))
        return min(cap, -(-rows // growth.r) * growth.r)
    return -(-rows // tiles(growth.r)) * tiles(growth.r)


def growth_cost(growth: Growth, machine: Machine, s: float, used: int, old: int, new: int) -> Cost:
    """Seconds of one growth from old to new rows, used of them in use. First touch counts here, whenever it happens."""
    copies = POLICIES[growth.policy].copies
    mapped = s * (new if copies or growth.policy in ("remap", "max", "max-lazy") else new - old)
    huge = growth.huge and mapped >= HUGE_PAGE
    allocate, touched = machine.map_s, s * (new if copies else new - old)
    if copies:
        allocate += machine.unmap(huge) * s * old
    if growth.policy == "remap":
        allocate += machine.remap(huge) * s * old
    return Cost(allocate, machine.copy * s * used * copies, machine.touch(huge) * touched)


# ---- a text --------------------------------------------------------------------------------------------------


def predict(growth: Growth, machine: Machine, s: float, attention: tuple[float, float], prompt: int, generated: int,
            cap: int, width: int = 1, tau: float = 1.0) -> Cost:
    """Seconds a token of generating so many after a prompt, without the weights; the cache's start is among them.

    attention: seconds of a pass of this width over no rows, and over each row. Passes take `width` rows and leave tau.
    """
    reserved = grown(growth, prompt, 0, cap)
    cost, seen, passes = growth_cost(growth, machine, s, 0, 0, reserved), 0, max(1, round(generated / tau))
    for i in range(passes):
        used = prompt + int(i * tau)
        if used + width > reserved:
            before, reserved = reserved, grown(growth, used + width, reserved, cap)
            cost += growth_cost(growth, machine, s, used, before, reserved)
        seen += reserved if growth.pad else used + width
    return (cost + Cost(attention=passes * attention[0] + seen * attention[1])).over(passes * tau)


def best_r(machine: Machine, s: float, u: float, rows: float, width: int = 1, tau: float = 1.0, phi: float = 1.0,
           huge: bool = True) -> int:
    """r* = sqrt(2 tau (a + s (F + 1/B_c) n) / (u phi)) for caches that are copied, in whole tiles.

    phi is the share of unused rows that attention computes; F is first touch of the new rows and release of the old.
    """
    huge = huge and s * rows >= HUGE_PAGE
    per_growth = machine.map_s + s * rows * (machine.touch(huge) + machine.unmap(huge) + machine.copy)
    return max(tiles(math.sqrt(2 * tau * per_growth / (u * phi))), tiles(width))


# ---- what a session takes ------------------------------------------------------------------------------------


def chunk_rows(machine: Machine, s: float) -> int:
    """Rows of a chunk. Nothing is copied and attention stops at the last tile, so r costs nothing but the system calls
    of a growth on one side and memory that waits for its use on the other: the smallest r whose mapping costs a fifth
    of its first touch at most, in whole huge pages, within bounds.
    """
    low, high = CHUNK_BYTES
    enough = machine.map_s / (MAP_SHARE * max(machine.touch_huge, 1e-15))
    wanted = min(high, max(low, math.ceil(enough / HUGE_PAGE) * HUGE_PAGE))
    return min(MOST_ROWS, TILE * max(1, round(wanted / s / TILE)))


def planned(growth: Growth, config, threads: int) -> tuple[Growth, str]:
    """The growth with an r, where it leaves that open, and the reason for it in a few words."""
    if growth.r:
        return growth, "asked for"
    policy, machine, s = POLICIES[growth.policy], known(threads), config.kv_row_bytes
    if not policy.spare:
        return growth, "everything at once"
    source = f"measured {machine.measured}" if machine.measured else "usual costs; `pybmc tune` measures them"
    if growth.policy == "geometric":
        return replace(growth, r=TILE), "one tile, then by the factor"
    if growth.policy == "copy" and growth.pad:
        u = s * machine.attention_s(config.n_heads // config.n_kv_heads, 1)
        return (replace(growth, r=best_r(machine, s, u, USUAL_ROWS, huge=growth.huge)),
                f"copies and unused rows cost the same around {USUAL_ROWS} rows; {source}")
    if growth.policy == "copy":
        return replace(growth, r=USUAL_ROWS // 4), "unused rows cost memory only: a quarter of the usual rows"
    r = chunk_rows(machine, s)
    if r == MOST_ROWS:
        return replace(growth, r=r), f"rows are small, {s / 1e3:.3g} kB: the most at a time"
    share = machine.map_s / (machine.touch_huge * r * s)
    return (replace(growth, r=r),
            f"{r * s / 1e6:.1f} MB: a growth costs {machine.map_s * 1e6:.0f} us, {share:.0%} of first touch; {source}")
