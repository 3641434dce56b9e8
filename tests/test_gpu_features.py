"""What else there is besides passes, with layers on a GPU: shared beginnings, memory, drafts, times,
commands."""

import json

import numpy as np
import pytest
import tiny
import tiny_encoders
from gpu import fake_driver, nothing_is_left, tokens  # noqa: F401

import pybmc
from pybmc.cli import run
from pybmc.engine import memory
from pybmc.engine.engine import Engine
from pybmc.engine.memory import usual_memory
from pybmc.engine.request import Request
from pybmc.spec import store
from pybmc.spec.speculation import Speculation

GREEDY = pybmc.Sampler(temperature=0)


def loaded(path, layers, **settings):
    return pybmc.Model(path, threads=1, n_gpu_layers=layers, **settings)


def answers(engine, requests):
    """What each request is answered, and how many tokens of its prompt were there already. Rows make way."""
    sequences, found = list(map(engine.add, requests)), {}
    while engine.running or engine.waiting:
        try:
            for sequence, token in engine.step():
                found.setdefault(sequence, []).append((token.id, token.logprob))
        except pybmc.OutOfMemoryError:
            assert engine.relieve()
    assert not any(sequence.error for sequence in sequences)
    return [(found[sequence], sequence.stats.reused_tokens) for sequence in sequences]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen35"])
def test_requests_share_the_beginnings_of_their_texts(arch):
    path, begin = tiny.model(arch), tokens(24).tolist()
    rounds = [[Request(begin + [i], 4, GREEDY) for i in range(3)] for _ in range(2)]
    found = []
    for layers in (0, 1, -1):
        with loaded(path, layers) as model, \
                Engine(model, parallel=2, memory=1e9, keep=True, spec="off") as engine:
            found.append([answers(engine, requests) for requests in rounds])
    assert found[0] == found[1] == found[2]
    assert all(reused for _, reused in found[0][1])


def test_where_the_gpu_is_full_kept_rows_make_way(fake):
    """Though the engine's own bound is far off."""
    path, requests = tiny.model("llama"), [Request(tokens(60, i).tolist(), 4, GREEDY) for i in range(6)]
    with loaded(path, 0) as model, Engine(model, parallel=2, memory=1e9, keep=True, spec="off") as engine:
        right = [text for text, _ in answers(engine, requests)]
    with loaded(path, -1) as model, Engine(model, parallel=2, memory=1e9, keep=True, spec="off") as engine:
        with model.session() as session:
            session.eval(tokens(9), "none")             # room for what passes bring with them stays
        with fake.set(memory=fake["bytes"] + 5 * (2 << 20)):
            assert [text for text, _ in answers(engine, requests)] == right
            assert len(engine.prefixes) < 6


def test_the_memory_of_sessions_is_bounded_where_they_are(fake, monkeypatch):
    """Of the machine a half is for them, of the GPU four fifths; a split needs both."""
    path = tiny.model("llama", n_layers=4)
    monkeypatch.setattr(memory, "free_memory", lambda: 1e9)
    for layers, on_gpu in ((0, 0.0), (1, 0.25), (4, 1.0)):
        with loaded(path, layers) as model:
            assert model.gpu_rows() == on_gpu and model.gpu == (0 if layers else None)
            with fake.set(memory=fake["bytes"] + (64 << 20)):
                here = 5e8 / (1 - on_gpu) if on_gpu < 1 else float("inf")
                there = 0.8 * (64 << 20) / on_gpu if on_gpu else float("inf")
                assert usual_memory(model) == pytest.approx(min(here, there))
            with fake.set(memory=1 << 40):
                assert (usual_memory(model) == pytest.approx(here)) == (layers < 4)


def test_times_on_the_gpu_are_a_step(fake):
    path = tiny.model("llama", n_layers=3)
    with loaded(path, 1) as model, model.session() as session, model.profile() as profile:
        session.eval(tokens(5))
    assert profile.steps["on the GPU"] > 0 and profile.steps["attention"] > 0
    assert sum(profile.steps.values()) <= profile.calls_s
    with loaded(tiny.model("llama"), 0) as model, model.session() as session, model.profile() as profile:
        session.eval(tokens(5))
    assert "on the GPU" not in profile.steps


