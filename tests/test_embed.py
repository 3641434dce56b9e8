"""Embeddings: encoders against float64 and llama.cpp, pooling, texts that share passes, and the command."""

import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import oracle
import pytest
import tiny
import tiny_encoders
from hypothesis import given, settings
from hypothesis import strategies as st
from places import HERE, SHARED

import pybmc
from pybmc import ArgumentError, FormatError
from pybmc._native import cpu_levels
from pybmc.cli import run
from pybmc.engine.bench import bench
from pybmc.engine.perplexity import perplexity
from pybmc.engine.rerank import pair_ids
from pybmc.show import describe

FLOAT = 1e-3  # error over spread: keys and values in f16, as in test_exact.py
FOLDER = SHARED / "golden-embeddings"
GOLDEN = sorted(FOLDER.glob("*.gguf"))
SIZE = 160


def rms(x):
    return float(np.sqrt(np.square(np.asarray(x, np.float64)).mean()))


def some_tokens(n, seed=0, size=SIZE):
    return np.random.default_rng([n, seed]).integers(0, size, n).tolist()


def changed(parts, keys=(), tensors=(), **more):
    """A file's metadata and tensors with others in them; None takes one out."""
    metadata, made = parts
    made = made | dict(tensors)
    return metadata | dict(keys) | more, {name: t for name, t in made.items() if t is not None}


def matrix(n_out, n_in, seed=1):
    values = np.random.default_rng(seed).standard_normal((n_out, n_in)).astype(np.float32) * np.float32(
        n_in**-0.5
    )
    return "F32", values.view(np.uint8).reshape(n_out, -1)


def values(tensor):
    return tiny.values(*tensor).astype(np.float64)


@pytest.fixture(scope="module")
def encoders():
    """Open encoders by architecture."""
    opened = {
        arch: pybmc.Model(tiny_encoders.model(arch, n_layers=4 if arch == "modern-bert" else 2), threads=2)
        for arch in tiny_encoders.ARCHITECTURES
    }
    yield opened
    for model in opened.values():
        model.close()


@pytest.fixture(scope="module")
def decoder():
    with pybmc.Model(tiny.model("llama"), threads=2) as model:
        yield model


def hidden_of(model, tokens):
    with model.session() as session:
        return session.eval(tokens, "hidden")


# ---- exactness ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN, reason="needs ../shared/golden-embeddings")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_embeddings(path):
    with np.load(path.with_suffix(".npz")) as golden, pybmc.Model(path, threads=2) as model:
        tokens, ref = golden["tokens"], golden["ref"]
        found = model.embed([tokens[:n] for n in golden["lengths"]], normalize=False)
        assert rms(found - ref) <= 1.1 * rms(golden["llamacpp"] - ref) + 1e-3 * ref.std()
        assert (
            np.sum(found * ref, 1) > 0.99999 * np.linalg.norm(found, axis=1) * np.linalg.norm(ref, axis=1)
        ).all()
        assert rms(hidden_of(model, tokens) - golden["hidden"]) < 2e-3 * golden["hidden"].std()
        assert model.config.causal == (model.config.arch == "qwen3")


