"""tools.synth: valid blocks, llama-quantize's mixtures, a vocabulary that tokenizes."""

import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import tiny
from places import GOLDEN

import pybmc
from pybmc.show import describe
from tools import synth, synth_shapes, synth_vocab


@pytest.mark.parametrize("kind", [*synth.BLOCKS, "MXFP4", "F32", "F16", "BF16"])
def test_random_weights_have_mean_0_and_the_asked_deviation(kind):
    std = 2048 ** -0.5
    data = synth.random_matrix(kind, 2048, 256, std, np.random.default_rng(1))
    values = tiny.values(kind, data).astype(np.float64)
    assert values.size == 2048 * 256 and np.isfinite(values).all()
    assert values.std() == pytest.approx(std, rel=0.04)     # scales spread by 25% raise it by 1%
    assert abs(values.mean()) < 0.02 * std


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    shape = synth.MODELS["tiny"]
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (0, 0, 1)):
        synth.write(path, shape, "Q4_K_M", seed=seed)
    a, b, c = (path.read_bytes() for path in paths)
    assert a == b and a != c


def test_a_shallow_copy_shares_its_layers():
    deep, shallow = synth.MODELS["tiny"], replace(synth.MODELS["tiny"], n_layers=1)
    find = {name: data for name, _, _, data in synth.tensors(shallow, "F16")}
    for name, _, _, data in synth.tensors(deep, "F16"):
        if name == "blk.0.ffn_up.weight":
            assert np.array_equal(data(), find[name]())


def mixture(shape, file_type):
    return {name: kind for name, kind, dims, _ in synth.tensors(shape, file_type) if len(dims) == 2}