# ---- drafts


def written(model, draft, **settings):
    texts = []
    for temperature in (0.0, 0.8):
        stream = pybmc.generate(model, "the mill", 16, draft=draft, temperature=temperature, seed=1,
                                **settings)
        texts.append(([token.id for token in stream], stream.stats.draft_n > 0))
    return texts


@pytest.mark.parametrize("spec", ["self", "ngram"])
def test_guesses_without_a_draft_model(spec):
    path = tiny.model("llama")
    found = []
    for layers in (0, 1):
        with loaded(path, layers) as model:
            found.append([ids for ids, _ in written(model, None, spec=spec)])
    assert found[0] == found[1]


def test_a_draft_named_by_its_path_goes_where_the_model_is():
    path, draft = tiny.model("llama"), tiny.model("llama", seed=1)
    with loaded(path, 0) as model:
        right = [ids for ids, _ in written(model, draft)]
        assert [small.gpu_layers for small in model.drafts.values()] == [0]
        for small in model.drafts.values():
            small.close()
    with loaded(path, 1) as model:
        assert [ids for ids, _ in written(model, draft)] == right
        (small,) = model.drafts.values()
        assert small.gpu_layers == small.config.n_layers
        small.close()


@pytest.mark.long
def test_a_draft_on_the_gpu_has_no_coarse_head(tmp_path):
    """Of a size for which one is made on the CPU: on the GPU the head itself guesses; the text is the
    same."""
    shape = dict(vocab="spm", vocab_size=1 << 16, dim=256, n_layers=1, tied=True)
    metadata, tensors = tiny.parts(types="Q8_0", **shape)
    path = tiny.save(tmp_path / "wide.gguf", metadata, tensors)
    request = Request([5, 6, 7], 4, GREEDY)
    with loaded(path, 0) as model:
        def write(draft):
            spec, fixed = ("draft", 3) if draft else ("off", 0)
            with Engine(model, speculation=Speculation(model, draft, spec, fixed=fixed)) as engine:
                sequence = engine.add(request)
                ids = []
                while not sequence.done:
                    ids += [token.id for _, token in engine.step()]
                return ids, sequence.stats

        right, _ = write(None)
        with loaded(path, -1) as draft:
            ids, stats = write(draft)
            assert ids == right and stats.draft_n_accepted == stats.draft_n > 0
            assert not draft.coarsen()
        with loaded(path, 0) as draft:
            assert write(draft)[0] == right and draft.coarsen()


def test_what_was_learned_on_the_gpu_is_kept_apart():
    path = tiny.model("llama", n_layers=3)
    keys = []
    for layers in (0, 1, 3):
        with loaded(path, layers) as model:
            keys.append(json.dumps(store.identity(model, model)))
    assert len(set(keys)) == 3 and "gpu" not in keys[0]


# ---- commands


@pytest.mark.parametrize("flags",
                         [["--gpu", "0"], ["-ngl", "2"], ["-ngl", "auto"], ["-ngld", "2"]], ids=" ".join)
def test_nodes_of_a_cluster_have_no_gpu(flags, tmp_path, capsys):
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    batch = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", str(tiny.model("llama"))]
    assert run([*batch, "--ray", "local", *flags]) == 2
    assert "--gpu, -ngl, -ngld and --prompts have no effect there" in capsys.readouterr().err


def test_batches_and_embeddings(tmp_path, capsys):
    (tmp_path / "in").write_text('{"prompt": "the mill"}\n{"prompt": "the mill and"}\n')
    texts, vectors = [], []
    for i, flags in enumerate(([], ["-ngl", "1"])):
        out = tmp_path / f"out{i}"
        batch = ["batch", str(tmp_path / "in"), str(out), "-m", str(tiny.model("llama"))]
        assert run([*batch, "-n", "6", "--seed", "1", "-t", "1", *flags]) == 0
        texts.append([json.loads(line)["text"] for line in out.read_text().splitlines()])
        capsys.readouterr()
        assert run(["embed", str(tiny_encoders.model("bert")), "a text", "-t", "1", "--json", *flags]) == 0
        vectors.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) == 2
    assert vectors[0] == vectors[1] and np.size(vectors[0])