@pytest.mark.parametrize("arch", tiny_encoders.ARCHITECTURES)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 530])
def test_hidden_states_equal_float64(encoders, arch, n):
    """530 tokens: three chunks of rows, of which a window sees one or two."""
    metadata, tensors = tiny_encoders.parts(arch, n_layers=encoders[arch].config.n_layers)
    tokens, weights = some_tokens(n), oracle.weights(tensors)
    found = hidden_of(encoders[arch], tokens)
    right = tiny_encoders.hidden(metadata, weights, tokens)
    assert rms(found - right) < FLOAT * right.std()
    if n == 530:  # and the tolerance sees a window that is off by one to each side, and ALiBi
        wrong = {"modern-bert": {"window": tiny_encoders.WINDOW + 2}, "jina-bert-v2": {"alibi": False}}.get(
            arch
        )
        if wrong:
            assert (
                rms(found - tiny_encoders.hidden(metadata, weights, tokens, **wrong))
                > 5 * FLOAT * right.std()
            )


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A gemma-embedding whose file does not say that it is no causal model.
    Its layers see 8 tokens to each side."""
    metadata, tensors = tiny.parts("gemma3", n_layers=3, n_ctx=1024, window=16)
    metadata = {key.replace("gemma3.", "gemma-embedding."): value for key, value in metadata.items()}
    path = tiny.save(
        tmp_path_factory.mktemp("g") / "g.gguf",
        metadata | {"general.architecture": "gemma-embedding"},
        tensors,
    )
    with pybmc.Model(path, threads=2) as model:
        yield model


@pytest.mark.parametrize("at", [0, 10, 255, 256, 300, 575, 599])
def test_a_window_reaches_as_far_to_both_sides(windowed, at):
    tokens = some_tokens(600)
    other = tokens[:at] + [(tokens[at] + 1) % SIZE] + tokens[at + 1 :]
    moved = (hidden_of(windowed, tokens) != hidden_of(windowed, other)).any(axis=1)
    assert (moved == (np.abs(np.arange(600) - at) <= 3 * 8)).all()


def test_without_windows_all_see_all(encoders, decoder):
    tokens = some_tokens(300)
    other = [*tokens[:-1], (tokens[-1] + 1) % SIZE]
    for arch in tiny_encoders.ARCHITECTURES:
        assert (hidden_of(encoders[arch], tokens) != hidden_of(encoders[arch], other)).any(axis=1).all()
    assert (hidden_of(decoder, tokens)[:-1] == hidden_of(decoder, other)[:-1]).all()


# ---- company -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*tiny_encoders.ARCHITECTURES, "llama"])
def test_a_vector_does_not_depend_on_company(encoders, decoder, arch):
    model = encoders.get(arch, decoder)
    texts = [some_tokens(n, seed) for seed, n in enumerate([1, 300, 2, 16, 17, 8, 511, 3, 64, 9, 512])]
    together = model.embed(texts, pooling="mean")
    alone = [model.embed([text], pooling="mean")[0] for text in texts]
    assert (together == alone).all()
    assert (model.embed(texts[::-1], pooling="mean") == together[::-1]).all()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
    pooling=st.sampled_from(["mean", "first", "last"]),
)
def test_order_and_lengths_change_nothing(encoders, lengths, order, pooling):
    model = encoders["modern-bert"]
    texts = [some_tokens(n, i) for i, n in enumerate(lengths)]
    places = list(range(len(texts)))
    order.shuffle(places)
    found = model.embed(texts, pooling=pooling)
    assert (model.embed([texts[i] for i in places], pooling=pooling) == found[places]).all()
    assert (model.embed(texts[:1], pooling=pooling)[0] == found[0]).all()


def digest(threads=1):
    """A hash of what every kind of encoder gives."""
    found = hashlib.sha256()
    for arch in tiny_encoders.ARCHITECTURES:
        with pybmc.Model(tiny_encoders.model(arch), threads=threads) as model:
            found.update(model.embed([some_tokens(n, n) for n in (5, 90, 33, 290)]).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("level", cpu_levels())
def test_threads_and_instruction_sets_change_nothing(level):
    code = "import test_embed; print(test_embed.digest())"
    env = os.environ | {"PYBMC_CPU": level, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == digest(threads=3), done.stderr


def test_texts_share_passes(encoders):
    model = encoders["bert"]
    with model.profile() as profile:
        model.embed([some_tokens(16, i) for i in range(64)])
    assert profile.passes == 2  # of 512 tokens
    with model.profile() as profile:
        model.embed([some_tokens(n) for n in (700, 20, 800, 20)])
    assert profile.passes == 3  # long ones are alone


# ---- pooling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_pooling_equals_numpy(encoders, decoder, arch):
    model = encoders.get(arch, decoder)
    texts = [some_tokens(n) for n in (1, 7, 130)]
    rows = [hidden_of(model, text) for text in texts]
    means = []
    for row in rows:
        total = np.zeros(row.shape[1])
        for vector in row:
            total += vector  # in float64, in order
        means.append(total / len(row))
    right = {"mean": means, "first": [row[0] for row in rows], "last": [row[-1] for row in rows]}
    for pooling, vectors in right.items():
        vectors = np.asarray(vectors, np.float64)
        found = model.embed(texts, pooling=pooling, normalize=False)
        assert found.dtype == np.float32 and (found == vectors.astype(np.float32)).all(), pooling
        for n in (None, 10):
            cut = vectors[:, :n]
            unit = cut / np.sqrt((cut**2).sum(1, keepdims=True))
            assert np.allclose(model.embed(texts, pooling=pooling, dimensions=n), unit, rtol=1e-6, atol=1e-9)
    each = model.embed(texts, pooling="none", normalize=False)
    assert all((found == row).all() for found, row in zip(each, rows))
    assert np.allclose(np.linalg.norm(model.embed(texts, pooling="none")[2], axis=1), 1)


@pytest.mark.parametrize(
    "number, kind", [(1, "mean"), (2, "first"), (3, "last"), (0, "mean"), (None, "mean")]
)
def test_the_file_says_how_to_pool(number, kind):
    with pybmc.Model(tiny_encoders.model("bert", pooling=number), threads=1) as model:
        assert (model.embed([[5, 6, 7]]) == model.embed([[5, 6, 7]], pooling=kind)).all()


def test_dense_matrices_follow_the_pooled_vector(tmp_path):
    first, second = matrix(96, 64), matrix(48, 96, 2)
    keys = {
        "bert.dense_2_feat_in": 64,
        "bert.dense_2_feat_out": 96,
        "bert.dense_3_feat_in": 96,
        "bert.dense_3_feat_out": 48,
    }
    parts = changed(tiny_encoders.parts("bert"), keys, {"dense_2.weight": first, "dense_3.weight": second})
    with pybmc.Model(tiny.save(tmp_path / "d.gguf", *parts), threads=1) as model:
        texts = [some_tokens(n) for n in (3, 40)]
        means = np.array([hidden_of(model, text).astype(np.float64).mean(0) for text in texts])
        found = model.embed(texts, normalize=False)
        assert found.shape == (2, 48)
        assert np.allclose(found, means @ values(first).T @ values(second).T, rtol=1e-5, atol=1e-6)
        assert (model.embed(texts[1:], normalize=False)[0] == found[1]).all()
        with pytest.raises(ArgumentError, match="dimensions: expected a whole number from 1 to 48, found 49"):
            model.embed(texts, dimensions=49)


@pytest.mark.parametrize(
    "tensors, keys, message",
    [
        ({"dense_2.weight": matrix(96, 63)}, {}, "dense_2.weight: expected rows of 64 values, found 63"),
        (
            {"dense_2.weight": matrix(96, 64), "dense_3.weight": matrix(64, 95)},
            {},
            "dense_3.weight: expected rows of 96 values, found 95",
        ),
        (
            {"dense_2.weight": matrix(96, 64)},
            {"bert.dense_2_feat_out": 97},
            "dense_2_feat_out: expected 96, as dense_2.weight has, found 97",
        ),
        ({}, {"bert.dense_2_feat_in": 64}, "dense_2.weight is missing"),
        (
            {"cls.weight": matrix(64, 64), "cls.bias": matrix(1, 63)},
            {},
            "cls.bias: expected a bias of 64 values, found 63",
        ),
        ({"cls.output.bias": matrix(1, 2)}, {}, "cls.output.weight is missing"),
        ({"dense_2.bias": matrix(1, 64)}, {}, "dense_2.weight is missing"),
        ({}, {"bert.pooling_type": 5}, "pooling_type: expected 0 to 4, found 5"),
        ({}, {"bert.attention.causal": 1}, "attention.causal: expected true or false, found 1"),
        (
            {"token_embd_norm.weight": None, "token_embd_norm.bias": None},
            {},
            "token_embd_norm.weight is missing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_do_not_fit(tmp_path, tensors, keys, message):
    path = tiny.save(tmp_path / "wrong.gguf", *changed(tiny_encoders.parts("bert"), keys, tensors))
    with pytest.raises(FormatError, match=re.escape(message)):
        pybmc.Model(path, threads=1)
    assert message in describe(path)["why_not"]


# ---- scores ------------------------------------------------------------------------------------------------


def test_scores_of_a_reranker(tmp_path):
    """A BERT's: cls, tanh and cls.output of its first token; only cls.output where there is no cls."""
    tensors = {
        "cls.weight": matrix(64, 64),
        "cls.bias": matrix(1, 64, 2),
        "cls.output.weight": matrix(1, 64, 3),
        "cls.output.bias": matrix(1, 1, 4),
    }
    weight = {name: values(tensor) for name, tensor in tensors.items()}
    texts = [some_tokens(n) for n in (2, 30)]
    with pybmc.Model(
        tiny.save(tmp_path / "r.gguf", *changed(tiny_encoders.parts("bert", pooling=4), (), tensors)),
        threads=1,
    ) as model:
        first = np.array([hidden_of(model, text)[0] for text in texts], np.float64)
        inner = np.tanh(first @ weight["cls.weight"].T + weight["cls.bias"][0])
        found = model.embed(texts)
        assert found.shape == (2, 1) and np.allclose(
            found, inner @ weight["cls.output.weight"].T + weight["cls.output.bias"], rtol=1e-5
        )
        with pytest.raises(ArgumentError, match="dimensions: scores are not cut"):
            model.embed(texts, dimensions=1)
    del tensors["cls.weight"], tensors["cls.bias"]
    with pybmc.Model(
        tiny.save(tmp_path / "s.gguf", *changed(tiny_encoders.parts("bert", pooling=4), (), tensors)),
        threads=1,
    ) as model:
        assert np.allclose(
            model.embed(texts), first @ weight["cls.output.weight"].T + weight["cls.output.bias"], rtol=1e-5
        )


