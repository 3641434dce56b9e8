"""Sessions with layers on a GPU, in files: saved by one machine and loaded by another, the same bits; and
every call of the driver that may fail on the way."""

import io
import itertools
import os
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import tiny_kinds
from gpu import assert_same, fake_driver, nothing_is_left, tokens  # noqa: F401
from serving import served
from test_gpu import GOLDEN

import pybmc
from pybmc.chat.conversation import Conversation
from pybmc.cli import run
from pybmc.engine import session_file

KINDS = ["llama", "gemma3", *tiny_kinds.NAMES]


def kind(name):
    return tiny_kinds.model(name) if name in tiny_kinds.NAMES else tiny.model(name)


@contextmanager
def loaded(path, layers, **settings):
    with pybmc.Model(path, threads=1, n_gpu_layers=layers, **settings) as model:
        yield model


def write(session):
    """A text of several passes, 31 tokens; states have a snapshot after 6 of them."""
    session.eval(tokens(6, 1), "none")
    session.eval(tokens(15, 1), "none")
    session.snapshot()
    session.eval(tokens(9, 2), "none")
    for i in range(3):
        session.eval(tokens(1, i), "none")
    session.rewind(session.position - 2)


def go_on(session):
    """Logits of what may follow: after the text, after a part of it, and by way of the snapshot."""
    assert session.nearest(9) == (6 if session.arena_stats().state_bytes else 9)
    rows = [session.eval(tokens(2, 3), "all")]
    for position in (30, 22, 9):
        session.rewind(position)
        rows.append(session.eval(tokens(1, position), "all"))
    return np.concatenate(rows)


# ---- the same bits


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_models_carry_a_session_to_the_gpu_and_back(path, tmp_path):
    with loaded(path, 0) as model, model.session() as session:
        write(session)
        session.save(tmp_path / "cpu")
        right = go_on(session)
        with loaded(path, -1) as other:
            with other.load_session(tmp_path / "cpu") as session:
                session.save(tmp_path / "gpu")
                assert_same(go_on(session), right)
            with other.load_session(tmp_path / "gpu") as session:
                assert_same(go_on(session), right)
        with model.load_session(tmp_path / "gpu") as session:
            assert_same(go_on(session), right)
        assert (tmp_path / "gpu").read_bytes() == (tmp_path / "cpu").read_bytes()


