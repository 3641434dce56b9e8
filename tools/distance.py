"""How far logits are from reference logits: the arithmetic of golden.py, exact.py and versus.py."""

import math
from dataclasses import dataclass

import numpy as np

from pybmc.engine.perplexity import token_losses

ROWS = 16                               # in memory at once


@dataclass(frozen=True)
class Distance:
    """Of logits (n, vocab_size) from the reference's.

    error: the rms of the difference over the reference's standard deviation, of all rows; error_median: of
    the median row, since a few rows with very large activations may dominate the first. top1: the share of
    rows whose best token is the reference's. kl_mean, kl_p99: the Kullback-Leibler divergence from the
    reference's distribution in nats, its mean and 99th percentile over the rows. Logits that are not finite
    are infinitely far.
    """

    n: int
    error: float
    error_median: float
    top1: float
    kl_mean: float
    kl_p99: float


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def distance(logits, reference) -> Distance:
    """Of two arrays (n, vocab_size), which may be mapped files: a piece is in memory at a time."""
    n = len(reference)
    means, squares, differences, same, kl = ([] for _ in range(5))  # of each row
    for at in range(0, n, ROWS):
        x, ref = (np.asarray(rows[at:at + ROWS], np.float64) for rows in (logits, reference))
        if not np.isfinite(x).all() or not np.isfinite(ref).all():
            return Distance(n, math.inf, math.inf, 0.0, math.inf, math.inf)
        means.extend(ref.mean(1))
        squares.extend(np.square(ref).mean(1))
        differences.extend(np.square(x - ref).mean(1))
        same.extend(x.argmax(1) == ref.argmax(1))
        kl.extend(divergence(x, ref))
    spread = math.sqrt(max(np.mean(squares) - np.mean(means) ** 2, 1e-30))
    errors = (math.sqrt(middle(differences)) / spread for middle in (np.mean, np.median))
    return Distance(n, *errors, float(np.mean(same)), float(np.mean(kl)), float(np.percentile(kl, 99)))


def divergence(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The sum of p log(p / q) of each row, where p is the reference's distribution and q the other's."""
    log_p, log_q = log_softmax(reference), log_softmax(logits)
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def perplexity(logits, tokens) -> float:
    """Of the tokens after the first, each given those before it; logits (n, vocab_size) of the n tokens."""
    logits, targets = logits[:-1], np.asarray(tokens)[1:]
    pieces = [slice(at, at + ROWS) for at in range(0, len(targets), ROWS)]
    losses = [token_losses(logits[piece], targets[piece]) for piece in pieces]
    return math.exp(np.concatenate(losses).mean())