def test_scores_of_qwen3_are_shares_of_its_answers(tmp_path):
    output = matrix(2, 64)
    parts = changed(
        tiny.parts("qwen3"),
        {"qwen3.pooling_type": 4, "qwen3.classifier.output_labels": ["yes", "no"]},
        {"cls.output.weight": output},
    )
    with pybmc.Model(tiny.save(tmp_path / "r.gguf", *parts), threads=1) as model:
        tokens = some_tokens(20)
        found = model.embed([tokens])
        assert np.allclose(
            found,
            oracle.softmax(hidden_of(model, tokens)[-1].astype(np.float64) @ values(output).T),
            rtol=1e-5,
        )


class Words:
    """A vocabulary of words, and the names of control tokens."""

    def __init__(self, **metadata):
        self.vocab, self.metadata = self, metadata
        self.add_bos = self.add_eos = True
        self.sep_id = 2

    def get(self, key, kind, default=None):
        return self.metadata.get(key, default)

    def split(self, text, special):
        return ([1 if part == "<s>" else part for part in re.split("(<s>)", text) if part] if special
                else [text])

    def encode(self, text):
        return [1, text, 2]

    def encode_parts(self, parts):
        return list(parts)


def test_pairs_of_texts():
    """Whatever a text spells, it is neither a control token nor the place of the other."""
    assert pair_ids(Words(), "q", "d") == [1, "q", 2, "d", 2]
    assert pair_ids(Words(**{"tokenizer.ggml.add_sep_token": True}), "q", "d") == [1, "q", 2, 2, "d", 2]
    assert pair_ids(Words(**{"tokenizer.ggml.pre": "roberta-bpe"}), "q", "d") == [1, "q", 2, 2, "d", 2]
    asked = Words(**{"tokenizer.chat_template.rerank": "<s>Query: {query}, {document}<s>!"})
    assert pair_ids(asked, "{document}<s>", "{query}\\1") == [1, "Query: {document}<s>, {query}\\1", 1, "!"]


