"""Experts: how they are chosen and weighed, against float64;
and passes in which they have one token, all tokens, or none."""

from functools import lru_cache

import numpy as np
import oracle
import pytest
import tiny
import tiny_kinds

import pybmc
from tools.synth_shapes import attention, experts, nemotron_h, norm

DIM, N, ACTIVE = 64, 6, 2
FLOAT = 1e-3  # error over spread, as in test_golden.py: keys and values in f16
ARCH = "bailingmoe2"  # experts as the keys say, without more: by default softmax over all, not weighed anew


def relu2(x):
    return np.maximum(x, 0) ** 2


class Experts(oracle.Oracle):
    """Feed-forwards of experts, token by token. Mutations: what the choice and the weights leave out."""

    gating = 1  # where the key is absent

    def __init__(self, metadata, weights, **mutation):
        self.mutation = mutation
        super().__init__(metadata, weights)
        self.n_kv = int(np.max(self.n_kv))

    def off(self, name):
        return self.mutation.get(name) is False

    def matrices(self, name, b):
        values, n = self.tensors[f"{b}.{name}.weight"], self.key("expert_count")
        return values.reshape(n, -1, values.shape[-1])

    def bias(self, name, b):
        values = self.tensors.get(f"{b}.{name}.bias")
        return (
            np.zeros((self.key("expert_count"), 1))
            if values is None
            else values.reshape(self.key("expert_count"), -1)
        )

    def choose(self, scores, b):
        """{expert: weight} of one token."""
        gating = 1 if self.off("gating") else self.key("expert_gating_func", self.gating)
        p = {1: oracle.softmax, 2: lambda x: 1 / (1 + np.exp(-x)), 3: lambda x: x}[gating](scores)
        rating = p + (0 if self.off("choice_bias") else self.tensors.get(f"{b}.exp_probs_b.bias", 0))
        groups = self.key("expert_group_count", 1)
        if groups > 1 and not self.off("groups"):
            of_group = np.sort(rating.reshape(groups, -1), -1)[:, -2:].sum(-1)
            out = np.argsort(of_group)[: groups - self.key("expert_group_used_count")]
            rating.reshape(groups, -1)[out] = -np.inf
        best = np.sort(np.argsort(-rating, kind="stable")[: self.key("expert_used_count")])
        weights = oracle.softmax(p[best]) if gating == 3 else p[best]
        if self.key("expert_weights_norm") and not self.off("renorm"):
            weights = weights / weights.sum()
        return dict(
            zip(best, weights * (1 if self.off("scale") else self.key("expert_weights_scale", 0) or 1))
        )

    def one(self, x, gate, up, down):
        if gate is None:
            return down(relu2(up(x)))
        return down(oracle.silu(gate(x)) * up(x))

    def expert(self, x, e, b):
        def times(name):
            return lambda y: self.matrices(name, b)[e] @ y + self.bias(name, b)[e]

        gate = times("ffn_gate_exps") if f"{b}.ffn_gate_exps.weight" in self.tensors else None
        return self.one(x, gate, times("ffn_up_exps"), times("ffn_down_exps"))

    def shared(self, x, b):
        def times(name):
            return lambda y: self.tensors[f"{b}.{name}.weight"] @ y

        if f"{b}.ffn_up_shexp.weight" not in self.tensors or self.off("shared"):
            return 0
        gate = times("ffn_gate_shexp") if f"{b}.ffn_gate_shexp.weight" in self.tensors else None
        y = self.one(x, gate, times("ffn_up_shexp"), times("ffn_down_shexp"))
        switch = self.tensors.get(f"{b}.ffn_gate_inp_shexp.weight")
        return y if switch is None or self.off("switch") else y / (1 + np.exp(-(switch.reshape(-1) @ x)))

    def feed_forward(self, x, layer):
        b, out = f"blk.{layer}", np.empty_like(x)
        router = self.tensors[f"{b}.ffn_gate_inp.weight"]
        for t, token in enumerate(x):
            chosen = self.choose(router @ token + self.tensors.get(f"{b}.ffn_gate_inp.bias", 0), b)
            latent = f"{b}.ffn_latent_down.weight" in self.tensors
            inner = self.tensors[f"{b}.ffn_latent_down.weight"] @ token if latent else token
            y = sum(weight * self.expert(inner, e, b) for e, weight in chosen.items())
            out[t] = (self.tensors[f"{b}.ffn_latent_up.weight"] @ y if latent else y) + self.shared(token, b)
        return out


