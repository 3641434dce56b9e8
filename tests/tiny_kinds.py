"""Tiny models that bring each kind of block and each thing that layers vary in once, with random weights.

    tiny_kinds.model("sinks")                       a path
    metadata, tensors = tiny_kinds.parts("MLA")     as tiny.parts() gives them

Shapes are those of tools.synth_shapes, and more of the same parts here.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import tiny

from tools.synth_shapes import (
    SMALL,
    Mixed,
    Weight,
    attention,
    deepseek2,
    dense,
    expert_keys,
    experts,
    matrix,
    nemotron_h,
    norm,
    usual_keys,
)

VOCAB_SIZE = 401
DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 64, 4, 2, 32, 96


def simple(arch, layer, n_layers=2, keys=(), tied=False, outside=lambda m, vocab_size: [], layer_norm=False):
    """A model of the usual sizes; layer: of m and i; keys: beyond the usual ones, or a function of m."""
    def all_keys(m):
        own = usual_keys(m, 2048, HIDDEN, HEAD_DIM, 10000.0) | dict(keys(m) if callable(keys) else keys)
        if layer_norm:
            own["attention.layer_norm_epsilon"] = own.pop("attention.layer_norm_rms_epsilon")
        return {key: value for key, value in own.items() if value is not None}

    return Mixed(arch, "", DIM, n_layers, HEADS, KV_HEADS, layer, all_keys, tied, outside,
                 tuple(norm("output_norm", DIM, bias=layer_norm)))


def plain_attention(**more):
    return attention(DIM, HEADS, KV_HEADS, HEAD_DIM, **more)


def cohere2(m, i):
    return [*norm("attn_norm", DIM), *plain_attention(), *dense(DIM, HIDDEN)]


def bloom(m, i):
    return [*norm("attn_norm", DIM, bias=True), *matrix("attn_qkv", DIM, 6 * 3 * 16, bias=True),
            *matrix("attn_output", 6 * 16, DIM, bias=True), *norm("ffn_norm", DIM, bias=True),
            *dense(DIM, HIDDEN, gated=False, bias=True)]


BLOOM = {"attention.head_count": 6, "attention.head_count_kv": 6, "attention.key_length": 16,
         "attention.value_length": 16, "rope.freq_base": None, "rope.dimension_count": None}


def olmo2(m, i):
    """One norm for the queries of all heads together, and norms after the blocks only."""
    made = [weight for weight in plain_attention() if "norm" not in weight.name]
    return [*made, *norm("attn_q_norm", DIM * 2), *norm("attn_k_norm", DIM),
            *norm("post_attention_norm", DIM), *dense(DIM, HIDDEN), *norm("post_ffw_norm", DIM)]


def laguna(m, i):
    """A gate for each head, of which windowed layers have more; the first layer is dense and full."""
    heads = HEADS if i % 4 else KV_HEADS
    feed = experts(DIM, 6, 32, 32, choice_bias=True) if i else dense(DIM, HIDDEN)
    return [*norm("attn_norm", DIM), *attention(DIM, heads, KV_HEADS, HEAD_DIM, qk_norm=True, gate=heads),
            *norm("ffn_norm", DIM), *feed]


def laguna_keys(m):
    return expert_keys(6, 2, 32, expert_shared_feed_forward_length=32, leading_dense_block_count=1,
                       expert_gating_func=2) | {
                           "attention.head_count": [HEADS if i % 4 else KV_HEADS for i in range(m.n_layers)],
                           "attention.sliding_window": 16, "rope.dimension_count": 16,
                           "rope.dimension_count_swa": 32, "rope.freq_base_swa": 5000.0,
                           "expert_weights_norm": True, "expert_weights_scale": 2.5,
                           "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
                           "rope.scaling.original_context_length": 64}


def afmoe(m, i):
    made = [*norm("attn_norm", DIM), *plain_attention(qk_norm=True, gate=HEADS * HEAD_DIM)]
    for name in ("post_attention_norm", "ffn_norm", "post_ffw_norm"):
        made += norm(name, DIM)
    return made + experts(DIM, 6, 32)


def smallthinker(m, i):
    return [*norm("attn_norm", DIM), *plain_attention(), *norm("ffn_norm", DIM), *experts(DIM, 6, 32)]


def gemma4_experts(m, i):
    """Experts beside a feed-forward; full layers have no values but their keys."""
    full = i % 2 == 1
    made = [*norm("attn_norm", DIM),
            *attention(DIM, HEADS, KV_HEADS - full, 64 if full else HEAD_DIM, qk_norm=True, values=not full)]
    for name in ("post_attention_norm", "ffn_norm", "post_ffw_norm", "pre_ffw_norm_2", "post_ffw_norm_1",
                 "post_ffw_norm_2"):
        made += norm(name, DIM)
    return [*made, *dense(DIM, HIDDEN), *matrix("ffn_gate_inp", DIM, 6),
            Weight("ffn_gate_inp.scale", (DIM,), 1.0), *matrix("ffn_gate_up_exps", DIM, 64, 6),
            *matrix("ffn_down_exps", 32, DIM, 6), Weight("ffn_down_exps.scale", (6,), 1.0),
            Weight("layer_output_scale.weight", (1,), 1.0)]


def gemma4_keys(m):
    swa = {"attention.key_length_swa": 32, "attention.value_length_swa": 32,
           "rope.dimension_count_swa": 32, "rope.freq_base_swa": 5000.0, "attention.sliding_window": 16,
           "attention.sliding_window_pattern": [i % 2 == 0 for i in range(m.n_layers)]}
    return (swa | expert_keys(6, 2, 32)
            | {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64,
                "attention.head_count_kv": [KV_HEADS - i % 2 for i in range(m.n_layers)],
                "attention.shared_kv_layers": 0, "final_logit_softcapping": 30.0})


def mla():
    """With compressed queries, and experts by groups."""
    few = {"n": 6, "n_active": 2, "expert_dim": 32}
    return deepseek2(dim=DIM, n_layers=3, n_heads=3, q_rank=32, kv_rank=32, nope=32,
                     rope=16, v_dim=32, hidden_dim=HIDDEN, n_shared=1, choice_bias=True, original_ctx=64,
                     n_ctx=2048, **few, expert_gating_func=2, expert_group_count=3, expert_group_used_count=2,
                     expert_weights_norm=True, expert_weights_scale=2.5)


ALTUP, PER_LAYER, RANK, OWN = 3, 32, 16, 3           # OWN: layers with keys and values of their own


def gemma3n(m, i):
    """The last two layers read others' keys and values; one layer's gates are not sparse."""
    made = attention(DIM, HEADS, KV_HEADS, HEAD_DIM, qk_norm=True, own=i < OWN)
    for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm",
                 "altup_router_norm", "laurel_post_norm"):
        made += norm(name, DIM)
    return [*made, *dense(DIM, HIDDEN), *matrix("laurel_l", DIM, RANK), *matrix("laurel_r", RANK, DIM),
            *matrix("inp_gate", DIM, PER_LAYER), *matrix("proj", PER_LAYER, DIM),
            *matrix("altup_router", DIM, ALTUP), *matrix("altup_predict_coef", ALTUP, ALTUP**2),
            *matrix("altup_correct_coef", ALTUP, ALTUP), Weight("altup_correct_scale.weight", (DIM,), 1.0)]


def gemma3n_outside(m, vocab_size):
    layers = PER_LAYER * m.n_layers
    return [*matrix("altup_proj", DIM, DIM, ALTUP - 1), *matrix("altup_unembd_proj", DIM, DIM, ALTUP - 1),
            *matrix("per_layer_token_embd", layers, vocab_size), *matrix("per_layer_model_proj", DIM, layers),
            *norm("per_layer_proj_norm", PER_LAYER)]


def gemma3n_keys(m):
    sparse = [-np.inf if i == 1 else 0.5 + 0.3 * i for i in range(m.n_layers)]
    windowed = [i not in (2, 4) for i in range(m.n_layers)]
    return {"attention.sliding_window": 16, "attention.sliding_window_pattern": windowed,
            "attention.shared_kv_layers": m.n_layers - OWN, "altup.num_inputs": ALTUP, "altup.active_idx": 0,
            "embedding_length_per_layer_input": PER_LAYER, "activation_sparsity_scale": sparse}


KINDS = {
    "experts": SMALL["qwen3-30b-a3b"],
    "sinks": SMALL["gpt-oss-20b"], "per-layer inputs": SMALL["gemma-4-e2b"],
    "experts beside": lambda: simple("gemma4", gemma4_experts, 4, gemma4_keys, tied=True), "MLA": mla,
    "latent experts": lambda: nemotron_h(dim=DIM, pattern="ME*E", n_heads=HEADS, n_kv_heads=KV_HEADS,
                                         head_dim=HEAD_DIM, n=6, n_active=2, expert_dim=32, shared_dim=64,
                                         latent_dim=32, state_dim=32, n_groups=2, n_states=4, inner=64,
                                         n_ctx=2048),
    "blocks side by side": lambda: simple("cohere2", cohere2, 4,
                                          {"logit_scale": 0.5, "attention.sliding_window": 16}, True,
                                          layer_norm=True),
    "gates of heads": lambda: simple("laguna", laguna, 4, laguna_keys),
    "gates of values": lambda: simple("afmoe", afmoe, 4,
                                      expert_keys(6, 2, 32) | {"attention.sliding_window": 16}),
    "router first": lambda: simple("smallthinker", smallthinker, 2, expert_keys(6, 2, 32)
                                   | {"attention.sliding_window": 16, "expert_gating_func": 1}),
    "ALiBi": lambda: simple("bloom", bloom, 2, BLOOM,
                            outside=lambda m, n: norm("token_embd_norm", DIM, bias=True), layer_norm=True),
    "norms after": lambda: simple("olmo2", olmo2),
    "AltUp": lambda: simple("gemma3n", gemma3n, 5, gemma3n_keys, True, gemma3n_outside),
}
NAMES = [*tiny.RECURRENT, *KINDS]           # every kind of block


def parts(shape: str | Mixed, types: str = "F16", seed: int = 0):
    """metadata and tensors of one of KINDS, or of any shape; matrices that quantizers leave alone are F32."""
    name = shape if isinstance(shape, str) else shape.arch
    shape = KINDS[shape]() if isinstance(shape, str) else shape
    keys = {f"{shape.arch}.{key}": value for key, value in shape.keys(shape).items()}
    metadata = ({"general.architecture": shape.arch, "general.name": "tiny"} | keys
                | tiny.bpe_vocabulary(VOCAB_SIZE, "qwen2"))
    make = tiny._Tensors(np.random.default_rng([seed, *name.encode()]), types)
    make.matrix("token_embd", VOCAB_SIZE, shape.dim, 3 * shape.dim**-0.5)
    weights = [("", weight) for weight
               in [*shape.outside(shape, VOCAB_SIZE), *(shape.final_norm or norm("output_norm", shape.dim))]]
    weights += [(f"blk.{i}.", weight) for i in range(shape.n_layers) for weight in shape.layer(shape, i)]
    for prefix, weight in weights:
        make.made[prefix + weight.name] = _tensor(make, weight)
    if not shape.tied:
        make.matrix("output", VOCAB_SIZE, shape.dim, 3 * shape.dim**-0.5)
    return metadata, make.made


def _tensor(make, weight):
    if weight.fill is not None:
        values = weight.fill + 0.1 * np.abs(make.rng.standard_normal(weight.dims[::-1]))
        return "F32", values.astype(np.float32).view(np.uint8)
    n_cols, rows = weight.dims[0], weight.dims[:0:-1]
    floats = weight.name.startswith(("ffn_gate_inp", "ssm_conv1d", "shortconv.conv"))
    type = "F32" if floats else tiny.fitting(make.types["*"], n_cols)
    data = tiny.random_tensor(make.rng, type, int(np.prod(rows)), n_cols, n_cols**-0.5)
    return type, np.ascontiguousarray(data).reshape(*rows, -1)


@lru_cache(maxsize=None)
def model(name: str, types: str = "F16", seed: int = 0) -> Path:
    """A file of any of NAMES, written once per process."""
    if name in tiny.RECURRENT:
        return tiny.model(name, types, n_ctx=2048, seed=seed)
    return tiny.save(tiny.folder() / f"kind-{model.cache_info().misses}.gguf", *parts(name, types, seed))
