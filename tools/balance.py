"""The cost model of a cache that grows: allocation, copies, first touch, unused rows,
and the r that balances them.

The idea is BMC's (arXiv 2511.12031); docs/bmc.md derives the formulas. Letters: s bytes of a row over all
layers, r rows added at a time, n rows in use, u seconds that attention takes for a row, tau tokens that a
pass brings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .growth import POLICIES, Growth, grown, tiles
from .machine import Machine

HUGE_PAGE = 2 << 20


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


# ---- one growth --------------------------------------------------------------------------------------------


def growth_cost(growth: Growth, machine: Machine, s: float, used: int, old: int, new: int) -> Cost:
    """Seconds of one growth from old to new rows, used of them in use.
    First touch counts here, whenever it happens."""
    copies = POLICIES[growth.policy].copies
    mapped = s * (new if copies or growth.policy in ("remap", "max", "max-lazy") else new - old)
    huge = mapped >= HUGE_PAGE
    allocate, touched = machine.map_s, s * (new if copies else new - old)
    if copies:
        allocate += machine.unmap(huge) * s * old
    if growth.policy == "remap":
        allocate += machine.remap(huge) * s * old
    return Cost(allocate, machine.copy * s * used * copies, machine.touch(huge) * touched)


# ---- a text ------------------------------------------------------------------------------------------------


def predict(growth: Growth, machine: Machine, s: float, attention: tuple[float, float], prompt: int,
            generated: int, cap: int, width: int = 1, tau: float = 1.0) -> Cost:
    """Seconds a token of generating tokens after a prompt, without the weights;
    the cache's start is among them.

    attention: seconds of a pass of this width over no rows, and over each row.
    Passes take `width` rows and leave tau.
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


def best_r(machine: Machine, s: float, u: float, rows: float, width: int = 1, tau: float = 1.0,
           phi: float = 1.0) -> int:
    """r* = sqrt(2 tau (a + s (F + 1/B_c) n) / (u phi)) for caches that are copied, in whole tiles.

    phi is the share of unused rows that attention computes;
    F is first touch of the new rows and release of the old.
    """
    huge = s * rows >= HUGE_PAGE
    per_growth = machine.map_s + s * rows * (machine.touch(huge) + machine.unmap(huge) + machine.copy)
    return max(tiles(math.ceil(math.sqrt(2 * tau * per_growth / (u * phi)))), tiles(width))
