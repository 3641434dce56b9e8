"""A conversation in a file: it goes on where it ended, and reads nothing again."""

import io
import os
import signal
import subprocess
import sys

import pytest
import tiny

import pybmc
from pybmc import FormatError
from pybmc.chat.conversation import Conversation
from pybmc.cli import run
from pybmc.cli.repl import Repl

SETTINGS = dict(max_tokens=6, temperature=0.8, seed=1)


@pytest.fixture(scope="module", params=["llama", "qwen35"])
def model(request):
    with pybmc.Model(tiny.model(request.param, n_ctx=2000), threads=1) as model:
        yield model


def answers(talk, *messages):
    return ["".join(token.text for token in talk.ask(message)) for message in messages]


def told(talk, message):
    """An answer, and how many tokens of its prompt were there already."""
    return answers(talk, message), talk.stats.reused_tokens


def resumed(model, path, system=None, **settings):
    talk = Conversation(model, model.load_session(path), None, **SETTINGS | settings)
    talk.take_up(system)
    return talk


def test_a_conversation_goes_on_with_the_same_answers(model, tmp_path):
    messages, path = ["hello", "and then?", "why?", "the end"], tmp_path / "talk"
    with model.session() as session:
        right = Conversation(model, session, "be brief", **SETTINGS)
        expected = [told(right, message) for message in messages]
    assert all(reused for _, reused in expected[1:])
    talk = Conversation(model, model.session(), "be brief", **SETTINGS)
    for message, answer in zip(messages, expected):
        assert told(talk, message) == answer
        talk.save_session(path)
        talk.session.close()
        talk = resumed(model, path)
    assert talk.messages == right.messages and talk._ids == right._ids


def test_undo_clear_and_load_after_a_restart(model, tmp_path):
    path = tmp_path / "talk"
    talk = Conversation(model, model.session(), **SETTINGS)
    one, two = answers(talk, "one", "two")
    talk.save_session(path)
    talk = resumed(model, path)
    assert talk.undo() == "two" and answers(talk, "two") == [two]
    talk.clear()
    talk.save_session(path)
    talk = resumed(model, path)
    assert talk.messages == [] and answers(talk, "one") == [one]


def test_another_system_message_replaces_the_saved_one(model, tmp_path):
    path = tmp_path / "talk"
    talk = Conversation(model, model.session(), "be brief", **SETTINGS)
    answers(talk, "one")
    talk.save_session(path)
    assert resumed(model, path).messages == talk.messages
    talk = resumed(model, path, "be long")
    assert [m["content"] for m in talk.messages[:2]] == ["be long", "one"] and answers(talk, "two")


@pytest.mark.parametrize("notes", [None, [], {}, {"messages": 1, "after": None},
                                   {"messages": [{"role": "x", "content": "a"}], "after": None},
                                   {"messages": [], "after": [-1]}, {"messages": [], "after": ["a"]},
                                   {"messages": [{}], "after": []}])
def test_a_session_without_a_conversation_is_refused(model, tmp_path, notes):
    with model.session() as session:
        session.eval([1, 2], "none")
        session.notes = notes
        session.save(tmp_path / "s")
    with pytest.raises(FormatError, match="there is no conversation in this session"):
        resumed(model, tmp_path / "s")


# ---- pybmc chat --session ----------------------------------------------------------------------------------


@pytest.fixture
def chat(capsys, monkeypatch):
    """Runs the command with lines from a pipe: (status, stdout, stderr)."""
    def chat(*args, lines="", model="llama"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        status = run(["chat", str(tiny.model(model)), "-t", "1", "-n", "6", "--seed", "1", *map(str, args)])
        return status, *capsys.readouterr()
    return chat


def test_the_command_continues_yesterdays_talk(chat, tmp_path):
    path, lines = tmp_path / "talk", ["hello", "and then?", "why?"]
    _, right, _ = chat(lines="\n".join(lines))
    said = [chat("--session", path, lines=line) for line in lines]
    assert "".join(out for _, out, _ in said) == right and [status for status, _, _ in said] == [0, 0, 0]
    assert "(4 messages of " in said[2][2]
    _, _, err = chat("--session", path, lines="/stats\n/clear")
    assert "context " in err and "(6 messages of " in err
    assert "(0 messages of " in chat("--session", path)[2]


def test_the_command_refuses_what_it_cannot_go_on_with(chat, tmp_path):
    path = tmp_path / "talk"
    chat("--session", path, lines="hello")
    status, out, err = chat("--session", path, lines="hello", model="qwen3")
    assert status == 1 and not out and err.count("\n") == 1
    assert f"expected a session of {tiny.model('qwen3').name} (qwen3, " in err
    assert f"found one of {tiny.model('llama').name} (llama, " in err
    (tmp_path / "letter").write_text("dear")
    for name, says in (("letter", "is no saved session"), (".", "is no saved session: it is no regular file"),
                       ("none/talk", "No such file")):
        status, out, err = chat("--session", tmp_path / name, lines="hello")
        assert status == 1 and not out and says in err and err.count("\n") == 1
    assert (tmp_path / "letter").read_text() == "dear"
    assert chat("--session", "", lines="hello")[0] == 2


def test_a_save_that_fails_is_told_and_the_chat_goes_on(tmp_path, capsys, monkeypatch):
    with pybmc.Model(tiny.model("llama"), threads=1) as model, model.session() as session:
        talk = Conversation(model, session, **SETTINGS)

        def fail(path):
            raise OSError(28, "No space left on device", path)

        monkeypatch.setattr(session, "save", fail)
        assert Repl(talk, iter(["one", "two"]), session_file=str(tmp_path / "s")).run() == 1
        out, err = capsys.readouterr()
        assert len(talk.messages) == 4 and err.count("No space left on device") == 2


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_chat_that_is_ended_while_it_answers_keeps_the_turns_before(tmp_path, sign):
    path = tmp_path / "talk"
    command = [sys.executable, "-m", "pybmc", "chat", str(tiny.model("llama", n_ctx=4000)), "-t", "1",
               "--session", str(path), "-n", "-1", "-l", "398-inf", "-l", "400-inf"]
    with subprocess.Popen([*command[:-5], "5"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as first:
        first.communicate("hello\n", timeout=60)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as second:
        second.stdin.write(b"and then?\n")
        second.stdin.flush()
        assert os.read(second.stdout.fileno(), 1)           # it answers
        second.send_signal(sign)
        second.wait(60)
    with pybmc.Model(tiny.model("llama", n_ctx=4000), threads=1) as model:
        talk = resumed(model, path)
        found = [m["content"] for m in talk.messages[::2]]
        assert found in (["hello"], ["hello", "and then?"])
        assert answers(talk, "why?")
