"""Metadata of every kind of layer: what is not known, or cannot be meant, is an error that names it,
and never another answer."""

import random

import numpy as np
import pytest
import tiny
import tiny_kinds
from raw import I32, Raw, array
from test_model import entries

import pybmc
from pybmc.files.gguf import GGUF
from pybmc.models.config import read_config
from pybmc.models.keys import HARMLESS, NEUTRAL
from pybmc.show import describe, lines

TOKENS = np.arange(5, 45, dtype=np.int32)


def parts(name):
    return tiny.parts(name) if name in tiny.RECURRENT else tiny_kinds.parts(name)


def written(folder, metadata, tensors):
    return Raw({key: value for key, value in metadata.items() if value is not None},
               entries(tensors)).save(folder / "m.gguf")


def changed(folder, name, **keys):
    """A file of a kind with other values; two underscores in a key are a dot."""
    metadata, tensors = parts(name)
    arch = metadata["general.architecture"]
    return written(folder, metadata
                   | {f"{arch}.{key.replace('__', '.')}": value for key, value in keys.items()}, tensors)


def refuse(path, words):
    """Loading and show say the same."""
    with pytest.raises(pybmc.FormatError, match=words) as caught:
        pybmc.Model(path, threads=1)
    assert str(path) in str(caught.value)
    info = describe(path)
    assert not info["runs"] and info["why_not"] == str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", tiny_kinds.NAMES)
def test_an_unknown_key_or_tensor_is_named(name, tmp_path):
    refuse(changed(tmp_path, name, attention__new_kind=2),
           r"does not know the key \S+\.attention\.new_kind \(2\)")
    metadata, tensors = parts(name)
    for tensor in ("blk.0.attn_new.weight", "blk.0.ffn_new_exps.weight", "new_norm.weight",
                   "blk.0.attn_norm.scale"):
        extra = {tensor: ("F32", np.zeros((1, 256), np.uint8))}
        refuse(written(tmp_path, metadata, tensors | extra), f"{tensor}: pybmc does not know this tensor")


@pytest.mark.parametrize("key", NEUTRAL)
def test_keys_that_would_change_something_have_their_neutral_value(key, tmp_path):
    """Where the architecture does not have what they are for."""
    neutral = changed(tmp_path, "ALiBi", **{key.replace(".", "__"): NEUTRAL[key]})
    assert (logits(neutral) == logits(tiny_kinds.model("ALiBi"))).all()
    for value in (7, 0.25, "word", True):
        refuse(changed(tmp_path, "ALiBi", **{key.replace(".", "__"): value}),
               f"bloom.{key}: expected {NEUTRAL[key]}, as pybmc knows of no")


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_keys_without_effect(key, tmp_path):
    value = {"rope.dimension_sections": array(I32, np.int32([4, 2, 2, 0]).tobytes(), 4),
             "vocab_size": 7}.get(key, 1.5)
    paths = tiny_kinds.model("norms after"), changed(tmp_path, "norms after",
                                                     **{key.replace(".", "__"): value})
    assert (logits(paths[0]) == logits(paths[1])).all()


def logits(path):
    with pybmc.Model(path, threads=1) as model, model.session() as session:
        return session.eval(TOKENS[:min(len(TOKENS), session.context)], logits="all")


def flags(*values):
    return np.array(values, bool)