@pytest.mark.parametrize("name", KINDS)
def test_every_split_opens_what_another_one_saved(name, tmp_path):
    """The next machine goes on from the file that one wrote, at every layer where the machines may take
    over."""
    path = kind(name)
    with loaded(path, 0) as model, model.session() as session:
        write(session)
        session.save(tmp_path / "0")
        right = go_on(session)
        n_layers = model.config.n_layers
    splits = sorted({1, n_layers // 2, n_layers - 1, n_layers} - {0})
    for before, layers in zip([0, *splits], splits):
        with loaded(path, layers) as model, model.load_session(tmp_path / str(before), rows=16) as session:
            session.save(tmp_path / str(layers))
            assert_same(go_on(session), right)
    with loaded(path, 0) as model, model.load_session(tmp_path / str(n_layers)) as session:
        assert_same(go_on(session), right)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35"])
def test_a_text_that_the_gpu_wrote_goes_on_elsewhere(name, tmp_path):
    """And a file grows by what the GPU adds to it."""
    path = kind(name)
    with loaded(path, 0) as model, model.session() as session:
        write(session)
        session.eval(tokens(20, 5), "none")
        right = go_on(session)
    with loaded(path, 1) as model, model.session() as session:
        write(session)
        session.notes = {"by": "gpu"}
        session.save(tmp_path / "s")
        inode = (tmp_path / "s").stat().st_ino
        session.eval(tokens(20, 5), "none")
        session.save(tmp_path / "s")
        assert (tmp_path / "s").stat().st_ino == inode
    for layers in (0, 1, -1):
        with loaded(path, layers) as model, model.load_session(tmp_path / "s") as session:
            assert session.notes == {"by": "gpu"}
            assert_same(go_on(session), right)


def test_windows_whose_rows_are_gone(tmp_path):
    """Segments of the two arenas have different sizes, so they have different first rows."""
    path, text = tiny.model("gemma3", n_ctx=4096), tokens(1500)
    with loaded(path, 0) as model, model.session(rows=64) as session:
        session.eval(text, "none")
        session.save(tmp_path / "0")
        right = session.eval([7])
    for before, layers, rows in ((0, 5, 16), (5, 7, "auto"), (7, 1, 48)):
        with loaded(path, layers) as model, model.load_session(tmp_path / str(before), rows=rows) as session:
            assert session.nearest(1490) == 1490 and session.nearest(100) == 0
            session.save(tmp_path / str(layers))
            assert_same(session.eval([7]), right)
    with loaded(path, 0) as model, model.load_session(tmp_path / "1") as session:
        assert_same(session.eval([7]), right)


@pytest.mark.parametrize("piece", [session_file.PIECE, 1 << 30])
def test_a_session_larger_than_the_buffer(piece, tmp_path, monkeypatch):
    """Of which one call brings more pieces, and more bytes, than go through pinned memory at a time."""
    monkeypatch.setattr(session_file, "PIECE", piece)
    path = tiny.model("llama", n_ctx=4096, n_heads=8, n_kv_heads=8, head_dim=64)
    with loaded(path, 0) as model, model.session(rows=1024) as session:
        session.eval(tokens(2400), "none", 64)
        session.save(tmp_path / "cpu")
        right = session.eval([7], "last", 64)
    with loaded(path, -1) as model, model.load_session(tmp_path / "cpu", rows=512) as session:
        assert session.arena_stats().row_bytes * 2400 > 2 * (4 << 20)
        session.save(tmp_path / "gpu")
        assert_same(session.eval([7], "last", 64), right)
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "cpu").read_bytes()


def test_forks_share_rows_that_were_loaded(tmp_path):
    path = kind("llama")
    with loaded(path, 0) as model, model.session(rows=16) as session:
        write(session)
        session.save(tmp_path / "s")
        right = go_on(session)
    with loaded(path, 1) as model, model.load_session(tmp_path / "s", rows=16) as session:
        with session.fork() as fork:
            fork.save(tmp_path / "fork")
            assert_same(go_on(fork), right)
            session.eval(tokens(40, 9), "none")
        with model.load_session(tmp_path / "fork") as again:
            assert_same(go_on(again), right)


def test_a_gpu_that_cannot_map_memory(tmp_path, fake):
    path = kind("qwen35")
    with loaded(path, 0) as model, model.session() as session:
        write(session)
        session.save(tmp_path / "s")
        right = go_on(session)
    with fake.set(maps=0), loaded(path, -1) as model, model.load_session(tmp_path / "s") as session:
        session.save(tmp_path / "gpu")
        assert_same(go_on(session), right)
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "s").read_bytes()


# ---- failures


def each_failure(fake, attempt):
    """Make each call of the driver fail in turn, until there are none left; the names of those that did."""
    seen = set()
    for nth in itertools.count(1):
        fake["fail_in"] = nth
        try:
            attempt()
            assert fake["fail_in"] > 0, f"{fake.failed} failed, and nobody said so"
            return seen
        except (pybmc.DeviceError, pybmc.OutOfMemoryError) as error:
            assert "\n" not in str(error)
            seen.add(fake.failed)
        finally:
            fake["fail_in"] = 0


