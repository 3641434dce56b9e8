"""Gemma 3n: AltUp, LAuReL, sparse gates and layers without keys and values, against float64."""

import altup_oracle
import numpy as np
import oracle
import pytest
import tiny
import tiny_kinds
from places import SHARED

import pybmc

FLOAT = 2e-3    # error over spread: keys and values in f16, and a gate beside the threshold may count or not


def made(types="F16"):
    return tiny_kinds.parts("AltUp", types)


def evaluate(path, tokens, threads=1):
    with pybmc.Model(path, threads=threads) as model, model.session() as session:
        return session.eval(tokens, logits="all")


def text(n=40):
    return np.random.default_rng(n).integers(0, tiny_kinds.VOCAB_SIZE, n).astype(np.int32)


def error(ours, right):
    return np.sqrt(((ours - right) ** 2).mean()) / right.std()


def changed(tmp_path, keys=(), without=(), **tensors):
    metadata, parts = made()
    metadata |= {f"gemma3n.{key}": value for key, value in dict(keys).items()}
    parts = {name: value for name, value in parts.items() if name not in without} | tensors
    return tiny.save(tmp_path / "m.gguf", metadata, parts)


def test_it_equals_the_oracle_and_each_part_counts(tmp_path):
    metadata, tensors = made()
    ours = evaluate(tiny.save(tmp_path / "m.gguf", metadata, tensors), text(), 2)
    weights = oracle.weights(tensors)
    assert error(ours, altup_oracle.Gemma3n(metadata, weights).run(text())) < FLOAT
    errors = {part: error(ours, altup_oracle.Gemma3n(metadata, weights, part).run(text()))
              for part in altup_oracle.PARTS}
    assert {part: e for part, e in errors.items() if e < 5 * FLOAT} == {}


@pytest.mark.parametrize("types", ["Q8_0", "Q4_0"])
def test_quantized_matrices(types, tmp_path):
    """Those of AltUp too, whose rows are taken from the middle of a token's."""
    metadata, tensors = made(types)
    ours = evaluate(tiny.save(tmp_path / "m.gguf", metadata, tensors), text())
    assert error(ours, altup_oracle.Gemma3n(metadata, oracle.weights(tensors)).run(text())) < 0.05


def test_the_oracle_equals_the_golden_logits():
    path = SHARED / "golden-breadth" / "gemma3n.F16.gguf"
    if not path.is_file():
        pytest.skip("needs ../shared")
    with np.load(path.with_suffix(".npz")) as file:
        right = altup_oracle.Gemma3n(*oracle.read(path)).run(file["tokens"])
        error = np.sqrt(((right - file["ref"]) ** 2).mean())
    assert error < 5e-3                 # llama.cpp takes GELU from a table of f16


def test_keys_and_values_of_layers_that_read_others_are_not_loaded(tmp_path):
    """Files have them all the same."""
    metadata, tensors = made()
    right = evaluate(tiny.save(tmp_path / "a.gguf", metadata, tensors), text())
    for i in (3, 4):
        tensors |= {f"blk.{i}.{name}.weight": tensors[f"blk.0.{name}.weight"]
                    for name in ("attn_k", "attn_v", "attn_k_norm")}
    path = tiny.save(tmp_path / "b.gguf", metadata, tensors)
    assert (evaluate(path, text()) == right).all()
    with pybmc.Model(path) as model, pybmc.Model(tmp_path / "a.gguf") as other:
        assert model.packed_bytes == other.packed_bytes


def test_twenty_layers_have_keys_and_values_where_the_key_is_absent(tmp_path):
    absent = dict.fromkeys(("attention.shared_kv_layers", "activation_sparsity_scale",
                            "attention.sliding_window_pattern"))
    shape = tiny_kinds.simple("gemma3n", tiny_kinds.gemma3n, 22,
                              lambda m: tiny_kinds.gemma3n_keys(m) | absent, True, tiny_kinds.gemma3n_outside)
    metadata, tensors = tiny_kinds.parts(shape)
    own = ("attn_k", "attn_v", "attn_k_norm")
    tensors |= {f"blk.{i}.{name}.weight": tensors[f"blk.0.{name}.weight"] for i in range(3, 20)
                for name in own}
    with pybmc.Model(tiny.save(tmp_path / "m.gguf", metadata, tensors)) as model:
        mixers = [block for _, block in model.config.blocks if block.kind == "ATTENTION"]
        gates = [block.sparsity for _, block in model.config.blocks if block.kind == "DENSE"]
    assert [block.source for block in mixers] == [None] * 20 + [18, 18]
    assert [block.window for block in mixers] == [0 if i % 5 == 4 else 16 for i in range(22)]
    assert gates == [pytest.approx(1.6448536)] * 10 + [0] * 12


@pytest.mark.parametrize("keys, message", [
    ({"altup.active_idx": 1}, "altup.active_idx: expected 0, found 1"),
    ({"altup.num_inputs": 1}, "altup.num_inputs: expected 2 to 8, found 1"),
    ({"altup.num_inputs": 4}, "expected 192 rows of 64 values, found 128 of 64"),
    ({"activation_sparsity_scale": [0.5, -1.0, 0.5, 0.5, 0.5]},
     "activation_sparsity_scale: expected a number above 0 up to 100, or -inf"),
    ({"activation_sparsity_scale": [0.5, float("nan"), 0.5, 0.5, 0.5]},
     "activation_sparsity_scale: expected a number above 0"),
    ({"activation_sparsity_scale": [0.5]}, "one for each of 5 layers, found 1"),
    ({"embedding_length_per_layer_input": 0},
     "embedding_length_per_layer_input: expected 1 to 65536, found 0"),
])
def test_keys_out_of_range(keys, message, tmp_path):
    with pytest.raises(pybmc.FormatError, match=message):
        pybmc.Model(changed(tmp_path, keys))


@pytest.mark.parametrize("name", [
    "per_layer_token_embd", "per_layer_model_proj", "per_layer_proj_norm", "altup_proj", "altup_unembd_proj",
    "blk.1.altup_router", "blk.1.altup_router_norm", "blk.2.altup_predict_coef", "blk.2.altup_correct_coef",
    "blk.0.altup_correct_scale", "blk.3.laurel_l", "blk.3.laurel_r", "blk.3.laurel_post_norm",
    "blk.3.ffn_gate", "blk.1.attn_k_norm",
    "blk.4.attn_q_norm", "blk.0.post_norm",
])
def test_a_missing_tensor_is_named(name, tmp_path):
    with pytest.raises(pybmc.FormatError, match=rf"{name}.weight is missing"):
        pybmc.Model(changed(tmp_path, without=(f"{name}.weight",)))
