"""Rotary positions: tables of frequencies, after every kind of scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import FormatError
from ..files.gguf import GGUF
from .keys import Keys

TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


@dataclass(eq=False)
class Table:
    """freq (dim / 2,) radians per position; cos and sin are multiplied by mscale."""

    freq: np.ndarray
    mscale: float = 1.0

    @property
    def dim(self) -> int:
        return 2 * len(self.freq)

    def __eq__(self, other) -> bool:
        return self.mscale == other.mscale and np.array_equal(self.freq, other.freq)


def plain(base: float, dim: int) -> np.ndarray:
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def table(keys: Keys, dim: int, base: float, n_ctx: int, magnitude=None) -> Table:
    """The frequencies of `dim` values after no, linear or YaRN scaling (arXiv 2309.00071), and Llama 3's.

    magnitude: of cos and sin by YaRN's factor; None for 1 + 0.1 ln(factor).
    """
    freq, mscale = _scaled(keys, dim, base, n_ctx, magnitude)
    factors = tensor(keys.file, "rope_freqs", dim // 2)
    return Table(freq if factors is None else freq / factors, mscale)


def long_tables(keys: Keys, dim: int, base: float, n_ctx: int) -> list[Table] | None:
    """The two tables of a model with short and long factors (longrope, arXiv 2402.13753); None without."""
    factors = [tensor(keys.file, f"rope_factors_{name}", dim // 2) for name in ("short", "long")]
    if factors[0] is None or factors[1] is None:
        return None
    freq, mscale = _scaled(keys, dim, base, n_ctx, None)
    return [Table(freq / part, mscale) for part in factors]


def yarn_factor(keys: Keys) -> float:
    """What YaRN divides slow frequencies by; 1 where the model does not use it."""
    linear = _scale(keys, "rope.scale_linear", 0.0)
    kind = keys.text("rope.scaling.type", "linear" if linear else "none")
    return _scale(keys, "rope.scaling.factor", linear) or 1.0 if kind == "yarn" else 1.0


def _scaled(keys: Keys, dim: int, base: float, n_ctx: int, magnitude) -> tuple[np.ndarray, float]:
    freq = plain(base, dim)
    linear = _scale(keys, "rope.scale_linear", 0.0)
    kind = keys.text("rope.scaling.type", "linear" if linear else "none")
    factor = _scale(keys, "rope.scaling.factor", linear) or 1.0
    mscale = keys.number("rope.scaling.attn_factor", 1.0, high=1e3, above=0.0)
    if kind != "yarn" and keys.number("rope.scaling.yarn_ext_factor", 0.0, high=1.0):
        raise keys.error("rope.scaling.yarn_ext_factor", f"0 with scaling {kind}",
                         keys.find("rope.scaling.yarn_ext_factor"))
    if kind in ("none", "longrope"):
        return freq, mscale
    if kind == "linear":
        return freq / factor, mscale
    if kind != "yarn":
        raise keys.error("rope.scaling.type", "none, linear, yarn or longrope", kind)
    trained = keys.count("rope.scaling.original_context_length", n_ctx)
    low, high = (_turns_dim(dim, base, trained,
                            keys.number(f"rope.scaling.yarn_beta_{name}", beta, 1e-3, 1e6))
                 for name, beta in (("fast", 32.0), ("slow", 1.0)))
    low, high = max(0.0, math.floor(low)), min(dim - 1.0, math.ceil(high))
    ramp = 1.0 - np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0.0, 1.0)
    share = keys.number("rope.scaling.yarn_ext_factor", 1.0, high=1.0)
    mix = ramp * share
    if share:
        mscale *= (magnitude or _yarn_magnitude)(factor)
    return freq / factor * (1.0 - mix) + freq * mix, mscale


def _yarn_magnitude(factor: float) -> float:
    return 1.0 + 0.1 * math.log(factor)


def _scale(keys: Keys, key: str, default: float) -> float:
    """By what positions are divided; 0 in a file is none."""
    scale = keys.number(key, default, high=1e4)
    if 0 < scale < 1e-3:
        raise keys.error(key, "0, or a number from 0.001 up to 10000", scale)
    return scale


def _turns_dim(dim: int, base: float, trained: int, turns: float) -> float:
    """The dimension that makes `turns` turns over the context the model was trained on."""
    return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))


def tensor(file: GGUF, name: str, n: int) -> np.ndarray | None:
    """Factors (n,) that divide frequencies, as float64; None where the file has none."""
    found = file.tensors.get(f"{name}.weight")
    if found is None:
        return None
    if found.type.name != "f32" or found.shape != (n,):
        raise FormatError(f"{file.path}: {name}.weight: expected f32 ({n},), "
                          f"found {found.type} {found.shape}")
    factors = found.data.view(np.float32).astype(np.float64)
    if not ((factors >= 1e-3) & (factors <= 1.0001e30)).all():       # NaN is in no range
        raise FormatError(f"{file.path}: {name}.weight: expected factors from 0.001 up to 1e30, "
                          f"found {factors.min():g} to {factors.max():g}")
    return factors
