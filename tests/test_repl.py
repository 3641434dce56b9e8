"""The chat loop: lines to messages, commands, interrupts, and one real terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import pybmc
from pybmc.conversation import Conversation
from pybmc.decode import Token
from pybmc.repl import Repl, changed, history_file, joined


# ---- lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines, messages", [
    (["one", "two"], ["one", "two"]),
    (["one\\", "two", "three"], ["one\ntwo", "three"]),
    (['"""', "one", "", 'two"""', "three"], ["one\n\ntwo", "three"]),
    (['"""one"""', "two"], ["one", "two"]),
    (['"""one', 'two', '"""'], ["one\ntwo"]),
    (['"""', "/exit", '"""'], ["/exit"]),
    (["no end\\"], ["no end"]),
    (['"""no end', "either"], ["no end\neither"]),
    (["", "a"], ["", "a"]),
])
def test_lines_become_messages(lines, messages):
    assert list(joined(iter(lines))) == messages


@given(st.lists(st.text(alphabet='ab\\" ', max_size=6)))
def test_no_line_is_lost(lines):
    kept = "".join(joined(iter(lines)))
    assert [c for c in kept if c in "ab"] == [c for line in lines for c in line if c in "ab"]


# ---- commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


@pytest.fixture
def talk(model):
    with model.session(context=400) as session:
        yield Conversation(model, session, None, max_tokens=4, temperature=0.8, seed=1)


def play(talk, *messages, capsys):
    Repl(talk, messages).run()
    return capsys.readouterr()


def test_answers_go_to_stdout_and_everything_else_to_stderr(talk, capsys):
    out, err = play(talk, "hello", "/help", "/stats", "", "/exit", "unheard", capsys=capsys)
    assert out == talk.messages[-1]["content"] + "\n" and len(talk.messages) == 2
    for name in ("/help", "/exit", "/clear", "/regen", "/undo", "/set", "/stats", "/save", "/load"):
        assert f"{name}" in err
    assert "tok/s" in err and "400 tokens" in err


def test_commands_change_the_conversation(talk, capsys, tmp_path):
    path = tmp_path / "a chat.json"
    play(talk, "one", "two", f"/save '{path}'", "/undo", capsys=capsys)
    assert [m["content"] for m in talk.messages[::2]] == ["one"]
    play(talk, "/regen", capsys=capsys)
    assert talk.settings["seed"] == 2 and len(talk.messages) == 2
    play(talk, "/clear", capsys=capsys)
    assert talk.messages == []
    play(talk, f"/load '{path}'", capsys=capsys)
    assert [m["content"] for m in talk.messages[::2]] == ["one", "two"]


def test_settings_can_be_changed_and_seen(talk, capsys):
    _, err = play(talk, "/set temp 0", "/set top-k 7", "/set n -1", "/set", capsys=capsys)
    assert talk.settings["temperature"] == 0 and talk.settings["top_k"] == 7 and talk.settings["max_tokens"] is None
    assert "temp 0" in err and "top-k 7" in err and "n -1" in err
    assert changed({}, "n", "5") == {"max_tokens": 5}


@pytest.mark.parametrize("line", ["/nope", "/set temp", "/set temp hot", "/set top-k 1.5", "/set temp -1", "/set x 1",
                                  "/save", "/load /no/such/file", "/undo", "/regen"])
def test_a_wrong_command_is_a_sentence_and_the_chat_goes_on(talk, capsys, line):
    out, err = play(talk, line, "hello", capsys=capsys)
    assert err and "Traceback" not in err and len(talk.messages) == 2
    assert talk.settings["temperature"] == 0.8


