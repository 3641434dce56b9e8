"""The chat loop: lines to messages, commands, interrupts, and one real terminal."""

import io
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
from pybmc import ArgumentError
from pybmc.chat.conversation import Conversation
from pybmc.cli.repl import COMMANDS, Block, Repl, changed, history_file, is_command, joined, named
from pybmc.cli.terminal import ReaderLeft
from pybmc.engine import Token

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
    assert talk.settings["temperature"] == 0 and talk.settings["top_k"] == 7
    assert talk.settings["max_tokens"] is None
    assert "temp 0" in err and "top-k 7" in err and "n -1" in err
    assert changed({}, "n", "5") == {"max_tokens": 5}


@pytest.mark.parametrize("line", ["/nope", "/set temp", "/set temp hot", "/set top-k 1.5", "/set temp -1",
                                  "/set x 1", "/save", "/load /no/such/file", "/undo", "/regen"])
def test_a_wrong_command_is_a_sentence_and_the_chat_goes_on(talk, capsys, line):
    out, err = play(talk, line, "hello", capsys=capsys)
    assert err and "Traceback" not in err and len(talk.messages) == 2
    assert talk.settings["temperature"] == 0.8


def test_every_command_is_in_the_help(talk, capsys):
    commands = {name.removeprefix("do_") for name in vars(Repl) if name.startswith("do_")}
    assert commands == set(COMMANDS)
    _, err = play(talk, "/help", capsys=capsys)
    assert err.count("\n") == len(commands)


def test_help_needs_no_docstrings():
    code = "from pybmc.cli.repl import Repl; Repl(None, ['/help']).run()"
    run = subprocess.run([sys.executable, "-OO", "-B", "-c", code], capture_output=True,
                         text=True, check=True)
    assert "/save FILE: write the conversation to a file\n" in run.stderr


@pytest.mark.parametrize("message", [Block("/exit"), Block("/api/orders now returns a list"),
                                     "/api/orders\nMay it break?"])
def test_blocks_and_pasted_lines_are_messages_even_after_a_slash(talk, capsys, message):
    play(talk, message, capsys=capsys)
    assert talk.messages[0] == {"role": "user", "content": str(message)} and len(talk.messages) == 2


def test_only_a_block_is_marked_as_one():
    lines = ['"""/exit"""', "/exit", '"""', "/a", '"""', '"""/open', "/exit"]
    assert ([(str(m), type(m) is Block) for m in joined(iter(lines))]
            == [("/exit", True), ("/exit", False), ("/a", True), ("/open\n/exit", True)])
    assert ([is_command(m) for m in joined(iter(['"""/exit"""', "/exit", "/a\\", "b"]))]
            == [False, True, False])


def test_an_unknown_command_tells_how_to_send_it(talk, capsys):
    _, err = play(talk, "/api/orders", capsys=capsys)
    assert '"""/api/orders"""' in err and "/help" in err and talk.messages == []


@pytest.mark.parametrize("rest, name", [
    ("it's.json", "it's.json"), ("my chat.json", "my chat.json"), ("'my chat.json'", "my chat.json"),
    ('"a b"', "a b"), ("my\\ chat.json", "my chat.json"), ("it's my chat", "it's my chat"),
    ("a.json", "a.json"),
])
def test_file_names_as_people_type_them(rest, name):
    assert named(rest) == name


@pytest.mark.parametrize("rest", ["", "''"])
def test_no_file_name(rest):
    with pytest.raises(ArgumentError, match="expected a file name"):
        named(rest)


@pytest.mark.parametrize("error, says", [
    (ValueError("odd\nlines"), "internal error: ValueError: odd lines"), (MemoryError(), "not enough memory"),
    (RecursionError(), "internal error: RecursionError"), (pybmc.ClosedError("closed"), "closed"),
])
@pytest.mark.parametrize("command", ["load", "regen"])
def test_no_failure_of_a_command_ends_the_chat(talk, capsys, monkeypatch, command, error, says):
    def fail(*_):
        raise error

    monkeypatch.setattr(Repl, f"do_{command}", fail)
    repl = Repl(talk, ["one", f"/{command} x", "two"])
    assert repl.run() == 0 and [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert says in capsys.readouterr().err


def test_a_message_that_fails_does_not_end_the_chat(talk, capsys):
    """.. from a pipe the status tells of it."""
    repl = Repl(talk, ["one", "word " * 600, "caf\udce9", "two"])
    assert repl.run() == 1 and [m["content"] for m in talk.messages[::2]] == ["one", "two"]
    err = capsys.readouterr().err
    assert "room for 400" in err and "half a surrogate pair" in err


def test_a_reader_that_leaves_ends_the_chat(talk, monkeypatch):
    def leave(*_):
        raise ReaderLeft

    monkeypatch.setattr(Repl, "answer", leave)
    with pytest.raises(ReaderLeft):
        Repl(talk, ["one"]).run()


def test_bytes_that_are_not_utf_8_are_replaced(talk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHello\n"), encoding="utf-8"))
    assert Repl(talk).run() == 0
    assert [m["content"] for m in talk.messages[::2]] == ["caf\ufffd", "Hello"]


def test_thinking_is_switched_and_shown_or_hidden(talk, capsys):
    _, err = play(talk, "/think on", "/think", "/think sometimes", capsys=capsys)
    assert talk.variables == {"enable_thinking": True} and err.count("think on") == 2
    assert "not 'sometimes'" in err
    _, err = play(talk, "/set think off", "/set thoughts hide", "/set think maybe", "/set", capsys=capsys)
    assert talk.variables == {"enable_thinking": False} and "think off" in err and "thoughts hide" in err
    assert "does not read enable_thinking" in err and "think is on or off, not 'maybe'" in err
    repl = Repl(talk, [], thoughts="hide")
    repl.answer(lambda update: (Token(1, text, -1.0) for text in ("<think>a", "b</think>", " c")))
    assert capsys.readouterr().out == "c\n"


def test_an_answer_whose_prompt_opened_the_thought(talk, capsys):
    talk.prompt = talk.model.tokenizer.encode("<|im_start|>assistant\n<think>\n", special=True)
    pieces = ("a</th", "ink>\n\nb")
    Repl(talk, [], thoughts="hide").answer(lambda update: (Token(1, text, -1.0) for text in pieces))
    assert capsys.readouterr().out == "b\n"


def test_why_tells_where_the_time_went(talk, model, capsys):
    _, err = play(talk, "/why", "hello", "/why", capsys=capsys)
    assert "nothing was said yet" in err and "verify" in err and "repetitions:" in err
    assert "draft model" not in err
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

    monkeypatch.setattr("pybmc.cli.terminal.is_terminal", lambda stream: True)
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


def test_a_paste_of_several_lines_on_a_terminal_is_one_message(tmp_path):
    pytest.importorskip("prompt_toolkit")
    terminal = Terminal("chat", str(tiny.model("llama")), "-t", "1", "-n", "3", XDG_STATE_HOME=str(tmp_path))
    try:
        terminal.wait_for(PROMPT)
        terminal.type("\x1b[200~/exit\rand more\x1b[201~")
        terminal.wait_for("and more")
        terminal.type("\r")
        terminal.wait_for("(cut off by -n")
        terminal.wait_for(PROMPT)
        terminal.leave()
    finally:
        terminal.close()