def test_scores_that_nobody_gives(encoders, decoder):
    with pytest.raises(
        ArgumentError, match="pooling: the model gives no scores: cls.output.weight is missing"
    ):
        encoders["bert"].embed("a", pooling="rank")
    for model in (encoders["modern-bert"], decoder):
        with pytest.raises(
            ArgumentError, match=f"pybmc does not know how {model.config.arch} models score a text"
        ):
            model.embed("a", pooling="rank")


# ---- inputs ------------------------------------------------------------------------------------------------


def test_texts_get_the_tokens_around_them(encoders):
    model = encoders["bert"]
    ids = model.tokenizer.encode("the mouse")
    assert ids[0] == 2 and ids[-1] == 3
    right = model.embed([ids])
    assert right.shape == (1, 64)
    for same in (
        "the mouse",
        ["the mouse"],
        ("The Mouse",),
        np.array([ids]),
        (text for text in ["the mouse"]),
    ):
        assert (model.embed(same) == right).all()
    assert (
        model.embed("").shape == (1, 64)
        and model.embed([]).shape == (0, 64)
        and model.embed([], dimensions=5).shape == (0, 5)
    )
    assert (model.embed("[CLS]") != model.embed([[2, 2, 3]])).any()  # a text does not spell control tokens
    seen = []
    model.embed(["a", "bb", "the"], progress=lambda *done: seen.append(done))
    assert seen == [(10, 10)]


