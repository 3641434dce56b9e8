"""Recurrent layers: gated delta nets, Mamba 2, short convolutions.
What holds for every kind of layer is in test_kinds.py."""

import numpy as np
import pytest
import recurrent_oracle
import tiny
from test_kinds import LONG, SIZE, assert_same, load, text, truth

import pybmc
from pybmc import Engine, Request
from pybmc._native import check, ffi, lib
from pybmc.chat.conversation import Conversation
from pybmc.errors import FormatError, OutOfMemoryError
from pybmc.models.layers import DeltaNet

LOG = 48                # LOG_MAX of native/state.h

archs = pytest.mark.parametrize("arch", tiny.RECURRENT)


@archs
@pytest.mark.parametrize("type, limit", [("F32", 1e-3), ("Q8_0", 0.2)])
def test_logits_equal_the_oracle(arch, type, limit):
    """Error over spread. States add up what activations of 8 bits lose: 0.01 to 0.1."""
    right = recurrent_oracle.logits(*tiny.parts(arch, types=type), text(70))
    with pybmc.Model(tiny.model(arch, types=type), threads=1) as model, model.session() as session:
        ours = session.eval(text(70), logits="all")
    assert np.sqrt(((ours - right) ** 2).mean()) / right.std() < limit


# Going back


@archs
def test_tokens_one_by_one_and_back(arch):
    """The log fills up and moves on; each time some of its tokens are taken back."""
    with load(arch).session() as session:
        while (at := session.position) < 150:
            for token in text(LONG, at)[:32]:
                session.eval([token], logits="none")
            session.rewind(at)
            assert_same(session.eval(text()[at:at + 1])[None], truth(arch)[at:at + 1])


def test_guesses_of_many_sequences_can_all_be_taken_back():
    """72 rows with a sampler are more than one pass has room for:
    a sequence's own stay in one, however many there are."""
    model, sampler = load("qwen35"), pybmc.Sampler(temperature=0.7)
    sessions = [model.session() for _ in range(8)]
    for session in sessions:
        session.eval(text(20), "none")
    pybmc.eval_batch([(session, text(9, seed=i), "argmax", 0, sampler) for i, session in enumerate(sessions)])
    assert [session.nearest(20) for session in sessions] == [20] * 8


@archs
def test_sync_keeps_what_needs_no_other_tokens(arch):
    """Without a snapshot a text that differs early is read anew;
    with one, from a little before the snapshot."""
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
    handle = ffi.new("bmc_session **")
    with load(arch).session() as session:
        session.eval(text()[:100], logits="none")
        session.eval(text()[100:103], logits="none")
        before = session.arena_stats().bytes_reserved
        for position in (103, 101, 20):
            check(lib.bmc_session_fork(session._handle, position, handle))
            row = np.empty((1, SIZE), np.float32)
            token = ffi.new("int32_t *", int(text()[position]))
            span = ffi.new("bmc_span *", {"session": handle[0], "tokens": token, "n_tok": 1, "want": 1,
                                          "logits": ffi.from_buffer("float[]", row)})
            check(lib.bmc_eval(span, 1))
            assert_same(row, truth(arch)[position:position + 1])
            lib.bmc_session_free(handle[0])
        assert session.arena_stats().bytes_reserved == before
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
    assert ({name: rows.tolist() for name, rows in block.rows("ssm_ba").items()}
            == {"ssm_beta": [0, 1, 4, 5], "ssm_alpha": [2, 3, 6, 7]})
    rows = block.rows("ssm_in")
    assert rows["attn_qkv"].tolist() == [0, 1, 12, 13, 2, 3, 14, 15, 4, 5, 6, 7, 16, 17, 18, 19]
    assert rows["attn_gate"].tolist() == [8, 9, 10, 11, 20, 21, 22, 23] and block.rows("ssm_out") == {}


def test_alphas_and_betas_in_one_matrix(tmp_path):
    """The same model in both layouts."""
    metadata, tensors = tiny.parts("qwen35")
    for layer in (0, 2):
        (kind, alpha), (_, beta) = (tensors.pop(f"blk.{layer}.ssm_{name}.weight")
                                    for name in ("alpha", "beta"))
        rows = [part[2 * group:2 * group + 2] for group in range(2) for part in (beta, alpha)]
        tensors[f"blk.{layer}.ssm_ba.weight"] = kind, np.concatenate(rows)
    path = tiny.save(tmp_path / "ba.gguf", metadata, tensors)
    with pybmc.Model(path, threads=1) as model, pybmc.Model(tiny.model("qwen35"), threads=1) as plain, \
            model.session() as ours, plain.session() as right:
        assert_same(ours.eval(text()[:30], logits="all"), right.eval(text()[:30], logits="all"))


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
    ("qwen35", key("qwen35.ssm.conv_kernel", 5),
     r"ssm_conv1d.*expected 256 rows of 5 values, found 256 of 4"),
    ("qwen35", key("qwen35.ssm.state_size", 0), "ssm.state_size: expected 1 to 1024, found 0"),
    ("qwen35", renamed("blk.0.ssm_alpha.weight", "blk.0.ssm_ba.weight", 3),
     "ssm_ba.weight: expected 8 rows, found 3"),
    ("granitehybrid", rows("blk.0.ssm_in.weight", 200),
     r"blk.0.ssm_in.weight: expected 214 rows of 64 values, found 200 of 64"),
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
