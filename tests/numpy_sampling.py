"""The sampler by its definition, in numpy: what native/sample.c is compared with.

Bias and penalties in float32, as in the library; the filters by a sort of all logits; scores in float64.
"""

from math import inf, log

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(seed: int, index) -> np.ndarray:
    """Output number `index`, of one or many, of SplitMix64 (Steele, Lea, Flood 2014) started at `seed`."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed % 2**64) + (np.asarray(index, np.uint64) + np.uint64(1)) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniforms(seed: int, position: int, n: int) -> np.ndarray:
    """x in (0, 1) of every id below n at this position: 52 random bits and a half, (n,) float64."""
    bits = splitmix64(int(splitmix64(seed, position)), np.arange(n)) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def altered(sampler, logits: np.ndarray, history=()) -> np.ndarray:
    """Logits after bias and penalties."""
    logits = np.array(logits, np.float32)
    for id, bias in sampler.logit_bias.items():
        logits[id] += np.float32(bias)
    n = len(history) if sampler.repeat_last_n < 0 else min(sampler.repeat_last_n, len(history))
    settings = sampler.repeat_penalty, sampler.presence_penalty, sampler.frequency_penalty
    repeat, presence, frequency = map(np.float32, settings)
    for id, count in zip(*np.unique(list(history)[len(history) - n:], return_counts=True)):
        id = int(id)
        logits[id] = logits[id] / repeat if logits[id] > 0 else logits[id] * repeat
        logits[id] -= np.float32(count) * frequency
        logits[id] -= presence
    return logits


def kept(sampler, logits: np.ndarray) -> np.ndarray:
    """The ids that the filters leave, the likeliest first; of equals the lower ids stand before."""
    ids = np.argsort(-logits, kind="stable")
    k = sampler.top_k if sampler.temperature > 0 else 1
    ids = ids[:k or len(ids)]
    weights = np.exp(logits[ids] - logits[ids[0]]).astype(np.float64)
    n = len(ids)
    if sampler.top_p < 1:
        n = min(n, 1 + int(np.searchsorted(np.cumsum(weights), sampler.top_p * weights.sum())))
    least = float(logits[ids[0]]) + log(sampler.min_p) if sampler.min_p > 0 else -inf
    return ids[:min(n, int((logits[ids] >= least).sum()))]


def choose(sampler, logits: np.ndarray, position: int, history=()) -> int:
    """The token that follows `position` tokens, of which history are the last: of those kept the one with the largest
    logit / temperature - log(E), where E = -log(1 - x)."""
    logits = altered(sampler, logits, history)
    ids = np.sort(kept(sampler, logits))
    x = uniforms(sampler.seed, position, len(logits))[ids]
    below = (logits[ids] - logits.max()).astype(np.float64)
    return int(ids[(below / max(sampler.temperature, 1e-6) - np.log(-np.log1p(-x))).argmax()])


def logprobs(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits, float64."""
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
