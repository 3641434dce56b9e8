"""Attention beside recurrent blocks: LFM2, Granite 4, Nemotron Nano, Falcon H1."""

from __future__ import annotations

from .layers import PAIRS, RELU2, SIGMOID, Mamba2, ShortConv
from .llama import GRANITE, granite_attention, has_rope, residual
from .parts import architecture, attention, beside, dense, experts, feed_forward, ignore_rope


def _has_attention(k, i):
    return k.count("attention.head_count_kv", low=0, layer=i) > 0


@architecture("lfm2", "lfm2moe", names={"token_embd_norm": "output_norm"}, needs=("token_embd_norm",))
def lfm2(k, i):
    mixer = (attention(k, i, qk_norm=True) if _has_attention(k, i)
             else ShortConv(conv=k.count("shortconv.l_cache", low=2, high=64), norm="attn_norm",
                            needs=("attn_norm",)))
    return mixer, feed_forward(k, i, gating=SIGMOID)


def mamba2(k, i):
    """A state-space block (arXiv 2405.21060)."""
    n_heads = k.count("ssm.time_step_rank", high=4096)
    return Mamba2(conv=k.count("ssm.conv_kernel", low=2, high=64),
                  state_dim=k.count("ssm.state_size", high=1024), n_heads=n_heads,
                  n_groups=k.count("ssm.group_count", high=n_heads),
                  inner_dim=k.count("ssm.inner_size", high=1 << 20),
                  norm="attn_norm", needs=("attn_norm",))


@architecture("granitehybrid", rope=PAIRS, **GRANITE)
def granitehybrid(k, i):
    rope = has_rope(k)
    mixer = granite_attention(k, i, rope=rope) if _has_attention(k, i) else mamba2(k, i)
    return residual(k, mixer, feed_forward(k, i))


def _latent_dim(k, i):
    """Values that experts read, where those are fewer than the layer's; 0: all of them."""
    tensor = k.file.tensors.get(f"blk.{i}.ffn_latent_down.weight")
    return tensor.shape[-1] if tensor else 0


@architecture("nemotron_h", "nemotron_h_moe")
def nemotron_h(k, i):
    """One block a layer."""
    ignore_rope(k)
    if k.in_layer(i, "ffn_gate_inp"):
        return (experts(k, i, norm="attn_norm", gating=SIGMOID, renorm=False, act=RELU2,
                        latent_dim=_latent_dim(k, i)),)
    if k.count("feed_forward_length", 0, low=0, layer=i) > 0:
        return (dense(k, i, norm="attn_norm", act=RELU2, gated=False),)
    return (attention(k, i, rope=False) if _has_attention(k, i) else mamba2(k, i),)


@architecture("falcon-h1")
def falcon_h1(k, i):
    return (*beside(attention(k, i), mamba2(k, i)), dense(k, i))
