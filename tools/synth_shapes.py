"""Shapes of models whose layers differ: experts, recurrent layers, compressed keys and values, encoders.

A layer is a list of weights from the parts below; names and keys are GGUF's.
Sizes are arguments, so that the same model can be made tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Weight:
    """A tensor. dims: (n_cols, n_rows) of a matrix, a third for each expert, (n,) of a vector;
    fill: its values, None for random."""

    name: str
    dims: tuple[int, ...]
    fill: float | None = None


@dataclass(frozen=True)
class Mixed:
    """A model whose layers differ. layer: the weights of layer i;
    keys: its metadata, without the architecture, for n layers."""

    arch: str
    vocab: str                  # a key of synth_vocab.VOCABS
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    layer: Callable[[Mixed, int], list[Weight]]
    keys: Callable[[Mixed], dict]
    tied: bool = False
    outside: Callable[[Mixed, int], list[Weight]] = lambda m, vocab_size: []
    final_norm: tuple[Weight, ...] | None = None


# ---- parts of a layer --------------------------------------------------------------------------------------


def norm(name, n, bias=False):
    return [Weight(f"{name}.weight", (n,), 1.0)] + [Weight(f"{name}.bias", (n,), 0.0)] * bias


def matrix(name, n_cols, n_rows, *n, bias=False):
    return ([Weight(f"{name}.weight", (n_cols, n_rows, *n))]
            + [Weight(f"{name}.bias", (n_rows, *n), 0.1)] * bias)


def attention(dim, n_heads, n_kv_heads, head_dim, qk_norm=False, bias=False, gate=0, doubled=False,
              values=True, own=True, sinks=False):
    """doubled: queries with gates; values, own: with values, and with keys and values of its own."""
    made = matrix("attn_q", dim, n_heads * head_dim * (1 + doubled), bias=bias)
    for name, there in (("attn_k", own), ("attn_v", own and values)):
        made += matrix(name, dim, n_kv_heads * head_dim, bias=bias) if there else []
    made += matrix("attn_gate", dim, gate) if gate else []
    made += matrix("attn_output", n_heads * head_dim, dim, bias=bias)
    made += norm("attn_q_norm", head_dim) if qk_norm else []
    made += norm("attn_k_norm", head_dim) if qk_norm and own else []
    return made + ([Weight("attn_sinks.weight", (n_heads,), 0.5)] if sinks else [])


def dense(dim, hidden_dim, gated=True, bias=False):
    gate = matrix("ffn_gate", dim, hidden_dim, bias=bias) if gated else []
    return [*gate, *matrix("ffn_up", dim, hidden_dim, bias=bias),
            *matrix("ffn_down", hidden_dim, dim, bias=bias)]


def experts(dim, n, expert_dim, shared_dim=0, gated=True, bias=False, choice_bias=False, latent_dim=0):
    made = matrix("ffn_gate_inp", dim, n, bias=bias) + [Weight("exp_probs_b.bias", (n,), 0.0)] * choice_bias
    inner = latent_dim or dim
    if latent_dim:
        made += matrix("ffn_latent_down", dim, latent_dim) + matrix("ffn_latent_up", latent_dim, dim)
    for name in ("ffn_gate", "ffn_up")[not gated:]:
        made += matrix(f"{name}_exps", inner, expert_dim, n, bias=bias)
        made += matrix(f"{name}_shexp", dim, shared_dim) if shared_dim else []
    made += matrix("ffn_down_exps", expert_dim, inner, n, bias=bias)
    return made + (matrix("ffn_down_shexp", shared_dim, dim) if shared_dim else [])


def delta_net(dim, conv, state_dim, n_groups, n_heads):
    keys, inner = state_dim * n_groups, state_dim * n_heads
    return [*matrix("attn_qkv", dim, 2 * keys + inner), *matrix("attn_gate", dim, inner),
            *matrix("ssm_conv1d", conv, 2 * keys + inner), Weight("ssm_dt.bias", (n_heads,), 0.5),
            Weight("ssm_a", (n_heads,), -0.5), *matrix("ssm_alpha", dim, n_heads),
            *matrix("ssm_beta", dim, n_heads), *norm("ssm_norm", state_dim), *matrix("ssm_out", inner, dim)]


def mamba2(dim, conv, state_dim, n_groups, n_heads, inner):
    channels = inner + 2 * n_groups * state_dim
    return [*matrix("ssm_in", dim, inner + channels + n_heads), *matrix("ssm_conv1d", conv, channels),
            Weight("ssm_conv1d.bias", (channels,), 0.0), Weight("ssm_dt.bias", (n_heads,), 0.5),
            Weight("ssm_a", (1, n_heads), -0.5), Weight("ssm_d", (1, n_heads), 1.0),
            Weight("ssm_norm.weight", (inner // n_groups, n_groups), 1.0), *matrix("ssm_out", inner, dim)]


def short_conv(dim, conv):
    return (matrix("shortconv.in_proj", dim, 3 * dim) + matrix("shortconv.conv", conv, dim)
            + matrix("shortconv.out_proj", dim, dim))


def mla(dim, n_heads, q_rank, kv_rank, nope, rope, v_dim):
    q = n_heads * (nope + rope)
    made = (matrix("attn_q_a", dim, q_rank) + norm("attn_q_a_norm", q_rank)
            + matrix("attn_q_b", q_rank, q) if q_rank
            else matrix("attn_q", dim, q))
    return [*made, *matrix("attn_kv_a_mqa", dim, kv_rank + rope), *norm("attn_kv_a_norm", kv_rank),
            *matrix("attn_k_b", nope, kv_rank, n_heads), *matrix("attn_v_b", kv_rank, v_dim, n_heads),
            *matrix("attn_output", n_heads * v_dim, dim)]


# ---- models ------------------------------------------------------------------------------------------------


def usual_keys(m, n_ctx, hidden_dim, head_dim=0, rope_base=0.0, eps=1e-5, **more):
    """The keys that nearly all have."""
    keys = {"context_length": n_ctx, "embedding_length": m.dim,
            "block_count": m.n_layers, "feed_forward_length": hidden_dim, "attention.head_count": m.n_heads,
            "attention.head_count_kv": m.n_kv_heads, "attention.layer_norm_rms_epsilon": eps}
    if head_dim:
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if rope_base:
        keys |= {"rope.freq_base": rope_base, "rope.dimension_count": head_dim}
    return keys | more


def expert_keys(n, n_active, expert_dim, **more):
    return {"expert_count": n, "expert_used_count": n_active, "expert_feed_forward_length": expert_dim} | more


def qwen3moe(dim=2048, n_layers=48, n_heads=32, n_kv_heads=4, head_dim=128, n=128, n_active=8, expert_dim=768,
             n_ctx=40960, vocab="qwen"):
    def layer(m, i):
        return [*norm("attn_norm", m.dim), *attention(m.dim, n_heads, n_kv_heads, head_dim, qk_norm=True),
                *norm("ffn_norm", m.dim), *experts(m.dim, n, expert_dim)]

    return Mixed("qwen3moe", vocab, dim, n_layers, n_heads, n_kv_heads, layer,
                 lambda m: usual_keys(m, n_ctx, 8 * expert_dim, head_dim, 1e6, 1e-6)
                 | expert_keys(n, n_active, expert_dim))


def gpt_oss(dim=2880, n_layers=24, n_heads=64, n_kv_heads=8, head_dim=64, n=32, n_active=4, expert_dim=2880,
            window=128, original_ctx=4096, n_ctx=131072, vocab="o200k"):
    def layer(m, i):
        return [*norm("attn_norm", m.dim),
                *attention(m.dim, n_heads, n_kv_heads, head_dim, bias=True, sinks=True),
                *norm("post_attention_norm", m.dim), *experts(m.dim, n, expert_dim, bias=True)]

    return Mixed("gpt-oss", vocab, dim, n_layers, n_heads, n_kv_heads, layer, lambda m: usual_keys(
        m, n_ctx, expert_dim, head_dim, 150000.0, **expert_keys(n, n_active, expert_dim), **{
            "attention.sliding_window": window, "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": original_ctx}))


def qwen35(dim=2560, n_layers=32, n_heads=16, n_kv_heads=4, head_dim=256, hidden_dim=9216, conv=4,
           state_dim=128, n_groups=16, n_values=32, n_ctx=262144, vocab="qwen3.5"):
    def layer(m, i):
        mixer = (attention(m.dim, n_heads, n_kv_heads, head_dim, qk_norm=True, doubled=True) if i % 4 == 3
                 else delta_net(m.dim, conv, state_dim, n_groups, n_values))
        return [*norm("attn_norm", m.dim), *mixer, *norm("post_attention_norm", m.dim),
                *dense(m.dim, hidden_dim)]

    turned = head_dim // 4
    return Mixed("qwen35", vocab, dim, n_layers, n_heads, n_kv_heads, layer, lambda m: usual_keys(
        m, n_ctx, hidden_dim, head_dim, 1e7, 1e-6) | {
            "rope.dimension_count": turned,
            "rope.dimension_sections": [turned // 2 - 2 * (turned // 6), turned // 6, turned // 6, 0],
            "full_attention_interval": 4, "ssm.conv_kernel": conv, "ssm.state_size": state_dim,
            "ssm.group_count": n_groups, "ssm.time_step_rank": n_values,
            "ssm.inner_size": state_dim * n_values}, tied=True)


def lfm2(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, full=(2, 5, 8, 10, 12, 14), lead=0,
         n=0, n_active=0, expert_dim=0, conv=3, n_ctx=128000, vocab="lfm2"):
    """Attention in the layers `full`; experts, if any, from layer `lead` on."""
    head_dim = dim // n_heads

    def layer(m, i):
        mixer = (attention(m.dim, n_heads, n_kv_heads, head_dim, qk_norm=True) if i in full
                 else short_conv(m.dim, conv))
        feed = (experts(m.dim, n, expert_dim, choice_bias=True) if n and i >= lead
                else dense(m.dim, hidden_dim))
        return [*norm("attn_norm", m.dim), *mixer, *norm("ffn_norm", m.dim), *feed]

    def keys(m):
        own = (usual_keys(m, n_ctx, hidden_dim, 0, 1e6)
               | {"shortconv.l_cache": conv, "rope.dimension_count": head_dim,
                  "attention.head_count_kv": [n_kv_heads * (i in full) for i in range(m.n_layers)]})
        return own | (expert_keys(n, n_active, expert_dim, leading_dense_block_count=lead,
                                  expert_gating_func=2) if n else {})

    return Mixed("lfm2moe" if n else "lfm2", vocab, dim, n_layers, n_heads, n_kv_heads, layer, keys,
                 tied=True, final_norm=tuple(norm("token_embd_norm", dim)))


def granite_hybrid(dim=1536, n_layers=40, n_heads=12, n_kv_heads=4, head_dim=128, n=64, n_active=6,
                   expert_dim=512, shared_dim=1024, conv=4, state_dim=128, n_groups=1, n_states=48,
                   inner=3072, n_ctx=131072, vocab="granite"):
    def is_full(i):
        return i % 10 == 5

    def layer(m, i):
        mixer = (attention(m.dim, n_heads, n_kv_heads, head_dim) if is_full(i)
                 else mamba2(m.dim, conv, state_dim, n_groups, n_states, inner))
        return [*norm("attn_norm", m.dim), *mixer, *norm("ffn_norm", m.dim),
                *experts(m.dim, n, expert_dim, shared_dim)]

    return Mixed("granitehybrid", vocab, dim, n_layers, n_heads, n_kv_heads, layer, lambda m: usual_keys(
        m, n_ctx, expert_dim, head_dim, 10000.0,
        **expert_keys(n, n_active, expert_dim, expert_shared_feed_forward_length=shared_dim)) | {
            "attention.head_count_kv": [n_kv_heads * is_full(i) for i in range(m.n_layers)],
            "rope.scaling.finetuned": False, "embedding_scale": 12.0, "attention.scale": 1 / 128,
            "residual_scale": 0.22, "logit_scale": 6.0, "ssm.conv_kernel": conv, "ssm.state_size": state_dim,
            "ssm.group_count": n_groups, "ssm.time_step_rank": n_states, "ssm.inner_size": inner}, tied=True)


def gemma4(dim=1536, n_layers=35, n_heads=8, n_kv_heads=1, head_dim=512, head_dim_swa=256, hidden_dim=6144,
           window=512, per_layer=256, n_ctx=131072, vocab="gemma"):
    """Every fifth layer sees all; of seven layers four use the keys and values of those before them,
    and are twice as wide."""
    def own(m):
        return min(m.n_layers, max(5, m.n_layers * 3 // 7 // 5 * 5))

    def is_full(i):
        return i % 5 == 4

    def layer(m, i):
        size = head_dim if is_full(i) else head_dim_swa
        made = [*norm("attn_norm", m.dim),
                *attention(m.dim, n_heads, n_kv_heads, size, qk_norm=True, own=i < own(m))]
        for name in ("post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm"):
            made += norm(name, m.dim)
        return [*made, *dense(m.dim, hidden_dim * (1 if i < own(m) else 2)),
                *matrix("inp_gate", m.dim, per_layer), *matrix("proj", per_layer, m.dim),
                Weight("layer_output_scale.weight", (1,), 1.0)]

    def outside(m, vocab_size):
        return [*matrix("per_layer_token_embd", per_layer * m.n_layers, vocab_size),
                *matrix("per_layer_model_proj", m.dim, per_layer * m.n_layers),
                *norm("per_layer_proj_norm", per_layer), Weight("rope_freqs.weight", (head_dim // 2,), 1.0)]

    def keys(m):
        swa = {"attention.key_length_swa": head_dim_swa, "attention.value_length_swa": head_dim_swa,
               "rope.dimension_count_swa": head_dim_swa,
               "rope.freq_base_swa": 10000.0, "attention.sliding_window": window,
               "attention.sliding_window_pattern": [not is_full(i) for i in range(m.n_layers)]}
        return usual_keys(m, n_ctx, 0, head_dim, 1e6, 1e-6) | swa | {
            "feed_forward_length": [hidden_dim * (1 if i < own(m) else 2) for i in range(m.n_layers)],
            "attention.shared_kv_layers": m.n_layers - own(m), "embedding_length_per_layer_input": per_layer,
            "final_logit_softcapping": 30.0}

    return Mixed("gemma4", vocab, dim, n_layers, n_heads, n_kv_heads, layer, keys, tied=True, outside=outside)


NEMOTRON_3 = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"        # Mamba 2, experts, attention


def nemotron_h(dim=2688, pattern=NEMOTRON_3, n_heads=32, n_kv_heads=2, head_dim=128, n=128, n_active=6,
               expert_dim=1856, shared_dim=3712, latent_dim=0, conv=4, state_dim=128, n_groups=8, n_states=64,
               inner=4096, n_ctx=262144, vocab="nemotron"):
    def layer(m, i):
        parts = {"*": lambda: attention(m.dim, n_heads, n_kv_heads, head_dim),
                 "M": lambda: mamba2(m.dim, conv, state_dim, n_groups, n_states, inner),
                 "E": lambda: experts(m.dim, n, expert_dim, shared_dim, gated=False, choice_bias=True,
                                      latent_dim=latent_dim)}
        return norm("attn_norm", m.dim) + parts[pattern[i]]()

    def keys(m):
        kinds = pattern[:m.n_layers]
        return usual_keys(m, n_ctx, 0, head_dim, **expert_keys(
            n, n_active, expert_dim, expert_shared_feed_forward_length=shared_dim)) | {
                "feed_forward_length": [expert_dim * (kind == "E") for kind in kinds],
                "attention.head_count_kv": [n_kv_heads * (kind == "*") for kind in kinds],
                "attention.layer_norm_epsilon": 1e-5, "expert_shared_count": 1, "expert_weights_norm": True,
                "expert_weights_scale": 2.5, "ssm.conv_kernel": conv, "ssm.state_size": state_dim,
                "ssm.group_count": n_groups, "ssm.time_step_rank": n_states, "ssm.inner_size": inner}

    return Mixed("nemotron_h_moe", vocab, dim, len(pattern), n_heads, n_kv_heads, layer, keys)


def deepseek2(dim=2048, n_layers=27, n_heads=16, q_rank=0, kv_rank=512, nope=128, rope=64, v_dim=128,
              hidden_dim=10944, lead=1, n=64, n_active=6, expert_dim=1408, n_shared=2, choice_bias=False,
              original_ctx=4096, n_ctx=163840, vocab="deepseek", **more):
    def layer(m, i):
        feed = (dense(m.dim, hidden_dim) if i < lead
                else experts(m.dim, n, expert_dim, n_shared * expert_dim, choice_bias=choice_bias))
        return [*norm("attn_norm", m.dim), *mla(m.dim, n_heads, q_rank, kv_rank, nope, rope, v_dim),
                *norm("ffn_norm", m.dim), *feed]

    return Mixed("deepseek2", vocab, dim, n_layers, n_heads, 1, layer, lambda m: usual_keys(
        m, n_ctx, hidden_dim, 0, 10000.0, 1e-6,
        **expert_keys(n, n_active, expert_dim, expert_shared_count=n_shared, leading_dense_block_count=lead,
                      expert_weights_scale=1.0)) | {
                          "rope.dimension_count": rope,
                          "attention.key_length": kv_rank + rope, "attention.value_length": kv_rank,
                          "attention.key_length_mla": nope + rope, "attention.value_length_mla": v_dim,
                          "attention.kv_lora_rank": kv_rank, "rope.scaling.type": "yarn",
                          "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": original_ctx,
                          "rope.scaling.yarn_log_multiplier": 0.0707, "attention.q_lora_rank": q_rank} | more)


def bert(dim=384, n_layers=12, n_heads=12, hidden_dim=1536, n_ctx=512, vocab="bert"):
    def layer(m, i):
        return [*attention(m.dim, n_heads, n_heads, m.dim // n_heads, bias=True),
                *norm("attn_output_norm", m.dim, bias=True),
                *dense(m.dim, hidden_dim, gated=False, bias=True),
                *norm("layer_output_norm", m.dim, bias=True)]

    def outside(m, vocab_size):
        return [*matrix("position_embd", m.dim, n_ctx), *matrix("token_types", m.dim, 2),
                *norm("token_embd_norm", m.dim, bias=True)]

    return Mixed("bert", vocab, dim, n_layers, n_heads, n_heads, layer, lambda m: {
        "context_length": n_ctx, "embedding_length": m.dim,
        "block_count": m.n_layers, "feed_forward_length": hidden_dim, "attention.head_count": n_heads,
        "attention.layer_norm_epsilon": 1e-12, "attention.causal": False, "pooling_type": 2},
                 tied=True, outside=outside, final_norm=())


MODELS = {
    "qwen3-30b-a3b": qwen3moe, "gpt-oss-20b": gpt_oss, "qwen3.5-4b": qwen35, "lfm2-1.2b": lfm2,
    "lfm2-8b-a1b": partial(lfm2, n_layers=24, hidden_dim=7168, full=(2, 6, 10, 14, 18, 21), lead=2, n=32,
                           n_active=4, expert_dim=1792),
    "granite-4-tiny": granite_hybrid, "gemma-4-e2b": gemma4, "nemotron-3-nano": nemotron_h,
    "deepseek-v2-lite": deepseek2, "bge-small": bert,
}

# The same made tiny.
HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
FEW = {"n": 6, "n_active": 2, "expert_dim": 32}
STATES = {"conv": 4, "state_dim": 32, "n_groups": 2}
TINY = {"dim": 64, "n_ctx": 2048, "vocab": "tiny"}
SMALL = {
    "qwen3-30b-a3b": partial(qwen3moe, n_layers=2, **HEADS, **FEW, **TINY),
    "gpt-oss-20b": partial(gpt_oss, n_layers=2, window=16, original_ctx=64, **HEADS, **FEW, **TINY),
    "qwen3.5-4b": partial(qwen35, n_layers=4, hidden_dim=96, n_values=4, **HEADS, **STATES, **TINY),
    "lfm2-1.2b": partial(lfm2, n_layers=3, n_heads=2, n_kv_heads=1, hidden_dim=96, full=(1,), **TINY),
    "lfm2-8b-a1b": partial(lfm2, n_layers=4, n_heads=2, n_kv_heads=1, hidden_dim=96, full=(1,), lead=1,
                           **FEW, **TINY),
    "granite-4-tiny": partial(granite_hybrid, n_layers=6, shared_dim=64, n_states=4, inner=128, **HEADS,
                              **FEW, **STATES, **TINY),
    "gemma-4-e2b": partial(gemma4, n_layers=7, n_heads=4, n_kv_heads=1, head_dim=64, head_dim_swa=32,
                           hidden_dim=96, window=16, per_layer=32, **TINY),
    "nemotron-3-nano": partial(nemotron_h, pattern="ME*E", shared_dim=64, n_states=4, inner=64, **HEADS,
                               **FEW, **STATES, **TINY),
    "deepseek-v2-lite": partial(deepseek2, n_layers=3, n_heads=3, kv_rank=32, nope=32, rope=16, v_dim=32,
                                hidden_dim=96, n_shared=1, original_ctx=64, **FEW, **TINY),
    "bge-small": partial(bert, dim=64, n_layers=2, n_heads=4, hidden_dim=96, n_ctx=512, vocab="tiny-bert"),
}