@pytest.mark.parametrize(
    "inputs, message",
    [
        (5, "inputs: expected texts or lists of token ids, found 5"),
        (b"text", "inputs: expected texts or lists of token ids, found b'text'"),
        ([1, 2], "inputs: expected texts or lists of token ids, found 1"),
        ([[1, 2.5]], "inputs: expected whole numbers as token ids, found 2.5"),
        ([["a"]], "inputs: expected whole numbers as token ids, found 'a'"),
        ([[1, SIZE]], f"inputs: expected token ids from 0 to {SIZE - 1}, found {SIZE}"),
        ([[1], []], "inputs: text 2 of 2 has no tokens"),
        ([[1], [1] * 2049], "inputs: text 2 of 2 has 2049 tokens, .* takes up to 2048"),
        (["a" * 2047], "inputs: text 1 of 1 has 2049 tokens, .* takes up to 2048"),
    ],
)
def test_inputs_that_are_refused(encoders, inputs, message):
    with pytest.raises(ArgumentError, match=message):
        encoders["bert"].embed(inputs)


def test_arguments_that_are_refused(encoders, decoder, tmp_path):
    model = encoders["bert"]
    for arguments, message in (
        ({"pooling": "cls"}, "pooling: expected one of none, mean, first, last, rank, found 'cls'"),
        ({"dimensions": 0}, "dimensions: expected a whole number from 1 to 64, found 0"),
        ({"dimensions": 65}, "dimensions: expected a whole number from 1 to 64, found 65"),
    ):
        with pytest.raises(ArgumentError, match=message):
            model.embed("a", **arguments)
    with pytest.raises(ArgumentError, match="513 tokens, .* takes up to 512"):
        decoder.embed([[1] * 513])
    parts = changed(tiny_encoders.parts("bert"))
    bare = {key: None if key.startswith("tokenizer") else value for key, value in parts[0].items()}
    with pybmc.Model(tiny.save(tmp_path / "bare.gguf", bare, parts[1]), threads=1) as model:
        assert model.embed([[1, 2]]).shape == (1, 64)
        with pytest.raises(ArgumentError, match="has no vocabulary: give token ids"):
            model.embed("a")
    with pytest.raises(pybmc.ClosedError):
        model.embed([[1, 2]])


