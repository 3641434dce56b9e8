"""Gemma 1 to 4: norms on both sides of a block, windows, soft caps, and inputs of a layer's own."""

from __future__ import annotations

from .layers import GELU, SCALED, PerLayer
from .parts import architecture, attention, beside, dense, experts, rope_table, sqrt_dim

POST = {"post": "post_attention_norm"}


@architecture("gemma", embedding_scale=sqrt_dim)
def gemma(k, i):
    return attention(k, i), dense(k, i, act=GELU)


@architecture("gemma2", embedding_scale=sqrt_dim, logit_softcap=30.0)
def gemma2(k, i):
    scale = (k.dim / k.count("attention.head_count")) ** -0.5 if k.n_layers == 46 else None
    cap = k.number("attn_logit_softcapping", 50.0)
    return (attention(k, i, **POST, window=k.window(i, 2, default=4096), attn_scale=scale, attn_softcap=cap),
            dense(k, i, act=GELU, post="post_ffw_norm"))


@architecture("gemma3", embedding_scale=sqrt_dim)
@architecture("gemma-embedding", embedding_scale=sqrt_dim, causal=False)
def gemma3(k, i):
    """The 27B divides scores by sqrt(dim / heads), the others by sqrt(head_dim)."""
    window, n_heads = k.window(i, 6), k.count("attention.head_count")
    table = rope_table(k, k.head_dim(), window, swa_base=10000.0, swa_scaling=False)
    return (attention(k, i, **POST, qk_norm=True, window=window, table=table, attn_scale=(k.dim / n_heads) ** -0.5 if k.n_layers == 62 else None),
            dense(k, i, act=GELU, post="post_ffw_norm"))


def _shared_rows(k, i, windowed):
    """The layer whose keys and values layer i reads, of the last ones that have none; None: its own."""
    n = k.n_layers - k.count("attention.shared_kv_layers", 0, low=0, high=k.n_layers - 1)
    return None if i < n else n - 2 if windowed else n - 1


@architecture("gemma4", embedding_scale=sqrt_dim, logit_softcap=30.0)
def gemma4(k, i):
    window = k.window(i, 0)
    source = _shared_rows(k, i, window > 0)
    head_dim = k.count("attention.key_length_swa", k.head_dim(i), high=1024) if window else k.head_dim(i)
    table = rope_table(k, head_dim, window, swa_base=10000.0, swa_scaling=False)
    mixer = attention(k, i, **POST, window=window, table=table, attn_scale=1.0, v_norm=1, source=source, values_are_keys=True)
    if k.in_layer(i, "ffn_gate_inp"):
        blocks = (mixer, *beside(dense(k, i, act=GELU, post="post_ffw_norm_1"),
                                 experts(k, i, act=GELU, norm="pre_ffw_norm_2", post="post_ffw_norm_2", sum_norm="post_ffw_norm", route=SCALED)))
    else:
        blocks = (mixer, dense(k, i, act=GELU, post="post_ffw_norm"))
    if k.count("embedding_length_per_layer_input", 0, low=0):
        blocks += (PerLayer(per_layer=i, post="post_norm", needs=("post_norm",)),)
    return blocks