def test_why_tells_where_the_time_went(talk, model, capsys):
    _, err = play(talk, "/why", "hello", "/why", capsys=capsys)
    assert "nothing was said yet" in err and "verify" in err and "there is no draft" in err
    talk.settings |= {"draft": model, "max_tokens": 60, "stop_tokens": ()}
    out, err = play(talk, "hello", "/why", capsys=capsys)
    assert "accepted" in err and "draft model:" in err and "repetitions:" in err and "one token takes" in err
    with model.session(context=400) as session:
        again = Conversation(model, session, None, max_tokens=60, temperature=0.8, seed=1, stop_tokens=())
        again.messages = talk.messages[:-2]
        assert play(again, "hello", capsys=capsys)[0] == out


def test_tokens_that_were_drafted_are_tinted_on_a_terminal(talk, monkeypatch, capsys):
    def answer(*_):
        yield Token(1, "one ", -1.0)
        yield Token(2, "two", -1.0, from_draft=True)

    monkeypatch.setattr("pybmc.terminal.is_terminal", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    Repl(talk, [], tint=True).answer(answer)
    assert capsys.readouterr().out == "one \x1b[36mtwo\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    Repl(talk, [], tint=True).answer(answer)
    assert capsys.readouterr().out == "one two\n"


def test_ctrl_c_ends_the_answer_and_not_the_chat(talk, capsys):
    def interrupted(*_):
        yield Token(1, "so ", -1.0)
        yield Token(2, "far", -1.0)
        raise KeyboardInterrupt

    repl = Repl(talk, [])
    repl.terminal = True
    repl.answer(interrupted)
    assert capsys.readouterr() == ("so far\n", "(interrupted)\n")
    repl.terminal = False
    with pytest.raises(KeyboardInterrupt):
        repl.answer(interrupted)


def test_a_full_context_is_explained(talk, capsys):
    talk.settings["max_tokens"] = None
    talk.settings["stop_tokens"] = ()
    _, err = play(talk, "hello", capsys=capsys)
    assert "context of 400 tokens is full" in err and "/clear" in err


def test_the_history_is_kept_in_the_users_state_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_file()
    assert path == tmp_path / "state" / "pybmc" / "history" and path.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    assert history_file() is None


# ---- a terminal --------------------------------------------------------------------------------------------

PROMPT = "\x1b[?2004h"          # bracketed paste goes on when the line editor is ready


class Terminal:
    """pybmc on a pseudo-terminal."""

    def __init__(self, *args, **environment):
        self.fd, child = pty.openpty()
        environment |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen([sys.executable, "-m", "pybmc", *args], stdin=child, stdout=child,
                                        stderr=child, start_new_session=True, env=os.environ | environment)
        os.close(child)
        self.text = ""

    def wait_for(self, what, seconds=60):
        ends = time.monotonic() + seconds
        while what not in self.text:
            assert time.monotonic() < ends, f"no {what!r} in {self.text!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError:                     # the other end is closed
                    break
        assert what in self.text, self.text
        self.text = self.text[self.text.index(what) + len(what):]

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def leave(self):
        """Ctrl-D until it is heard: the line editor drops keys that come before it is ready."""
        for _ in range(50):
            if self.process.poll() is not None:
                break
            self.type("\x04")
            if select.select([self.fd], [], [], 0)[0]:
                os.read(self.fd, 4096)
            time.sleep(0.2)
        assert self.process.poll() == 0

    def close(self):
        os.close(self.fd)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def test_a_chat_on_a_terminal(tmp_path):
    pytest.importorskip("prompt_toolkit")
    terminal = Terminal("chat", str(tiny.model("llama")), "-t", "1", "-n", "3", XDG_STATE_HOME=str(tmp_path))
    try:
        terminal.wait_for(PROMPT)
        terminal.type("hello\r")
        terminal.wait_for("(cut off by -n")
        terminal.wait_for(PROMPT)
        terminal.type("\x03")                       # at the prompt it only clears the line
        terminal.wait_for("(Ctrl-D leaves)")
        terminal.wait_for(PROMPT)
        terminal.leave()
        assert "hello" in (tmp_path / "pybmc" / "history").read_text()
    finally:
        terminal.close()