@pytest.mark.parametrize("name, keys, message", [
    ("MLA", {"leading_dense_block_count": 2},
     r"leading_dense_block_count: expected at most 1, as blk.1.ffn_gate_inp.weight is there, found 2"),
    ("MLA", {"attention__head_count_kv": 2}, "head_count_kv: expected 1 or 3, found 2"),
    ("MLA", {"expert_shared_count": 0},
     "expert_shared_count: expected at least 1, as there is blk.1.ffn_up_shexp.weight, found 0"),
    ("MLA", {"expert_shared_count": 2}, "ffn_gate_shexp.weight: expected 64 rows of 64 values, found 32"),
    ("MLA", {"expert_group_count": 4}, "2 of 4 groups of 6 experts"),
    ("MLA", {"expert_group_used_count": 0}, "0 of 3 groups"),
    ("MLA", {"expert_gating_func": 4}, "expert_gating_func: expected 0 to 3, found 4"),
    ("MLA", {"attention__kv_lora_rank": 0}, "kv_lora_rank: expected 1 to"),
    ("MLA", {"attention__q_lora_rank": 16}, "attn_q_a.*expected 16 rows"),
    ("MLA", {"attention__key_length_mla": 8}, "rope.dimension_count: expected an even number up to 8"),
    ("experts", {"expert_used_count": 7}, "expert_used_count: expected 1 to 6, found 7"),
    ("experts", {"expert_count": 5}, "expected 5 rows of 64"),
    ("experts", {"expert_shared_count": 1}, "blk.0.ffn_up_shexp.weight is missing"),
    ("experts", {"expert_weights_scale": -1.0}, "expert_weights_scale"),
    ("sinks", {"attention__sliding_window_pattern": flags(True)},
     "sliding_window_pattern: expected one for each of 2 layers, found 1"),
    ("sinks", {"attention__sliding_window_pattern": flags(True, False, True)},
     "sliding_window_pattern: expected one for each of 2 layers, found 3"),
    ("gates of heads", {"attention__head_count": [4, 4, 4]},
     "head_count: expected one for each of 4 layers, found 3"),
    ("gates of heads", {"attention__head_count": [2, 4, 4, 4, 4]}, "one for each of 4 layers, found 5"),
    ("gates of heads", {"attention__head_count": [2, 4, 0, 4]}, "head_count: expected 1 to 4096, found 0"),
    ("gates of heads", {"attention__head_count": [2, 4, 3, 4]},
     "head_count_kv: expected a divisor of 3 heads, found 2"),
    ("gates of heads", {"rope__scaling__type": "dynamic"}, "rope.scaling.type"),
    ("gates of heads", {"rope__dimension_count_swa": 34}, "expected an even number up to 32"),
    ("per-layer inputs", {"attention__shared_kv_layers": 6}, "shared_kv_layers: expected fewer layers than"),
    ("per-layer inputs", {"attention__shared_kv_layers": 7}, "shared_kv_layers: expected 0 to 6, found 7"),
    ("per-layer inputs", {"embedding_length_per_layer_input": 16},
     "per_layer_token_embd.weight: expected 401 rows of 112"),
    ("per-layer inputs", {"embedding_length_per_layer_input": 0},
     r"blk.0.\w+.weight: pybmc does not know this tensor"),
    ("blocks side by side", {"attention__clamp_kqv": 8.0},
     "attention.clamp_kqv: expected 0, as pybmc knows of no other for cohere2, found 8.0"),
    ("blocks side by side", {"expert_count": 8},
     "expert_count: expected 0, as pybmc knows of no other for cohere2, found 8"),
    ("norms after", {"rope__scaling__yarn_ext_factor": 1.0},
     "yarn_ext_factor: expected 0 with scaling none, found 1.0"),
    ("norms after", {"nextn_predict_layers": np.array([1, 0])},
     "nextn_predict_layers: expected one whole number"),
    ("norms after", {"block_count": np.array([2, 2])}, "block_count: expected one for each"),
    ("norms after", {"nextn_predict_layers": 2}, "block_count"),
    ("latent experts", {"feed_forward_length": [0, 32, 0]},
     "feed_forward_length: expected one for each of 4 layers, found 3"),
])
def test_values_that_cannot_be_meant(name, keys, message, tmp_path):
    refuse(changed(tmp_path, name, **keys), message)


