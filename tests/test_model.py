"""Files that are models, and files that are not: what opening says of them."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import raw
import tiny

import pybmc
from pybmc._native import lib
from pybmc.files.types import type_info
from pybmc.models.parts import REGISTRY
from pybmc.show import describe, lines

HERE = Path(__file__).parent
TOKENS = [1, 2, 3, 250, 7, 7, 19]


def entries(tensors: dict) -> list[raw.Entry]:
    """What tiny.parts() gives, as lines of a tensor table; a vector has one dimension."""
    out = []
    for name, (kind, rows) in tensors.items():
        kind = gguf.GGMLQuantizationType[kind]
        block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
        n_cols = rows.shape[-1] // type_size * block_size
        out.append(raw.Entry(name, (n_cols, *rows.shape[-2::-1]), kind.value, data=rows.tobytes()))
    return out


def raw_model(arch="llama", **shape) -> raw.Raw:
    """A small model, byte by byte."""
    metadata, tensors = tiny.parts(arch, **(tiny.SMALL | shape))
    return raw.Raw({key: value for key, value in metadata.items() if value is not None}, entries(tensors))


def refuse(path, words, error=pybmc.FormatError):
    """Opening says what is wrong, and with which file."""
    with pytest.raises(error, match=words) as caught:
        pybmc.Model(path)
    assert str(path) in str(caught.value)


# Files


def test_paths_that_are_no_models(tmp_path):
    refuse(tmp_path / "missing.gguf", "no such file", FileNotFoundError)
    refuse(tmp_path, "is a directory", IsADirectoryError)
    for name, content, words in (
        ("empty", b"", "is empty"),
        ("text", b"# a readme, and no model\n", "not a GGUF file"),
        ("short", b"GGUF", "truncated"),
        ("big-endian", b"GGUF\0\0\0\3" + bytes(99), "big-endian"),
    ):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, words)
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "not a regular file")


def test_a_vocabulary_alone_is_no_model(tmp_path):
    metadata, _ = tiny.parts("llama", **tiny.SMALL)
    refuse(
        raw.Raw({k: v for k, v in metadata.items() if v is not None}).save(tmp_path / "m.gguf"),
        "there are no weights",
    )


def test_unknown_architecture_is_named(tmp_path):
    file = raw_model()
    for name in ("mamba", "", "LLaMA"):
        file.pairs["general.architecture"] = name
        refuse(
            file.save(tmp_path / "m.gguf"),
            f"{name!r} is not supported; expected one of the {len(REGISTRY)} that "
            "docs/architectures.md lists",
        )
    del file.pairs["general.architecture"]
    refuse(file.save(tmp_path / "m.gguf"), "None is not supported")


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_tensor_is_needed(arch, tmp_path):
    """Without any one of them: an error that names it, but for those that may be absent."""
    optional = {"output.weight", "rope_freqs.weight"}
    file = raw_model(arch, vocab="llama", n_layers=2)
    pybmc.Model(file.save(tmp_path / "m.gguf")).close()
    for i, tensor in enumerate(file.tensors):
        changed = raw.Raw(file.pairs, file.tensors[:i] + file.tensors[i + 1:]).save(tmp_path / "m.gguf")
        if tensor.name in optional:
            pybmc.Model(changed).close()
        else:
            shown = "|".join(tensor.name.replace("attn_qkv", f"attn_{x}") for x in "qkv")
            refuse(changed, shown)


def test_tensors_that_have_no_place(tmp_path):
    file = raw_model()
    for name, words in (
        ("blk.0.ffn_gate_inp.weight", "llama.expert_count: expected a number, found nothing"),
        ("blk.1.attn_q.weight", "the model has 1 layers"), ("blk.x.attn_q.weight", "the model has 1 layers"),
        ("blk.-1.attn_q.weight", "the model has 1 layers"), ("blk..attn_q.weight", "the model has 1 layers"),
        ("something", "does not know this tensor"), ("", "does not know this tensor"),
        ("output_norm.scale", "does not know this tensor"), ("token_embd.bias", "token_embd.bias"),
    ):
        extra = raw.Entry(name, (32, 32), 0, data=bytes(4096))
        refuse(raw.Raw(file.pairs, [*file.tensors, extra]).save(tmp_path / "m.gguf"), words)


def changed(file: raw.Raw, name: str, **values) -> raw.Raw:
    tensors = [raw.Entry(**(vars(t) | values)) if t.name == name else t for t in file.tensors]
    assert tensors != file.tensors
    return raw.Raw(file.pairs, tensors)


@pytest.mark.parametrize(
    "dims", [(32, 31), (31, 32), (16, 64), (1024,), (32, 32, 2), (32,), (64, 64), (32, 16, 2, 2)], ids=str
)
def test_shapes_that_do_not_fit(dims, tmp_path):
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight"):
        path = changed(raw_model(), name, dims=dims, type=0, data=bytes(4 * math.prod(dims))).save(
            tmp_path / "m.gguf"
        )
        refuse(path, f"{name}: expected 32 rows of 32 values, found")
    path = changed(
        raw_model(), "blk.0.attn_norm.weight", dims=dims, type=0, data=bytes(4 * math.prod(dims))
    ).save(tmp_path / "m.gguf")
    if dims != (32,):
        refuse(path, "blk.0.attn_norm.weight: expected 1 rows of 32 values, found")


@pytest.mark.parametrize(
    "dims",
    [
        (0, 32), (32, 0), (2**63, 32), (32, 2**63), (2**62, 4), (2**32, 2**32), (2**63 - 1,),
        (2**64 - 1, 2**64 - 1),
    ],
    ids=str,
)
def test_dimensions_from_nowhere(dims, tmp_path):
    for name in ("blk.0.attn_q.weight", "token_embd.weight", "output_norm.weight"):
        refuse(changed(raw_model(), name, dims=dims, type=0).save(tmp_path / "m.gguf"), name)


def test_types_that_do_not_compute(tmp_path):
    file = raw_model()
    for type, words in (
        (15, "pybmc does not compute with type q8_K|rows of 32"),
        (26, "pybmc does not compute with type i32"), (28, "pybmc does not compute with type f64"),
        (12, "rows of 32 values: expected a multiple of q4_K's 256"), (4, "unknown tensor type 4"),
        (1000, "unknown tensor type"), (2**32 - 1, "unknown tensor type"),
    ):
        refuse(
            changed(file, "blk.0.attn_q.weight", type=type, data=bytes(32 * 32 * 8)).save(
                tmp_path / "m.gguf"
            ),
            words,
        )


def test_another_type_is_no_error(tmp_path):
    """A type is the file's choice: any that computes, for any matrix, vectors included."""
    file = changed(raw_model(), "blk.0.attn_q.weight", type=2, data=bytes(32 * 18))
    file = changed(file, "blk.0.attn_norm.weight", type=1, data=np.ones(32, np.float16).tobytes())
    with pybmc.Model(file.save(tmp_path / "m.gguf")) as model, model.session() as session:
        assert np.isfinite(session.eval(TOKENS)).all()


