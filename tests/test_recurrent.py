"""Recurrent layers: gated delta nets, Mamba 2, short convolutions.

The logits of a text in one pass on one thread are the truth. Cut otherwise, beside other sequences, on other threads
and instruction sets, after any number of rewinds and with any guesses, they have the same bits.
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
import recurrent_oracle
import tiny

import pybmc
from pybmc import Engine, Request, Sampler
from pybmc._native import cpu_levels
from pybmc.chat.conversation import Conversation
from pybmc.engine.prove import prove
from pybmc.errors import FormatError, OutOfMemoryError
from pybmc.models.layers import DeltaNet
from pybmc.spec.speculation import Speculation

SIZE = 401
LONG = 600              # tokens: more than a pass
LOG = 48                # LOG_MAX of native/state.h

archs = pytest.mark.parametrize("arch", tiny.RECURRENT)


@lru_cache(maxsize=None)
def load(arch, threads=1, seed=0):
    return pybmc.Model(tiny.model(arch, n_ctx=2048, seed=seed), threads=threads)


def text(n=LONG, seed=0):
    return np.random.default_rng(seed).integers(0, SIZE, n).astype(np.int32)


@lru_cache(maxsize=None)
def truth(arch, n=LONG, seed=0):
    with load(arch).session() as session:
        return session.eval(text(n, seed), logits="all")


def assert_same(ours, right):
    assert ours.shape == right.shape
    different = np.flatnonzero((ours.view(np.int32) != right.view(np.int32)).any(-1))
    assert not different.size, f"{different.size} of {len(ours)} rows differ, the first is row {different[0]}"


@archs
@pytest.mark.parametrize("type, limit", [("F32", 1e-3), ("Q8_0", 0.2)])
def test_logits_equal_the_oracle(arch, type, limit):
    """Error over spread. States add up what activations of 8 bits lose: 0.01 to 0.1."""
    right = recurrent_oracle.logits(*tiny.parts(arch, types=type), text(70))
    with pybmc.Model(tiny.model(arch, types=type), threads=1) as model, model.session() as session:
        ours = session.eval(text(70), logits="all")
    assert np.sqrt(((ours - right) ** 2).mean()) / right.std() < limit


# Cuts, threads, instruction sets, company


@archs
def test_every_width(arch):
    for width in range(1, 34):
        n = max(60, 2 * width)
        with load(arch, 1 + width % 4).session() as session:
            ours = [session.eval(text()[at:min(at + width, n)], logits="all") for at in range(0, n, width)]
        assert_same(np.concatenate(ours), truth(arch)[:n])


@archs
@pytest.mark.parametrize("cuts", [(1, 512, 513), (511, 512, 514), (47, 48, 49, 97, 98), (300,), range(1, 120)], ids=str)
def test_long_texts(arch, cuts):
    """Passes end beside the edges: of the log, and of what one pass takes."""
    edges = [0, *cuts, LONG]
    with load(arch, 3).session() as session:
        ours = [session.eval(text()[a:b], logits="all") for a, b in zip(edges, edges[1:])]
    assert_same(np.concatenate(ours), truth(arch))


def digests():
    return {arch: hashlib.sha256(truth(arch, 100).tobytes()).hexdigest() for arch in tiny.RECURRENT}


@lru_cache(maxsize=None)
def run_on(level):
    here = Path(__file__).parent
    result = subprocess.run([sys.executable, "-c", "import test_recurrent; print(test_recurrent.digests())"],
                            capture_output=True, text=True, timeout=120,
                            env=os.environ | {"PYBMC_CPU": level, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("level", cpu_levels())
def test_every_level_gives_the_same_bits(level):
    assert run_on(level) == str(digests())


@archs
def test_sequences_side_by_side(arch):
    rng = random.Random(arch)
    model = load(arch, 2)
    sessions = [model.session() for _ in range(5)]
    for _ in range(12):
        taking = rng.sample(range(5), rng.randint(1, 5))
        parts = [(i, sessions[i].position, rng.choice([1, 1, 2, 7, 30])) for i in taking]
        results = pybmc.eval_batch([(sessions[i], text(LONG, i)[at:at + n], "all") for i, at, n in parts])
        for (i, at, n), ours in zip(parts, results):
            assert_same(ours, truth(arch, LONG, i)[at:at + n])


@archs
def test_a_pass_that_several_long_texts_share(arch):
    """It is cut inside a sequence, and the next one goes on there."""
    sessions = [load(arch, 2).session() for _ in range(3)]
    results = pybmc.eval_batch([(session, text(LONG, i)[:400], "all") for i, session in enumerate(sessions)])
    for i, ours in enumerate(results):
        assert_same(ours, truth(arch, LONG, i)[:400])


# Going back


@archs
@pytest.mark.parametrize("seed", range(4))
def test_rewinds_to_anywhere(arch, seed):
    """Between passes of all widths, with other words in between that are forgotten again."""
    rng = random.Random(seed)
    with load(arch, 1 + seed % 3).session() as session:
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
                assert_same(session.eval(text()[keep:keep + n], logits="all"), truth(arch)[keep:keep + n])


@archs
def test_tokens_one_by_one_and_back(arch):
    """The log fills up and moves on; each time some of its tokens are taken back."""
    with load(arch).session() as session:
        while (at := session.position) < 150:
            for token in text(LONG, at)[:32]:
                session.eval([token], logits="none")
            session.rewind(at)
            assert_same(session.eval(text()[at:at + 1])[None], truth(arch)[at:at + 1])


@archs
def test_sync_keeps_what_needs_no_other_tokens(arch):
    """Without a snapshot a text that differs early is read anew; with one, from a little before the snapshot."""
    other = text(LONG, 1)
    with load(arch).session() as session:
        session.eval(text()[:300], logits="none")
        assert session.sync([*text()[:290], *other[:20]]) == 290
        assert session.sync([*text()[:200], *other[:20]]) == 0 == session.position
        session.eval(text()[:200], logits="none")
        session.snapshot()
        session.eval(text()[200:400], logits="none")
        kept = session.sync([*text()[:200], *other[:20]])
        assert 200 - LOG <= kept <= 200 and session.position == kept
        assert_same(session.eval(text()[kept:250], logits="all"), truth(arch)[kept:250])


@archs
def test_a_fork_has_the_states(arch):
    with load(arch).session() as session:
        session.eval(text()[:100], logits="none")
        session.eval(text()[100:103], logits="none")
        for position in (103, 101, 20):
            with session.fork(position) as fork:
                assert_same(fork.eval(text()[position:position + 9], logits="all"), truth(arch)[position:position + 9])
        assert_same(session.eval(text()[103:110], logits="all"), truth(arch)[103:110])


@archs
def test_memory_is_counted(arch):
    with load(arch).session() as session:
        empty = session.arena_stats()
        assert empty.state_bytes > 0 and empty.bytes_reserved == 0
        session.snapshot()                          # of nothing
        session.eval(text()[:60], logits="none")
        used = session.arena_stats()
        assert used.bytes_reserved >= used.state_bytes == empty.state_bytes
        session.snapshot()
        session.snapshot()
        again = session.arena_stats()
        assert 0 < again.bytes_reserved - used.bytes_reserved < used.state_bytes


# Guesses


def written(model, requests, **settings):
    with Engine(model, speculation=Speculation(model, **settings), parallel=len(requests)) as engine:
        sequences, given = list(map(engine.add, requests)), {}
        while engine.running or engine.waiting:
            for sequence, token in engine.step():
                given.setdefault(sequence.number, []).append((token.id, token.logprob))
    assert not any(sequence.error for sequence in sequences)
    return given, sequences


@archs
def test_guesses_change_nothing(arch):
    """Of repetitions, of a draft model of the same kind, of one that is always right, of the model itself; three at a
    time."""
    model, other = load(arch, 2), load(arch, 2, 1)
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


def test_a_draft_model_follows_a_text_that_changes():
    """Its states go back too: in the second text, which begins as the first, it is right again."""
    model = load("qwen35", 2)
    speculation = Speculation(model, model, "draft", fixed=5)
    with model.session() as session, Engine(model, speculation=speculation) as engine:
        for prompt in (text(90, 5).tolist(), text(90, 5).tolist()[:60] + [1, 2, 3], [7, 8, 9] * 5):
            sequence = engine.add(Request(prompt, 40, session=session))
            while not sequence.done:
                engine.step()
            assert sequence.stats.draft_n_accepted == sequence.stats.draft_n > 20


@archs
def test_it_is_proven(arch):
    found = list(prove(load(arch), ["abc abc abc"], 24, load(arch, 1, 1)))
    assert found and all(f.difference is None and f.tokens == 24 for f in found)


# Conversations


def said(stream):
    return [token.id for token in stream]


@pytest.mark.parametrize("arch", ["qwen35", "lfm2", "nemotron_h"])
def test_undo_goes_back_to_the_last_answer(arch):
    model = load(arch)
    with model.session() as session, model.session() as fresh:
        settings = {"max_tokens": 60, "spec": "off"}
        talk, other = Conversation(model, session, **settings), Conversation(model, fresh, **settings)
        said(talk.ask("the first question, again and again " * 20))
        length = session.position
        said(talk.ask("another one, which is longer than it has to be"))
        said(talk.ask("and one that is taken back"))
        talk.undo()
        talk.undo()
        ours = said(talk.ask("the second question"))
        assert talk.stats.reused_tokens >= length - LOG > 100
        other.messages = [dict(message) for message in talk.messages[:-2]]
        assert said(other.ask("the second question")) == ours
        assert other.stats.reused_tokens == 0


def test_an_answer_is_given_again_from_its_prompt():
    model = load("qwen35")
    prompt = text(500, 8).tolist()
    with model.session() as session:
        first = said(pybmc.generate(model, prompt, session=session, max_tokens=100, spec="off"))
        again = pybmc.generate(model, prompt, session=session, max_tokens=100, spec="off")
        assert said(again) == first and again.stats.reused_tokens >= 500 - LOG


def test_a_snapshot_without_memory_is_done_without(monkeypatch):
    def no_memory(self):
        raise OutOfMemoryError("none")

    monkeypatch.setattr(pybmc.Session, "snapshot", no_memory)
    model = load("qwen35")
    with model.session() as session:
        assert len(said(pybmc.generate(model, [1, 2, 3], session=session, max_tokens=5))) == 5


def test_memory_that_sessions_may_take_includes_states():
    model = load("qwen35")
    with model.session() as session:
        stats = session.arena_stats()
    one = stats.row_bytes * 20 + stats.state_bytes
    for memory, at_once in ((1.5 * one, 1), (2.5 * one, 2)):
        with Engine(model, spec="off", memory=memory) as engine:
            for _ in range(3):
                engine.add(Request([1, 2, 3], 17))
            engine.step()
            assert len(engine.running) == at_once


# Files


def test_rows_of_first_files_of_qwen3next():
    """Two groups of one key head and two value heads each; a row's number says what it is."""
    block = DeltaNet(conv=4, state_dim=2, n_groups=2, n_heads=4, inner_dim=8)
    found = {name: rows.tolist() for name, rows in block.rows("ssm_ba").items()}
    assert found == {"ssm_beta": [0, 1, 4, 5], "ssm_alpha": [2, 3, 6, 7]}
    rows = block.rows("ssm_in")
    assert rows["attn_qkv"].tolist() == [0, 1, 12, 13, 2, 3, 14, 15, 4, 5, 6, 7, 16, 17, 18, 19]
    assert rows["attn_gate"].tolist() == [8, 9, 10, 11, 20, 21, 22, 23] and block.rows("ssm_out") == {}