@pytest.mark.parametrize("name", ["gemma3", "qwen35"])
def test_a_save_that_fails_leaves_the_one_before(name, tmp_path, fake):
    path, place = kind(name), tmp_path / "s"
    with loaded(path, 0) as plain, loaded(path, 2) as model, model.session() as session:
        write(session)
        session.save(place)
        first = place.read_bytes()
        session.eval(tokens(20, 5), "none")

        def append():
            try:
                session.save(place)
            except pybmc.BmcError:
                assert place.read_bytes() == first and os.listdir(tmp_path) == ["s"]
                raise

        def write_anew():
            try:
                session.save(tmp_path / "new")
            except pybmc.BmcError:
                assert os.listdir(tmp_path) == ["s"]
                raise

        seen = each_failure(fake, append)
        assert {"cuCtxSetCurrent", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"} <= seen
        assert seen == each_failure(fake, write_anew) or "cuMemHostAlloc" in seen
        right = go_on(session)
        for file in ("s", "new"):
            with plain.load_session(tmp_path / file) as other:
                assert_same(go_on(other), right)


def test_pinned_memory_that_is_missing_is_a_sentence(tmp_path, fake):
    with loaded(kind("llama"), 1) as model, model.session() as session:
        write(session)
        with fake.set(fail_in=2, fail_code=2), \
                pytest.raises(pybmc.OutOfMemoryError, match="GPU 0: pinned memory: out of memory"):
            session.save(tmp_path / "s")
        assert fake.failed == "cuMemHostAlloc" and not os.listdir(tmp_path)
        session.save(tmp_path / "s")


@pytest.mark.parametrize("maps", [0, 1])
@pytest.mark.parametrize("name", ["gemma3", "qwen35"])
def test_a_load_that_fails_leaves_nothing(name, maps, tmp_path, fake):
    path = kind(name)
    with loaded(path, 0) as model, model.session() as session:
        write(session)
        session.save(tmp_path / "s")
        right = go_on(session)
    with fake.set(maps=maps), loaded(path, 2) as model:
        model.load_session(tmp_path / "s").close()              # the pinned buffer stays
        before = fake["alive"], fake["bytes"]

        def load():
            assert (fake["alive"], fake["bytes"]) == before, fake.failed    # what the failure before has left
            session = model.load_session(tmp_path / "s")
            with fake.set(fail_in=0):               # calls that give memory back are not made to fail
                session.close()

        seen = each_failure(fake, load)
        assert {
            "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize", "cuMemsetD8Async",
            "cuMemMap" if maps else "cuMemAlloc_v2"
        } <= seen
        assert (fake["alive"], fake["bytes"]) == before
        with model.load_session(tmp_path / "s") as session:
            assert_same(go_on(session), right)


def test_states_on_both_machines_fail_together(tmp_path, fake):
    """After a pass that failed they are at one snapshot, and what is saved then is that."""
    path = kind("falcon-h1")
    with loaded(path, 1) as model, loaded(path, 0) as plain:
        for nth in (4, 8, 12):
            with model.session() as session:
                write(session)
                with fake.set(fail_in=nth), pytest.raises(pybmc.DeviceError):
                    session.eval(tokens(3, 4), "none")
                assert session.position == 6
                session.eval(tokens(2, nth), "none")
                session.save(tmp_path / "s")
                with plain.load_session(tmp_path / "s") as other:
                    assert other.tokens == session.tokens
                    assert_same(other.eval([7]), session.eval([7]))


def test_a_session_whose_states_are_lost_is_not_saved(tmp_path, fake):
    """Nor forked: the GPU failed while a snapshot was copied back."""
    with loaded(kind("qwen35"), -1) as model, model.session() as session:
        write(session)
        lost = "the states of this session are lost"
        with fake.set(fail_in=2), pytest.raises(pybmc.DeviceError, match=lost):
            session.rewind(9)
        assert session.position == 6
        for use in (session.fork, session.snapshot, lambda: session.save(tmp_path / "s"),
                    lambda: session.eval([7])):
            with pytest.raises(pybmc.DeviceError, match=lost):
                use()
        assert not os.listdir(tmp_path)


# ---- threads


def test_saves_and_loads_beside_passes(tmp_path):
    """While another thread decodes, whose launches become graphs."""
    path, text, errors = tiny.model("llama", n_ctx=2000), tokens(60), []
    with loaded(path, 0) as model, model.session() as session:
        write(session)
        session.save(tmp_path / "s")
        right = go_on(session)
        session.rewind(0)
        decoded = np.concatenate([session.eval(text[i:i + 1], "all") for i in range(60)])

    def decode(session):
        try:
            assert_same(np.concatenate([session.eval(text[i:i + 1], "all") for i in range(60)]), decoded)
        except BaseException as error:
            errors.append(error)

    with loaded(path, -1) as model, model.session(rows=16) as session:
        thread = threading.Thread(target=decode, args=(session,))
        thread.start()
        n = 0
        while thread.is_alive() or n < 2:
            n += 1
            with model.load_session(tmp_path / "s", rows=16) as other, other.fork(20) as fork:
                fork.save(tmp_path / "fork")
                assert_same(go_on(other), right)
        thread.join()
    assert not errors


# ---- chats and servers


def test_a_conversation_goes_on_with_layers_on_the_gpu(tmp_path):
    path, settings = tiny.model("qwen35", n_ctx=2000), dict(max_tokens=6, temperature=0.8, seed=1)

    def say(talk, message):
        return "".join(token.text for token in talk.ask(message)), talk.stats.reused_tokens

    messages = ["hello", "and then?", "why?"]
    with loaded(path, 0) as model, model.session() as session:
        talk = Conversation(model, session, "be brief", **settings)
        right = [say(talk, message) for message in messages]
    with loaded(path, 1) as model, loaded(path, 0) as plain:
        talk = Conversation(model, model.session(), "be brief", **settings)
        for i, message in enumerate(messages):
            assert say(talk, message) == right[i]
            talk.save_session(tmp_path / "talk")
            talk.session.close()
            machine = plain if i == 0 else model
            talk = Conversation(machine, machine.load_session(tmp_path / "talk"), None, **settings)
            talk.take_up(None)
        talk.session.close()


def test_chat_goes_on_with_a_session(tmp_path, capsys, monkeypatch):
    path, file = str(tiny.model("llama", n_ctx=2000)), str(tmp_path / "talk")

    def chat(message, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO(message))
        assert run(["chat", path, "--session", file, "-n", "6", "--temp", "0", "-t", "1", *flags]) == 0
        return capsys.readouterr().out

    right = chat("hello"), chat("and then?")
    os.unlink(file)
    assert (chat("hello", "-ngl", "1"), chat("and then?", "-ngl", "99")) == right


@pytest.mark.parametrize("arch", ["llama", "qwen35"])
def test_a_server_saves_and_restores(arch, tmp_path):
    """By name in requests, and by slots: with the answers and the cached tokens of a server without a GPU."""
    path, folder = tiny.model(arch, n_ctx=2000), tmp_path / "sessions"

    def talk(models):
        messages, told = [], []
        for i, model in enumerate(models):
            messages.append({"role": "user", "content": f"turn {i}"})
            with served(model, sessions=str(folder)) as server:
                body = {"messages": messages, "max_tokens": 6, "seed": 3, "session": "talk"}
                answer = server.post("/v1/chat/completions", body).json()
                messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                told.append((messages[-1]["content"], cached))
        (folder / "talk").unlink()
        return told

    with loaded(path, 0) as plain, loaded(path, 1) as model:
        right = talk([plain] * 3)
        assert all(cached for _, cached in right[1:])
        assert talk([plain, model, model]) == right == talk([model, plain, model])


def test_a_server_whose_gpu_fails_while_it_saves(tmp_path, fake):
    with loaded(tiny.model("llama", n_ctx=2000), 1) as model, served(model, sessions=str(tmp_path)) as server:
        body = {"prompt": "Once upon", "n_predict": 4, "id_slot": 0}
        assert server.post("/completion", body).status_code == 200
        with fake.set(fail_in=1):
            answer = server.post("/slots/0?action=save", {"filename": "slot.bin"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (500, "device_failed") and "GPU 0" in error["message"]
        assert not os.listdir(tmp_path)
        assert server.post("/slots/0?action=save", {"filename": "slot.bin"}).status_code == 200
        assert os.listdir(tmp_path) == ["slot.bin"]
