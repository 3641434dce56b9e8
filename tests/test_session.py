"""Sessions in use: wrong arguments, the order of ends, forks, threads, interrupts, memory."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

import pybmc
from pybmc._native import lib
from pybmc.engine.model import _note_threads

HERE = Path(__file__).parent
TOKENS = [1, 2, 3, 250, 7, 7, 19]


@pytest.fixture
def model():
    with pybmc.Model(tiny.model("llama"), threads=2) as model:
        yield model


# Arguments


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
    path = tiny.model("llama", **tiny.SMALL)
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


def test_nothing_is_said_at_exit():
    """A program that ends with models open, in globals and caches, ends quietly."""
    code = (
        "import functools, pybmc\n"
        f"model = pybmc.Model({str(tiny.model('llama', **tiny.SMALL))!r})\nsession = model.session()\n"
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
        f"model = pybmc.Model({str(tiny.model('llama', **tiny.SMALL))!r}, threads=3)\n"
        "session = model.session()\n"
        "right = session.eval([1, 2, 3]).tobytes()\nsession.rewind(0)\nchild = os.fork()\n"
        "assert session.eval([1, 2, 3]).tobytes() == right\nmodel.close()\n"
        "if child: assert os.waitpid(child, 0)[1] == 0"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, timeout=120).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_beside_a_generation_go_on():
    """Another thread is in the middle of a pass:
    its locks, threads and counters are made new in the child."""
    code = (
        "import faulthandler, os, threading, traceback, numpy as np, pybmc\n"
        f"model = pybmc.Model({str(tiny.model('llama'))!r}, threads=3)\n"
        "pybmc.generate                      # a fork while another thread imports this would hang in "
        "Python's own lock\n"
        "text, idle = list(range(1, 300)), model.session()\n"
        "right = model.session().eval(text, logits='all')\n"
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
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, timeout=120,
                            capture_output=True, text=True)
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
        f"{cores + 6} threads are asked for, this process may use {cores} cores: that is slower than "
        f"{cores} threads"]


def test_a_context_beyond_the_training_is_noted_once(model, caplog):
    model.session(context=model.config.n_ctx).close()
    assert not caplog.records
    for _ in range(2):
        with model.session(context=model.config.n_ctx + 1) as session:
            session.eval(TOKENS)
    assert [f"a context of {model.config.n_ctx + 1} tokens is more than the {model.config.n_ctx}"
            in r.getMessage()
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
    path = tiny.model("llama", **tiny.SMALL)
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
    """An exception out of a signal, at any moment:
    position and tokens still agree, and the next eval is right."""

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
    metadata, _ = tiny.parts("llama", **tiny.SMALL)
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
        [sys.executable, "-c", MEASURE, tiny.model("llama", **tiny.SMALL), path, json.dumps(ways)],
        capture_output=True, text=True, cwd=HERE.parent, timeout=60,
    )
    assert result.returncode == 0, result.stderr
    for (rows, context), got in zip(ways, json.loads(result.stdout)):
        assert got["packed"] > 60 * MB and got["loaded"] < 1.05 * got["packed"] + 4 * MB, (rows, context, got)
        assert got["opened"] < MB, (rows, context, got)
        assert got["used"] < 400 * got["row"] + 24 * MB, (rows, context, got)    # a pass's buffers among it
