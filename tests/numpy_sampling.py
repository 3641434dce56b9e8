"""The sampler, written with numpy: what native/sample.c is compared with.

A token is the argmax over ids of logit / temperature - log(E), E = -log(1 - x), x being each id's own number in (0, 1).
"""

from functools import lru_cache

import numpy as np

from pybmc.engine.sampler import GOLDEN, U64, Sampler, _finish, splitmix64, uniforms_of

FEW = 256                               # logits that are sorted and looked at one and all


def sample(sampler: Sampler, logits: np.ndarray, position: int) -> int:
    """The token that follows `position` tokens; logits is (vocab,) float32."""
    if sampler.greedy:
        return int(logits.argmax())
    ids = None
    if sampler.top_k:
        ids = top_k(logits, sampler.top_k)
        logits = logits[ids]
        if len(ids) <= FEW:
            kept = largest(logits, sampler.top_p, sampler.min_p)
            return choose(logits[kept], sampler.temperature, sampler.seed, position, ids[kept])
    for keep, p, off in ((top_p, sampler.top_p, 1), (min_p, sampler.min_p, 0)):
        if p != off:
            kept = keep(logits, p)
            ids, logits = kept if ids is None else ids[kept], logits[kept]
    return choose(logits, sampler.temperature, sampler.seed, position, ids)


@lru_cache(maxsize=4)
def _steps(n: int) -> np.ndarray:
    """(i + 1) * GOLDEN of every id below n."""
    steps = (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    steps.flags.writeable = False
    return steps


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
