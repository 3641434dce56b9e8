"""Models that read a text as a whole and give vectors: BERT and those after it."""

from __future__ import annotations

from .layers import GELU, HALVES, LAYER, NONE, SILU
from .parts import architecture, attention, dense, experts, rope_table

AFTER = {"norm": None, "out_norm": "attn_output_norm"}
AFTER_FFN = {"norm": None, "out_norm": "layer_output_norm"}
ENCODER = {"norm": LAYER, "causal": False, "needs": ("token_embd_norm",)}
SCORED = ENCODER | {"score": "first"}


@architecture("bert", rope=NONE, **SCORED)
def bert(k, i):
    return attention(k, i, **AFTER), dense(k, i, act=GELU, gated=False, **AFTER_FFN)


@architecture("jina-bert-v2", rope=NONE, **SCORED)
def jina_bert_v2(k, i):
    return attention(k, i, alibi=8.0, **AFTER), dense(k, i, act=GELU, **AFTER_FFN)


@architecture("nomic-bert", rope=HALVES, **SCORED)
def nomic_bert(k, i):
    return attention(k, i, **AFTER), dense(k, i, act=SILU, **AFTER_FFN)


@architecture("nomic-bert-moe", rope=HALVES, **SCORED)
def nomic_bert_moe(k, i):
    every = k.count("moe_every_n_layers", 0, low=0)
    feed = (experts(k, i, act=GELU, renorm=False, norm=None, out_norm="layer_output_norm")
            if every and i % every == 1
            else dense(k, i, act=GELU, gated=False, **AFTER_FFN))
    return attention(k, i, **AFTER), feed


@architecture("modern-bert", rope=HALVES, **ENCODER)
def modern_bert(k, i):
    window = k.window(i, 3, dense_first=True)
    table = rope_table(k, k.head_dim(), window, swa_base=10000.0, swa_scaling=False)
    return (attention(k, i, norm="attn_norm" if i else None, window=window, table=table),
            dense(k, i, act=GELU))
