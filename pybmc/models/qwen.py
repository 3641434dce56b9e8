"""Qwen 2 to 3.5: biases, then norms of queries and keys, experts, and gated delta nets beside attention."""

from __future__ import annotations

from .layers import GATE_IN_QUERY, DeltaNet
from .parts import architecture, attention, dense, experts, feed_forward


@architecture("qwen2", "qwen2vl")
def qwen2(k, i):
    return attention(k, i, bias=True), dense(k, i)


@architecture("qwen2moe")
def qwen2moe(k, i):
    return attention(k, i, bias=True), experts(k, i, renorm=False)


@architecture("qwen3", "qwen3vl", score="last")
def qwen3(k, i):
    return attention(k, i, qk_norm=True), dense(k, i)


@architecture("qwen3moe", "qwen3vlmoe")
def qwen3moe(k, i):
    return attention(k, i, qk_norm=True), experts(k, i)


def delta_net(k, i, interleaved):
    """A gated delta net in place of attention (arXiv 2412.06464)."""
    n_heads = k.count("ssm.time_step_rank", high=4096)
    return DeltaNet(conv=k.count("ssm.conv_kernel", low=2, high=64),
                    state_dim=k.count("ssm.state_size", high=1024), n_heads=n_heads,
                    n_groups=k.count("ssm.group_count", high=n_heads),
                    inner_dim=k.count("ssm.inner_size", high=1 << 20),
                    interleaved=interleaved, norm="attn_norm", needs=("attn_norm",))


def _is_recurrent(k, i):
    if i >= k.n_layers:                 # a draft head
        return False
    flags = k.file.metadata.get(f"{k.arch}.attention.recurrent_layers")
    if flags is not None:
        return bool(k.find("attention.recurrent_layers", i))
    return (i + 1) % k.count("full_attention_interval", 4) > 0


def _mixer(k, i, interleaved):
    k.count("full_attention_interval", 4)
    if _is_recurrent(k, i):
        return delta_net(k, i, interleaved)
    return attention(k, i, qk_norm=True, gate=GATE_IN_QUERY)


@architecture("qwen35", "qwen35moe")
def qwen35(k, i):
    return _mixer(k, i, interleaved=1), feed_forward(k, i, norm="post_attention_norm")


@architecture("qwen3next")
def qwen3next(k, i):
    return _mixer(k, i, interleaved=0), experts(k, i, norm="post_attention_norm")