def test_alphas_and_betas_in_one_matrix(tmp_path):
    """The same model in both layouts."""
    metadata, tensors = tiny.parts("qwen35")
    for layer in (0, 2):
        (kind, alpha), (_, beta) = (tensors.pop(f"blk.{layer}.ssm_{name}.weight") for name in ("alpha", "beta"))
        rows = [part[2 * group:2 * group + 2] for group in range(2) for part in (beta, alpha)]
        tensors[f"blk.{layer}.ssm_ba.weight"] = kind, np.concatenate(rows)
    path = tiny.save(tmp_path / "ba.gguf", metadata, tensors)
    results = []
    for file in (path, tiny.model("qwen35")):
        with pybmc.Model(file, threads=1) as model, model.session() as session:
            results.append(session.eval(text()[:30], logits="all"))
    assert_same(*results)


def without(name):
    return lambda metadata, tensors: tensors.pop(name)


def key(name, value):
    return lambda metadata, tensors: metadata.update({name: value})


def rows(name, n):
    return lambda metadata, tensors: tensors.update({name: (tensors[name][0], tensors[name][1][:n])})


def renamed(name, other, n):
    def change(metadata, tensors):
        kind, data = tensors.pop(name)
        tensors[other] = kind, data[:n]
    return change


@pytest.mark.parametrize("arch, change, message", [
    ("qwen35", without("blk.0.ssm_alpha.weight"), "blk.0.ssm_alpha.weight is missing"),
    ("qwen35", without("blk.0.ssm_a"), "blk.0.ssm_a.* is missing"),
    ("qwen35", key("qwen35.ssm.group_count", 3), "4 heads cannot share 3 groups"),
    ("qwen35", key("qwen35.ssm.inner_size", 130), "4 heads cannot share 130 values"),
    ("qwen35", key("qwen35.ssm.conv_kernel", 5), r"ssm_conv1d.*expected 256 rows of 5 values, found 256 of 4"),
    ("qwen35", key("qwen35.ssm.state_size", 0), "ssm.state_size: expected 1 to 1024, found 0"),
    ("qwen35", renamed("blk.0.ssm_alpha.weight", "blk.0.ssm_ba.weight", 3), "ssm_ba.weight: expected 8 rows, found 3"),
    ("granitehybrid", rows("blk.0.ssm_in.weight", 200), "ssm_in.weight: expected 214 rows of 64 values, found 200 of"),
    ("nemotron_h", without("blk.0.ssm_dt.bias"), "blk.0.ssm_dt.bias is missing"),
    ("nemotron_h", key("nemotron_h.ssm.time_step_rank", 5), "cannot share"),
    ("lfm2", without("blk.0.shortconv.conv.weight"), "blk.0.shortconv.conv.* is missing"),
    ("lfm2", key("lfm2.shortconv.l_cache", 4), "shortconv.conv.*expected 64 rows of 4 values, found 64 of 3"),
    ("lfm2", key("lfm2.shortconv.l_cache", 1), "shortconv.l_cache: expected 2 to 64, found 1"),
])
def test_a_file_with_something_wrong_is_refused(tmp_path, arch, change, message):
    metadata, tensors = tiny.parts(arch)
    change(metadata, tensors)
    with pytest.raises(FormatError, match=message):
        pybmc.Model(tiny.save(tmp_path / "wrong.gguf", metadata, tensors), threads=1)
