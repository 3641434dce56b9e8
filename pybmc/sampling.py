"""From logits to a token id: pure functions on numpy arrays, and Sampler, which holds the settings.

The order is llama.cpp's: logit bias, penalties, top-k, top-p, min-p, temperature, then a random choice among
what is left. The choice is a function of the logits, the seed and the position alone. SplitMix64 gives every
token id at every position its own number x in (0, 1); E = -log(1 - x) is its exponential noise, -log(E) its
Gumbel noise, and

    token = argmax over ids of  logit / temperature - log(E)

which is distributed as softmax(logits / temperature). No state is carried from token to token and a filter
does not change the noise of the ids it keeps, so whoever looks at a position, in whatever order, finds the same
token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf, isfinite, isnan
from numbers import Integral, Real

import numpy as np

from .errors import ArgumentError, BmcError

GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
U64 = (1 << 64) - 1
FEW = 256                               # logits that are sorted and looked at one and all


# ---- noise -------------------------------------------------------------------------------------------------


def splitmix64(seed: int, index: int) -> int:
    """Output number index (from 0) of SplitMix64 (Steele, Lea, Flood 2014) started at seed."""
    z = (seed + (index + 1) * GOLDEN) & U64
    z = (z ^ (z >> 30)) * MIX_1 & U64
    z = (z ^ (z >> 27)) * MIX_2 & U64
    return z ^ (z >> 31)


@lru_cache(maxsize=4)
def _steps(n: int) -> np.ndarray:
    """(i + 1) * GOLDEN of every id below n."""
    steps = (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    steps.flags.writeable = False
    return steps


def _finish(z: np.ndarray) -> np.ndarray:
    """SplitMix64 states to x, in place."""
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    z >>= np.uint64(12)
    x = z.view(np.float64)
    np.add(z.view(np.int64), 0.5, out=x)                    # below 2**52: exact
    x *= 2.0 ** -52
    return x


def uniforms(seed: int, position: int, n: int) -> np.ndarray:
    """x in (0, 1) of every id below n at this position: (n,) float64.

    x = (h + 0.5) / 2**52, where h is the upper 52 bits of output number id of the SplitMix64 that starts at
    output number position of the one that starts at seed (its lower 64 bits).
    """
    start = np.uint64(splitmix64(seed & U64, position))
    out = np.empty(n)
    for at in range(0, n, 8192):                            # temporaries that stay in the cache
        out[at:at + 8192] = _finish(_steps(n)[at:at + 8192] + start)
    return out


def uniforms_of(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """uniforms(seed, position, n)[ids], without the others."""
    start = np.uint64(splitmix64(seed & U64, position))
    return _finish((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN) + start)


def choose(logits: np.ndarray, temperature: float, seed: int, position: int,
           ids: np.ndarray | None = None) -> int:
    """An id drawn from softmax(logits / temperature). With ids, logits are those of these ids only.

    Logarithms over a whole vocabulary would cost more than everything else. E >= x, so weight / x bounds
    weight / E from above: only ids whose bound reaches the true value of the best are looked at closely.
    """
    temperature = max(temperature, 1e-6)            # colder is greedy but for exact ties
    below = logits - logits.max()
    if ids is not None and len(ids) <= FEW:
        x = uniforms_of(seed, position, ids)
        return int(ids[(below.astype(np.float64) / temperature - np.log(-np.log1p(-x))).argmax()])
    x = uniforms(seed, position, len(logits)) if ids is None else uniforms_of(seed, position, ids)
    with np.errstate(over="ignore"):
        bound = np.exp(below / np.float32(temperature))
    bound /= x.astype(np.float32)
    best = int(bound.argmax())
    margin = 1 - 1e-3                               # float32 exp of up to -100 is good to 1e-5
    close = np.flatnonzero(bound >= bound[best] * (margin * x[best] / -np.log1p(-x[best])))
    score = below[close].astype(np.float64) / temperature - np.log(-np.log1p(-x[close]))
    winner = int(close[score.argmax()])
    return winner if ids is None else int(ids[winner])


# ---- what changes logits -----------------------------------------------------------------------------------


def add_bias(logits: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
    """A copy with bias[id] added; -inf bans an id."""
    logits = logits.copy()
    for token, value in bias.items():
        if not 0 <= token < len(logits):
            raise ArgumentError(f"logit_bias names token {token}, but the vocabulary has {len(logits)} tokens")
        logits[token] += value
    return logits


def penalize(logits: np.ndarray, history: Sequence[int], repeat: float, presence: float,
             frequency: float) -> np.ndarray:
    """A copy in which tokens of the history are less likely, by llama.cpp's rule.

    A positive logit is divided by repeat, a negative one multiplied; then frequency is taken off for every time
    the token occurs and presence once.
    """
    logits = logits.copy()
    if len(history) == 0:
        return logits
    ids, counts = np.unique(np.asarray(history, np.int64), return_counts=True)
    seen = logits[ids]
    seen = np.where(seen > 0, seen / np.float32(repeat), seen * np.float32(repeat))
    logits[ids] = seen - counts.astype(np.float32) * np.float32(frequency) - np.float32(presence)
    return logits


# ---- what drops tokens -------------------------------------------------------------------------------------


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k largest logits, ascending; among equals the lower ids."""
    n = len(logits)
    if k >= n:
        return np.arange(n)
    width = n // (4 * k) + 1            # k of the groups' maxima are at least `least`, so at least k logits are
    maxima = np.maximum.reduceat(logits, np.arange(0, n, width))
    least = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
    ids = np.flatnonzero(logits >= least)
    order = np.argsort(-logits[ids], kind="stable")[:k]
    return np.sort(ids[order])


