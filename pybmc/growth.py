"""How the rows of a session may grow: one table of policies, one spelling for Python and the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import checks
from .errors import ArgumentError


@dataclass(frozen=True)
class Policy:
    """A way to grow, as native/arena.h describes it; constant is its name in bmc.h.

    takes: what may follow its name after a colon, "rows" added at a time or the "factor" of a growth. spare: rows are
    reserved some at a time, so that unused ones wait for their use.
    """

    constant: str
    says: str
    takes: str = ""
    copies: bool = False
    spare: bool = True


POLICIES = {
    "copy": Policy("BMC_GROW_COPY", "a larger array r rows at a time, to which rows are copied", "rows", copies=True),
    "geometric": Policy("BMC_GROW_GEOMETRIC", "likewise, a factor larger each time", "factor", copies=True),
    "chunk": Policy("BMC_GROW_CHUNK", "chunks of r rows, nothing is copied", "rows"),
    "reserve": Policy("BMC_GROW_RESERVE", "address space for the cap, made memory r rows at a time", "rows"),
    "remap": Policy("BMC_GROW_REMAP", "one mapping, moved where it can grow by r rows (Linux)", "rows"),
    "max": Policy("BMC_GROW_MAX", "all memory at once, touched", spare=False),
    "max-lazy": Policy("BMC_GROW_MAX_LAZY", "all at once, memory as it is written", spare=False),
}
MOST = 1 << 30


@dataclass(frozen=True)
class Growth:
    """A policy with its numbers. r 0: what suits the model and the machine; factor 0: 2.

    huge: take huge pages. touch: first touch at growth and not at the first write, so that its time is counted. pad:
    attention works on unused rows too, as kernels over whole arrays do; it changes nothing but the time.
    """

    policy: str = "chunk"
    r: int = 0
    factor: float = 0.0
    huge: bool = True
    touch: bool = False
    pad: bool = False

    def __str__(self) -> str:
        takes = POLICIES[self.policy].takes
        number = {"rows": self.r, "factor": self.factor, "": 0}[takes]
        return f"{self.policy}:{number:g}" if number else self.policy


def parse(rows: int | str | Growth, **switches: bool) -> Growth:
    """What `rows` means: "auto", rows at a time (with a copy), a policy, or "policy:number". Raises ArgumentError."""
    if isinstance(rows, Growth):
        return _checked(replace(rows, **switches), rows)
    if rows == "auto":
        return Growth(**switches)
    if isinstance(rows, str) and not rows.isdecimal():
        return _checked(Growth(**_named(rows), **switches), rows)
    try:
        r = checks.whole("rows", int(rows) if isinstance(rows, str) else rows, 1, MOST)
    except ArgumentError:
        raise _expected(rows) from None
    return _checked(Growth("copy", r, **switches), rows)


def _named(rows: str) -> dict:
    """The policy, and what follows its colon."""
    name, colon, number = rows.partition(":")
    if name not in POLICIES:
        raise _expected(rows)
    if not colon:
        return {"policy": name}
    takes = POLICIES[name].takes
    try:
        if takes == "rows" and int(number) > 0:
            return {"policy": name, "r": int(number)}
        if takes == "factor" and float(number):
            return {"policy": name, "factor": float(number)}
    except ValueError:
        pass
    raise _expected(rows)


def _checked(growth: Growth, rows) -> Growth:
    factor = growth.factor or 2
    if growth.policy not in POLICIES or not 0 <= growth.r <= MOST or not 1.01 <= factor <= 16:
        raise _expected(rows)
    return growth


def _expected(rows) -> ArgumentError:
    return ArgumentError(f"rows: expected auto, a number from 1 up, {', '.join(POLICIES)}, or one of these with its "
                         f"rows (chunk:128) or factor (geometric:1.5), found {rows!r}")
