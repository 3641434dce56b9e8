"""Phi 2 to 3.5."""

from __future__ import annotations

from .layers import GELU, LAYER
from .parts import architecture, attention, beside, dense, experts


@architecture("phi2", norm=LAYER)
def phi2(k, i):
    return beside(attention(k, i), dense(k, i, act=GELU, gated=False, norm="attn_norm"))


@architecture("phi3")
def phi3(k, i):
    k.count("attention.sliding_window", 0, low=0)       # of models that were not trained with one
    return attention(k, i), dense(k, i)


@architecture("phimoe")
def phimoe(k, i):
    k.count("attention.sliding_window", 0, low=0)
    return attention(k, i), experts(k, i)