def top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Indices, ascending, of the fewest tokens that together have at least probability p; at least one."""
    weights = np.exp(logits - logits.max())
    target = p * weights.sum(dtype=np.float64)
    some, mass = logits, 0.0            # the last one kept is among some; what lies above them weighs mass
    while len(some) > 256:              # sorting a whole vocabulary would take milliseconds
        upper = some > some.mean(dtype=np.float64)
        if not upper.any():
            break
        above = mass + weights[upper].sum(dtype=np.float64)
        if above < target:
            upper, mass = ~upper, above
        some, weights = np.compress(upper, some), np.compress(upper, weights)
    order = np.argsort(-some, kind="stable")
    n = int(np.searchsorted(mass + np.cumsum(weights[order], dtype=np.float64), target))
    least = some[order[min(n, len(some) - 1)]]
    ties = min(n, len(some) - 1) + 1 - np.count_nonzero(some > least)
    kept = [np.flatnonzero(logits > least), np.flatnonzero(logits == least)[:ties]]
    return np.sort(np.concatenate(kept))


def min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Indices, ascending, of the tokens with at least p times the probability of the best."""
    return np.flatnonzero(logits >= logits.max() + np.log(p))


def largest(logits: np.ndarray, p: float, least: float) -> np.ndarray:
    """Indices, ascending, that top_p and then min_p leave of a few logits: either leaves the first of them by size."""
    order = np.argsort(-logits, kind="stable")
    n, best = len(order), logits.max()
    if p != 1:
        weights = np.exp(logits - best)
        n = min(n, int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64),
                                       p * weights.sum(dtype=np.float64))) + 1)
    if least != 0:
        n = min(n, int(np.count_nonzero(logits >= best + np.log(least))))
    return np.sort(order[:n])


def logprob(logits: np.ndarray, token: int) -> float:
    """log softmax(logits)[token]: what the model thinks of a token, before any setting changes it."""
    best = logits.max()
    return float(logits[token] - best) - float(np.log(np.exp(logits - best).sum(dtype=np.float64)))


# ---- settings ----------------------------------------------------------------------------------------------


RANGES = [
    ("temperature", Real, 0, inf), ("top_k", Integral, 0, inf), ("top_p", Real, 0, 1), ("min_p", Real, 0, 1),
    ("repeat_penalty", Real, 0, inf), ("presence_penalty", Real, -inf, inf),
    ("frequency_penalty", Real, -inf, inf), ("repeat_last_n", Integral, -1, inf), ("seed", Integral, -inf, inf),
]


@dataclass(frozen=True)
class Sampler:
    """Settings of a choice; names and meanings are llama.cpp's. temperature 0 is greedy.

    repeat_last_n is how many last tokens the penalties look at, prompt included: 0 none, -1 all. logit_bias
    maps ids to what is added to their logits. Values that switch off: top_k 0, top_p 1, min_p 0,
    repeat_penalty 1, presence_penalty 0, frequency_penalty 0.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, kind, low, high in RANGES:
            value = getattr(self, name)
            if not isinstance(value, kind) or not isfinite(value) or not low <= value <= high:
                noun = "a whole number" if kind is Integral else "a number"
                bounds = f" from {low} {f'to {high}' if isfinite(high) else 'up'}" * isfinite(low)
                raise ArgumentError(f"{name} is {value!r}; expected {noun}{bounds}")
        if self.repeat_penalty == 0:
            raise ArgumentError("repeat_penalty is 0; expected a positive number")
        for token, value in self.logit_bias.items():
            if isnan(value) or value == inf:
                raise ArgumentError(f"logit_bias of token {token} is {value!r}; expected a number or -inf")

    @property
    def penalizes(self) -> bool:
        off = self.repeat_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
        return not off and self.repeat_last_n != 0

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is always the largest logit: nothing else of a row counts."""
        return (self.temperature == 0 or self.top_k == 1) and not self.penalizes and not self.logit_bias

    def adjust(self, logits: np.ndarray, history: Sequence[int] = ()) -> np.ndarray:
        """The logits after bias and penalties: the same array if there are none."""
        if self.logit_bias:
            logits = add_bias(logits, self.logit_bias)
        if self.penalizes:
            window = history[-self.repeat_last_n:] if self.repeat_last_n > 0 else history
            logits = penalize(logits, window, self.repeat_penalty, self.presence_penalty,
                              self.frequency_penalty)
        return logits

    def sample(self, logits: np.ndarray, position: int, history: Sequence[int] = ()) -> int:
        """The token that follows `position` tokens; logits is (vocab,) float32, history these tokens."""
        logits = self.adjust(logits, history)
        best = int(logits.argmax())                         # the first NaN, if there is one
        if not isfinite(logits[best]):
            raise BmcError(f"no token can be chosen at position {position}: "
                           f"the largest logit is {logits[best]}")
        if self.temperature == 0 or self.top_k == 1:
            return best
        ids = None
        if self.top_k:
            ids = top_k(logits, self.top_k)
            logits = logits[ids]
            if len(ids) <= FEW:
                kept = largest(logits, self.top_p, self.min_p)
                return choose(logits[kept], self.temperature, self.seed, position, ids[kept])
        for keep, p, off in ((top_p, self.top_p, 1), (min_p, self.min_p, 0)):
            if p != off:
                kept = keep(logits, p)
                ids, logits = kept if ids is None else ids[kept], logits[kept]
        return choose(logits, self.temperature, self.seed, position, ids)
