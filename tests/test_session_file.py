"""Sessions in files: saved, loaded, cut, damaged, killed while they are written."""

import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_kinds

import pybmc
from pybmc._native import cpu_levels
from pybmc.engine import session_file
from pybmc.errors import ArgumentError, ContextFullError, FormatError

KILLS = int(os.environ.get("PYBMC_KILLS", "20"))
WINDOWS = ("gemma3",)

names = pytest.mark.parametrize("name", ["llama", *WINDOWS, *tiny_kinds.NAMES])


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(0, 300, n).tolist()


@lru_cache(maxsize=None)
def load(name):
    path = tiny.model(name, n_ctx=4096) if name in ("llama", *WINDOWS) else tiny_kinds.model(name)
    return pybmc.Model(path, threads=1)


@lru_cache(maxsize=None)
def small():
    return pybmc.Model(tiny.model("llama", **tiny.SMALL), threads=1)


def next_logits(session):
    with session.fork() as fork:
        return fork.eval([7])


def assert_same(ours, right):
    assert ours.tokens == right.tokens and ours.notes == right.notes and ours.context == right.context
    assert np.array_equal(next_logits(ours), next_logits(right))


@lru_cache(maxsize=None)
def fresh(text):
    with small().session() as session:
        return session.eval([*text, 7])


def saved_thrice(path):
    """A file with three saves, the last after a rewind, and (where it ends, text, notes) after each."""
    found = []
    with small().session() as session:
        for n, back, notes in ((5, 0, None), (9, 0, {"turn": 1}), (4, 3, {"turn": 2})):
            session.rewind(session.position - back)
            session.eval(tokens(n, len(found)))
            session.notes = notes
            session.save(path)
            found.append((os.path.getsize(path), session.tokens, notes))
    return found


# ---- what is saved is what is loaded


@names
def test_a_session_goes_on_as_if_it_had_never_been_saved(name, tmp_path):
    """Saved after each step, in the way of a chat, and loaded each time:
    with other segments, and beside what the live one gives."""
    path, steps = tmp_path / "s", ((37, 0), (5, 0), (100, 20), (1, 0), (60, 50), (3, 120), (5, 0))
    with load(name).session(rows=48) as session:
        for i, (n, back) in enumerate(steps):
            session.eval(tokens(n, i), "none")
            if i % 2:
                session.snapshot()
            session.rewind(session.position - back)
            session.notes = {"step": i}
            session.save(path)
            with load(name).load_session(path, rows=16 if i % 2 else "auto") as other:
                assert_same(other, session)
                at = max(session.position - 20, 0)
                assert other.nearest(at) == session.nearest(at)
                other.rewind(at)
                assert np.array_equal(other.eval(tokens(9, 5)), np.array(_rewound(session, at)))


def _rewound(session, at):
    with session.fork() as fork:
        fork.rewind(at)
        return fork.eval(tokens(9, 5))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35", "MLA", "per-layer inputs"])
def test_any_order_of_steps(name, tmp_path):
    """Evaluate, go back, sync, snapshot, fork, save and load at random:
    each session gives the logits of its text read anew."""
    rng, model = random.Random(1), load(name)
    session, text = model.session(rows=16), []
    for step in range(50):
        action, position = rng.random(), rng.randrange(len(text) + 1)
        if action < 0.4 and len(text) < 400:
            more = tokens(rng.choice([1, 3, 20, 60]), step)
            text += more
            session.eval(more, "none")
        elif action < 0.5:
            session.rewind(position)
            del text[position:]
        elif action < 0.55:
            del text[session.sync(text[:position]):]
        elif action < 0.65:
            session.snapshot()
        elif action < 0.7:
            session = session.fork(position)
            del text[position:]
        else:
            path = tmp_path / rng.choice("ab")
            session.save(path)
            if action < 0.85:
                session = model.load_session(path, rows=rng.choice([16, 64]))
        assert session.tokens == text
    with model.session() as right:
        assert np.array_equal(session.eval([7]), right.eval([*text, 7]))


