"""Sampler: the settings by which the library chooses a token from logits (native/sample.c).

The order is llama.cpp's: logit bias, penalties, top-k, top-p, min-p, temperature, then a random choice among what is left. The
choice is a function of the logits, the seed and the position alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite, isnan
from numbers import Integral, Real
from weakref import WeakKeyDictionary

import numpy as np

from ._native import check, ffi, lib, pointer
from .errors import ArgumentError

U64 = (1 << 64) - 1


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
    def greedy(self) -> bool:
        """Whether the choice is always the largest logit, so that nothing else of a row counts."""
        penalizes = self.repeat_last_n and (self.repeat_penalty != 1 or self.presence_penalty or self.frequency_penalty)
        return (self.temperature == 0 or self.top_k == 1) and not penalizes and not self.logit_bias

    @cached_property
    def native(self):
        """The bmc_sampler of these settings."""
        made = ffi.new("bmc_sampler *")
        made.temperature, made.top_p, made.min_p = self.temperature, self.top_p, self.min_p
        made.seed, made.top_k = self.seed & U64, min(self.top_k, 2**31 - 1)
        made.repeat_penalty, made.last_n = self.repeat_penalty, min(self.repeat_last_n, 2**31 - 1)
        made.presence_penalty, made.frequency_penalty = self.presence_penalty, self.frequency_penalty
        ids, values = ffi.new("int32_t[]", list(self.logit_bias)), ffi.new("float[]", list(self.logit_bias.values()))
        made.n_bias, made.bias_id, made.bias = len(self.logit_bias), ids, values
        _kept[made] = ids, values
        return made

    def sample(self, logits: np.ndarray, position: int, history: Sequence[int] = ()) -> int:
        """The token that follows `position` tokens, of which history are the last; logits is (vocab,) float32."""
        chosen, before = ffi.new("int32_t *"), ffi.new("int32_t[]", list(history))
        check(lib.bmc_choose(pointer(np.ascontiguousarray(logits, np.float32)), len(logits), self.native, position,
                             before, len(before), chosen))
        return chosen[0]


_kept: WeakKeyDictionary = WeakKeyDictionary()          # a bmc_sampler -> the arrays that it points to
