"""Forks share rows and change nothing of each other; windows give back rows that nobody reads."""

import random

import numpy as np
import pytest
import tiny

import pybmc


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(0, 401, n).tolist()


def fresh(model, text):
    with model.session() as session:
        return session.eval(text)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("rows", [16, 48])
def test_forks_read_what_their_own_text_says(arch, rows):
    """Sessions that fork, go on, go back and close in any order:
    each gives the logits of its text read anew."""
    rng = random.Random(rows)
    with pybmc.Model(tiny.model(arch), threads=2) as model:
        sessions = [(model.session(rows=rows), [])]
        for step in range(60):
            at = rng.randrange(len(sessions))
            session, text = sessions[at]
            action = rng.random()
            if action < 0.3 and text:
                position = rng.randrange(len(text) + 1)
                sessions.append((session.fork(position), text[:position]))
            elif action < 0.45:
                position = rng.randrange(len(text) + 1)
                session.rewind(position)
                del text[position:]
            elif action < 0.55 and len(sessions) > 1:
                sessions.pop(at)[0].close()
            elif len(text) < 300:
                more = tokens(rng.choice([1, 3, 20, 60]), step)
                text += more
                logits = session.eval(more)
                assert np.array_equal(logits, fresh(model, text))
        for session, text in sessions:
            assert session.tokens == text
            assert np.array_equal(session.eval([7]), fresh(model, [*text, 7]))


def test_forks_where_windows_grow_by_other_rows_than_the_rest():
    """Rows of windows and the others have segments of their own size, as the library chooses them."""
    with pybmc.Model(tiny.model("gemma3", n_heads=4, n_kv_heads=4, head_dim=256, n_ctx=2048),
                     threads=2) as model, model.session() as session:
        text = tokens(700)
        session.eval(text)
        for position in (700, 300, 15):
            with session.fork(position) as fork:
                assert np.array_equal(fork.eval([9]), fresh(model, [*text[:position], 9]))


def test_a_fork_costs_no_memory_for_what_is_shared():
    with pybmc.Model(tiny.model("llama"), threads=1) as model, model.session(rows=16) as session:
        session.eval(tokens(320))
        alone = session.arena_stats().bytes_reserved
        forks = [session.fork(320) for _ in range(9)]
        together = sum(one.arena_stats().bytes_reserved for one in (session, *forks))
        assert alone / 11 <= session.arena_stats().bytes_reserved < alone / 5 and together <= 1.01 * alone
        for fork in forks:
            fork.close()
        assert session.arena_stats().bytes_reserved == alone


def test_a_fork_takes_no_more_than_its_rows():
    with pybmc.Model(tiny.model("llama"), threads=1) as model, model.session(rows=16) as session:
        session.eval(tokens(320))
        with session.fork(33) as fork:
            assert fork.rows == 48 and fork.tokens == session.tokens[:33]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen35"])
def test_going_back_to_the_nearest_position_reads_no_tokens(arch):
    """What nearest() tells is where sync() gets to: by rows, by snapshots and logs of states, by windows."""
    with pybmc.Model(tiny.model(arch, n_ctx=4096), threads=1) as model, model.session(rows=16) as session:
        text = tokens(2600)
        for start in range(0, len(text), 200):
            session.eval(text[start:start + 200], "none")
            if start == 1000:
                session.snapshot()
        found = {n: session.nearest(n) for n in (0, 1, 900, 1180, 1300, 2590, 2600)}
        assert found[2600] == 2600 and all(at <= n for n, at in found.items())
        if arch == "llama":
            assert all(at == n for n, at in found.items())
        elif arch == "gemma3":
            assert found[900] == 0 and found[2590] == 2590
        else:
            assert found[900] == 0 and found[1180] == found[1300] == 1200 - 48 and found[2590] == 2590
        for n, at in found.items():
            with session.fork(at) as fork:
                assert fork.position == at and np.array_equal(fork.eval([7]), fresh(model, [*text[:at], 7]))
            with session.fork() as fork:
                assert fork.sync(text[:n]) == at
        with pytest.raises(pybmc.ArgumentError, match="nearest: expected 0 to 2600, found 2601"):
            session.nearest(2601)


def test_a_fork_outlives_its_parent_and_stays_in_its_cap():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        session, text = model.session(context=40), tokens(30)
        session.eval(text)
        fork = session.fork(20)
        session.close()
        assert np.array_equal(fork.eval(text[20:]), fresh(model, text)) and fork.context == 40
        with pytest.raises(pybmc.ContextFullError, match="cap is 40"):
            fork.eval(tokens(11))
        with pytest.raises(pybmc.ArgumentError, match="fork: expected 0 to 30, found 31"):
            fork.fork(31)


def test_windows_give_back_rows_and_keep_the_text():
    """gemma3 with a window of 16, six of seven layers:
    far behind it rows go, and going back there reads the text anew."""
    text = tokens(2600)
    with pybmc.Model(tiny.model("gemma3", n_ctx=4096), threads=2) as model, model.session(rows=16) as session:
        for start in range(0, len(text), 200):
            session.eval(text[start:start + 200], "none")
        stats = session.arena_stats()
        assert stats.bytes_reserved < 0.7 * stats.row_bytes * stats.rows_reserved
        right = session.eval([5])
        with model.session(rows=16) as other:
            assert np.array_equal(other.eval([*text, 5]), right)
        fork = session.fork(2000)
        assert np.array_equal(fork.eval([*text[2000:], 5]), right)
        session.rewind(700)
        assert session.position == 700 and np.array_equal(session.eval([*text[700:], 5]), right)
        assert session.sync(text[:650]) in (0, 650) and session.tokens == text[:session.position]