def test_windows_keep_their_rows_only(tmp_path):
    """Six of seven layers see 16 rows: far behind them nothing is saved,
    and going back there reads the text anew."""
    model, text = load("gemma3"), tokens(2600)
    with model.session(rows=256) as session:
        for start in range(0, len(text), 200):
            session.eval(text[start:start + 200], "none")
        session.save(tmp_path / "s")
        stats = session.arena_stats()
        assert os.path.getsize(tmp_path / "s") < 0.7 * stats.row_bytes * 2600
        for rows in (16, 2048):
            with model.load_session(tmp_path / "s", rows=rows) as other:
                assert_same(other, session)
                assert other.nearest(2590) == 2590 and other.nearest(900) == 0
                other.rewind(1500)
                assert np.array_equal(other.eval([*text[1500:], 7]), next_logits(session))
                other.save(os.fsencode(tmp_path / "again"))
            with model.load_session(os.fsencode(tmp_path / "again")) as again:
                assert again.tokens == [*text, 7] and again.nearest(2590) == 2590


def test_other_kernels_give_the_same_logits(tmp_path):
    files, right = [], b""
    for name in ("llama", "qwen35", "MLA"):
        with load(name).session() as session:
            session.eval(tokens(90), "none")
            session.snapshot()
            session.eval(tokens(20), "none")
            session.save(tmp_path / name)
            files += [load(name).path, str(tmp_path / name)]
            right += session.eval([7]).tobytes()
    code = ("import sys, pybmc\nfor model, path in zip(sys.argv[1::2], sys.argv[2::2]):\n"
            "    sys.stdout.buffer.write(pybmc.Model(model, "
            "threads=1).load_session(path).eval([7]).tobytes())")
    for level in cpu_levels():
        done = subprocess.run([sys.executable, "-c", code, *files],
                              capture_output=True, timeout=120, check=False, env=os.environ
                              | {"PYBMC_CPU": level, "PYTHONPATH": str(Path(__file__).parents[1])})
        assert done.stdout == right, done.stderr.decode()


# ---- what is written


def test_only_what_is_new_is_appended(tmp_path):
    path = tmp_path / "s"
    with load("llama").session() as session:
        session.eval(tokens(1600), "none")
        session.save(path)
        inode, size, row = path.stat().st_ino, path.stat().st_size, session.arena_stats().row_bytes
        session.save(path)
        assert path.stat().st_size == size
        session.eval(tokens(16), "none")
        session.save(path)
        assert 16 * row < path.stat().st_size - size < 17 * row + 300 and path.stat().st_ino == inode
        with load("llama").load_session(path) as other:
            other.eval(tokens(16), "none")
            other.save(path)
        assert path.stat().st_size - size < 34 * row + 600 and path.stat().st_ino == inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(tmp_path) == ["s"]


def test_old_saves_take_no_more_than_the_session(tmp_path, monkeypatch):
    """A text that is always written anew, and states that each save brings."""
    monkeypatch.setattr(session_file, "SLACK", 0)
    for name in ("llama", "qwen35"):
        with load(name).session() as session, load(name).session() as once:
            for i in range(8):
                session.rewind(0)
                session.eval(tokens(64, i), "none")
                session.save(tmp_path / name)
            once.eval(tokens(64, 7), "none")
            once.save(tmp_path / "once")
            assert os.path.getsize(tmp_path / name) <= 2 * os.path.getsize(tmp_path / "once")
            with load(name).load_session(tmp_path / name) as other:
                assert_same(other, session)


def test_rows_that_were_written_anew_are_saved_anew(tmp_path):
    """The same tokens have other rows where attention saw less of the text."""
    text = tokens(600)
    with load("llama").session() as session:
        session.eval(text[:300], "none")
        session.eval(text[300:], "none", last=16)
        session.save(tmp_path / "s")
        session.rewind(290)
        session.eval(text[290:], "none")
        session.save(tmp_path / "s")
        with load("llama").load_session(tmp_path / "s") as other:
            assert_same(other, session)