def test_vocabulary_and_embedding_disagree(tmp_path):
    file = raw_model()
    pairs = file.pairs | {
        key: file.pairs[key][:-1] for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    }
    refuse(
        raw.Raw(pairs, file.tensors).save(tmp_path / "m.gguf"),
        "the vocabulary has 299 tokens, token_embd.weight 300 rows",
    )


def test_no_vocabulary_is_no_error(tmp_path):
    file = raw_model()
    file.pairs = {key: value for key, value in file.pairs.items() if not key.startswith("tokenizer")}
    with pybmc.Model(file.save(tmp_path / "m.gguf")) as model, model.session() as session:
        assert model.tokenizer is None and session.eval(TOKENS).shape == (300,)


NONSENSE = [
    0, -1, 3, 2**31, 2**32 - 1, 2**63 - 1, 0.0, -1.5, math.nan, math.inf, 1e-30, 1e30, True, "", "word", "\0",
    [], [1, 2], [0.5], ["a", "b"], np.array([], np.int32), np.arange(1, 300, dtype=np.int64),
    np.full(2, np.nan), raw.array(raw.ARRAY, raw.array(raw.U8, b"\1", 1).payload, 1),
]


ROPE_VALUES = (1.0, 0.0, -1.0, math.nan, math.inf, -math.inf, 1e-30, 1e30, 1.0000001,
               *(raw.Typed(raw.F64, struct.pack("<d", x))
                 for x in (5e-324, 1e-300, 1e300, 1 + 2**-52, -1e300, math.nan)))
ROPE_KEYS = ("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "rope.scale_linear",
             "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
             "rope.scaling.yarn_ext_factor", "attention.layer_norm_rms_epsilon")


@pytest.mark.parametrize("key", ROPE_KEYS)
@pytest.mark.parametrize("scaling", [None, "linear", "yarn"])
def test_numbers_that_break_arithmetic_are_refused_by_name(key, scaling, tmp_path):
    """Logits that are numbers, or a FormatError that names the key; and show says the same."""
    file = raw_model("gemma3", vocab="llama", n_layers=7)
    pairs = file.pairs | ({"gemma3.rope.scaling.type": scaling, "gemma3.rope.scaling.factor": 4.0}
                          if scaling else {})
    refused = 0
    for value in ROPE_VALUES:
        path = raw.Raw(pairs | {f"gemma3.{key}": value}, file.tensors).save(tmp_path / "m.gguf")
        info = describe(path)
        try:
            with pybmc.Model(path, threads=1) as model, model.session() as session:
                assert np.isfinite(session.eval(TOKENS, logits="all")).all(), value
            assert info["runs"]
        except pybmc.FormatError as error:
            assert f"gemma3.{key}: expected" in str(error) and "found" in str(error)
            assert not info["runs"] and key in info["why_not"]
            refused += 1
    assert refused >= 5 or "yarn" in key and scaling != "yarn"