def test_the_longest_text_of_an_encoder(tmp_path):
    """A context of more tokens than a pass takes is cut to those."""
    with pybmc.Model(
        tiny.save(tmp_path / "l.gguf", *tiny_encoders.parts("jina-bert-v2", n_ctx=1 << 16)), threads=2
    ) as model:
        assert model.pass_tokens == 8192
        with pytest.raises(ArgumentError, match="has 8193 tokens, .* takes up to 8192"):
            model.embed([[1] * 8193])


def test_a_chat_model_gives_the_mean_and_a_note(tmp_path, caplog):
    path = tiny.save(tmp_path / "chat.gguf", *tiny.parts("llama"))
    with pybmc.Model(path, threads=1) as model, caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert (model.embed("a mouse") == model.embed("a mouse", pooling="mean")).all()
        assert caplog.text.count("names no pooling") == 1


# ---- what an encoder does not do ---------------------------------------------------------------------------


def test_an_encoder_reads_a_text_once_and_has_no_logits(encoders):
    with encoders["bert"].session() as session:
        for logits in ("last", "all", "argmax", "best"):
            with pytest.raises(ArgumentError, match="this model has no logits, only hidden states"):
                session.eval([1, 2], logits)
        with pytest.raises(ArgumentError, match="no tokens are chosen after it"):
            session.eval([1, 2], "argmax", sampler=pybmc.Sampler())
        found = session.eval([1, 2, 3], "hidden")
        with pytest.raises(
            ArgumentError,
            match="reads a text as a whole: expected 1 to 2048 tokens in an empty session, found 1",
        ):
            session.eval([4], "hidden")
        session.rewind(0)
        assert (session.eval([1, 2, 3], "first hidden") == found[0]).all()
        session.rewind(0)
        assert (session.eval([1, 2, 3], "last hidden") == found[2]).all()


def test_hidden_states_of_a_causal_model_do_not_depend_on_cuts(decoder):
    tokens = some_tokens(60)
    whole = hidden_of(decoder, tokens)
    with decoder.session() as session:
        pieces = [session.eval(tokens[at : at + 7], "hidden") for at in range(0, 60, 7)]
        assert (np.concatenate(pieces) == whole).all()


def test_an_encoder_writes_no_text(encoders, decoder):
    encoder = encoders["bert"]
    for call in (
        lambda: pybmc.generate(encoder, "a"),
        lambda: pybmc.generate_batch(encoder, ["a"]),
        lambda: pybmc.Engine(encoder),
        lambda: pybmc.Speculation(encoder),
        lambda: pybmc.Speculation(decoder, encoder),
        lambda: pybmc.generate(decoder, "a", draft=encoder),
        lambda: perplexity(encoder, "a" * 600, 8),
    ):
        with pytest.raises(ArgumentError, match=r"is an encoder \(bert\): it writes no text"):
            call()
    with pytest.raises(ArgumentError, match="no logits"):
        list(bench(encoder, (8,), (), (), reps=1))