def test_a_file_that_others_changed_is_written_anew(tmp_path):
    path = tmp_path / "s"
    with load("llama").session() as session:
        session.eval(tokens(40), "none")
        session.save(path)
        with session.fork(20) as fork, load("llama").load_session(path) as other:
            fork.save(path)
            other.eval([1, 2, 3], "none")
            other.save(path)
            assert load("llama").load_session(path).tokens == other.tokens
            session.eval([5], "none")
            session.save(path)
            assert load("llama").load_session(path).tokens == session.tokens
        path.unlink()
        session.save(path)
        assert load("llama").load_session(path).tokens == session.tokens
        session.save(tmp_path / "other")
        session.save(path)
        assert load("llama").load_session(tmp_path / "other").tokens == session.tokens


def test_a_file_with_the_number_and_size_of_the_old_one_is_written_anew(tmp_path):
    path, other = tmp_path / "s", tmp_path / "other"
    with load("llama").session() as session, load("llama").session() as stranger:
        for one, seed, where in ((session, 1, path), (stranger, 2, other)):
            one.eval(tokens(40, seed), "none")
            one.save(where)
        with open(path, "r+b") as file:
            file.write(other.read_bytes())
        assert path.stat().st_size == session.saved.size and path.stat().st_ino == session.saved.inode
        session.eval([1], "none")
        session.save(path)
        assert_same(load("llama").load_session(path), session)


def test_an_empty_session_and_notes_alone(tmp_path):
    with load("llama").session(context=99) as session:
        session.save(tmp_path / "s")
        session.notes = ["ä", None]
        session.save(tmp_path / "s")
        assert_same(load("llama").load_session(tmp_path / "s"), session)
        session.notes = {1, 2}
        with pytest.raises(ArgumentError, match="notes: expected a value that JSON has"):
            session.save(tmp_path / "s")


# ---- files that were cut, damaged, or are something else


def test_a_file_cut_anywhere_gives_the_last_whole_save(tmp_path, caplog):
    path = tmp_path / "cut"
    ends = saved_thrice(path)
    assert os.path.getsize(path) == ends[-1][0]
    for n in range(ends[-1][0], -1, -1):
        os.truncate(path, n)
        whole = [save for save in ends if save[0] <= n]
        if not whole:
            with pytest.raises(FormatError, match=r"cut is (no saved|a damaged) session[^\n]*$"):
                small().load_session(path)
            continue
        caplog.clear()
        with small().load_session(path, rows=16) as session:
            assert session.tokens == whole[-1][1] and session.notes == whole[-1][2]
            assert ("is cut off or damaged" in caplog.text) == (n > whole[-1][0])
            assert n % 8 or np.array_equal(session.eval([7]), fresh(tuple(whole[-1][1])))


def test_a_bit_that_flipped_costs_the_saves_from_there_on(tmp_path):
    path, rng = tmp_path / "flipped", random.Random(2)
    ends = saved_thrice(path)
    data, before = path.read_bytes(), 0
    for at in range(0, len(data), 3):
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), data[before:before + 1], before)
            os.pwrite(file.fileno(), bytes([data[at] ^ 1 << rng.randrange(8)]), at)
        before = at
        whole = [save for save in ends if save[0] <= at]
        if not whole:
            with pytest.raises(FormatError, match=r"flipped[^\n]*$"):
                small().load_session(path)
            continue
        with small().load_session(path, rows=16) as session:
            assert (session.tokens, session.notes) == whole[-1][1:]
            assert np.array_equal(session.eval([7]), fresh(tuple(whole[-1][1])))


def test_a_damaged_file_is_mended_by_the_next_save(tmp_path):
    ends, path = saved_thrice(tmp_path / "s"), tmp_path / "s"
    for n in (ends[1][0] - 1, ends[1][0] + 1, ends[2][0] - 1):
        path.write_bytes(path.read_bytes()[:n])
        with small().load_session(path) as session:
            session.eval(tokens(3), "none")
            session.save(path)
            assert_same(small().load_session(path), session)
        saved_thrice(path)


