"""Gemma 1 to 4: norms on both sides of a block, windows, soft caps, and inputs of a layer's own."""

from __future__ import annotations

import math

from .layers import GELU, SCALED, AltUpBegin, AltUpCorrect, AltUpEnd, AltUpPredict, Block, Laurel, PerLayer
from .parts import Reader, architecture, attention, beside, dense, experts, rope_table, sqrt_dim

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
    return (attention(k, i, **POST, qk_norm=True, window=window, table=table,
                      attn_scale=(k.dim / n_heads) ** -0.5 if k.n_layers == 62 else None),
            dense(k, i, act=GELU, post="post_ffw_norm"))


def _shared_rows(k, i, windowed, own=1024):
    """The layer whose keys and values layer i reads, of the last ones that have none; None: its own. own: how
    many layers have some where the key is absent."""
    shared = k.count("attention.shared_kv_layers", max(k.n_layers - own, 0), low=0, high=k.n_layers - 1)
    n = k.n_layers - shared
    return None if i < n else n - 2 if windowed else n - 1


@architecture("gemma4", embedding_scale=sqrt_dim, logit_softcap=30.0)
def gemma4(k, i):
    window = k.window(i, 0)
    source = _shared_rows(k, i, window > 0)
    head_dim = k.count("attention.key_length_swa", k.head_dim(i), high=1024) if window else k.head_dim(i)
    table = rope_table(k, head_dim, window, swa_base=10000.0, swa_scaling=False)
    mixer = attention(k, i, **POST, window=window, table=table, attn_scale=1.0, v_norm=1, source=source,
                      values_are_keys=True)
    if k.in_layer(i, "ffn_gate_inp"):
        blocks = (mixer, *beside(dense(k, i, act=GELU, post="post_ffw_norm_1"),
                                 experts(k, i, act=GELU, norm="pre_ffw_norm_2", post="post_ffw_norm_2",
                                         sum_norm="post_ffw_norm", route=SCALED)))
    else:
        blocks = (mixer, dense(k, i, act=GELU, post="post_ffw_norm"))
    if k.count("embedding_length_per_layer_input", 0, low=0):
        blocks += (PerLayer(per_layer=i, post="post_norm", needs=("post_norm",)),)
    return blocks


SPARSE_LAYERS, SPARSITY = 10, 1.6448533535003662    # without the key: 95% of a normal distribution is below


@architecture("gemma3n", embedding_scale=sqrt_dim, logit_softcap=30.0)
def gemma3n(k, i):
    """A layer between AltUp's prediction and correction; per-layer inputs go to the other versions of x."""
    n, window = _versions(k), k.window(i, 5)
    source = _shared_rows(k, i, window > 0, own=20)
    table = rope_table(k, k.head_dim(i), window, swa_base=10000.0, swa_scaling=False)
    mixer = attention(k, i, **POST, qk_norm=True, window=window, table=table, attn_scale=1.0, v_norm=1,
                      source=source)
    low_rank = Laurel(hidden_dim=_rank(k, i), norm="attn_norm", needs=("laurel_l",), sum_scale=math.sqrt(0.5))
    blocks: tuple[Block, ...] = (
        AltUpPredict(n_altup=n, norm="altup_router_norm", needs=("altup_router_norm",)),
        *beside(mixer, low_rank),
        dense(k, i, act=GELU, post="post_ffw_norm", sparsity=_sparsity(k, i)),
        AltUpCorrect(n_altup=n, norm="altup_router_norm"),
        PerLayer(per_layer=i, post="post_norm", n_altup=n, others=1,
                 needs=("post_norm", "altup_correct_scale")),
    )
    if i == 0:
        blocks = (AltUpBegin(n_altup=n, **_outside("altup_proj")), *blocks)
    if i == k.n_layers - 1:
        blocks += (AltUpEnd(n_altup=n, sum_scale=1 / n, **_outside("altup_unembd_proj")),)
    return blocks


def _outside(name: str) -> dict[str, tuple[str, ...]]:
    """For a block with a tensor of the file outside the layers."""
    return {"outside": (name,), "needs": (name,)}


def _versions(k: Reader) -> int:
    """How many of x there are; the layers work on the first."""
    if k.count("altup.active_idx", 0, low=0):
        raise k.error("altup.active_idx", "0", k.find("altup.active_idx"))
    k.count("embedding_length_per_layer_input", high=1 << 16)
    return k.count("altup.num_inputs", 4, low=2, high=8)


def _rank(k: Reader, i: int) -> int:
    tensor = k.file.tensors.get(f"blk.{i}.laurel_l.weight")
    return tensor.shape[-1] if tensor else 64


def _sparsity(k: Reader, i: int) -> float:
    """By how many standard deviations a gate has to be above the mean of all to count; 0: every gate does."""
    found = k.find("activation_sparsity_scale", i)
    if found is None:
        return SPARSITY if i < SPARSE_LAYERS else 0.0
    number = isinstance(found, (int, float)) and not isinstance(found, bool)
    if not number or not (found == -math.inf or 0 < found < 100):
        raise k.error("activation_sparsity_scale", "a number above 0 up to 100, or -inf for none",
                      f"{found!r:.60}")
    return max(0.0, float(found))