def test_q4_k_m_gives_more_bits_to_the_layers_that_llama_quantize_chooses():
    kinds = mixture(synth.MODELS["llama-3.2-1b"], "Q4_K_M")
    richer = [i for i in range(16) if kinds[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert richer == [0, 1, 4, 7, 10, 13, 14, 15]
    assert kinds["token_embd.weight"] == "Q6_K" and "output.weight" not in kinds
    assert set(kinds.values()) == {"Q4_K", "Q6_K"}


def test_narrow_rows_fall_back_to_blocks_of_32():
    kinds = mixture(synth.MODELS["qwen2.5-0.5b"], "Q4_K_M")
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.5.attn_q.weight"] == "Q5_0"
    assert [kinds[f"blk.{i}.ffn_down.weight"] for i in (2, 3, 4, 5)] == ["Q6_K", "Q4_K", "Q4_K", "Q6_K"]


def known_type(path):
    return path.name.split(".")[1].removeprefix("pure-") in synth.MIXES.keys() | synth.BLOCKS.keys()


@pytest.mark.parametrize("path", [path for path in GOLDEN if known_type(path) and path.stem != "gemma3n.F16"],
                         ids=lambda path: path.stem)
def test_mixtures_equal_those_of_files_made_by_llama_quantize(path):
    file_type = path.name.split(".")[1]
    reader = gguf.GGUFReader(path)
    found = {t.name: (t.tensor_type.name, int(t.shape[0])) for t in reader.tensors if len(t.shape) >= 2}
    arch = reader.fields["general.architecture"].contents()
    fields = {key.removeprefix(f"{arch}."): field for key, field in reader.fields.items()}
    n_heads, n_kv_heads = (np.max(fields.get(f"attention.{key}", fields["attention.head_count"]).contents())
                           for key in ("head_count", "head_count_kv"))
    gqa = int(n_heads // n_kv_heads)
    n_layers = fields["block_count"].contents()
    compared = 0
    for tensor, (kind, n_cols) in found.items():
        parts = tensor.split(".")
        layer = int(parts[1]) if parts[0] == "blk" else -1
        if file_type.startswith("pure-") and layer < 0 or parts[-1] != "weight":
            continue
        place = synth.Place(layer, n_layers, gqa)
        is_output = parts[0] == "output" or parts[0] == "token_embd" and "output.weight" not in found
        ours = synth.tensor_type(file_type, ".".join(parts[2:-1] if layer >= 0 else parts[:-1]), n_cols,
                                 place, is_output)
        assert ours == kind, (path.name, tensor)
        compared += 1
    assert compared >= 8


def test_sizes_are_those_of_the_real_models():
    def megabytes(model, file_type):
        total = 0
        for _, kind, dims, _ in synth.tensors(synth.MODELS[model], file_type):
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            total += int(np.prod(dims)) // block * size
        return total / 1e6

    assert megabytes("llama-3.2-1b", "Q4_K_M") == pytest.approx(807.7 - 7.8, abs=0.3)    # less its metadata
    assert megabytes("llama-2-7b", "Q4_0") == pytest.approx(3825, abs=3)
    assert megabytes("qwen2.5-0.5b", "Q8_0") == pytest.approx(531 - 6, abs=3)


@pytest.mark.parametrize("name", synth_vocab.VOCABS)
def test_vocabularies_have_their_size_and_no_duplicates(name):
    vocab = synth_vocab.VOCABS[name]
    make = {"gpt2": synth_vocab.bpe_vocabulary, "llama": synth_vocab.spm_vocabulary,
            "bert": synth_vocab.wordpiece_vocabulary}
    tokens, types, *extra = make[vocab.model](vocab)
    assert len(tokens) == len(types) == len(set(tokens)) == vocab.size
    assert vocab.bos in tokens and vocab.eos in tokens
    if vocab.model == "gpt2":
        known = set(tokens)
        made = {"".join(pair.split(" ")) for pair in extra[0]}
        assert all(part in known for pair in extra[0] for part in pair.split(" "))
        assert made == {t for t, kind in zip(tokens, types) if kind == synth_vocab.NORMAL and len(t) > 1}


def test_rope_factors_are_those_of_llama_3_2():
    factors = synth.rope_factors(synth.MODELS["llama-3.2-1b"])
    assert factors.shape == (32,) and factors[0] == 1 and factors[-1] == 32
    assert np.all(np.diff(factors) >= 0) and 1 < factors[16] < 32


def test_a_pair_agrees_about_as_often_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "TRIES", 5)
    monkeypatch.setattr(synth, "SAMPLE", (2, 48))
    shape = replace(synth.MODELS["tiny"], n_layers=4)
    paths = tmp_path / "whole.gguf", tmp_path / "draft.gguf"
    gain, found = synth.write_pair(*paths, shape, "Q4_K_M", "pair", 0.7)
    assert 0 < gain < 1 and found == pytest.approx(0.7, abs=0.15)
    assert synth.agreement(*paths) == found
    whole, draft = (gguf.GGUFReader(path) for path in paths)
    kept = {t.name: t for t in draft.tensors}
    for tensor in whole.tensors:
        if tensor.name in kept:
            assert np.array_equal(tensor.data, kept[tensor.name].data)
        elif tensor.name.endswith("_norm.weight"):
            assert (tensor.data == np.float32(gain)).all()
    assert len(kept) == 9 + 3 and len(whole.tensors) == 4 * 9 + 3


def test_weights_in_random_order_are_the_same_weights(tmp_path):
    path, other = tmp_path / "known.gguf", tmp_path / "random.gguf"
    synth.write(path, synth.MODELS["tiny"], "Q4_K_M")
    synth.scramble(shutil.copyfile(path, other))
    matrices = 0
    for was, tensor in zip(gguf.GGUFReader(path).tensors, gguf.GGUFReader(other).tensors):
        size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
        before, after = (t.data.view(np.uint8).reshape(-1, size) for t in (was, tensor))
        assert sorted(map(bytes, before)) == sorted(map(bytes, after))
        assert np.array_equal(before, after) == (len(tensor.shape) == 1)
        matrices += len(tensor.shape) > 1
    assert matrices > 10 and path.read_bytes()[:1000] == other.read_bytes()[:1000]


@pytest.mark.parametrize("name", synth_shapes.SMALL)
@pytest.mark.parametrize("file_type", ["Q4_K_M", "MXFP4_MOE"])
def test_models_whose_layers_differ(name, file_type, tmp_path):
    path = tmp_path / "small.gguf"
    shape = synth_shapes.SMALL[name]()
    total = synth.write(path, shape, file_type, name)
    info = describe(path)
    assert info["runs"], info["why_not"]
    assert total < info["bytes"] and info["architecture"] == shape.arch == synth.MODELS[name].arch
    with pybmc.Model(path, threads=1) as model:
        words = model.tokenizer.encode("the sea and the mill")
        if model.config.causal:
            logits = model.session().eval(words * 3, logits="all")
            assert 0.4 < logits.std() < 4 and len(set(logits.argmax(-1))) > 3
        else:
            assert np.isfinite(model.embed(["the sea"])).all()


@pytest.mark.parametrize("name, billions", [
    ("qwen3-30b-a3b", 30.5), ("gpt-oss-20b", 20.9), ("qwen3.5-4b", 4.2), ("lfm2-1.2b", 1.17),
    ("lfm2-8b-a1b", 8.3), ("granite-4-tiny", 6.9), ("gemma-4-e2b", 4.65), ("nemotron-3-nano", 31.6),
    ("deepseek-v2-lite", 15.7), ("bge-small", 0.0334),
])
def test_models_have_as_many_parameters_as_the_real_ones(name, billions):
    total = sum(int(np.prod(dims)) for _, _, dims, _ in synth.tensors(synth.MODELS[name], "Q4_K_M"))
    assert total / 1e9 == pytest.approx(billions, rel=0.03)


def test_fewer_layers_are_the_first_ones():
    """Of Gemma 4 the share of layers that use others' keys and values stays."""
    shape = replace(synth.MODELS["gemma-4-e2b"], n_layers=12)
    keys = shape.keys(shape)
    assert keys["attention.shared_kv_layers"] == 7 and len(keys["feed_forward_length"]) == 12
    names = {name for name, *_ in synth.tensors(shape, "Q8_0")}
    assert "blk.4.attn_k.weight" in names and "blk.5.attn_k.weight" not in names
    assert "blk.12.attn_q.weight" not in names


@pytest.mark.parametrize("arguments, words", [
    (["gpt-oss-20b", "--layers", "99"], "--layers: expected 1 to 24, found 99"),
    (["gpt-oss-20b", "--layers", "-1"], "expected 1 to 24, found -1"),
    (["gpt-oss-20b", "--pair", "0.8"], "there are no pairs of gpt-oss-20b"),
    (["gpt-oss-20b", "--type", "Q9"], "unknown type Q9"),
])
def test_wrong_arguments(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["synth", *arguments])
    with pytest.raises(SystemExit, match="2"):
        synth.main()
    assert words in capsys.readouterr().err