def test_dimensions_of_one_change_nothing(tmp_path):
    file = raw_model()
    with pybmc.Model(file.save(tmp_path / "a.gguf"), threads=1) as model:
        right = model.session().eval(TOKENS)
    for tensor in file.tensors:
        tensor.dims = (*tensor.dims, 1)
    with pybmc.Model(file.save(tmp_path / "b.gguf"), threads=1) as model:
        assert (model.session().eval(TOKENS) == right).all()


def test_a_file_that_ends_in_zeros_is_incomplete(tmp_path):
    """Some programs make a file as large as it will be before they fetch it."""
    file = raw_model()
    last = file.tensors[-1]
    whole = file.bytes()
    for n in (len(last.data), len(whole) // 2):
        path = tmp_path / "m.gguf"
        path.write_bytes(whole[:-n] + bytes(n))
        refuse(path, f"incomplete, as when a download broke off: {last.name}, the last of its tensors, is "
                     f"{len(last.data)} zeros")
        assert "incomplete" in describe(path)["why_not"]


def test_names_from_a_file_do_not_break_a_line(tmp_path):
    strange = "a\nruns yes\x1b[2J\u202e\u2028b"
    file = raw_model()
    pairs = file.pairs | {"general.name": strange, "tokenizer.ggml.pre": strange}
    shown = lines(describe(raw.Raw(pairs, file.tensors).save(tmp_path / "m.gguf")))
    extra = raw.Entry(strange, (32, 32), 0, data=b"\1" * 4096)
    shown += lines(describe(raw.Raw(file.pairs, [*file.tensors, extra]).save(tmp_path / "n.gguf")))
    texts = [text for _, text in shown]
    assert all(text.isprintable() for text in texts)
    assert sum(r"a\nruns yes\x1b[2J\u202e\u2028b" in text for text in texts) == 3


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_value_may_be_nonsense(arch, tmp_path):
    """Each value of the metadata replaced by another kind of value:
    a FormatError, or a model that evaluates."""
    file = raw_model(arch, vocab="llama", n_layers=2)
    keys = [
        *(key for key in file.pairs if arch == "llama" or key.startswith(arch)),
        *(
            f"{arch}.{key}"
            for key in (
                "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
                "rope.scaling.original_context_length", "rope.freq_base_swa", "rope.scaling.yarn_beta_fast",
                "attention.key_length", "expert_count", "attention.value_length", "attention.sliding_window",
                "attention.sliding_window_pattern", "attention.head_count_kv",
            )
        ),
        "split.count",
    ]
    problems = []
    for key in dict.fromkeys(keys):
        for value in NONSENSE:
            extra = (
                {f"{arch}.rope.scaling.type": "yarn", f"{arch}.rope.scaling.factor": 2.0}
                if "yarn" in key or "original" in key
                else {}
            )
            path = raw.Raw(file.pairs | extra | {key: value}, file.tensors).save(tmp_path / "m.gguf")
            try:
                with pybmc.Model(path, threads=1) as model, model.session() as session:
                    session.eval(TOKENS[:session.context])
            except pybmc.FormatError as error:
                if str(path) not in str(error):
                    problems.append((key, value, f"without a path: {error}"))
            except Exception as error:
                problems.append((key, value, repr(error)))
    assert problems == []


# Run as a script: open every file named on stdin and tell how that went, one JSON object a line.


def open_all():
    import faulthandler
    import resource

    faulthandler.enable()
    faulthandler.dump_traceback_later(100, exit=True)
    pages = (
        int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    )
    if pages:      # nothing that a small file says may cost a gigabyte
        limit = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for path in sys.stdin.read().split():
        print(json.dumps({"path": path, "result": open_one(path)}))


def open_one(path):
    try:
        with pybmc.Model(path, threads=2) as model, model.session() as session:
            n = min(len(TOKENS), session.context)
            session.eval(np.minimum(TOKENS[:n], model.config.vocab_size - 1), logits="all")
        return "evaluates"
    except pybmc.FormatError as error:
        return "refused" if path in str(error) else f"without a path: {error}"
    except BaseException as error:
        return repr(error)


def open_in_a_process(paths):
    result = subprocess.run(
        [sys.executable, __file__], input="\n".join(map(str, paths)), capture_output=True, text=True,
        timeout=110, env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )
    assert result.returncode == 0, result.stdout[-300:] + result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == list(map(str, paths))
    return [line["result"] for line in lines]


@pytest.mark.parametrize("arch, seed", [("llama", 1), ("gemma3", 2)])
def test_truncated_anywhere(arch, seed, tmp_path):
    whole = raw_model(arch).bytes()
    places = sorted(
        random.Random(seed).sample(range(len(whole)), 60) + random.Random(seed).sample(range(3000), 40)
    )
    paths = [tmp_path / f"{n}.gguf" for n in places]
    for n, path in zip(places, paths):
        path.write_bytes(whole[:n])
    assert set(open_in_a_process(paths)) == {"refused"}


@pytest.mark.parametrize("arch, seed", [("llama", 3), ("phi3", 4), ("gpt2", 5)])
def test_bits_flipped_in_the_header(arch, seed, tmp_path):
    """Half of them in what is not the vocabulary, which is most of the header."""
    file, rng = raw_model(arch, vocab="llama"), random.Random(seed)
    whole, header = file.bytes(), len(file.header())
    vocabulary = whole.index(b"tokenizer.ggml.tokens"), whole.index(b"token_embd.weight")
    paths = []
    for i in range(200):
        at = rng.randrange(header)
        while i % 2 and vocabulary[0] <= at < vocabulary[1]:
            at = rng.randrange(header)
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.randrange(8)
        paths.append(tmp_path / f"{i}-{at}.gguf")
        paths[-1].write_bytes(broken)
    results = open_in_a_process(paths)
    assert {
        path.name: result for path, result in zip(paths, results) if result not in ("refused", "evaluates")
    } == {}
    assert results.count("refused") > 50 and results.count("evaluates") > 10


def test_weights_of_any_bits_evaluate(tmp_path):
    """NaN, infinities and junk in every tensor: logits that mean nothing, and no more than that."""
    paths, rng = [], np.random.default_rng(0)
    for i, fill in enumerate((b"\0", b"\xff", b"\x7f", b"\x80", None, None)):
        for arch in ("llama", "gemma3"):
            file = raw_model(arch, types=("Q4_0", "F16", "Q8_0", "F32", "BF16", "MXFP4")[i])
            for tensor in file.tensors:
                tensor.data = rng.bytes(len(tensor.data)) if fill is None else fill * len(tensor.data)
            if fill == b"\0":                   # a file that ends in zeros is an incomplete one
                file.tensors[-1].data = b"\1" * len(file.tensors[-1].data)
            paths.append(file.save(tmp_path / f"{arch}-{i}.gguf"))
    assert set(open_in_a_process(paths)) == {"evaluates"}


# Runs


@pytest.mark.parametrize("type", [t.name for t in map(type_info, range(64)) if t and t.runs])
def test_weights_that_stay_in_the_file_give_the_same_bits(type):
    path = tiny.model("llama", types=type.upper(), dim=256, hidden_dim=256, head_dim=64)
    words = np.random.default_rng(0).integers(0, 401, 60)
    with pybmc.Model(path, threads=1) as packed, pybmc.Model(path, threads=2, repack=False) as kept:
        with packed.session() as session, kept.session() as other:
            right = session.eval(words, logits="all")
            ours = [other.eval(words[a:b], logits="all") for a, b in [(0, 1), (1, 9), (9, 60)]]
        assert np.concatenate(ours).tobytes() == right.tobytes() and kept.packed_bytes > 0


def test_a_profile_counts_from_its_beginning_to_its_end():
    with pybmc.Model(tiny.model("llama"), threads=2) as model, model.session() as session:
        session.eval([1, 2, 3])
        with model.profile() as profile:
            session.eval([4], logits="none")
            session.eval([5, 6])
        session.eval([7])
        assert profile.passes == 2 and len(profile.steps) == lib.BMC_STEPS - 2
        assert profile.steps["attention"] > 0
        assert 0 < sum(profile.steps.values()) <= profile.calls_s <= profile.wall_s
        with model.profile() as nothing:
            pass
        assert nothing.passes == nothing.calls_s == sum(nothing.steps.values()) == 0


def test_a_failed_open_leaves_nothing(tmp_path):
    """Threads, files and memory of models that did not open are given back."""
    path = changed(raw_model(), "blk.0.attn_q.weight", dims=(32, 31)).save(tmp_path / "m.gguf")
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")

    def held():
        return (
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            Path("/proc/self/maps").read_text().count("m.gguf"),
        )

    gc.collect()                        # what other tests left
    before = held()
    for _ in range(20):
        refuse(path, "attn_q")
    pybmc.Model(tiny.model("llama"), threads=4).close()
    gc.collect()
    assert held() == before


if __name__ == "__main__":
    open_all()
