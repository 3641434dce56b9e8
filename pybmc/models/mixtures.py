"""Models that are experts above all: gpt-oss, Trinity (afmoe), Laguna, SmallThinker and others."""

from __future__ import annotations

from .layers import CHOSEN, GATE_SIGMOID, GATE_SOFTPLUS, LAYER_INPUT, RELU, SIGMOID, SWIGLU_OAI
from .parts import architecture, attention, experts, feed_forward, rope_table, sqrt_dim


@architecture("gpt-oss")
def gpt_oss(k, i):
    return (attention(k, i, window=k.window(i, 2)),
            experts(k, i, norm="post_attention_norm", gating=CHOSEN, renorm=False, act=SWIGLU_OAI))


@architecture("afmoe", embedding_scale=sqrt_dim)
def afmoe(k, i):
    window = k.window(i, 4)
    return (attention(k, i, post="post_attention_norm", qk_norm=True, gate=GATE_SIGMOID, window=window,
                      rope=(i + 1) % 4 > 0),
            feed_forward(k, i, post="post_ffw_norm", gating=SIGMOID, renorm=False))


@architecture("laguna")
def laguna(k, i):
    window = k.window(i, 4, dense_first=True)
    table = rope_table(k, k.head_dim(i), window, swa_scaling=False)
    return (attention(k, i, qk_norm=True, gate=GATE_SOFTPLUS, window=window, table=table),
            feed_forward(k, i, gating=SIGMOID, renorm=False))


@architecture("smallthinker")
def smallthinker(k, i):
    """Layers l % 4 = 0 see everything and do not turn; the others see 4096 rows, whatever the key says."""
    windows = k.count("attention.sliding_window", 0, low=0) > 0
    full = i % 4 == 0
    return (attention(k, i, window=4096 if windows and not full else 0, rope=not (windows and full)),
            experts(k, i, act=RELU, route=LAYER_INPUT))


@architecture("mellum", golden="")
def mellum(k, i):
    window = k.window(i, 4)
    table = rope_table(k, k.head_dim(), window, swa_scaling=False)
    return attention(k, i, qk_norm=True, window=window, table=table), experts(k, i)
