"""Every kind of layer, and every way in which layers vary, at work in a model.

The logits of a text in one pass on one thread are the truth. Cut otherwise, beside other sequences, on other
threads and instruction sets, after any number of rewinds and with any guesses, they have the same bits.
"""

import hashlib
import os
import random
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_kinds

import pybmc
from pybmc import Engine, Request, Sampler
from pybmc._native import cpu_levels
from pybmc.engine.prove import prove
from pybmc.spec.speculation import Speculation

SIZE = 401
LONG = 600              # tokens: more than a pass

names = pytest.mark.parametrize("name", tiny_kinds.NAMES)


@lru_cache(maxsize=None)
def load(name, threads=1, seed=0):
    return pybmc.Model(tiny_kinds.model(name, seed=seed), threads=threads)


def text(n=LONG, seed=0):
    return np.random.default_rng(seed).integers(0, SIZE, n).astype(np.int32)


@lru_cache(maxsize=None)
def truth(name, n=LONG, seed=0):
    with load(name).session() as session:
        return session.eval(text(n, seed), logits="all")


def assert_same(ours, right):
    assert ours.shape == right.shape
    different = np.flatnonzero((ours.view(np.int32) != right.view(np.int32)).any(-1))
    assert not different.size, f"{different.size} of {len(ours)} rows differ, the first is row {different[0]}"


# Cuts, threads, instruction sets, company


@names
def test_every_width(name):
    for width in range(1, 34):
        n = max(40, 2 * width)
        with load(name, 1 + (width % 5 == 4)).session() as session:
            ours = [session.eval(text()[at:min(at + width, n)], logits="all") for at in range(0, n, width)]
        assert_same(np.concatenate(ours), truth(name)[:n])


@names
@pytest.mark.parametrize("cuts", [(1, 512, 513), (511, 512, 514), (47, 48, 49, 97, 98), (300,),
                                  range(1, 120)], ids=str)
def test_long_texts(name, cuts):
    """Passes end beside the edges: of the log, and of what one pass takes."""
    edges = [0, *cuts, LONG]
    with load(name, 3).session() as session:
        ours = [session.eval(text()[a:b], logits="all") for a, b in zip(edges, edges[1:])]
    assert_same(np.concatenate(ours), truth(name))


def digests():
    return {name: hashlib.sha256(truth(name, 100).tobytes()).hexdigest() for name in tiny_kinds.NAMES}


@lru_cache(maxsize=None)
def run_on(level):
    here = Path(__file__).parent
    result = subprocess.run([sys.executable, "-c", "import test_kinds; print(test_kinds.digests())"],
                            capture_output=True, text=True, timeout=120,
                            env=os.environ
                            | {"PYBMC_CPU": level, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("level", cpu_levels())
def test_every_level_gives_the_same_bits(level):
    assert run_on(level) == str(digests())


@names
def test_sequences_side_by_side(name):
    rng = random.Random(name)
    model = load(name, 2)
    sessions = [model.session() for _ in range(5)]
    for _ in range(12):
        parts = [(i, sessions[i].position, rng.choice([1, 1, 2, 7, 30]))
                 for i in rng.sample(range(5), rng.randint(1, 5))]
        results = pybmc.eval_batch([(sessions[i], text(LONG, i)[at:at + n], "all") for i, at, n in parts])
        for (i, at, n), ours in zip(parts, results):
            assert_same(ours, truth(name, LONG, i)[at:at + n])


@names
def test_a_pass_that_several_long_texts_share(name):
    """It is cut inside a sequence, and the next one goes on there."""
    sessions = [load(name, 2).session() for _ in range(3)]
    results = pybmc.eval_batch([(session, text(LONG, i)[:400], "all") for i, session in enumerate(sessions)])
    for i, ours in enumerate(results):
        assert_same(ours, truth(name, LONG, i)[:400])


def test_compressed_values_are_kept_once():
    """c is the first part of the keys [c | r]: 32 and 16 values in each of 3 layers."""
    with load("MLA").session() as session:
        assert session.arena_stats().row_bytes == load("MLA").config.kv_row_bytes == 3 * (32 + 16) * 2


# Going back and guessing


@pytest.mark.parametrize("name, seed", [(name, seed) for name in tiny_kinds.NAMES
                                        for seed in range(4 if name in tiny.RECURRENT else 1)])
def test_rewinds_to_anywhere(name, seed):
    """Between passes of all widths, with other words in between that are forgotten again."""
    rng = random.Random(seed)
    with load(name, 1 + seed % 3).session() as session:
        for _ in range(25):
            at = session.position
            if at and rng.random() < 0.6:
                session.rewind(rng.choice([rng.randint(0, at), max(0, at - rng.randint(0, 40))]))
            keep = session.position
            for _ in range(rng.choice([0, 0, 1, 5, 50])):
                session.eval(text(LONG, 99)[:rng.choice([1, 1, 1, 4])], logits="none")
            session.rewind(keep)
            if rng.random() < 0.2:
                session.snapshot()
            n = min(rng.choice([1, 1, 2, 9, 33, 100]), LONG - keep)
            if n:
                assert session.position == keep
                assert_same(session.eval(text()[keep:keep + n], logits="all"), truth(name)[keep:keep + n])


def written(model, requests, **settings):
    with Engine(model, speculation=Speculation(model, **settings), parallel=len(requests)) as engine:
        sequences, given = list(map(engine.add, requests)), {}
        while engine.running or engine.waiting:
            for sequence, token in engine.step():
                given.setdefault(sequence.number, []).append((token.id, token.logprob))
    assert not any(sequence.error for sequence in sequences)
    return given, sequences


@names
def test_guesses_change_nothing(name):
    """Of repetitions, of a draft model of the same kind, of one that is always right and of the model
    itself; three at a time."""
    model, other = load(name), load(name, seed=1)
    requests = [Request(text(20, 3).tolist(), 70), Request([5, 6, 7] * 8, 70),
                Request(text(60, 4).tolist(), 70, Sampler(temperature=0.9, seed=3))]
    right, _ = written(model, requests, spec="off")
    for settings in ({"spec": "ngram", "fixed": 7}, {"draft": other, "spec": "draft", "fixed": 5},
                     {"draft": model, "spec": "draft", "fixed": 16}, {"spec": "self", "fixed": 9}):
        ours, sequences = written(model, requests, **settings)
        assert ours == right
        if settings["spec"] != "ngram":
            assert all(sequence.stats.draft_n > 40 for sequence in sequences)
        if settings.get("draft") is model:
            assert all(sequence.stats.draft_n_accepted == sequence.stats.draft_n for sequence in sequences)


@names
def test_it_is_proven(name):
    found = list(prove(load(name), ["abc abc abc"], 24, load(name, 1, 1)))
    assert found and all(f.difference is None and f.tokens == 24 for f in found)
