"""Sampler: the settings by which the library chooses a token from logits (native/sample.c).

The order is llama.cpp's: logit bias, penalties, top-k, top-p, min-p, temperature, then a random choice among
what is left. The choice is a function of the logits, the seed and the position alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from .. import checks
from .._native import check, ffi, lib, pointer
from ..errors import ArgumentError

U64, MOST = (1 << 64) - 1, (1 << 31) - 1


def check_bias(bias: Mapping[int, float], size: int) -> None:
    """Raise an ArgumentError if the bias names a token beyond a vocabulary."""
    for token in bias:
        if not 0 <= token < size:
            raise ArgumentError(f"logit_bias names token {token}: expected 0 to {size - 1}")


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
    maps ids to what is added to their logits; -inf bans an id. Values that switch off: top_k 0 or -1, top_p
    1, min_p 0, repeat_penalty 1, presence_penalty 0, frequency_penalty 0. None is "not given": the default.
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

    def __post_init__(self) -> None:
        given = {f.name: f.default if getattr(self, f.name) is None else getattr(self, f.name)
                 for f in fields(self)}
        plain: dict[str, Any] = {name: checks.number(name, given[name], *bounds)
                                 for name, bounds in REALS.items()}
        plain |= {name: checks.whole(name, given[name], *bounds) for name, bounds in WHOLES.items()}
        plain |= {"top_k": max(plain["top_k"], 0), "logit_bias": checked_bias(self.logit_bias)}
        if plain["repeat_penalty"] == 0:
            checks.refuse("repeat_penalty", "a number above 0", self.repeat_penalty)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the choice is always the largest logit, so that nothing else of a row counts."""
        adds = self.presence_penalty or self.frequency_penalty
        penalizes = self.repeat_last_n and (self.repeat_penalty != 1 or adds)
        return (self.temperature == 0 or self.top_k == 1) and not penalizes and not self.logit_bias

    @cached_property
    def native(self) -> Any:
        """The bmc_sampler of these settings."""
        made = ffi.new("bmc_sampler *")
        made.temperature, made.top_p, made.min_p = self.temperature, self.top_p, self.min_p
        made.seed, made.top_k = self.seed & U64, min(self.top_k, MOST)
        made.repeat_penalty, made.last_n = self.repeat_penalty, min(self.repeat_last_n, MOST)
        made.presence_penalty, made.frequency_penalty = self.presence_penalty, self.frequency_penalty
        bias = self.logit_bias
        ids, values = ffi.new("int32_t[]", list(bias)), ffi.new("float[]", list(bias.values()))
        made.n_bias, made.bias_id, made.bias = len(bias), ids, values
        _kept[made] = ids, values
        return made

    def sample(self, logits: np.ndarray, position: int, history: Sequence[int] = ()) -> int:
        """The token that follows `position` tokens, of which history are the last;
        logits is (vocab,) float32."""
        chosen, before = ffi.new("int32_t *"), ffi.new("int32_t[]", list(history))
        row = pointer(np.ascontiguousarray(logits, np.float32))
        check(lib.bmc_choose(row, len(logits), self.native, position, before, len(before), chosen))
        return chosen[0]


_kept: WeakKeyDictionary = WeakKeyDictionary()          # a bmc_sampler -> the arrays that it points to