def test_what_is_no_session_of_this_model(tmp_path):
    path = tmp_path / "s"
    with load("llama").session(context=50) as session:
        session.eval(tokens(30), "none")
        session.save(path)
    llama, gemma = Path(load("llama").path).name, Path(load("gemma3").path).name
    with pytest.raises(FormatError, match=rf"expected a session of {gemma} \(gemma3, \w+\), found one of "
                                          rf"{llama} \(llama, \w+\)$"):
        load("gemma3").load_session(path)
    with pytest.raises(ContextFullError, match="30 rows are needed and its cap is 20"):
        load("llama").load_session(path, context=20)
    with load("llama").load_session(path, context=3000) as other:
        assert other.context == 3000
    data = path.read_bytes()
    start = len(session_file.MAGIC)
    length = int.from_bytes(data[start + 4:start + 8], "little")
    opening = json.loads(data[start + 8:start + 8 + length])
    for version, change, message in ((0, {}, "expected a session of version 1, found version 0"),
                                     (2, {}, "expected a session of version 1, found version 2"),
                                     (1, {"kv_type": "q8_0"}, "KV type: expected f16, found q8_0"),
                                     (1, {"layout": [1, 2]},
                                      r"bytes of rows and states: expected \[.*\], found \[1, 2\]"),
                                     (1, {"fingerprint": "0" * 64, "name": "a\nb\x1b"},
                                      r"found one of a\\nb\\x1b \(llama, 0{12}\)$")):
        path.write_bytes(_opening(version, opening | change) + data[start + 8 + length + 4:])
        with pytest.raises(FormatError, match=message):
            load("llama").load_session(path)


def _opening(version, described):
    data = json.dumps(described, separators=(",", ":")).encode()
    data = session_file.MAGIC + session_file.OPENING.pack(version, len(data)) + data
    return data + session_file.CRC.pack(session_file.crc32(data))


def forged(path, name, **changes):
    """A file with one save whose checksums are right, and whatever else is not."""
    with load(name).session() as session:
        session.eval(tokens(40), "none")
        session.save(path)
        layout = session_file.Layout(session._handle)
    data = path.read_bytes()
    with open(path, "rb") as file:
        start = session_file._read_opening(file.fileno(), path)[1]
        record = session_file._records(file.fileno(), start)[0]
    for key, value in changes.items():
        setattr(record, key, value)
    body = bytes(max(record.bytes(layout), 0))
    front = session_file.HEAD.pack(session_file.SAVE, record.context, record.kept, len(record.tokens),
                                   record.window, len(record.parts), len(record.notes), len(body))
    front += (b"".join(session_file.PART.pack(*part) for part in record.parts) + record.tokens.tobytes()
              + record.notes)
    path.write_bytes(data[:start] + front + _crc(front) + body + _crc(body))


def _crc(data):
    return session_file.CRC.pack(session_file.crc32(data))


@pytest.mark.parametrize("name, changes", [
    ("llama", {"context": 1 << 31, "tokens": np.array([9999], np.int32)}),
    ("llama", {"tokens": np.array([-1], np.int32)}),
    ("llama", {"parts": []}), ("llama", {"parts": [(0, 0, 64)]}),
    ("llama", {"parts": [(0, 16, 48)]}), ("llama", {"parts": [(7, 0, 0)]}),
    ("llama", {"parts": [(0, 0, 48), (3, 0, 40)]}), ("llama", {"parts": [(0, 0, 48)] * 2}),
    ("llama", {"parts": [(0, 48, 0)]}), ("llama", {"window": 5}), ("llama", {"kept": 1}),
    ("llama", {"notes": b"{"}), ("llama", {"notes": b"[" * 100_000}), ("qwen35", {"parts": [(0, 0, 48)]}),
    ("qwen35", {"parts": [(0, 0, 48), (3, 0, 39)]}), ("qwen35", {"parts": [(0, 0, 48), (2, 40, 40)]}),
    ("qwen35", {"parts": [(0, 0, 48), (2, 99, 99), (3, 0, 40)]}),
    ("gemma3", {"window": 48, "parts": [(0, 0, 48), (1, 48, 48)]}),
    ("gemma3", {"window": 32, "parts": [(0, 0, 48), (1, 32, 48)]}), ("gemma3", {"parts": [(0, 0, 48)]}),
])
def test_a_forged_file_is_one_sentence(name, changes, tmp_path):
    changes = {key: [session_file.Part(*part) for part in value] if key == "parts" else value
               for key, value in changes.items()}
    forged(tmp_path / "s", name, **changes)
    with pytest.raises(FormatError, match=r"^[^\n]*$"):
        load(name).load_session(tmp_path / "s")
    forged(tmp_path / "s", name)
    assert load(name).load_session(tmp_path / "s").position == 40


