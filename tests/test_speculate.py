"""Speculation: pairs of vocabularies, who guesses in a session, bounds, and what is kept for the next run."""

import json
import logging
import os
import random
from types import SimpleNamespace

import engines
import pytest
import tiny

import pybmc
from pybmc import ArgumentError, Engine, OutOfMemoryError, Request
from pybmc.chat.generate import generate
from pybmc.engine.generate import speculation_of
from pybmc.engine.sampler import Sampler
from pybmc.spec import store
from pybmc.spec.pair import TEXT, PairError, check_pair, connect, first_difference
from pybmc.spec.speculation import MODEL, NGRAMS, Speculation


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def stranger():
    with pybmc.Model(tiny.model("llama", seed=1, n_layers=1), threads=1) as draft:
        yield draft


def write(model, tokens, n, speculation=None, **settings):
    return engines.write(model, Request(tokens, n, Sampler(**settings)), speculation)


# ---- vocabularies ------------------------------------------------------------------------------------------


def test_pairs_are_compared_by_bytes(model, caplog):
    with pybmc.Model(tiny.model("phi3", vocab_size=900), threads=1) as other:
        with pytest.raises(PairError, match=r"token 0 is b'.*' in .* and b'<unk>'"):
            check_pair(model, other)
        assert check_pair(model, model) is None
        assert connect(model, other) == TEXT and "token 0" in caplog.text


def test_the_first_difference_is_one_of_bytes(model):
    """Vocabularies that are spelled alike, or compared piece by piece."""
    tokenizer = model.tokenizer
    other = SimpleNamespace(vocab_size=tokenizer.vocab_size,
                            piece=lambda id: tokenizer.piece(id) + b"x" * (id == 300), tokens=None)
    assert first_difference(tokenizer, tokenizer) is None and first_difference(tokenizer, other) == 300


def test_a_model_without_a_vocabulary_drafts_for_nobody(model, tmp_path, caplog):
    metadata, tensors = tiny.parts("llama")
    path = tiny.save(tmp_path / "bare.gguf", {k: v for k, v in metadata.items()
                                              if not k.startswith("tokenizer")}, tensors)
    with pybmc.Model(path, threads=1) as bare:
        made = Speculation(model, bare)
        assert made.draft is None and "no vocabulary to compare" in caplog.text
        assert "goes on without it" in caplog.text
        assert write(model, [1, 2], 9, made)[0] == write(model, [1, 2], 9)[0]


@pytest.mark.parametrize("sizes", [(900, 860), (860, 900)])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "logit_bias": {5: 3.0, 859: 2.0}}], ids=repr)
def test_padded_vocabularies_work_together(sizes, settings):
    """What only the target has is token 0 for the draft; what only the draft has is not proposed."""
    paths = [tiny.model("llama", vocab_size=size, seed=size) for size in sizes]
    with pybmc.Model(paths[0], threads=1) as model, pybmc.Model(paths[1], threads=1) as draft:
        assert check_pair(model, draft) is None
        text = [1, 2, sizes[0] - 1]
        found, stats = write(model, text, 60, Speculation(model, draft, "draft", fixed=3), **settings)
        assert found == write(model, text, 60, **settings)[0] and stats.draft_n > 0


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3, "top_p": 1.0},
                                      {"temperature": 0.8, "logit_bias": {5: 3.0}}], ids=repr)
def test_ids_are_mapped_where_vocabularies_overlap(model, tmp_path, settings):
    order = list(range(401))
    random.Random(1).shuffle(order)
    with pybmc.Model(tiny.shuffled(tmp_path / "shuffled.gguf", order), threads=1) as draft:
        assert check_pair(model, draft).to_target.tolist() == order
        found, stats = write(model, [5, 6, 7], 60, Speculation(model, draft, "draft", fixed=4), **settings)
        assert found == write(model, [5, 6, 7], 60, **settings)[0]
        right = stats.draft_n_accepted / stats.draft_n
        assert right > 0.5 if "logit_bias" in settings else right == 1      # it is the same model


# ---- guesses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most, least", [(4, 0), (8, 3), (16, 6), (32, 0)])
@pytest.mark.parametrize("spec", ["draft", "auto", "ngram"])
def test_guesses_stay_in_their_bounds(model, spec, most, least):
    draft = None if spec == "ngram" else model
    _, stats = write(model, [5, 6, 7] * 10, 200, Speculation(model, draft, spec, most, least))
    assert all(k == 0 or least <= k <= most for k in stats.lengths)
    assert sum(stats.lengths.values()) == stats.rounds
    assert sum(k * n for k, n in stats.lengths.items()) == stats.draft_n


def test_repetitions_are_found(model):
    """A text that repeats itself, since its logits are biased that way: the guesses come true."""
    bias = {id: 1000.0 for id in (5, 6)}
    found, stats = write(model, [5, 6, 7], 100, Speculation(model, spec="ngram", fixed=4), logit_bias=bias)
    assert found == write(model, [5, 6, 7], 100, logit_bias=bias)[0]
    assert stats.draft_n_accepted > 50 and stats.rounds < 40


def test_one_request_can_do_without_guesses(model):
    with Engine(model, model, spec="draft") as engine:
        sequence = engine.add(Request([1, 2, 3], 20, speculate=False))
        while not sequence.done:
            engine.step()
        assert sequence.drafter is None and sequence.stats.draft_n == 0


def test_without_memory_for_a_coarse_head_drafts_go_on(model, monkeypatch):
    def no_memory(self):
        raise OutOfMemoryError("no memory")

    monkeypatch.setattr(pybmc.Model, "coarsen", no_memory)
    found, stats = write(model, [1, 2, 3], 40, Speculation(model, model, "draft", fixed=3))
    assert found == write(model, [1, 2, 3], 40)[0] and stats.draft_n == stats.draft_n_accepted > 0


