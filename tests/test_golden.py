"""The engine's logits against exact ones: a float64 oracle on models made here, and the golden folder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
from places import GOLDEN, SHARED

import pybmc
from tools import golden

ROOT = Path(__file__).parents[1]

# Error over spread of the logits. Float weights leave what keys and values lose in f16 (11 bits), measured
# 1.3e-4 to 3.4e-4; quantized ones what activations lose in 8 bits: 4e-3 to 2e-2. A step left out is seen, as
# shown below.
FLOAT, QUANTIZED = 1e-3, 3e-2
FLOATS = ("F32", "F16", "BF16")
ORACLES = [f"{arch}.F16" for arch in (*tiny.ARCHITECTURES, "llama3")]


def some_tokens(n=48, vocab_size=401):
    return np.random.default_rng(n).integers(0, vocab_size, n)


def evaluate(path, tokens, context=None):
    with pybmc.Model(path, threads=2) as model, model.session(context=context) as session:
        return session.eval(tokens, logits="all")


def error(ours, right):
    return golden.rms(ours - right) / right.std()


class Case:
    """A model as its parts, its file's logits and the oracle's."""

    def __init__(self, tmp_path, metadata, tensors, n_tok=48, context=None):
        self.metadata, self.weights, self.context = metadata, oracle.weights(tensors), context
        self.tokens = some_tokens(n_tok, len(self.weights["token_embd.weight"]))
        self.ours = evaluate(tiny.save(tmp_path / "model.gguf", metadata, tensors), self.tokens, context)

    def error(self, weights=None, metadata=None, **mutation):
        right = oracle.logits(
            metadata or self.metadata, weights or self.weights, self.tokens, self.context, **mutation
        )
        return error(self.ours, right)


def vector(n, seed=0, mean=0.0):
    values = mean + 0.2 * np.random.default_rng(seed).standard_normal((1, n))
    return "F32", values.astype(np.float32).view(np.uint8)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_K"])
def test_every_architecture_equals_the_oracle(arch, type, tmp_path):
    shape = {"dim": 256, "head_dim": 32, "n_layers": 2} if type == "Q4_K" else {}
    case = Case(tmp_path, *tiny.parts(arch, types=type, **shape))
    assert case.error() < (FLOAT if type in FLOATS else QUANTIZED)


@pytest.mark.parametrize("type", tiny.TYPES + tiny.OWN_TYPES)
def test_every_type_equals_the_oracle(type, tmp_path):
    case = Case(tmp_path, *tiny.parts("llama", types=type, dim=256, hidden_dim=512, head_dim=32))
    assert case.error() < (FLOAT if type in FLOATS else QUANTIZED)


@pytest.mark.parametrize(
    "shape",
    [
        {"n_heads": 4, "n_kv_heads": 4}, {"n_heads": 6, "n_kv_heads": 2, "dim": 96},
        {"n_heads": 8, "n_kv_heads": 1}, {"head_dim": 80, "n_heads": 2}, {"head_dim": 8, "n_heads": 2},
        {"head_dim": 24, "n_heads": 3, "n_kv_heads": 3}, {"head_dim": 256, "n_heads": 2}, {"vocab_size": 523},
        {"hidden_dim": 100}, {"dim": 100, "n_heads": 5, "n_kv_heads": 1}, {"n_layers": 1, "tied": True},
    ],
    ids=str,
)
def test_shapes(shape, tmp_path):
    assert Case(tmp_path, *tiny.parts("llama", **shape)).error() < FLOAT


# What the tolerance sees: each part of a model, left out of the oracle.


def without(weights, word):
    """The weights with every norm or bias of this name made neutral."""
    found = [name for name in weights if word in name]
    assert found
    return weights | {
        name: np.full_like(weights[name], 0.0 if name.endswith("bias") else 1.0) for name in found
    }


VECTORS = {
    "llama": ["attn_norm", "ffn_norm", "output_norm"],
    "qwen2": ["attn_q.bias", "attn_k.bias", "attn_v.bias"],
    "qwen3": ["attn_q_norm", "attn_k_norm"],
    "gpt2": [
        "attn_norm.weight", "attn_norm.bias", "attn_qkv.bias", "attn_output.bias", "ffn_norm.weight",
        "ffn_norm.bias", "ffn_up.bias", "ffn_down.bias", "output_norm.weight", "output_norm.bias",
    ],
    "gemma3": ["attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"],
    "phi3": ["attn_norm", "ffn_norm"],
}
STEPS = {
    "llama": [{"rope": False}, {"swap_pairs": True}], "qwen2": [{"rope": False}, {"swap_pairs": True}],
    "qwen3": [{"rope": False}, {"swap_pairs": True}], "gpt2": [{"tanh_gelu": False}],
    "gemma3": [{"rope": False}, {"windows": False}, {"tanh_gelu": False}, {"embedding_scale": False}],
    "phi3": [{"rope": False}, {"swap_pairs": True}],
}


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_a_step_that_is_left_out_is_seen(arch, tmp_path):
    case = Case(tmp_path, *tiny.parts(arch))
    assert case.error() < FLOAT
    errors = {word: case.error(without(case.weights, word)) for word in VECTORS[arch]}
    errors |= {str(step): case.error(**step) for step in STEPS[arch]}
    assert {what: e for what, e in errors.items() if e < 5 * FLOAT} == {}


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_a_matrix_of_another_layer_is_seen(arch, tmp_path):
    case = Case(tmp_path, *tiny.parts(arch))
    for name in [
        name for name in case.weights if name.startswith("blk.0.") and not oracle.kind_is_vector(name)
    ]:
        assert (
            case.error(case.weights | {name: case.weights[name.replace("blk.0.", "blk.1.")]}) > 5 * FLOAT
        ), name


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_epsilon(arch, tmp_path):
    metadata, tensors = tiny.parts(arch)
    key = f"{arch}.attention.layer_norm_{'rms_' if arch == 'llama' else ''}epsilon"
    case = Case(tmp_path, metadata | {key: 0.05}, tensors)
    assert case.error() < FLOAT < 5 * FLOAT < case.error(metadata=metadata)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_biases_where_they_are_optional(arch, tmp_path):
    metadata, tensors = tiny.parts(arch)
    for role, n in (
        ("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64), ("ffn_gate", 96), ("ffn_up", 96),
        ("ffn_down", 64),
    ):
        tensors |= {f"blk.{layer}.{role}.bias": vector(n, seed=n + layer) for layer in range(2)}
    case = Case(tmp_path, metadata, tensors)
    assert case.error() < FLOAT
    for role in ("attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        assert case.error(without(case.weights, f"{role}.bias")) > 5 * FLOAT, role


def test_window_pattern_as_flags_and_a_base_for_windowed_layers(tmp_path):
    metadata, tensors = tiny.parts("gemma3", n_layers=3)
    metadata |= {
        "gemma3.attention.sliding_window_pattern": [False, True, True], "gemma3.attention.sliding_window": 5,
        "gemma3.rope.freq_base_swa": 500.0, "gemma3.rope.freq_base": 1e6,
    }
    case = Case(tmp_path, metadata, tensors)
    assert (
        case.error()
        < FLOAT
        < 5 * FLOAT
        < min(
            case.error(metadata=metadata | {key: value})
            for key, value in (
                ("gemma3.attention.sliding_window_pattern", [True, True, False]),
                ("gemma3.attention.sliding_window", 6), ("gemma3.rope.freq_base_swa", 10000.0),
                ("gemma3.rope.freq_base", 10000.0),
            )
        )
    )


# Rotary positions


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(
    "keys",
    [
        {"type": "linear", "factor": 4.0},
        {"type": "yarn", "factor": 8.0, "original_context_length": 64},
        {"type": "yarn", "factor": 3.5, "original_context_length": 400, "attn_factor": 1.3},
    ],
    ids=str,
)
def test_rope_scaling(arch, keys, tmp_path):
    metadata, tensors = tiny.parts(arch)
    metadata |= {f"{arch}.rope.freq_base": 500.0} | {
        f"{arch}.rope.scaling.{key}": value for key, value in keys.items()
    }
    case = Case(tmp_path, metadata, tensors)
    assert case.error() < FLOAT < 5 * FLOAT < case.error(scaling=False)


def test_rope_scaling_none_and_unknown(tmp_path):
    metadata, tensors = tiny.parts("llama")
    case = Case(
        tmp_path, metadata | {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, tensors
    )
    assert case.error() < FLOAT
    with pytest.raises(
        pybmc.FormatError, match="rope.scaling.type: expected none, linear, yarn or longrope, found dynamic"
    ):
        Case(tmp_path, metadata | {"llama.rope.scaling.type": "dynamic"}, tensors)


def test_llama3_factors(tmp_path):
    case = Case(tmp_path, *tiny.parts("llama", rope_factors=True))
    assert case.error() < FLOAT < 5 * FLOAT < case.error(scaling=False)


def test_part_of_a_head_turns(tmp_path):
    for arch in ("llama", "phi3"):
        metadata, tensors = tiny.parts(arch)
        case = Case(tmp_path, metadata | {f"{arch}.rope.dimension_count": 10}, tensors)
        assert case.error() < FLOAT < 5 * FLOAT < case.error(metadata=metadata)


@pytest.mark.parametrize(
    "original, context, long",
    [(100, None, True), (100, 100, False), (100, 101, True), (512, None, False), (512, 64, False)],
)
def test_longrope_takes_its_factors_by_the_cap(original, context, long, tmp_path):
    """The cap decides, and not how long the sequence is: 48 tokens in all of these."""
    metadata, tensors = tiny.parts("phi3", rope_factors=True)
    metadata |= {"phi3.rope.scaling.original_context_length": original, "phi3.rope.scaling.attn_factor": 1.2}
    case = Case(tmp_path, metadata, tensors, context=context)
    assert case.error() < FLOAT < 5 * FLOAT < case.error(scaling=False)
    case.context = 50 if long else 500
    assert case.error(metadata=metadata | {"phi3.rope.scaling.original_context_length": 100}) > 5 * FLOAT


def test_both_factors_in_one_pass(tmp_path):
    """Two sessions of one model, one short and one long, evaluated together."""
    metadata, tensors = tiny.parts("phi3", rope_factors=True)
    metadata |= {"phi3.rope.scaling.original_context_length": 100}
    tokens, weights = some_tokens(), oracle.weights(tensors)
    with pybmc.Model(tiny.save(tmp_path / "model.gguf", metadata, tensors)) as model:
        sessions = [model.session(context=context) for context in (64, 512)]
        for ours, session in zip(
            pybmc.eval_batch([(session, tokens, "all") for session in sessions]), sessions
        ):
            assert error(ours, oracle.logits(metadata, weights, tokens, session.context)) < FLOAT


# The golden folder and its tool


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_models(path):
    row = golden.compare(path)
    assert row.holds and row.compared >= 56, row


def test_positions_whose_experts_are_nearly_a_tie_are_left_out():
    ref = np.zeros((4, 8), np.float32)
    theirs = np.repeat(np.float32([[0.1], [0.1], [5.0], [0.1]]), 8, axis=1)    # the third chose other experts
    made = {"tokens": np.arange(4), "ref": ref, "llamacpp": theirs}
    assert golden.routed(made).tolist() == [True] * 4
    assert (golden.routed(made | {"route_gap": np.array([0.3, 0.21, 0.05, 0.19])}).tolist()
            == [True, True, False, False])


def test_a_scale_beside_nvfp4_multiplies_its_values():
    path = SHARED / "golden-breadth" / "low-bit.pure-NVFP4.gguf"
    if not path.is_file():
        pytest.skip("needs ../shared")
    metadata, values = oracle.read(path)
    scales = {name: value for name, value in values.items() if name.endswith(".scale")}
    matrices = {name.replace(".scale", ".weight"): values[name.replace(".scale", ".weight")] * value
                for name, value in scales.items()}
    assert len(matrices) == 14
    with np.load(path.with_suffix(".npz")) as file:
        tokens, ref, context = file["tokens"], file["ref"], int(file["n_ctx"])
    assert error(oracle.logits(metadata, values | matrices, tokens, context), ref) < 1e-5
    assert error(oracle.logits(metadata, values, tokens, context), ref) > 0.1


@pytest.mark.parametrize("path", [path for path in GOLDEN if path.stem in ORACLES],
                         ids=lambda path: path.stem)
def test_the_oracle_equals_golden_logits(path):
    """llama.cpp takes GELU from a table of f16, 2e-3 off at worst; everything else is float32."""
    with np.load(path.with_suffix(".npz")) as file:
        right = oracle.logits(*oracle.read(path), file["tokens"], int(file["n_ctx"]))
        assert golden.rms(right - file["ref"]) < (3e-3 if path.stem.startswith(("gemma", "gpt2")) else 1e-5)


def write_pair(folder, shift=0.0):
    """A model and the oracle's logits of it; shift spoils them."""
    metadata, tensors = tiny.parts("llama")
    tiny.save(folder / "made.gguf", metadata, tensors)
    weights, tokens = oracle.weights(tensors), some_tokens(16)
    ref = oracle.logits(metadata, weights, tokens)
    run, gaps = list(tokens), []
    for _ in range(6):
        last = oracle.logits(metadata, weights, run)[-1]
        gaps.append(golden.lead(last))
        run.append(int(last.argmax()))
    noise = np.random.default_rng(0).standard_normal(ref.shape) * 3e-3
    np.savez(
        folder / "made.npz", tokens=tokens, ref=(ref + shift * ref[:, ::-1]).astype(np.float32), n_ctx=512,
        greedy_gap=np.array(gaps), llamacpp=(ref + shift * ref[:, ::-1] + noise).astype(np.float32),
        greedy_prompt=tokens, greedy_tokens=np.array(run[16:]),
    )


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.golden", *arguments], capture_output=True, text=True, cwd=ROOT,
    )


def test_the_tool(tmp_path):
    empty = run_tool(tmp_path)
    assert empty.returncode == 1 and "there are no pairs" in empty.stderr and empty.stdout == ""
    write_pair(tmp_path)
    good = run_tool(tmp_path)
    assert good.returncode == 0 and "| made |" in good.stdout and "| 6 of 6 | holds |" in good.stdout
    write_pair(tmp_path, shift=0.3)
    bad = run_tool(tmp_path, "--json")
    row = json.loads(bad.stdout)
    assert bad.returncode == 3 and row["file"] == "made" and not row["holds"] and row["rms"] > row["limit"]
