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
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import inf, isfinite

import numpy as np

from . import checks
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
    check_bias(bias, len(logits))
    logits = logits.copy()
    for token, value in bias.items():
        logits[token] += value
    return logits


def check_bias(bias: Mapping[int, float], size: int) -> None:
    """Raise an ArgumentError if the bias names a token beyond a vocabulary."""
    for token in bias:
        if not 0 <= token < size:
            raise ArgumentError(f"logit_bias names token {token}: expected 0 to {size - 1}")


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


REALS = {"temperature": (0, inf), "top_p": (0, 1), "min_p": (0, 1), "repeat_penalty": (0, inf),
         "presence_penalty": (-inf, inf), "frequency_penalty": (-inf, inf)}
WHOLES = {"top_k": (-1, inf), "repeat_last_n": (-1, inf), "seed": (-inf, inf)}


def checked_bias(bias: Mapping | None) -> dict[int, float]:
    """A logit bias with whole numbers as ids: keys that came through JSON are strings. None is no bias."""
    if bias is None:
        return {}
    if not isinstance(bias, Mapping):
        checks.refuse("logit_bias", "a mapping of token ids to numbers", bias)
    found = {}
    for key, value in bias.items():
        id = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20 else key
        id = checks.whole("logit_bias, a token id", id)
        if id in found:
            raise ArgumentError(f"logit_bias: token {id} is there twice")
        found[id] = checks.number(f"logit_bias of token {id}", value, infinite=True)
        if found[id] == inf:
            checks.refuse(f"logit_bias of token {id}", "a number or -inf", value)
    return found


@dataclass(frozen=True)
class Sampler:
    """Settings of a choice; names and meanings are llama.cpp's. temperature 0 is greedy.

    repeat_last_n is how many last tokens the penalties look at, prompt included: 0 none, -1 all. logit_bias
    maps ids to what is added to their logits; -inf bans an id. Values that switch off: top_k 0 or -1, top_p 1, min_p 0,
    repeat_penalty 1, presence_penalty 0, frequency_penalty 0. None is "not given": the default.
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
        given = {f.name: f.default if (value := getattr(self, f.name)) is None else value for f in fields(self)}
        plain = {name: checks.number(name, given[name], *bounds) for name, bounds in REALS.items()}
        plain |= {name: checks.whole(name, given[name], *bounds) for name, bounds in WHOLES.items()}
        plain |= {"top_k": max(plain["top_k"], 0), "logit_bias": checked_bias(self.logit_bias)}
        if plain["repeat_penalty"] == 0:
            checks.refuse("repeat_penalty", "a number above 0", self.repeat_penalty)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

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
