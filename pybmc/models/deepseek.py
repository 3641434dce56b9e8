"""DeepSeek 2 and 3, and others with compressed keys and values (MLA, arXiv 2405.04434)."""

from __future__ import annotations

import math

from . import rope
from .layers import PAIRS, Mla
from .parts import architecture, feed_forward, rope_dim


@architecture("deepseek2", rope=PAIRS)
def deepseek2(k, i):
    """YaRN leaves cos and sin as they are; scores are multiplied by the square of its magnitude instead."""
    n_heads = k.count("attention.head_count", high=4096, layer=i)
    n_kv_heads = k.count("attention.head_count_kv", n_heads, layer=i)
    if n_kv_heads not in (1, n_heads):
        raise k.error("attention.head_count_kv", f"1 or {n_heads}", n_kv_heads)
    k_dim = k.count("attention.key_length_mla", k.count("attention.key_length", high=1024), high=1024)
    v_dim = k.count("attention.value_length_mla", k.count("attention.value_length", high=1024), high=1024)
    turned = rope_dim(k, k_dim)
    factor, log = rope.yarn_factor(k), k.number("rope.scaling.yarn_log_multiplier", 0.0, high=1e3)
    magnitude = k.number("rope.scaling.attn_factor", 1.0, above=0.0) * (1 + log * math.log(factor))
    table = rope.table(k, turned, k.number("rope.freq_base", 10000.0, above=1.0), k.n_ctx,
                       magnitude=lambda f: 1.0)
    table.mscale = 1.0
    mixer = Mla(n_heads=n_heads, k_dim=k_dim, v_dim=v_dim, q_rank=k.count("attention.q_lora_rank", 0, low=0),
                kv_rank=k.count("attention.kv_lora_rank"), rope_dim=turned, rope=k.table(table),
                attn_scale=k_dim**-0.5 * magnitude**2,
                norm="attn_norm", needs=("attn_norm", "attn_kv_a_norm", "attn_k_b", "attn_v_b"))
    return mixer, feed_forward(k, i, renorm=False)
