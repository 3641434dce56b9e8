"""Llama and those that differ from it by a norm, a scale or a bias."""

from __future__ import annotations

import math
from dataclasses import replace

from .layers import HALVES, LAYER, PAIRS, RELU2, SIGMOID, XIELU
from .parts import architecture, attention, dense, experts, feed_forward, ignore_rope, rope_table


@architecture("llama", rope=PAIRS)
def llama(k, i):
    return attention(k, i), feed_forward(k, i)


@architecture("internlm2", rope=PAIRS)
def internlm2(k, i):
    return attention(k, i), dense(k, i)


@architecture("smollm3", rope=PAIRS)
def smollm3(k, i):
    return attention(k, i, rope=(i + 1) % 4 > 0), dense(k, i)


@architecture("arcee", rope=PAIRS)
def arcee(k, i):
    return attention(k, i), dense(k, i, act=RELU2, gated=False)


@architecture("apertus")
def apertus(k, i):
    p, n, b, e = (k.file_number(f"xielu.{name}", i) for name in ("alpha_p", "alpha_n", "beta", "eps"))
    params = (math.log1p(math.exp(p)), b + math.log1p(math.exp(n)), b, e)
    return attention(k, i, qk_norm=True), dense(k, i, act=XIELU, act_param=params, gated=False)


@architecture("mistral3", rope=PAIRS)
def mistral3(k, i):
    log = k.number("rope.scaling.yarn_log_multiplier", 0.0, high=1e3)
    table = rope_table(k, k.head_dim(),
                       magnitude=lambda f: (1 + 0.1 * math.log(f)) / (1 + 0.1 * log * math.log(f)))
    scale = k.number("attention.temperature_scale", 0.0, high=1e3)
    ctx = k.count("rope.scaling.original_context_length", k.n_ctx) if scale else 0
    return attention(k, i, table=table, scale_ctx=ctx, scale_log=scale), feed_forward(k, i)


@architecture("ernie4_5", rope=PAIRS)
def ernie4_5(k, i):
    return attention(k, i), dense(k, i)


@architecture("ernie4_5-moe", rope=PAIRS)
def ernie4_5_moe(k, i):
    """Experts in every layer whose number is a multiple of interleave_moe_layer_step, counted from 1."""
    step = k.count("interleave_moe_layer_step", 1)
    if k.in_layer(i, "ffn_gate_inp") and (i + 1) % step:
        raise k.error("interleave_moe_layer_step",
                      f"a divisor of {i + 1}, as there is blk.{i}.ffn_gate_inp.weight", step)
    return attention(k, i), feed_forward(k, i)


def residual(k, *blocks):
    """Blocks whose results are multiplied before the sum."""
    scale = k.number("residual_scale", 1.0, above=0.0)
    return tuple(replace(block, scale=scale) for block in blocks)


def has_rope(k):
    """Files of models without rope say so, and have keys of one all the same."""
    if rope := k.flag("rope.scaling.finetuned", True):
        return rope
    ignore_rope(k)
    return False


def granite_attention(k, i, **fields):
    return attention(k, i, attn_scale=k.number("attention.scale", 0.0) or None, **fields)


GRANITE = {"embedding_scale": lambda k: k.number("embedding_scale", 1.0, above=0.0),
           "logit_scale": lambda k: 1 / k.number("logit_scale", 1.0, above=0.0)}


@architecture("granite", "granitemoe", rope=PAIRS, **GRANITE)
def granite(k, i):
    """rope.scaling.finetuned false: without rope."""
    rope = has_rope(k)
    if not rope and k.arch == "granitemoe":
        raise k.error("rope.scaling.finetuned", "true", "false")
    return residual(k, granite_attention(k, i, rope=rope), feed_forward(k, i))


@architecture("minicpm", rope=PAIRS, embedding_scale=lambda k: k.number("embedding_scale", 12.0, above=0.0),
              logit_scale=lambda k: 1 / k.number("logit_scale", k.dim / 256, above=0.0))
def minicpm(k, i):
    scale = k.number("residual_scale", 1.4 / math.sqrt(k.n_layers), above=0.0)
    return attention(k, i, scale=scale), dense(k, i, scale=scale)


@architecture("olmo2")
def olmo2(k, i):
    window = k.window(i, 4)
    table = rope_table(k, k.head_dim(), window, swa_scaling=False)
    return (attention(k, i, norm=None, post="post_attention_norm", qk_norm=True, window=window, table=table),
            dense(k, i, norm=None, post="post_ffw_norm"))


@architecture("olmoe")
def olmoe(k, i):
    return attention(k, i, qk_norm=True), experts(k, i, renorm=False)


@architecture("exaone4")
def exaone4(k, i):
    window = k.window(i, 4, default=4096) if k.n_layers == 64 else k.window(i, 0)
    return (attention(k, i, norm=None, post="post_attention_norm", qk_norm=True, window=window,
                      rope=k.n_layers != 64 or window > 0),
            dense(k, i, norm=None, post="post_ffw_norm"))


def _hunyuan(k, i):
    head_dim = k.head_dim()
    alpha = k.number("rope.scaling.alpha", 0.0, high=1e6)
    factor = alpha ** (head_dim / (head_dim - 2)) if alpha else 1.0
    return attention(k, i, qk_norm=True, rope_late=1, table=rope_table(k, head_dim, base_factor=factor))


@architecture("hunyuan-dense")
def hunyuan_dense(k, i):
    return _hunyuan(k, i), dense(k, i)


@architecture("hunyuan-moe")
def hunyuan_moe(k, i):
    return _hunyuan(k, i), experts(k, i)


@architecture("seed_oss")
def seed_oss(k, i):
    return attention(k, i, bias=True), dense(k, i, norm="post_attention_norm")


@architecture("glm4", rope=PAIRS)
def glm4(k, i):
    """Those that read images too, whose positions have sections, turn halves in place of pairs."""
    sections = k.sections()
    mixer = attention(k, i, post="post_attention_norm")
    return replace(mixer, rope_style=HALVES if any(sections) else PAIRS), dense(k, i, post="post_ffw_norm")


@architecture("glm4moe")
def glm4moe(k, i):
    return (attention(k, i, bias=True),
            feed_forward(k, i, norm="post_attention_norm", gating=SIGMOID, renorm=False))


@architecture("bailingmoe2")
@architecture("dots1", golden="")
def bailingmoe2(k, i):
    return attention(k, i, qk_norm=True), feed_forward(k, i, renorm=False)


@architecture("minimax-m2", golden="")
def minimax_m2(k, i):
    return attention(k, i, qk_norm=True), experts(k, i, gating=SIGMOID)


@architecture("hy-v3", rope=HALVES, golden="")
def hy_v3(k, i):
    return attention(k, i, qk_norm=True), feed_forward(k, i, gating=SIGMOID, renorm=False)


@architecture("nemotron", norm=LAYER)
def nemotron(k, i):
    return attention(k, i), dense(k, i, act=RELU2, gated=False)