def test_a_draft_that_is_closed_is_a_draft_less_at_most(model):
    with pybmc.Model(model.path, threads=1) as twin:
        stream = generate(model, "a mouse", 300, draft=Speculation(model, twin, "draft", fixed=4),
                          stop_tokens=())
        first = next(stream)
        twin.close()
        found = [first.id, *(t.id for t in stream)]
        assert found == [t.id for t in generate(model, "a mouse", 300, stop_tokens=(), spec="off")]


# ---- wishes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wishes, message", [
    ({"spec": "some"}, "spec: expected one of auto"), ({"spec": "draft"}, "there is no draft"),
    ({"draft_max": -1}, "draft_max"), ({"draft_min": 3, "draft_max": 2}, "draft_min"),
    ({"draft": 5}, "draft: expected a Model or a path")], ids=repr)
def test_odd_wishes_are_refused(model, wishes, message):
    for start in (lambda: generate(model, "x", **wishes),
                  lambda: pybmc.generate_batch(model, ["x"], **wishes)):
        with pytest.raises(ArgumentError, match=message):
            start()


def test_a_speculation_is_off_where_nobody_may_guess(model):
    assert Speculation(model, spec="off").off and Speculation(model, model, most=0).off
    made = Speculation(model, model, "ngram")
    assert made.draft is None and not made.off


def test_texts_of_a_model_share_what_was_learned(model, stranger):
    """The same wishes find the same Speculation, in a session also the drafter that knows its text."""
    with model.session() as session, model.session() as other:
        made = speculation_of(session, model, stranger, "auto", 16, 0)
        assert speculation_of(session, model, stranger, "auto", 16, 0) is made
        assert speculation_of(session, model, stranger, "auto", 4, 0) is not made
        assert speculation_of(other, model, stranger, "auto", 16, 0) is made
        for _ in range(2):
            list(generate(model, "the mill", 9, session=session, draft=stranger, stop_tokens=()))
        drafter = session.drafter
        list(generate(model, "the mill and", 9, session=session, draft=stranger, stop_tokens=()))
        assert session.drafter is drafter


def test_a_path_is_opened_once_for_a_session(model):
    with model.session() as session:
        path = tiny.model("llama", seed=1)
        made = speculation_of(session, model, path, "auto", 16, 0)
        assert made.draft.path == str(path)
        assert speculation_of(session, model, str(path), "auto", 16, 0) is made
        assert speculation_of(session, model, path, "ngram", 16, 0).draft is None


# ---- what is kept ------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pybmc" / "pairs"


def test_what_was_learned_is_kept_for_a_pair(model, stranger, kept):
    first = Speculation(model, stranger)
    assert first.seconds(1) == 0
    write(model, [1, 2, 3] * 5, 60, first)
    assert len(list(kept.iterdir())) == 1
    again, other = Speculation(model, stranger), Speculation(model, model)
    assert again.seconds(1) == pytest.approx(first.seconds(1), rel=0.01) and other.seconds(1) == 0
    for source in (NGRAMS, MODEL):
        assert abs(again.chance(source) - first.chance(source)) < 0.2


def test_plain_decoding_keeps_nothing(model, kept):
    write(model, [1, 2, 3], 9, Speculation(model, spec="off"))
    assert not kept.exists()


def test_a_record_is_for_the_same_files_threads_and_machine(tmp_path, kept):
    (tmp_path / "m.gguf").write_bytes(b"x")
    model = SimpleNamespace(path=str(tmp_path / "m.gguf"), threads=2, gpu_layers=0)
    key = store.identity(model)
    assert store.load(key) == [] and store.identity(SimpleNamespace(path="/nowhere", threads=1)) is None
    store.save(key, [0.01, 1.23456789])
    assert store.load(key) == [0.01, 1.2346]
    assert store.load(store.identity(model, model)) == []
    model.threads = 3
    assert store.load(store.identity(model)) == []
    model.threads, before = 2, os.stat(model.path)
    os.utime(model.path, (1, 1))
    assert store.load(store.identity(model)) == []
    os.utime(model.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.load(store.identity(model))
    model.gpu_layers = 1
    assert store.load(store.identity(model)) == []
    store.save(None, [1.0])
    assert store.load(None) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": 1}', "\xff", "[" * 100000, "RECORD:3",
                                  'RECORD:{"a": 1}', "RECORD:[]", "RECORD:[1, 2]", "RECORD:[null]",
                                  f"RECORD:{[1e300] * 200}", f"RECORD:{[-1.0] * 200}"])
def test_a_broken_record_is_no_record(model, stranger, kept, text):
    write(model, [1, 2, 3], 20, Speculation(model, stranger))
    [path] = kept.iterdir()
    if text.startswith("RECORD:"):
        text = json.dumps({"key": json.loads(path.read_text())["key"], "record": 0})[:-2] + text[7:] + "}"
    path.write_text(text, encoding="latin-1")
    made = Speculation(model, stranger)
    assert made.seconds(1) == 0 and 0 < made.chance(MODEL) < 1


def test_a_folder_that_cannot_be_written_is_no_failure(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write(model, [1, 2, 3], 9, Speculation(model, spec="ngram"))
    assert (tmp_path / "file").read_text() == ""


def test_a_warning_names_a_draft_of_another_vocabulary(model, caplog):
    with pybmc.Model(tiny.model("phi3", vocab_size=900), threads=1) as other, \
            caplog.at_level(logging.WARNING):
        found = [t.id for t in generate(model, "x", 20, draft=other, stop_tokens=())]
        assert found == [t.id for t in generate(model, "x", 20, stop_tokens=())]
        assert "another vocabulary" in caplog.text