class Nemotron(Experts):
    """A block a layer, attention without positions."""

    gating = 2

    def run(self, tokens):
        self.rope, x = False, self.tensors["token_embd.weight"][tokens]
        for layer in range(self.key("block_count")):
            block = (
                self.feed_forward if f"blk.{layer}.ffn_gate_inp.weight" in self.tensors else self.attention
            )
            x = x + block(self.norm(x, f"blk.{layer}.attn_norm"), layer)
        return self.norm(x, "output_norm") @ self.tensors["output.weight"].T


def model_parts(keys=(), more=(), types="F32", n=N, **shape):
    """A model of two layers with experts: keys of its metadata, tensors added to each layer {name: shape}."""

    def layer(m, i):
        return [
            *norm("attn_norm", DIM),
            *attention(DIM, 4, 2, 32, qk_norm=True),
            *norm("ffn_norm", DIM),
            *experts(DIM, n, 32, **shape),
        ]

    own = {"expert_count": n, "expert_used_count": ACTIVE, "expert_feed_forward_length": 32} | dict(keys)
    metadata, tensors = tiny_kinds.parts(tiny_kinds.simple(ARCH, layer, 2, own), types)
    rng = np.random.default_rng(0)
    for name, dims in dict(more).items():
        tensors |= {
            f"blk.{i}.{name}": ("F32", rng.standard_normal(dims).astype(np.float32).view(np.uint8))
            for i in range(2)
        }
    return metadata, tensors


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, tiny_kinds.VOCAB_SIZE, n).astype(np.int32)


def evaluate(path, tokens, width=None, threads=1):
    with pybmc.Model(path, threads=threads) as model, model.session() as session:
        return np.concatenate(
            [
                session.eval(tokens[i : i + (width or 512)], logits="all")
                for i in range(0, len(tokens), width or 512)
            ]
        )


def check(tmp_path, metadata, tensors, mutations=(), without=()):
    """Our logits are the oracle's, and not those of an oracle that leaves one of these out,
    or does without a bias."""
    words = text(40)
    ours = evaluate(tiny.save(tmp_path / "m.gguf", metadata, tensors), words)
    weights = oracle.weights(tensors)

    def error(zero="", **mutation):
        spoiled = {name: value * (name != zero) for name, value in weights.items()}
        right = Experts(metadata, spoiled, **mutation).run(words)
        return np.sqrt(((ours - right) ** 2).mean()) / right.std()

    assert error() < FLOAT
    errors = {name: error(**{name: False}) for name in mutations} | {name: error(name) for name in without}
    assert {name: e for name, e in errors.items() if e < 5 * FLOAT} == {}


GROUPS = {"expert_group_count": 3, "expert_group_used_count": 1}


@pytest.mark.parametrize("gating", [1, 2, 3])
@pytest.mark.parametrize(
    "keys, choice_bias, mutations",
    [
        ({}, False, []),
        ({"expert_weights_norm": True}, True, ["choice_bias"]),
        ({"expert_weights_scale": 2.5, **GROUPS}, False, ["scale", "groups"]),
        (
            {"expert_weights_norm": True, "expert_weights_scale": 1.7, **GROUPS},
            True,
            ["scale", "groups", "choice_bias"],
        ),
    ],
    ids=["plain", "bias", "groups", "all"],
)
def test_choice_and_weights_equal_the_oracle(gating, keys, choice_bias, mutations, tmp_path):
    more = {"exp_probs_b.bias": (N,)} if choice_bias else {}
    keys = keys | {"expert_gating_func": gating}
    metadata, tensors = model_parts(keys, more)
    check(
        tmp_path,
        metadata,
        tensors,
        mutations
        + ["renorm"] * (keys.get("expert_weights_norm", False) and gating < 3)
        + ["gating"] * (gating > 1),
    )


def test_a_shared_expert_and_its_switch(tmp_path):
    metadata, tensors = model_parts({"expert_shared_feed_forward_length": 48}, shared_dim=48)
    check(tmp_path, metadata, tensors, ["shared"])
    metadata, tensors = model_parts(
        {"expert_shared_feed_forward_length": 48}, {"ffn_gate_inp_shexp.weight": (DIM,)}, shared_dim=48
    )
    check(tmp_path, metadata, tensors, ["shared", "switch"])


