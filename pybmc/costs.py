"""What passes and drafts cost, in seconds, from times as they come.

Nothing here knows of models: a simulation can drive it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import exp, log, sqrt

import numpy as np

FADE = 0.98                             # weight of what was seen one draft ago
KNOTS = (*range(1, 18), 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
DENSE = 17                              # up to here every width is a knot
OCTAVES = np.log2(KNOTS)


class CostCurve:
    """Seconds of a pass by its width.

    A Kalman filter over the logarithms at KNOTS. What all widths share, the speed of the machine and the depth of the text, may change
    within a few passes; by how much wider passes cost more is a random walk over the octaves of width, which changes slowly. So
    a width that is not seen follows the nearest ones that are. A single odd pass moves nothing much, several in a row mean that the
    machine is another now. Where many passes are slow, because it does other things, all widths are taken to suffer alike: drag is
    how much longer than usual they take on the average.
    """

    GUESS = 0.05                        # what a token more costs, in passes of one, where nothing is known
    NOISE = 0.08                        # standard deviation of a pass's logarithm
    ODD = 2.5                           # deviations from which on a pass surprises
    SEVERAL = 3                         # surprises in a row that may be accidents
    SURE = 0.06                         # standard deviation of a width's cost that is known well enough
    DARE = 0.5                          # deviations by which one that is not is hoped to cost less
    LONG = 64                           # passes after which a width has not been seen for long ..
    BOLD = 0.4                          # .. and, beside the last one, is hoped to cost so much less, in its logarithm

    # Covariances: the speed that all share, and what passes of twice the width cost more.
    _octaves = np.minimum.outer(OCTAVES, OCTAVES)
    _unknown = 10.0 ** 2 + 0.12 ** 2 * _octaves
    _another_day = 0.3 ** 2 + 0.12 ** 2 * _octaves      # or another machine
    _from_pass_to_pass = 0.02 ** 2 + 0.004 ** 2 * _octaves

    def __init__(self, seconds: dict[int, float] | None = None):
        known = sorted(seconds.items()) if seconds and 1 in seconds else []
        self._given = {n for n, _ in known}
        self._log = np.log(_over_knots(known or [(1, 1.0)], self.GUESS))
        self._covariance = self._another_day if known else self._unknown
        self._streak = 0                                # surprises in a row, with their sign
        self._seen = [-self.LONG] * (DENSE + 1)         # when each width was ..
        self._now, self._last = 0, (1, 0.0)             # .. of so many passes, and the last one's width and seconds
        self._drag = 1.0                                # mean over median
        self._costs: list[float] = []                   # at the knots, without drag; empty when they have to be found anew ..
        self._hopes: list[float] = []                   # .. and what they may be at best
        self.counts: dict[int, int] = {}

    def observe(self, n: int, seconds: float, count: int = 1) -> bool:
        """A pass of n tokens took so long, or the mean of so many did. Whether the machine seems to be another now."""
        i = bisect_right(KNOTS, n, hi=len(KNOTS) - 1)
        share = (n - KNOTS[i - 1]) / (KNOTS[i] - KNOTS[i - 1])
        noise = self.NOISE ** 2 / count
        common, variance = self._seen_from(i, share, noise)
        surprise = log(max(seconds, 1e-9)) - float((1 - share) * self._log[i - 1] + share * self._log[i])
        another = self._another(surprise, self.ODD * sqrt(variance), count)
        if another:
            self._covariance = self._covariance + self._another_day
            common, variance = self._seen_from(i, share, noise)
        else:
            variance = max(variance, (surprise / self.ODD) ** 2)        # an odd one says as little as makes it usual
        self._log = self._log + common * (surprise / variance)
        self._covariance = self._covariance - np.outer(common, common / variance) + self._from_pass_to_pass
        self.counts[n] = self.counts.get(n, 0) + count
        self._now, self._last = self._now + 1, (n, seconds)
        if n <= DENSE:
            self._seen[n] = self._now
        if self.counts[n] > 4:
            self._drag += 0.03 * count * (max(0.5, min(12.0, exp(surprise))) - self._drag)
        self._costs = []
        return another

    def _seen_from(self, i: int, share: float, noise: float):
        """Covariance of what is observed, so far between two knots, with every knot, and its own variance."""
        common = (1 - share) * self._covariance[i - 1] + share * self._covariance[i]
        return common, float((1 - share) * common[i - 1] + share * common[i]) + noise

    def _another(self, surprise: float, odd: float, count: int) -> bool:
        way = (surprise > odd) - (surprise < -odd)
        self._streak = self._streak + way * count if way * self._streak > 0 else way * count
        if abs(self._streak) <= self.SEVERAL:
            return False
        self._streak = 0
        return True

    def _find(self) -> None:
        """Seconds at the knots. No width costs less than a smaller one: where it seems so, both cost their mean, weighted by how sure they
        are beside what is unknown of all (pool adjacent violators)."""
        covariance, variance = self._covariance, np.diagonal(self._covariance)
        pools: list[tuple[int, float, float]] = []              # knots, their cost, weight
        unsure = variance - covariance.min() + self.NOISE ** 2 / 50
        for cost, weight in zip(np.exp(self._log).tolist(), (1 / unsure).tolist()):
            n = 1
            while pools and pools[-1][1] > cost:
                m, other, more = pools.pop()
                n, cost, weight = n + m, (cost * weight + other * more) / (weight + more), weight + more
            pools.append((n, cost, weight))
        self._costs = [cost for n, cost, _ in pools for _ in range(n)]
        surest = int(variance.argmin())
        doubt = np.sqrt(np.maximum(variance + variance[surest] - 2 * covariance[surest], 0.0))
        hopes = np.maximum(self._costs * np.exp(-self.DARE * doubt * (doubt > self.SURE)), self._costs[0])
        hopes[surest:] = np.maximum(hopes[surest:], self._costs[surest])
        self._hopes = hopes.tolist()
        last, seconds = self._last
        if 1 < last <= DENSE:                                   # drafting pays
            self._hope(last, seconds / self._drag)
            if last < DENSE and self._now - self._seen[last + 1] >= self.LONG:
                self._hope(last + 1, self._costs[last] * exp(-self.BOLD))

    def _hope(self, n: int, seconds: float) -> None:
        """A pass of n tokens may take so few, though no less than a narrower one."""
        self._hopes[n - 1] = min(self._hopes[n - 1], max(seconds, self._costs[n - 2]))

    def _between(self, n: float, hoped: bool = False) -> float:
        if not self._costs:
            self._find()
        costs = self._hopes if hoped else self._costs
        i = min(int(n) if n < DENSE else bisect_right(KNOTS, n), len(KNOTS) - 1)
        low, high = KNOTS[i - 1], KNOTS[i]
        return costs[i - 1] + (costs[i] - costs[i - 1]) * (n - low) / (high - low)

    def at(self, n: float) -> float:
        """Seconds, on the average; n may be a mean of widths."""
        return self._between(n) * self._drag

    def hope(self, n: float) -> float:
        """Seconds if a width of which little is known, beside the one that is known best, costs somewhat less than expected, and the next
        one, where it was not seen for long, a good deal less: what is never tried, because it was dear once, is never known. And what the
        last pass took may be what its width costs."""
        return self._between(n, True) * self._drag

    def ratio(self, n: float) -> float:
        """Cost of a pass of n tokens over one of a single token: 1 or more."""
        return self._between(n) / self._between(1)

    @property
    def known(self) -> bool:
        return bool(self._given or self.counts)

    def seconds(self) -> dict[int, float]:
        """What is known, for the next time; without drag."""
        return {n: self._between(n) for n in sorted({1, *self._given, *self.counts})} if self.known else {}


def _over_knots(known: Sequence[tuple[int, float]], guess: float) -> list[float]:
    """Costs at the knots, from some in the order of width: linear between them, and beyond them by the slope of all."""
    (_, one), (last, most) = known[0], known[-1]
    slope = max(guess, (most / one - 1) / max(last - 1, 1)) * one
    return [most + (n - last) * slope if n > last else float(np.interp(n, *zip(*known))) for n in KNOTS]


class Average:
    """A mean in which what is older counts less; single values far off count little."""

    def __init__(self, weight: float = 0.1):
        self.weight, self.n, self.value = weight, 0, 0.0

    def add(self, value: float) -> None:
        self.n += 1
        if self.n > 8:
            value = min(value, 3 * self.value)
        self.value += max(self.weight, 1 / self.n) * (value - self.value)


class DraftCost:
    """Seconds of a draft by its length: a start and so much a token, fitted to what was seen lately. What takes far
    longer than expected is taken for a hiccup of the machine and counts as twice as long. Where plain tokens take longer or
    shorter than they did, drafts are taken to do so too."""

    SLOPE = 0.8                         # of a token's mean cost: what one more is taken to cost before lengths differ

    def __init__(self):
        self.n, self._weight, self._x, self._y, self._xx, self._xy = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        self._token = 0.0               # seconds of a plain token; 0: not known

    def follow(self, token: float) -> None:
        """A plain token takes so many seconds now."""
        change = token / self._token if self._token else 1.0
        self._y, self._xy, self._token = self._y * change, self._xy * change, token

    def add(self, length: int, seconds: float) -> None:
        self.n += 1
        if self.n == 2 and self._y > 1.5 * self._x * seconds / length:      # the first one met the hiccup
            self._weight = self._x = self._y = 0.0
        elif self.n > 1:
            seconds = min(seconds, 2 * self.at(length))
        self._weight = FADE * self._weight + 1
        step = 1 / self._weight
        dx, dy = length - self._x, seconds - self._y
        self._x += step * dx
        self._y += step * dy
        self._xx += step * ((1 - step) * dx * dx - self._xx)
        self._xy += step * ((1 - step) * dx * dy - self._xy)

    @property
    def slope(self) -> float:
        """Of a token more."""
        if not self.n:
            return 0.0
        mean = self._y / max(self._x, 1.0)
        few = 2 / self._weight                  # the guess counts as much as two drafts
        return max(0.0, min((self._xy + few * self.SLOPE * mean) / (self._xx + few), mean))

    def line(self) -> tuple[float, float]:
        """(seconds of a draft of no token, seconds of a token more)."""
        slope = self.slope
        return self._y - slope * self._x, slope

    def at(self, length: float) -> float:
        start, slope = self.line()
        return max(0.0, start + slope * length)

    def record(self) -> list[list[float]]:
        """Drafts of one and of eight tokens, in plain tokens' time: the machine may be another the next time."""
        return [[length, self.at(length) / self._token] for length in (1, 8)] if self.n > 1 and self._token else []

    def recall(self, record: Sequence[Sequence[float]]) -> None:
        self._token = 1.0 if record else 0.0
        for length, tokens in [*record, *record]:
            self.add(int(length), tokens)