def test_another_choice_of_rope_factors_is_refused(tmp_path):
    with pybmc.Model(tiny.model("phi3", rope_factors=True), threads=1) as model:
        original = model.config.original_ctx
        with model.session(context=original) as session:
            session.eval(tokens(20), "none")
            session.save(tmp_path / "s")
            assert_same(model.load_session(tmp_path / "s"), session)
        with pytest.raises(FormatError, match="rope factors of long contexts: expected True, found False"):
            model.load_session(tmp_path / "s", context=original + 1)


def test_other_files_are_refused_and_stay(tmp_path):
    (tmp_path / "text").write_text("a letter")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with small().session() as session:
        session.eval([1], "none")
        for name in ("text", "empty", "pipe"):
            with pytest.raises(FormatError, match=f"{name} is no saved session"):
                small().load_session(tmp_path / name)
            with pytest.raises(FormatError, match=f"{name} is no saved session: it stays as it is"):
                session.save(tmp_path / name)
        for function in (small().load_session, session.save):
            with pytest.raises((FormatError, OSError)):
                function(tmp_path / "folder")
        with pytest.raises(FileNotFoundError):
            small().load_session(tmp_path / "none")
        with pytest.raises(FileNotFoundError):
            session.save(tmp_path / "none" / "s")
        os.symlink(tmp_path / "s", tmp_path / "link")
        session.save(tmp_path / "link")
        assert small().load_session(tmp_path / "s").tokens == [1] and os.path.islink(tmp_path / "link")
    assert (tmp_path / "text").read_text() == "a letter"
    assert sorted(os.listdir(tmp_path)) == ["empty", "folder", "link", "pipe", "s", "text"]


# ---- processes that end, disks that are full


class Killed:
    """Calls of os that end the process at the n-th one, a write in the middle of its bytes."""

    def __init__(self, n, rng):
        self.left, self.rng = n, rng
        for name in ("pwrite", "ftruncate", "fsync", "rename"):
            setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, function):
        def call(*args, **more):
            self.left -= 1
            if self.left == 0:
                if function.__name__ == "pwrite" and self.rng.random() < 0.8:
                    function(args[0], memoryview(args[1])[:self.rng.randrange(len(args[1]) + 1)], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)
        return call


