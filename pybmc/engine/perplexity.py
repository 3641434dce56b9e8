"""Perplexity of a text, counted as llama.cpp counts it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import checks
from ..errors import ArgumentError

PIECE = 64                              # tokens whose logits are held at once


@dataclass(frozen=True)
class Perplexity:
    """ppl and its standard error, over n scored tokens; bits_per_byte does not depend on the vocabulary."""

    ppl: float
    stderr: float
    tokens: int
    bits_per_byte: float


def perplexity(model, text: str, window: int = 512,
               progress: Callable[[int, int], None] | None = None, bos: bool = True) -> Perplexity:
    """The text is cut into windows of tokens that begin with BOS, if the model wants one and bos is true (it
    takes the place of the first token); each window's second half is scored, so that every scored token has
    at least half a window before it. Tokens after the last whole window are left out.
    """
    window = checks.whole("window", window, 4)
    model.check_writes()
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ArgumentError(f"{model.path} has no vocabulary: there are no tokens to score")
    tokens = np.array(tokenizer.encode(text, bos), np.int32)
    n_windows = len(tokens) // window
    if n_windows == 0:
        raise ArgumentError(f"the text has {len(tokens)} tokens; "
                            f"one window takes {window} (-c makes it smaller)")
    losses, n_bytes = [], 0
    with model.session(context=window) as session:
        for i in range(n_windows):
            part = tokens[i * window:(i + 1) * window].copy()
            if bos and tokenizer.add_bos:
                part[0] = tokenizer.bos_id
            losses.append(window_losses(session, part))
            n_bytes += sum(len(tokenizer.piece(int(t))) for t in part[window // 2 + 1:])
            if progress:
                progress(i + 1, n_windows)
    all_losses = np.concatenate(losses)
    n = len(all_losses)
    ppl, bits = math.exp(all_losses.mean()), all_losses.sum() / math.log(2)
    return Perplexity(ppl, ppl * math.sqrt(all_losses.var() / max(n - 1, 1)), n, bits / n_bytes)


def window_losses(session, tokens: np.ndarray) -> np.ndarray:
    """-log p of every token of the second half given those before it, except for the half's first."""
    first = len(tokens) // 2
    session.rewind(0)
    session.eval(tokens[:first], logits="none")
    losses = []
    for at in range(first, len(tokens) - 1, PIECE):
        end = min(at + PIECE, len(tokens) - 1)
        losses.append(token_losses(session.eval(tokens[at:end], logits="all"), tokens[at + 1:end + 1]))
    return np.concatenate(losses)


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of each row, float64."""
    best = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - best).sum(axis=1, dtype=np.float64)
    return np.log(total) - (logits[np.arange(len(targets)), targets] - best[:, 0])
