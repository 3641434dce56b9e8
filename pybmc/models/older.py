"""Models with LayerNorm: GPT-2 and those after it, Cohere's."""

from __future__ import annotations

from dataclasses import replace

from .layers import GELU, LAYER, NONE, PAIRS
from .parts import architecture, attention, beside, dense

BIASES = ("attn_norm.bias", "attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
FFN_BIASES = ("ffn_norm.bias", "ffn_up.bias", "ffn_down.bias")


@architecture("gpt2", norm=LAYER, rope=NONE, needs=("output_norm", "output_norm.bias", "position_embd"))
def gpt2(k, i):
    mixer = attention(k, i)
    return replace(mixer, needs=mixer.needs + BIASES), dense(k, i, act=GELU, gated=False, needs=FFN_BIASES)


@architecture("starcoder2", norm=LAYER)
def starcoder2(k, i):
    return attention(k, i), dense(k, i, act=GELU, gated=False)


@architecture("bloom", norm=LAYER, rope=NONE, needs=("output_norm", "token_embd_norm"))
def bloom(k, i):
    return attention(k, i, alibi=8.0), dense(k, i, act=GELU, gated=False)


@architecture("mpt", norm=LAYER, rope=NONE, golden="")
def mpt(k, i):
    return (attention(k, i, alibi=k.number("attention.max_alibi_bias", 0.0, high=1e3)),
            dense(k, i, act=GELU, gated=False))


@architecture("gptneox", norm=LAYER)
def gptneox(k, i):
    parallel = k.flag("use_parallel_residual", True)
    blocks = attention(k, i), dense(k, i, act=GELU, gated=False)
    return beside(*blocks) if parallel else blocks


@architecture("falcon", norm=LAYER)
def falcon(k, i):
    """Where there are two norms, attention reads the second."""
    norm = "attn_norm_2" if k.in_layer(i, "attn_norm_2.weight") else "attn_norm"
    return beside(attention(k, i, norm=norm), dense(k, i, act=GELU, gated=False, norm="attn_norm"))


@architecture("stablelm", norm=LAYER)
def stablelm(k, i):
    k.flag("use_parallel_residual")                     # the second norm tells the same
    if k.in_layer(i, "ffn_norm.weight"):
        return attention(k, i), dense(k, i)
    return beside(attention(k, i), dense(k, i, norm="attn_norm"))


@architecture("command-r", norm=LAYER, rope=PAIRS,
              logit_scale=lambda k: k.number("logit_scale", 1.0, above=0.0))
def command_r(k, i):
    return beside(attention(k, i), dense(k, i, norm="attn_norm"))


@architecture("cohere2", norm=LAYER, rope=PAIRS,
              logit_scale=lambda k: k.number("logit_scale", 1.0, above=0.0))
def cohere2(k, i):
    """Windowed layers turn, full ones do not."""
    window = k.window(i, 4)
    return beside(attention(k, i, window=window, rope=window > 0), dense(k, i, norm="attn_norm"))
