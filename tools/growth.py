"""Ways in which the rows of a session may grow, and a session that grows so and measures what it costs.

The product grows by chunks alone (native/arena.h). The other policies are here to be compared with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from pybmc._native import lib
from pybmc.errors import ArgumentError

from . import lab

TILE = 16                               # rows that the kernels take at a time
MOST = 1 << 30


@dataclass(frozen=True)
class Policy:
    """growth: its part of enum bmc_growth. takes: what may follow its name after a colon, "rows" added at a
    time or the "factor" of a growth. copies: a growth copies. spare: rows are reserved some at a time."""

    growth: int
    takes: str = ""
    copies: bool = False
    spare: bool = True


POLICIES = {
    "copy": Policy(lib.BMC_GROW_COPY, "rows", copies=True),           # a larger array, rows are copied to it
    "geometric": Policy(lib.BMC_GROW_COPY, "factor", copies=True),    # likewise, a factor larger each time
    "chunk": Policy(lib.BMC_GROW_CHUNK, "rows"),                      # chunks of r rows, as in the product
    "reserve": Policy(lib.BMC_GROW_RESERVE, "rows"),                  # address space for the cap, made memory
    "remap": Policy(lib.BMC_GROW_REMAP, "rows"),                      # one mapping that moves to grow (Linux)
    "max": Policy(lib.BMC_GROW_COPY, spare=False),                    # all memory at once, touched
    "max-lazy": Policy(lib.BMC_GROW_COPY, spare=False),               # all at once, memory as it is written
}


@dataclass(frozen=True)
class Growth:
    """A policy with its numbers. r 0: what suits the model; factor 0: 2.

    touch: first touch at growth and not at the first write, so that its time is counted.
    pad: attention works on unused rows too, as kernels over whole arrays do; it changes nothing but the time.
    """

    policy: str = "chunk"
    r: int = 0
    factor: float = 0.0
    touch: bool = False
    pad: bool = False

    def __str__(self) -> str:
        number = {"rows": self.r, "factor": self.factor, "": 0}[POLICIES[self.policy].takes]
        return f"{self.policy}:{number:g}" if number else self.policy


def parse(text: str, **switches: bool) -> Growth:
    """A policy's name, alone or with its number: "chunk", "copy:128", "geometric:1.5".
    Raises ArgumentError."""
    name, colon, number = text.partition(":")
    takes = POLICIES[name].takes if name in POLICIES else ""
    try:
        if name in POLICIES and not colon:
            return Growth(name, **switches)
        if takes == "rows" and 0 < int(number) <= MOST:
            return Growth(name, int(number), **switches)
        if takes == "factor" and 1.01 <= float(number) <= 16:
            return Growth(name, factor=float(number), **switches)
    except ValueError:
        pass
    raise ArgumentError(f"policy: expected one of {', '.join(POLICIES)}, or one with its rows (chunk:128) or "
                        f"factor (geometric:1.5), found {text!r}")


def tiles(rows: int) -> int:
    """Rows, rounded up to whole tiles."""
    return TILE * max(1, -(-rows // TILE))


def grown(growth: Growth, rows: int, reserved: int, cap: int) -> int:
    """Rows reserved after a growth to `rows` or more. The growth has its r."""
    policy = POLICIES[growth.policy]
    if not policy.spare:
        return cap
    if policy.takes == "factor":
        rows = max(rows, int((growth.factor or 2) * reserved))
    if policy.copies:
        return min(cap, -(-rows // growth.r) * growth.r)
    return -(-rows // tiles(growth.r)) * tiles(growth.r)


class GrowingSession:
    """A session whose rows grow as a policy says. spent: seconds by what growth spent them on so far."""

    def __init__(self, model, growth: Growth, cap: int):
        r = growth.r or (TILE if growth.policy == "geometric" else "auto")
        self.model, self.cap = model, cap
        self.session = model.session(context=cap, rows=r)
        self.growth = replace(growth, r=growth.r or self.session.arena_stats().r)
        self.spent = {"allocate": 0.0, "copy": 0.0, "touch": 0.0}
        self.bytes_copied = 0
        if not POLICIES[growth.policy].spare:
            self.reserve(cap)

    @property
    def rows(self) -> int:
        return self.session.rows

    @property
    def position(self) -> int:
        return self.session.position

    def reserve(self, rows: int) -> None:
        """Room for this number of rows in all."""
        growth, policy = self.growth, POLICIES[self.growth.policy]
        if rows <= self.rows:
            return
        if policy.copies or not policy.spare:
            rows = grown(growth, rows, self.rows, self.cap)
        touch = growth.policy == "max" or growth.touch and growth.policy != "max-lazy"
        cost = lab.grow(self.session, policy.growth, rows, touch)
        self.bytes_copied += cost.bytes_copied
        for name in self.spent:
            self.spent[name] += getattr(cost, name)

    def eval(self, tokens, **how):
        """Session.eval."""
        self.reserve(self.position + len(tokens))
        result = self.session.eval(tokens, **how)
        if self.growth.pad:
            lab.attend_unused(self.session, len(tokens))
        return result

    def fill(self, rows: int) -> None:
        """Rows of noise, as if that many tokens had been evaluated."""
        self.reserve(self.position + rows)
        lab.fill(self.session, rows)

    def rewind(self, position: int) -> None:
        self.session.rewind(position)

    def evaluate(self, width: int) -> dict[str, float]:
        """A pass of some tokens, which are forgotten again:
        its seconds ("wall"), those of a growth that it had to wait for, and those of attention."""
        position, before = self.position, dict(self.spent)
        with self.model.profile() as profile:
            started = time.perf_counter()
            self.reserve(position + width)
            self.session.eval([1] * width, logits="argmax")
            unused = lab.attend_unused(self.session, width)[0] if self.growth.pad else 0.0
            wall = time.perf_counter() - started
        self.rewind(position)
        return ({name: seconds - before[name] for name, seconds in self.spent.items()}
                | {"wall": wall, "attention": profile.steps["attention"] + unused})

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> GrowingSession:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