def test_activations_by_numbers_of_each_layer(tmp_path):
    def layer(m, i):
        return [*tiny_kinds.norm("attn_norm", 64), *tiny_kinds.plain_attention(qk_norm=True),
                *tiny_kinds.norm("ffn_norm", 64), *tiny_kinds.dense(64, 96, gated=False)]

    metadata, tensors = tiny_kinds.parts(tiny_kinds.simple("apertus", layer))
    own = {f"xielu.{name}": value
           for name, value in (("alpha_p", [0.8, 0.7]), ("alpha_n", 0.8), ("beta", 0.5), ("eps", -1e-6))}
    assert np.isfinite(logits(written(tmp_path, metadata | own, tensors))).all()
    for value, words in ((1e30, "expected a number from -100 to 100"),
                         ([0.8], "one for each of 2 layers, found 1"), ("a", "found 'a'"),
                         (np.array([0.5, np.nan]), "for layer 1, found nan"), (None, "found None")):
        refuse(written(tmp_path, metadata | own | {"xielu.alpha_n": value}, tensors),
               f"xielu.alpha_n: expected.*{words}|{words}")


@pytest.mark.parametrize("arch, keys, style", [
    ("glm4", {}, 1), ("glm4", {"rope.dimension_sections": np.int32([4, 2, 2, 0])}, 2), ("granite", {}, 1),
    ("granite", {"rope.scaling.finetuned": False}, 0),
])
def test_keys_that_change_how_heads_turn(arch, keys, style, tmp_path):
    """Pairs, halves or not at all: as llama.cpp, whose logits of such files are the same."""
    names = ("post_attention_norm", "ffn_norm", "post_ffw_norm") if arch == "glm4" else ("ffn_norm",)

    def layer(m, i):
        norms = [weight for name in ("attn_norm", *names) for weight in tiny_kinds.norm(name, 64)]
        return [*norms, *tiny_kinds.plain_attention(), *tiny_kinds.dense(64, 96)]

    metadata, tensors = tiny_kinds.parts(tiny_kinds.simple(arch, layer, keys=keys))
    path = written(tmp_path, metadata, tensors)
    with GGUF(path) as file:
        assert {block.rope_style for _, block in read_config(file).blocks
                if block.kind == "ATTENTION"} == {style}
    assert np.isfinite(logits(path)).all()


@pytest.mark.parametrize("name, line", [
    ("MLA", "3 mla, 1 dense, 2 experts (2 of 6 for a token)"), ("norms after", "2 attention, 2 dense"),
    ("latent experts", "1 mamba2, 2 experts, 1 attention (2 of 6 for a token)"),
    ("lfm2", "2 short conv, 3 dense, 1 attention"),
])
def test_show_tells_the_blocks(name, line):
    assert ("blocks", line) in lines(describe(tiny_kinds.model(name)))


HOSTILE = (0, 1, -1, 3, 48, 2**31 - 1, 2**32 - 1, 2**62, 0.5, 1e30, -1.0, float("nan"), float("inf"), True,
           "word", np.array([], np.int32))


def hostile(value, rng):
    """Another value than this one: of any kind, or an array with one element wrong or too many."""
    if rng.random() < 0.6:
        return rng.choice(HOSTILE)
    n = len(value) if isinstance(value, (list, np.ndarray)) else 4
    made = np.array(value if isinstance(value, (list, np.ndarray)) else [value] * n)
    made[rng.randrange(n)] = rng.choice([0, 1]) if made.dtype == bool else rng.choice([0, -1, 1, 1 << 20])
    return made[:rng.choice([n, n, n - 1])]


@pytest.mark.parametrize("name", tiny_kinds.NAMES)
def test_any_value_of_a_key_is_refused_or_evaluates(name, tmp_path):
    """And what evaluates gives numbers."""
    metadata, tensors = parts(name)
    arch, rng = metadata["general.architecture"], random.Random(name)
    metadata = {key: value for key, value in metadata.items() if value is not None
                and not key.startswith("tokenizer.")}
    refused = 0
    for key in [key for key in metadata if key.startswith(arch)] * 2:
        value = metadata[key]
        if isinstance(value, str):
            continue
        path = written(tmp_path, metadata | {key: hostile(value, rng)}, tensors)
        try:
            assert np.isfinite(logits(path)).all()
        except pybmc.FormatError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 10
