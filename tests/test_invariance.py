"""A result is a function of the model and the tokens before it, to the last bit.

The model's logits for a text, evaluated in one call with one thread, are the truth here; every other way to
get them gives the same bits: cut into other passes, with more threads, in another arena, beside other
sessions, after a rewind, on another ISA.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pybmc
from pybmc import Engine, Request
from pybmc._native import cpu_levels
from pybmc.spec.speculation import Speculation, plain
from tools.growth import GrowingSession, parse

# Each brings something of its own: types with activations of 8 bits, floats, windows, learned positions,
# sizes that no vector divides.
MODELS = {
    "Q4_K_M": dict(
        arch="llama", types={"*": "Q4_K", "ffn_down": "Q6_K", "attn_v": "Q6_K"}, dim=256, hidden_dim=512,
        head_dim=64, n_ctx=1024,
    ),
    "Q8_0": dict(arch="qwen2", types="Q8_0", n_ctx=1024, vocab_size=523),
    "F16": dict(arch="qwen3", types="F16", head_dim=24, n_heads=3, n_kv_heads=1, n_ctx=1024),
    "windows": dict(arch="gemma3", types="Q4_0", window=37, n_ctx=1024),
    "learned": dict(arch="gpt2", types="Q5_1", n_ctx=1024),
    "MHA": dict(
        arch="phi3", types={"*": "BF16", "ffn_down": "IQ4_NL"}, n_heads=5, n_kv_heads=5, dim=160,
        hidden_dim=160, n_ctx=1024,
    ),
}
TEXT = 700      # tokens: two passes of 512, three chunks of 256
ROWS = ["auto", 1, 3, 16, 50, 1000]
GROWTHS = [parse(name) for name
           in ("copy:1", "copy:50", "geometric", "geometric:1.3", "chunk:16", "reserve", "max", "max-lazy")]
GROWTHS += [parse("copy:48", pad=True, touch=True), parse("chunk:112", pad=True)]
if sys.platform == "linux":
    GROWTHS += [parse("remap"), parse("remap:32")]

names = pytest.mark.parametrize("name", MODELS)
calm = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@lru_cache(maxsize=None)
def load(name, threads=1):
    return pybmc.Model(tiny.model(**MODELS[name]), threads=threads)


@lru_cache(maxsize=None)
def text(name, n=TEXT, seed=0):
    return np.random.default_rng(seed).integers(0, MODELS[name].get("vocab_size", 401), n).astype(np.int32)


@lru_cache(maxsize=None)
def truth(name, n=TEXT, seed=0):
    with load(name).session() as session:
        return session.eval(text(name, n, seed), logits="all")


def assert_same(ours, right):
    assert ours.shape == right.shape and ours.dtype == right.dtype
    different = np.flatnonzero((ours.view(np.int32) != right.view(np.int32)).reshape(len(ours), -1).any(-1))
    assert not different.size, f"{different.size} of {len(ours)} rows differ, the first is row {different[0]}"


def pieces(draw, n, widths):
    """Where a text of n tokens is cut."""
    cuts = [0]
    while cuts[-1] < n:
        cuts.append(min(n, cuts[-1] + draw(widths)))
    return list(zip(cuts, cuts[1:]))


@names
@pytest.mark.parametrize("width", range(1, 34))
def test_every_width(name, width):
    n = max(40, 2 * width)
    threads = 1 + width % 4
    with load(name, threads).session() as session:
        ours = [session.eval(text(name)[at: at + width], logits="all") for at in range(0, n, width)]
    assert_same(np.concatenate(ours)[:n], truth(name)[:n])


@pytest.mark.long
@names
@calm
@given(st.data())
def test_any_split_any_threads_any_arena(name, data):
    n = data.draw(st.integers(1, 300), label="tokens")
    widths = st.one_of(st.integers(1, 33), st.sampled_from([64, 100, 255, 256, 257]))
    with load(name, data.draw(st.integers(1, 4), label="threads")).session(
        rows=data.draw(st.sampled_from(ROWS), label="rows")
    ) as session:
        ours = [session.eval(text(name)[a:b], logits="all") for a, b in pieces(data.draw, n, widths)]
    assert_same(np.concatenate(ours), truth(name)[:n])


@pytest.mark.long
@names
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_arenas_across_chunks_and_passes(name, rows):
    """Passes that end beside the edges: chunks of 256 rows, passes of 512 tokens."""
    cuts = [0, 1, 250, 256, 257, 511, 513, 513 + 17, TEXT]
    with load(name, 2).session(rows=rows) as session:
        ours = [session.eval(text(name)[a:b], logits="all") for a, b in zip(cuts, cuts[1:])]
        assert session.position == TEXT and session.rows >= TEXT
    assert_same(np.concatenate(ours), truth(name))


@pytest.mark.long
@names
@pytest.mark.parametrize("growth", GROWTHS, ids=str)
def test_other_ways_to_grow(name, growth):
    """Those that tools.kvbench compares read the same rows."""
    cuts = [0, 1, 250, 256, 257, 511, 513, 513 + 17, TEXT]
    with GrowingSession(load(name, 2), growth, TEXT) as session:
        ours = [session.eval(text(name)[a:b], logits="all") for a, b in zip(cuts, cuts[1:])]
    assert_same(np.concatenate(ours), truth(name))


@names
def test_last_and_argmax_are_rows_of_all(name):
    model = load(name, 2)
    for n in (1, 2, 17, 255, 513, TEXT):
        with model.session() as session, model.session() as other:
            assert_same(session.eval(text(name)[:n])[None], truth(name)[n - 1: n])
            best = other.eval(text(name)[:n], logits="argmax")
            assert best.dtype == np.int32 and best.tolist() == truth(name)[:n].argmax(-1).tolist()
            session.rewind(0)
            assert session.eval(text(name)[:n], logits="none") is None and session.position == n


@pytest.mark.long
@names
@calm
@given(st.data())
def test_rewind_and_other_words(name, data):
    """Rows beyond the position are garbage that does not matter."""
    with load(name, data.draw(st.integers(1, 3))).session(rows=data.draw(st.sampled_from(ROWS))) as session:
        for _ in range(4):
            keep = data.draw(st.integers(0, min(session.position, 280)), label="keep")
            session.rewind(keep)
            junk = data.draw(st.integers(0, 60), label="junk")
            if junk:
                session.eval(text(name, seed=1)[:junk], logits="none")
                session.rewind(keep)
            assert session.position == keep
            n = data.draw(st.integers(1, 70), label="tokens")
            assert_same(session.eval(text(name)[keep: keep + n], logits="all"), truth(name)[keep : keep + n])


@pytest.mark.long
@names
@calm
@given(st.data())
def test_sessions_side_by_side(name, data):
    """Several sessions in one call, each at its own place in its own text, each with its own wish."""
    model, rounds = (
        load(name, data.draw(st.integers(1, 3), label="threads")),
        data.draw(st.integers(1, 3), label="rounds"),
    )
    sessions = [
        model.session(rows=data.draw(st.sampled_from(ROWS)))
        for _ in range(data.draw(st.integers(1, 5), label="sessions"))
    ]
    for _ in range(rounds):
        taking = data.draw(st.sets(st.sampled_from(range(len(sessions))), min_size=1), label="taking part")
        parts = [
            (
                i, sessions[i].position, data.draw(st.one_of(st.integers(1, 9), st.integers(1, 120))),
                data.draw(st.sampled_from(["all", "last", "none", "argmax"])),
            )
            for i in sorted(taking)
        ]
        results = pybmc.eval_batch(
            [(sessions[i], text(name, 380, i)[at: at + n], want) for i, at, n, want in parts]
        )
        for (i, at, n, want), result in zip(parts, results):
            right = truth(name, 380, i)[at: at + n]
            if want == "none":
                assert result is None
            elif want == "argmax":
                assert result.tolist() == right.argmax(-1).tolist()
            else:
                assert_same(result.reshape(-1, right.shape[1]), right if want == "all" else right[-1:])
    for session in sessions:
        session.close()


@names
def test_best_is_the_same_one_by_one_in_a_pass_and_in_rounds(name):
    """Greedy ids and their log-probabilities, with any threads."""
    words, right = text(name)[:30].tolist(), truth(name)[:30].astype(np.float64)
    with (
        load(name, 3).session() as session,
        load(name).session(rows=3) as other,
        load(name, 2).session() as third,
    ):
        ids, logprobs = session.eval(words, logits="best")
        assert ids.tolist() == right.argmax(-1).tolist()
        np.testing.assert_allclose(
            logprobs, -np.log(np.exp(right - right.max(-1, keepdims=True)).sum(-1)), rtol=0, atol=1e-5
        )
        ours = [other.eval([word], logits="best") for word in words]
        assert_same(np.concatenate([best.logprobs for best in ours]), logprobs)
        greedy = [(int(ids[-1]), float(logprobs[-1]))]
        for _ in range(11):
            best = session.eval([greedy[-1][0]], logits="best")
            greedy.append((int(best.ids[0]), float(best.logprobs[0])))
        assert list(zip(*plain(third, words, 12))) == greedy
        assert third.position == 41 and third.tokens == words + [id for id, _ in greedy[:-1]]
        third.rewind(29)
        assert_same(third.eval(text(name)[29:32], logits="all"), truth(name)[29:32])


@pytest.mark.long
@pytest.mark.parametrize("company", [1, 3, 9])
def test_a_coarse_head_drafts_nearly_the_same_and_changes_nothing_else(tmp_path, company):
    """65,536 ids of 256 values, the least for which a coarse head is made: a model's guesses for itself, in
    rounds of one sequence or many, are nearly always its choices, and its passes have the same bits."""
    metadata, tensors = tiny.parts(types="Q8_0", vocab="spm", vocab_size=1 << 16, dim=256,
                                   n_layers=1, tied=True)
    path = tiny.save(tmp_path / "wide.gguf", metadata, tensors)
    words = np.random.default_rng(5).integers(0, 1 << 16, 60).tolist()
    with pybmc.Model(path, threads=2) as model, model.session() as session:
        before = session.eval(words, logits="all")
        made = Speculation(model, model, "draft", fixed=4)
        assert model.coarsen()
        session.rewind(0)
        assert_same(session.eval(words, logits="all"), before)
        requests = [Request(words[i:i + 3], 60) for i in range(company)]
        found = []
        for guessing in (made, Speculation(model, spec="off")):
            with Engine(model, speculation=guessing, parallel=company) as engine:
                sequences, given = list(map(engine.add, requests)), {}
                while engine.running or engine.waiting:
                    for sequence, token in engine.step():
                        given.setdefault(sequence, []).append((token.id, token.logprob))
                found.append([given[s] for s in sequences])
            if guessing is made:
                guesses, right = (sum(getattr(s.stats, name) for s in sequences)
                                  for name in ("draft_n", "draft_n_accepted"))
                assert right > 0.9 * guesses > 0
        assert found[0] == found[1]
    assert not load("Q8_0").coarsen()


def test_a_pass_is_shared_by_many_sessions():
    """40 sessions of 1 to 40 tokens in one call: 820 tokens, so that two passes cut one of them."""
    model = load("Q8_0", 2)
    sessions = [model.session() for _ in range(40)]
    results = pybmc.eval_batch([(s, text("Q8_0")[:i + 1], "all") for i, s in enumerate(sessions)])
    for i, result in enumerate(results):
        assert_same(result, truth("Q8_0")[:i + 1])
    assert [session.position for session in sessions] == list(range(1, 41))


@pytest.mark.long
@pytest.mark.parametrize("window", [1, 2, 16, 37, 255, 256, 257, 300])
def test_windows_across_chunks(window):
    model = pybmc.Model(tiny.model("gemma3", types="F16", window=window, n_ctx=1024, n_layers=2), threads=2)
    words = text("windows")
    with model.session() as session:
        right = session.eval(words, logits="all")
    for cuts in ([0, 255, 257, 300, TEXT], [*range(0, 290, 29), 512, 513, TEXT]):
        with model.session(rows=50) as session:
            ours = [session.eval(words[a:b], logits="all") for a, b in zip(cuts, cuts[1:])]
        assert_same(np.concatenate(ours), right)
    model.close()


@pytest.mark.long
@pytest.mark.parametrize("threads", [2, 3, 7, 16])
def test_attention_that_is_cut_into_pieces(threads):
    """Few KV heads, many threads, a long context: chunks of one head go to several threads."""
    model = pybmc.Model(tiny.model("llama", types="F16", n_heads=2, n_kv_heads=1, n_ctx=4096),
                        threads=threads)
    alone = pybmc.Model(model.path, threads=1)
    words = np.random.default_rng(0).integers(0, 401, 2600).astype(np.int32)
    with model.session() as ours, alone.session() as right:
        for n in (2300, 1, 8, 250, 17, 1):
            at = ours.position
            assert_same(ours.eval(words[at: at + n], logits="all"),
                        right.eval(words[at: at + n], logits="all"))
    model.close(), alone.close()


# Across ISAs


def digest(name):
    """A hash of everything that 300 tokens give, in two different ways."""
    with load(name).session() as session, load(name, 2).session(rows=16) as other:
        whole = session.eval(text(name)[:300], logits="all")
        assert_same(
            np.concatenate([other.eval(text(name)[at: at + 7], logits="all") for at in range(0, 42, 7)]),
            whole[:42],
        )
    return hashlib.sha256(whole.tobytes()).hexdigest()


def digests():
    return {name: digest(name) for name in MODELS}


def run_on(level):
    """What digests() gives in a new process with kernels of this level, or the error where there are none."""
    code = (
        "import json, pybmc, test_invariance\nfrom pybmc._native import lib\n"
        "try: model = test_invariance.load('F16')\n"
        "except pybmc.BmcError as error: print(error)\n"
        "else: print(json.dumps(test_invariance.digests()))"
    )
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYBMC_CPU": level, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@lru_cache(maxsize=None)
def reference():
    return run_on("ref")


@pytest.mark.parametrize("level", cpu_levels()[1:])
def test_every_level_gives_the_reference_bits(level):
    ours = run_on(level)
    assert ours.startswith("{") and ours == reference()


def test_this_process_gives_the_reference_bits():
    assert reference() == str(digests()).replace("'", '"')


def test_an_isa_that_is_unknown_is_an_error():
    assert re.fullmatch('PYBMC_CPU: expected ref.*, found "mmx"', run_on("mmx"))
