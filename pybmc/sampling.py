"""From logits to a token id: Sampler holds the settings.

The order is llama.cpp's: logit bias and penalties, which are here, then top-k, top-p, min-p, temperature and a random choice
among what is left, which are the library's (native/sample.c): passes choose by themselves where nothing changes
the logits before. The choice is a function of the logits, the seed and the position alone. SplitMix64 gives every
token id at every position its own number x in (0, 1); E = -log(1 - x) is its exponential noise, -log(E) its
Gumbel noise, and

    token = argmax over ids of  logit / temperature - log(E)

which is distributed as softmax(logits / temperature). No state is carried from token to token and a filter
does not change the noise of the ids it keeps, so whoever looks at a position, in whatever order, finds the same
token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite, isnan
from numbers import Integral, Real

import numpy as np

from ._native import check, ffi, lib, pointer
from .errors import ArgumentError, BmcError

GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
U64 = (1 << 64) - 1


# ---- noise -------------------------------------------------------------------------------------------------


def splitmix64(seed: int, index: int) -> int:
    """Output number index (from 0) of SplitMix64 (Steele, Lea, Flood 2014) started at seed."""
    z = (seed + (index + 1) * GOLDEN) & U64
    z = (z ^ (z >> 30)) * MIX_1 & U64
    z = (z ^ (z >> 27)) * MIX_2 & U64
    return z ^ (z >> 31)


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


def uniforms_of(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """x in (0, 1) of these ids at this position: float64, of the shape of ids.

    x = (h + 0.5) / 2**52, where h is the upper 52 bits of output number id of the SplitMix64 that starts at output number
    position of the one that starts at seed (its lower 64 bits).
    """
    start = np.uint64(splitmix64(seed & U64, position))
    return _finish((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN) + start)


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
    def alters(self) -> bool:
        """Whether logits are changed before anything is chosen."""
        return self.penalizes or bool(self.logit_bias)

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken, after what changes them."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is always the largest logit: nothing else of a row counts."""
        return self.greedy and not self.alters

    @property
    def kind(self) -> str:
        """What a pass has to give for a choice: "best" tokens, "sampled" ones, or "all" logits, since they change before."""
        return "all" if self.alters else "best" if self.greedy else "sampled"

    @cached_property
    def native(self):
        """What the library knows of it: a bmc_sampler."""
        made = ffi.new("bmc_sampler *")
        made.temperature, made.top_p, made.min_p = self.temperature, self.top_p, self.min_p
        made.seed, made.top_k = self.seed & U64, min(self.top_k, 2**31 - 1)
        return made

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
        if self.greedy:
            return best
        chosen = ffi.new("int32_t *")
        check(lib.bmc_choose(pointer(np.ascontiguousarray(logits, np.float32)), len(logits), self.native, position, chosen))
        return chosen[0]