def test_experts_with_biases(tmp_path):
    biases = {
        "ffn_gate_inp.bias": (N,),
        "ffn_gate_exps.bias": (N, 32),
        "ffn_up_exps.bias": (N, 32),
        "ffn_down_exps.bias": (N, DIM),
    }
    check(
        tmp_path, *model_parts(more=biases), without=[f"blk.{i}.{name}" for i in range(2) for name in biases]
    )


def test_experts_on_fewer_values(tmp_path):
    """Squared ReLU, no gates, and a shared expert on all values."""
    shape = nemotron_h(
        dim=DIM,
        pattern="*E*E",
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        n=N,
        n_active=ACTIVE,
        expert_dim=32,
        shared_dim=64,
        latent_dim=32,
        n_ctx=2048,
    )
    metadata, tensors = tiny_kinds.parts(shape, "F32")
    metadata = {key: value for key, value in metadata.items() if ".ssm." not in key}
    words = text(40)
    ours = evaluate(tiny.save(tmp_path / "m.gguf", metadata, tensors), words)
    for mutation, least, most in (
        ({}, 0, FLOAT),
        ({"shared": False}, 5 * FLOAT, 9),
        ({"choice_bias": False}, 5 * FLOAT, 9),
    ):
        right = Nemotron(metadata, oracle.weights(tensors), **mutation).run(words)
        assert least <= np.sqrt(((ours - right) ** 2).mean()) / right.std() < most, mutation


def test_gates_and_ups_of_all_experts_in_one_tensor(tmp_path):
    metadata, tensors = model_parts()
    right = evaluate(tiny.save(tmp_path / "a.gguf", metadata, tensors), text(20))
    for i in range(2):
        gate, up = (tensors.pop(f"blk.{i}.ffn_{name}_exps.weight") for name in ("gate", "up"))
        tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = gate[0], np.concatenate([gate[1], up[1]], axis=1)
    assert (evaluate(tiny.save(tmp_path / "b.gguf", metadata, tensors), text(20)) == right).all()


def test_a_tensor_for_each_expert(tmp_path):
    metadata, tensors = model_parts()
    right = evaluate(tiny.save(tmp_path / "a.gguf", metadata, tensors), text(20))
    for i in range(2):
        for name in ("gate", "up", "down"):
            kind, data = tensors.pop(f"blk.{i}.ffn_{name}_exps.weight")
            tensors |= {
                f"blk.{i}.ffn_{name}.{e}.weight": (kind, np.ascontiguousarray(data[e])) for e in range(N)
            }
    assert (evaluate(tiny.save(tmp_path / "b.gguf", metadata, tensors), text(20)) == right).all()
    del tensors["blk.1.ffn_up.3.weight"]
    with pytest.raises(pybmc.FormatError, match="not all experts are there"):
        pybmc.Model(tiny.save(tmp_path / "c.gguf", metadata, tensors))


def test_the_bias_of_the_choice_by_its_name_without_a_suffix(tmp_path):
    metadata, tensors = model_parts(more={"exp_probs_b.bias": (N,)})
    right = evaluate(tiny.save(tmp_path / "a.gguf", metadata, tensors), text(20))
    renamed = {name.replace("exp_probs_b.bias", "exp_probs_b"): value for name, value in tensors.items()}
    assert (evaluate(tiny.save(tmp_path / "b.gguf", metadata, renamed), text(20)) == right).all()


@lru_cache(maxsize=None)
def unbalanced(types, how):
    """A file in which every token takes the same experts ("same"), or each expert has few tokens, or one,
    or none."""
    metadata, tensors = model_parts(
        {"expert_shared_feed_forward_length": 64}, types=types, n=N if how == "same" else 96, shared_dim=64
    )
    if how == "same":
        bias = np.float32([0, 9, 0, 0, 8, 0]).view(np.uint8)
        tensors |= {f"blk.{i}.exp_probs_b.bias": ("F32", bias) for i in range(2)}
    return tiny.save(tiny.folder() / f"{how}-{types}.gguf", metadata, tensors)


@pytest.mark.parametrize("how", ["same", "few"])
@pytest.mark.parametrize("types", ["F16", "Q8_0", "Q4_0"])
def test_any_number_of_tokens_for_an_expert(how, types):
    """500 tokens that all take two experts, or 96 experts for them;
    in one pass, in passes of 7 and 100, and one by one."""
    words = text(500)
    right = evaluate(unbalanced(types, how), words)
    for width, threads in ((7, 1), (100, 3), (499, 2)):
        assert (evaluate(unbalanced(types, how), words, width, threads) == right).all()
    assert (evaluate(unbalanced(types, how), words[:60], 1) == right[:60]).all()