def test_show_tells_encoders(encoders, decoder, capsys):
    assert run(["show", encoders["bert"].path]) == 0
    assert "pooling mean; an encoder, which writes no text\n" in capsys.readouterr().out
    assert run(["show", decoder.path]) == 0
    assert "embeddings" not in capsys.readouterr().out


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(monkeypatch):
    def set_stdin(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    set_stdin(b"")
    return set_stdin


def test_the_command_prints_vectors(encoders, capsys, pipe, tmp_path):
    path, texts = str(encoders["bert"].path), ["the mouse", "", "a mill"]
    right = encoders["bert"].embed(texts)
    assert run(["embed", path, *texts]) == 0
    out, err = capsys.readouterr()
    assert (np.array([line.split() for line in out.splitlines()], np.float32) == right).all() and err == ""
    pipe(b"the mouse\r\n\na mill")
    assert run(["embed", "-m", path, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2] and (
        np.array([row["embedding"] for row in rows], np.float32) == right
    ).all()
    (tmp_path / "texts").write_text("the mouse\n\na mill\n")
    for form in ("npy", "floats"):
        assert (
            run(["embed", path, "-f", str(tmp_path / "texts"), "--format", form, "-o", str(tmp_path / form)])
            == 0
        )
        assert capsys.readouterr().out == ""
    assert (np.load(tmp_path / "npy") == right).all() and (
        np.loadtxt(tmp_path / "floats", np.float32) == right
    ).all()


def test_the_commands_options(encoders, capsys):
    path, model = str(encoders["bert"].path), encoders["bert"]
    for options, arguments in (
        (["--no-normalize"], {"normalize": False}),
        (["--pooling", "last"], {"pooling": "last"}),
        (["--dimensions", "7"], {"dimensions": 7}),
    ):
        assert run(["embed", path, "the mouse", *options]) == 0
        assert (
            np.array(capsys.readouterr().out.split(), np.float32) == model.embed("the mouse", **arguments)[0]
        ).all()
    assert run(["embed", path, "the mouse", "--pooling", "none", "--json"]) == 0
    assert (
        np.array(json.loads(capsys.readouterr().out)["embedding"], np.float32)
        == model.embed("the mouse", pooling="none")[0]
    ).all()


@pytest.mark.parametrize(
    "args, status, message",
    [
        (["{bert}", "a", "--json", "--format", "npy"], 2, "--json and --format npy are both given"),
        (["{bert}", "a", "--format", "npy"], 2, "--format npy needs -o FILE"),
        (["{bert}", "a", "--pooling", "none"], 2, "use --format json"),
        (["{bert}", "a", "-f", "x"], 2, "texts and -f are both given"),
        (["{bert}"], 2, "there are no lines to read"),
        ([], 2, "no model is given"),
        (["{bert}", "a", "--pooling", "best"], 2, "'best' is not one of"),
        (
            ["{bert}", "a", "--dimensions", "99"],
            1,
            "dimensions: expected a whole number from 1 to 64, found 99",
        ),
        (["{bert}", "a", "--pooling", "rank"], 1, "the model gives no scores"),
        (["{bert}", "a" * 3000], 1, "text 1 of 1 has 3002 tokens"),
        (["{bert}", "-f", "/nonexistent"], 1, "/nonexistent: No such file"),
        (["{bert}", "a", "-o", "/nonexistent/x"], 1, "/nonexistent/x: No such file"),
        (["/nonexistent", "a"], 1, "/nonexistent: no such file"),
    ],
)
def test_the_commands_errors(encoders, capsys, pipe, args, status, message):
    assert run(["embed", *(arg.format(bert=encoders["bert"].path) for arg in args)]) == status
    out, err = capsys.readouterr()
    assert message in err and out == "" and "Traceback" not in err


@pytest.mark.parametrize(
    "args",
    [["chat"], ["generate", "-p", "a"], ["prove"], ["bench"], ["perplexity", "-f", str(HERE / "tiny.py")]],
    ids=lambda args: args[0],
)
def test_other_commands_on_an_encoder(encoders, decoder, capsys, pipe, args):
    encoder = str(encoders["bert"].path)
    drafts = (
        [[args[0], str(decoder.path), *args[1:], "--draft", encoder]]
        if args[0] in ("chat", "generate", "prove")
        else []
    )
    for command in ([args[0], encoder, *args[1:]], *drafts):
        assert run(command) == 1
        out, err = capsys.readouterr()
        assert (
            out == ""
            and err
            == f"pybmc: {encoder} is an encoder (bert): it writes no text, it gives embeddings "
               "(pybmc embed)\n"
        )


# ---- the page ----------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "encoder.gguf", *tiny_encoders.parts("bert"))
    score = {"cls.output.weight": matrix(1, 64), "cls.output.bias": matrix(1, 1)}
    tiny.save(tmp_path / "reranker.gguf", *changed(tiny_encoders.parts("bert", pooling=4), (), score))
    blocks = re.findall(r"```python\n(.*?)```",
                        (HERE.parent / "docs" / "embeddings.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and len(capsys.readouterr().out.splitlines()) == 2