def in_child(function):
    """The status of a forked process that runs a function."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("name", ["llama", "qwen35"])
def test_a_process_that_is_killed_while_it_saves_loses_that_save_at_most(name, tmp_path):
    rng, model, path = random.Random(3), load(name), tmp_path / "s"
    killed = 0
    with model.session() as session:
        session.eval(tokens(20), "none")
        session.save(path)
        for i in range(KILLS):
            if rng.random() < 0.3:
                session.rewind(rng.randrange(session.position))
            if rng.random() < 0.2:
                session.saved = None            # as another session would: a new file
            before = model.load_session(path)
            session.eval(tokens(rng.choice([1, 5, 40]), i), "none")
            session.snapshot()
            n = rng.randrange(1, 9)
            status = in_child(lambda: (Killed(n, rng), session.save(path)))
            killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            with model.load_session(path) as found:
                assert_same(found, before if found.tokens == before.tokens else session)
            session.save(path)
            with model.load_session(path) as found:
                assert_same(found, session)
            before.close()
            assert os.listdir(tmp_path) == ["s"]
            if session.position > 300:
                session.rewind(10)
    assert killed > KILLS / 3


@pytest.mark.parametrize("anew", [False, True])
def test_a_full_disk_leaves_the_last_save(anew, tmp_path):
    path, model = tmp_path / "s", load("llama")
    with model.session() as session:
        session.eval(tokens(40), "none")
        session.save(path)
        text, size = session.tokens, path.stat().st_size
        session.eval(tokens(400), "none")

        def save():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, size + 5000))
            if anew:
                session.saved = None
            with pytest.raises(OSError, match="File too large"):
                session.save(path)
            assert path.stat().st_size == size
            assert model.load_session(path).tokens == text

        assert in_child(save) == 0
        assert os.listdir(tmp_path) == ["s"]
        session.save(path)
        assert_same(model.load_session(path), session)


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with small().session() as session:
        session.eval([1, 2, 3])
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            session.save(tmp_path / "s")
        assert caught.value.filename == str(tmp_path / "s") and not os.listdir(tmp_path)


def test_an_interrupt_while_it_saves_leaves_the_last_save(tmp_path, monkeypatch):
    path, model = tmp_path / "s", load("llama")
    with model.session() as session:
        session.eval(tokens(40), "none")
        session.save(path)
        size = path.stat().st_size
        session.eval(tokens(9), "none")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                session.save(path)
        assert path.stat().st_size == size
        session.save(path)
        assert_same(model.load_session(path), session)


def test_a_draft_head_guesses_on_in_a_loaded_session(tmp_path):
    import test_draft_head

    path = tiny.save(tmp_path / "head.gguf", *test_draft_head.parts())
    settings = dict(stop_tokens=(), temperature=0.7, seed=5)
    with pybmc.Model(path, threads=1) as model:
        right = [token.id for token in pybmc.generate(model, [1, 2, 3], 60, spec="off", **settings)]
        session, found = model.session(), [1, 2, 3]
        for _ in range(3):
            found += [token.id
                      for token in pybmc.generate(model, found, 20, session=session, spec="mtp", **settings)]
            session.save(tmp_path / "s")
            session = model.load_session(tmp_path / "s")
        assert found[3:] == right


# ---- the library refuses what does not fit


def test_parts_are_checked():
    from pybmc._native import check, ffi, lib, pointer

    with load("qwen35").session() as session, load("qwen35").session() as other:
        session.eval(tokens(40), "none")
        ids, handle, parts = np.array([5, 6], np.int32), other._handle, ffi.new("bmc_part[]", lib.BMC_PARTS)
        n_parts = lib.bmc_session_parts(session._handle, 20, parts)
        assert ([(p.kind, p.start, p.end) for p in parts[0:n_parts]]
                == [(lib.BMC_PART_ROWS, 16, 48), (lib.BMC_PART_STATES, 0, 40)])
        for from_, tokens_, window in ((1, ids, 0), (-1, ids, 0), (0, np.array([1, 9999], np.int32), 0),
                                       (0, ids, 16), (0, ids, 1)):
            with pytest.raises(ArgumentError):
                check(lib.bmc_session_extend(handle, from_, pointer(tokens_), len(tokens_), window))
        check(lib.bmc_session_extend(handle, 0, pointer(ids), 2, 0))
        for kind, start, end, n in ((0, 0, 16, 5), (0, 3, 16, 99), (0, 0, 1 << 20, 99), (1, 16, 0, 0),
                                    (9, 0, 16, 0), (2, 0, 1, 0), (3, 0, 1, 0), (3, 0, 99, 0), (2, 5, 5, 0),
                                    (0, -16, 0, 0)):
            data = ffi.new("char[]", 100)
            for function in (lib.bmc_session_export, lib.bmc_session_import):
                with pytest.raises(ArgumentError):
                    check(function(handle, ffi.new("bmc_part *", (kind, start, end)), data, n))


def test_encoders_have_no_sessions_to_save(tmp_path):
    import tiny_encoders

    with pybmc.Model(tiny_encoders.model("bert"), threads=1) as model, model.session() as session:
        for function in (session.save, model.load_session):
            with pytest.raises(ArgumentError, match="is an encoder"):
                function(tmp_path / "s")
