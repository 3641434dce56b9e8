"""Model and Session at their worst: broken files, wrong arguments, threads, memory, and the order of ends."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import raw
import tiny

import pybmc
from pybmc._native import lib
from pybmc.engine.model import _note_threads
from pybmc.files.types import type_info
from pybmc.models.parts import REGISTRY
from pybmc.show import describe, lines

HERE = Path(__file__).parent
SMALL = dict(dim=32, hidden_dim=32, n_heads=2, n_layers=1, n_ctx=64, vocab_size=300, vocab="llama")
TOKENS = [1, 2, 3, 250, 7, 7, 19]


@pytest.fixture
def model():
    with pybmc.Model(tiny.model("llama"), threads=2) as model:
        yield model


def entries(tensors: dict) -> list[raw.Entry]:
    """What tiny.parts() gives, as lines of a tensor table; a vector has one dimension."""
    out = []
    for name, (kind, rows) in tensors.items():
        kind = gguf.GGMLQuantizationType[kind]
        block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
        n_rows, n_bytes = rows.reshape(len(rows) if rows.ndim > 1 else 1, -1).shape
        n_cols = n_bytes // type_size * block_size
        out.append(
            raw.Entry(name, (n_cols, n_rows) if rows.ndim > 1 else (n_cols,), kind.value, data=rows.tobytes())
        )
    return out


def raw_model(arch="llama", **shape) -> raw.Raw:
    """A small model, byte by byte."""
    metadata, tensors = tiny.parts(arch, **(SMALL | shape))
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
    metadata, _ = tiny.parts("llama", **SMALL)
    refuse(
        raw.Raw({k: v for k, v in metadata.items() if v is not None}).save(tmp_path / "m.gguf"),
        "there are no weights",
    )


def test_unknown_architecture_lists_the_known(tmp_path):
    file = raw_model()
    for name in ("mamba", "", "LLaMA"):
        file.pairs["general.architecture"] = name
        refuse(
            file.save(tmp_path / "m.gguf"),
            f"{name!r} is not supported; supported are {', '.join(sorted(REGISTRY))}",
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
               *(raw.Typed(raw.F64, struct.pack("<d", x)) for x in (5e-324, 1e-300, 1e300, 1 + 2**-52, -1e300, math.nan)))
ROPE_KEYS = ("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
             "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor",
             "attention.layer_norm_rms_epsilon")


@pytest.mark.parametrize("key", ROPE_KEYS)
@pytest.mark.parametrize("scaling", [None, "linear", "yarn"])
def test_numbers_that_break_arithmetic_are_refused_by_name(key, scaling, tmp_path):
    """Logits that are numbers, or a FormatError that names the key; and show says the same."""
    file = raw_model("gemma3", vocab="llama", n_layers=7)
    pairs = file.pairs | ({"gemma3.rope.scaling.type": scaling, "gemma3.rope.scaling.factor": 4.0} if scaling else {})
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
        refuse(path, f"incomplete, as when a download broke off: {last.name}, the last of its tensors, is {len(last.data)} zeros")
        assert "incomplete" in describe(path)["why_not"]


def test_names_from_a_file_do_not_break_a_line(tmp_path):
    strange = "a\nruns yes\x1b[2J\u202e\u2028b"
    file = raw_model()
    pairs = file.pairs | {"general.name": strange, "tokenizer.ggml.pre": strange}
    shown = lines(describe(raw.Raw(pairs, file.tensors).save(tmp_path / "m.gguf")))
    extra = raw.Entry(strange, (32, 32), 0, data=b"\1" * 4096)
    shown += lines(describe(raw.Raw(file.pairs, [*file.tensors, extra]).save(tmp_path / "n.gguf")))
    texts = [text for _, text in shown]
    assert all(text.isprintable() for text in texts) and sum(r"a\nruns yes\x1b[2J\u202e\u2028b" in text for text in texts) == 3


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_value_may_be_nonsense(arch, tmp_path):
    """Each value of the metadata replaced by another kind of value: a FormatError, or a model that evaluates."""
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


# Arguments


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
        assert profile.passes == 2 and len(profile.steps) == 11 and profile.steps["attention"] > 0
        assert 0 < sum(profile.steps.values()) <= profile.calls_s <= profile.wall_s
        with model.profile() as nothing:
            pass
        assert nothing.passes == nothing.calls_s == sum(nothing.steps.values()) == 0


@pytest.mark.parametrize(
    "tokens",
    [
        [], [-1], [401], [2**31], [-(2**63)], [1.0], [1.5], [None], ["a"], "abc", [[1, 2]], [[1], [2, 3]],
        [True], 5, None, np.array([1.0]), np.array([[1]]), np.array([], np.int32), np.array([2**40]),
    ],
    ids=repr,
)
def test_tokens_that_are_none(model, tokens):
    with model.session() as session:
        right = session.eval(TOKENS)
        session.rewind(3)
        with pytest.raises(pybmc.ArgumentError):
            session.eval(tokens)
        with pytest.raises(pybmc.ArgumentError):
            pybmc.eval_batch([(session, TOKENS, "last"), (model.session(), tokens, "last")])
        assert session.position == 3 and session.tokens == TOKENS[:3]
        assert (session.eval(TOKENS[3:]) == right).all()


@pytest.mark.parametrize(
    "tokens",
    [
        tuple(TOKENS), np.array(TOKENS), np.array(TOKENS, np.uint8), np.array(TOKENS * 2)[::2][:7], range(3),
        iter([1, 2]),
    ],
    ids=lambda tokens: type(tokens).__name__,
)
def test_tokens_of_other_kinds(model, tokens):
    if not hasattr(tokens, "__len__"):
        with pytest.raises(pybmc.ArgumentError), model.session() as session:
            session.eval(tokens)
        return
    with model.session() as session, model.session() as other:
        assert (session.eval(tokens) == other.eval([int(t) for t in tokens])).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.session(context=0), lambda m: m.session(context=-1), lambda m: m.session(context=2**40),
        lambda m: m.session(context=1.5), lambda m: m.session(context="many"), lambda m: m.session(rows=0),
        lambda m: m.session(rows=-3), lambda m: m.session(rows="most"), lambda m: m.session(rows=2.5),
        lambda m: m.session(rows=2**31), lambda m: m.session(rows=None), lambda m: m.session(kv_type="q3"),
        lambda m: m.session().eval(TOKENS, logits="some"), lambda m: m.session().eval(TOKENS, logits=None),
        lambda m: m.session().rewind(1), lambda m: m.session().rewind(-1), lambda m: m.session().rewind(0.5),
        lambda m: m.session().reserve(-1), lambda m: m.session().reserve(2**40),
        lambda m: pybmc.Model(m.path, threads=0), lambda m: pybmc.Model(m.path, threads=1025),
        lambda m: pybmc.Model(m.path, threads=1.5), lambda m: pybmc.Model("a\0b"),
    ],
)
def test_arguments_out_of_range(model, call):
    with pytest.raises(pybmc.ArgumentError):
        call(model)


def test_a_prompt_longer_than_the_cap(model):
    with model.session(context=20) as session:
        right = session.eval(TOKENS)
        with pytest.raises(pybmc.ContextFullError, match="21 rows are needed and its cap is 20"):
            session.eval([1] * 14, logits="all")
        with pytest.raises(pybmc.ContextFullError, match="1000007 rows are needed and its cap is 20"):
            session.eval(np.ones(10**6, np.int32), logits="all")
        with pytest.raises(pybmc.ContextFullError):
            session.reserve(14)
        assert session.position == len(TOKENS) and session.tokens == TOKENS
        session.eval([1] * 13)
        with pytest.raises(pybmc.ContextFullError, match="21 rows are needed"):
            session.eval([1])
        session.rewind(6)
        assert (session.eval(TOKENS[6:]) == right).all()


def test_one_full_session_stops_the_call(model):
    with model.session(context=5) as small, model.session() as large:
        large.eval([5])
        with pytest.raises(pybmc.ContextFullError):
            pybmc.eval_batch([(large, TOKENS, "last"), (small, TOKENS, "last")])
        assert (large.position, small.position) == (1, 0) and large.tokens == [5]


def test_learned_positions_are_a_limit():
    with pybmc.Model(tiny.model("gpt2", n_ctx=32)) as model:
        with pytest.raises(pybmc.ArgumentError, match="32 learned positions, 33 are asked for"):
            model.session(context=33)
        with model.session() as session, pytest.raises(pybmc.ContextFullError):
            session.eval([1] * 33)


def test_wrong_company(model):
    with pybmc.Model(tiny.model("llama")) as other, other.session() as theirs, model.session() as ours:
        with pytest.raises(pybmc.ArgumentError, match="different models"):
            pybmc.eval_batch([(ours, TOKENS, "last"), (theirs, TOKENS, "last")])
        with pytest.raises(pybmc.BusyError, match="twice"):
            pybmc.eval_batch([(ours, TOKENS, "last"), (ours, TOKENS, "last")])
        assert pybmc.eval_batch([]) == [] and ours.eval(TOKENS) is not None and theirs.position == 0


# Beginnings and ends


def use(session):
    return [
        lambda: session.eval(TOKENS), lambda: session.position, lambda: session.rows,
        lambda: session.rewind(0), lambda: session.tokens, lambda: session.arena_stats(),
        lambda: session.reserve(1), lambda: session.__enter__().eval(TOKENS),
        lambda: pybmc.eval_batch([(session, TOKENS, "last")]),
    ]


def test_closed_sessions_and_models(model):
    session, other = model.session(), model.session()
    session.close()
    session.close()
    for call in use(session):
        with pytest.raises(pybmc.ClosedError, match="this session is closed"):
            call()
    with pytest.raises(pybmc.ClosedError):
        pybmc.eval_batch([(other, TOKENS, "last"), (session, TOKENS, "last")])
    other.eval(TOKENS)
    model.close()
    model.close()
    for call in (*use(other), model.session, lambda: model.packed_bytes):
        with pytest.raises(pybmc.ClosedError):
            call()
    other.close()
    assert "llama" in repr(model)


def test_any_order_of_ends():
    """Model, sessions and results, forgotten in any order and in cycles."""
    path = tiny.model("llama", **SMALL)
    for order in range(12):
        model = pybmc.Model(path, threads=1 + order % 2)
        session, other = model.session(), model.session(rows=512)
        result = session.eval(TOKENS)
        if order % 3 == 0:
            del model
            gc.collect()
            assert (other.eval(TOKENS) == result).all()
        elif order % 3 == 1:
            model.cycle = [session, other, model]
            del model, session, other
            gc.collect()
        else:
            model.close()
            del other
        assert np.isfinite(result).all()
    gc.collect()


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

    before = held()
    for _ in range(20):
        refuse(path, "attn_q")
    pybmc.Model(tiny.model("llama"), threads=4).close()
    gc.collect()
    assert held() == before


def test_nothing_is_said_at_exit():
    """A program that ends with models open, in globals and caches, ends quietly."""
    code = (
        "import functools, pybmc\n"
        f"model = pybmc.Model({str(tiny.model('llama', **SMALL))!r})\nsession = model.session()\n"
        "cached = functools.lru_cache(lambda: pybmc.Model(model.path))\ncached().kept = cached().session()\n"
        "session.eval([1, 2, 3])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on_alone():
    """The pool's threads stay behind in the parent; the child must not wait for them."""
    code = (
        "import os, pybmc\n"
        f"model = pybmc.Model({str(tiny.model('llama', **SMALL))!r}, threads=3)\nsession = model.session()\n"
        "right = session.eval([1, 2, 3]).tobytes()\nsession.rewind(0)\nchild = os.fork()\n"
        "assert session.eval([1, 2, 3]).tobytes() == right\nmodel.close()\n"
        "if child: assert os.waitpid(child, 0)[1] == 0"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, timeout=120).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_beside_a_generation_go_on():
    """Another thread is in the middle of a pass: its locks, threads and counters are made new in the child."""
    code = (
        "import faulthandler, os, threading, traceback, numpy as np, pybmc\n"
        f"model = pybmc.Model({str(tiny.model('llama'))!r}, threads=3)\n"
        "pybmc.generate                      # a fork while another thread imports this would hang in Python's own lock\n"
        "text, idle = list(range(1, 300)), model.session()\nright = model.session().eval(text, logits='all')\n"
        "idle.eval(text[:100])\ndone = False\nused = model.session()\n"
        "def busy():\n"
        "    while not done:\n"
        "        list(pybmc.generate(model, text[:60], 20, session=used, stop_tokens=()))\n"
        "        used.rewind(0)\n"
        "thread = threading.Thread(target=busy)\nthread.start()\n"
        "def child():\n"
        "    faulthandler.dump_traceback_later(20, exit=True)\n"
        "    assert np.array_equal(model.session().eval(text, logits='all'), right)\n"
        "    assert np.array_equal(idle.eval(text[100:], logits='all'), right[100:])\n"
        "    assert len(list(pybmc.generate(model, text[:9], 9, stop_tokens=()))) == 9\n"
        "    try: used.rewind(0), used.eval([1])\n"
        "    except pybmc.BusyError as error: assert 'forked' in str(error)\n"
        "    model.close()\n"
        "    return 0\n"
        "failed = 0\n"
        "for _ in range(30):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        status = 1\n"
        "        try: status = child()\n"
        "        except BaseException: traceback.print_exc()\n"
        "        finally: os._exit(status)\n"
        "    failed += os.waitpid(pid, 0)[1] != 0\n"
        "done = True\nthread.join()\nassert not failed, failed"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, timeout=120, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# Threads


def test_more_threads_than_cores_are_noted_once_and_change_nothing(caplog):
    _note_threads.cache_clear()
    cores, path = lib.bmc_cpu_count(), tiny.model("llama")
    with pybmc.Model(path, threads=cores) as model:
        right = model.session().eval(TOKENS, logits="all")
    assert not caplog.records
    for _ in range(2):
        with pybmc.Model(path, threads=cores + 6) as model:
            assert (model.session().eval(TOKENS, logits="all") == right).all()
    assert [r.getMessage() for r in caplog.records] == [
        f"{cores + 6} threads are asked for, this process may use {cores} cores: that is slower than {cores} threads"]


def test_a_context_beyond_the_training_is_noted_once(model, caplog):
    model.session(context=model.config.n_ctx).close()
    assert not caplog.records
    for _ in range(2):
        with model.session(context=model.config.n_ctx + 1) as session:
            session.eval(TOKENS)
    assert [f"a context of {model.config.n_ctx + 1} tokens is more than the {model.config.n_ctx}" in r.getMessage()
            for r in caplog.records] == [True]


@pytest.fixture
def restless():
    """Threads take turns ten times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)
    yield
    sys.setswitchinterval(before)


def run_threads(*functions):
    """Their results, or the exception of one that failed."""
    results = [None] * len(functions)

    def call(i):
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_two_threads_in_one_session(model, restless):
    """Who comes second gets a BusyError; what is evaluated is right, and no call is lost or done twice."""
    session = model.session(rows=1)

    def many():
        done = busy = 0
        for _ in range(150):
            try:
                session.eval([3], logits="none")
                done += 1
            except pybmc.BusyError:
                busy += 1
            except pybmc.ContextFullError:
                break
        return done, busy

    results = run_threads(many, many, many)
    assert all(isinstance(result, tuple) for result in results), results
    assert session.position == sum(done for done, _ in results) == len(session.tokens)
    ours = session.eval([5], logits="last")
    with model.session() as other:
        assert (other.eval([3] * (session.position - 1) + [5]) == ours).all()
    session.close()


def test_a_session_in_use_cannot_be_touched(model):
    with model.session() as session:
        session._user["thread"] = os.getpid(), -1      # another thread is using it
        for call in (
            session.close, model.close, lambda: session.rewind(0), lambda: session.reserve(1),
            lambda: session.eval([1]),
        ):
            with pytest.raises(pybmc.BusyError, match="in use by another thread"):
                call()
        session._user.clear()
        assert session.eval(TOKENS) is not None


def test_closing_while_another_thread_evaluates(restless):
    """Either it is done, or it is busy, or it was closed before: never a crash."""
    path = tiny.model("llama", **SMALL)
    for i in range(30):
        model = pybmc.Model(path, threads=2)
        sessions = [model.session() for _ in range(2)]

        def work(session):
            for _ in range(20):
                session.eval(TOKENS, logits="all")
                session.rewind(0)

        def close(i=i):
            time.sleep(i % 5 / 1000)
            for _ in range(1000):
                try:
                    return model.close()
                except pybmc.BusyError:
                    time.sleep(0.0005)

        results = run_threads(
            lambda: work(sessions[0]), lambda: work(sessions[1]), close, close,
            lambda: [model.session() for _ in range(50)],
        )
        model.close()
        assert [
            r for r in results[:4] if not isinstance(r, (pybmc.ClosedError, pybmc.BusyError, type(None)))
        ] == []
        assert isinstance(results[4], (list, pybmc.ClosedError))


def test_threads_with_sessions_of_their_own(model):
    texts = [np.random.default_rng(i).integers(0, 401, 60) for i in range(4)]
    with model.session() as session:
        right = []
        for text in texts:
            right.append(session.eval(text, logits="all"))
            session.rewind(0)

    def work(i):
        with model.session(rows=["auto", 1, 16, 33][i]) as session:
            return np.concatenate(
                [session.eval(texts[i][at: at + 5], logits="all") for at in range(0, 60, 5)]
            )

    for ours, theirs in zip(run_threads(*(lambda i=i: work(i) for i in range(4))), right):
        assert (ours == theirs).all()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_interrupts_leave_a_session_whole(model):
    """An exception out of a signal, at any moment: position and tokens still agree, and the next eval is right."""

    class Interrupt(Exception):
        pass

    def interrupt(*_):
        raise Interrupt

    session, text = model.session(), list(np.random.default_rng(0).integers(0, 401, 400))
    right = model.session().eval(text, logits="all")
    before, interrupted = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for i in range(120):
            session.rewind(min(session.position, 300))
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 + i % 17 * 0.0003)
                while session.position < 390:
                    session.eval(text[session.position : session.position + 4], logits="none")
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interrupted += 1
            assert session.tokens == text[:session.position]
            if session.position < 400:
                assert (
                    session.eval(text[session.position : session.position + 1]) == right[session.position - 1]
                ).all()
            session.rewind(i % 3 * 50 if session.position > i % 3 * 50 else 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20
    session.close()


# What it costs


def big_model(path, n_ctx=131072):
    """60M weights in Q8_0, made of few random bytes: 65 MB in a fraction of a second."""
    shape = dict(dim=1024, hidden_dim=4096, n_heads=16, n_kv_heads=4, head_dim=64)
    metadata, _ = tiny.parts("llama", **SMALL)
    metadata |= {
        "llama.context_length": n_ctx, "llama.embedding_length": 1024, "llama.feed_forward_length": 4096,
        "llama.block_count": 4, "llama.attention.head_count": 16, "llama.attention.head_count_kv": 4,
        "llama.rope.dimension_count": 64,
    }

    class Cheap(tiny._Tensors):
        def matrix(self, name, n_rows, n_cols, std=None, type=None):
            blocks = np.tile(self.rng.integers(0, 256, (1, n_cols // 32, 34), np.uint8), (n_rows, 1, 1))
            blocks[..., :2] = np.array([0.0005], np.float16).view(np.uint8)
            self.made[name + ".weight"] = "Q8_0", blocks.reshape(n_rows, -1)

    make = Cheap(np.random.default_rng(0), "Q8_0")
    make.matrix("token_embd", 300, 1024)
    for layer in range(4):
        tiny._layer(make, "llama", layer, **shape)
    make.norm("output_norm", 1024)
    make.matrix("output", 300, 1024)
    return tiny.save(path, metadata, make.made)


MEASURE = """
import json, sys
from pathlib import Path
import pybmc

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10

def measure(path, rows, context):
    before = resident()
    with pybmc.Model(path, threads=2) as model:
        loaded = resident() - before
        session = model.session(context=context, rows=rows)
        opened = resident() - before - loaded
        session.eval([1] * 100)
        used, row = resident() - before - loaded, session.arena_stats().row_bytes
        return {"packed": model.packed_bytes, "loaded": loaded, "opened": opened, "used": used, "row": row}

pybmc.Model(sys.argv[1]).close()        # what a first model imports
print(json.dumps([measure(sys.argv[2], *way) for way in json.loads(sys.argv[3])]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_follows_use(tmp_path):
    """Packed weights plus 5%, and a session that costs what it holds, whatever its cap."""
    MB = 1 << 20
    path = big_model(tmp_path / "big.gguf")
    ways = [("auto", None), ("auto", 200), (1, None), (200, 200)]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tiny.model("llama", **SMALL), path, json.dumps(ways)],
        capture_output=True, text=True, cwd=HERE.parent, timeout=60,
    )
    assert result.returncode == 0, result.stderr
    for (rows, context), got in zip(ways, json.loads(result.stdout)):
        assert got["packed"] > 60 * MB and got["loaded"] < 1.05 * got["packed"] + 4 * MB, (rows, context, got)
        assert got["opened"] < MB, (rows, context, got)
        assert got["used"] < 400 * got["row"] + 24 * MB, (rows, context, got)       # a pass's buffers among it


if __name__ == "__main__":
    open_all()
