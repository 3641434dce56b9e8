"""Reading ahead while a message is typed: what is read, what is taken back, when it stops,
and that no text depends on it."""

import json
import threading
import time

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import pybmc
from pybmc.chat import preread
from pybmc.chat.conversation import CUT, Conversation, lasting
from pybmc.chat.preread import POWER_SECONDS, QUIET_SECONDS, Power, Preread, Reader, on_battery
from pybmc.cli import cli
from pybmc.cli.repl import begun, lines
from pybmc.engine.prefixes import common
from tools.preread_bench import main

MESSAGE = "tell me the story of the mouse and the sparrow under the old mill by the sea"


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=2000), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def recurrent():
    with pybmc.Model(tiny.model("qwen35", n_ctx=2000), threads=1) as model:
        yield model


@pytest.fixture
def talk(model):
    with model.session() as session:
        yield Conversation(model, session, "Be brief.", max_tokens=6, temperature=1.0, seed=5)


class Clock:
    """Time that passes only where a test lets it."""

    now = 100.0

    def __call__(self):
        return self.now


def reader_of(talk, on_battery=lambda: False, clock=None):
    return Reader(talk, on_battery, clock or Clock())


def rest(reader):
    """Read until there is nothing to read before the next key."""
    while (wait := reader.step()) == 0:
        pass
    return wait


def type_in(reader, keys, text=""):
    """Type, a key at a time; "\b" takes the last character away. The text that stands there."""
    for key in keys:
        text = text[:-1] if key == "\b" else text + key
        reader.note(text)
        rest(reader)
    return text


def answered(talk, message):
    return [(token.id, token.logprob) for token in talk.ask(message)]


def prompt_of(talk, message):
    """Ids of the next turn's prompt; the conversation stays as it is."""
    return talk._fitted([*talk.messages, {"role": "user", "content": message}])[0]


# ---- what is certain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, part", [
    ("", ""), ("tell", ""), ("tell ", "tell "), ("tell me", "tell "), ("one\ntw", "one\n"), (" ", " "),
    ("x" * (2 * CUT - 1), ""), ("x" * 2 * CUT, "x" * CUT), ("a " + "x" * (3 * CUT + 1), "a " + "x" * 2 * CUT),
])
def test_all_but_the_last_word_lasts(text, part):
    assert lasting(text) == part


def test_the_beginning_of_every_prompt_is_what_was_coming(talk):
    list(talk.ask("Who are you?"))
    whole = np.array(prompt_of(talk, MESSAGE))
    for n in range(len(MESSAGE) + 1):
        ids = np.array(talk.coming(MESSAGE[:n]))
        assert common(ids, whole) == len(ids), f"after {MESSAGE[:n]!r}"
    assert len(whole) - len(ids) < 16               # the last word, and what ends a message


def test_what_was_written_stays_in_the_tokens_that_it_was_written_in(talk):
    list(talk.ask("Who are you?"))
    held = talk.session.tokens
    assert talk.coming()[:len(held)] == held


@pytest.mark.parametrize("text", ["故" * 40, "https://example.org/" + "a" * 40])
def test_a_text_without_spaces_is_read_too(talk, text):
    head, ids = talk.coming(), talk.coming(text)
    assert ids[:len(head)] == head and len(ids) > len(head) + 10
    later = prompt_of(talk, text + "z")
    assert common(np.array(ids), np.array(later)) == len(ids)


def test_turns_that_will_be_dropped_are_not_read(model):
    with model.session(context=300) as session:
        talk = Conversation(model, session, None, max_tokens=30)
        for turn in range(5):
            list(talk.ask(f"question {turn}"))
        before = list(talk.messages)
        while len(talk.coming()) > 200:
            list(talk.ask("and"))
        talk.messages, n = before * 9, len(before * 9)
        assert len(talk.coming("so ")) < 160 and len(talk.messages) == n


# ---- reading -----------------------------------------------------------------------------------------------


def test_words_are_read_while_they_are_typed(talk):
    reader, seen = reader_of(talk), []
    for n in range(len(MESSAGE) + 1):
        reader.note(MESSAGE[:n])
        rest(reader)
        seen.append(talk.session.position)
    assert seen == sorted(seen) and seen[-1] > seen[0] > 0
    list(talk.ask(MESSAGE))
    assert talk.stats.reused_tokens == seen[-1] and talk.stats.prompt_tokens - seen[-1] < 16


KEYS = st.lists(st.one_of(st.sampled_from(["a", " ", "\n", "mouse ", "the sea ", "  \n", "é", "12",
                                           "<|im_end|>", "故事" * 9]),
                          st.integers(1, 30).map(lambda n: "\b" * n)), max_size=12).map("".join)


@pytest.mark.parametrize("name", ["llama", "qwen35"])
def test_no_answer_depends_on_what_was_read_ahead(model, recurrent, name):
    """.. with edits anywhere: words are taken back, and others are typed."""
    made = {"llama": model, "qwen35": recurrent}[name]

    @given(st.lists(KEYS, min_size=1, max_size=3))
    @settings(max_examples=15)
    def check(typed):
        with made.session() as one, made.session() as other:
            ahead, plain = (Conversation(made, session, "Be brief.", max_tokens=6, temperature=1.0, seed=5)
                            for session in (one, other))
            clock = Clock()
            reader = reader_of(ahead, clock=clock)
            for keys in typed:
                reader.begin()
                text = type_in(reader, keys) + "."
                clock.now += QUIET_SECONDS
                rest(reader)
                assert answered(ahead, text) == answered(plain, text)
            assert ahead.messages == plain.messages and one.tokens == other.tokens

    check()


def test_a_word_that_is_edited_is_taken_back(talk):
    reader = reader_of(talk)
    text = type_in(reader, "the old mill by the sea ")
    assert talk.session.tokens == talk.coming(text)
    text = type_in(reader, "\b" * 11 + "at home ", text)
    assert text == "the old mill at home " and talk.session.tokens == talk.coming(text)
    reader.note("")
    rest(reader)
    assert talk.session.tokens == talk.coming("")


def test_passes_are_short(talk):
    clock, widths = Clock(), []
    reader, read = reader_of(talk, clock=clock), talk.session.eval

    def eval(ids, logits):
        clock.now += len(ids) * 0.002               # 500 tokens a second
        widths.append(len(ids))
        return read(ids, logits)

    talk.session.eval = eval
    reader.note(MESSAGE * 3 + " ")
    rest(reader)
    assert widths[0] == preread.LEAST and max(widths) == round(500 * preread.PASS_SECONDS) and len(widths) > 3


def test_states_that_are_far_back_are_read_again_only_when_the_typist_rests(recurrent):
    with recurrent.session() as session:
        talk, clock = Conversation(recurrent, session), Clock()
        reader = reader_of(talk, clock=clock)
        long = "the mouse and the sea " * 20
        text = type_in(reader, [long])
        assert session.tokens == talk.coming(text)
        reader.note("the mouse and ")
        assert session.nearest(len(talk.coming("the mouse and "))) == 0
        assert reader.step() == QUIET_SECONDS and session.tokens == talk.coming(text), "it went back at once"
        clock.now += QUIET_SECONDS / 2
        assert reader.step() == QUIET_SECONDS / 2
        clock.now += QUIET_SECONDS / 2
        rest(reader)
        assert session.tokens == talk.coming("the mouse and ")


def test_a_thought_that_the_template_leaves_out_is_read_again_before_the_message(model):
    source = ("{% for m in messages %}"
              "{{ '<|im_start|>' + m.role + '\n' + "
              "(m.content.split('</think>')|last if m.role == 'assistant' else m.content) + '<|im_end|>' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    with model.session() as session:
        talk = Conversation(model, session, chat_template=source, max_tokens=4)
        list(talk.ask("Who?"))
        talk.messages[-1]["content"] = "<think>much of it</think>A mouse of the mill, and no other."
        rest(reader_of(talk))
        held = model.tokenizer.decode(session.tokens, special=True)
        assert held.endswith("A mouse of the mill, and no other.<|im_end|><|im_start|>user\n")
        assert "much" not in held


# ---- power -------------------------------------------------------------------------------------------------

BATTERY, MAINS = {"type": "Battery"}, {"type": "Mains"}
MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging"}
EMPTYING, FILLING, FULL = (BATTERY | {"status": status} for status in ("Discharging", "Charging", "Full"))
ON, OFF = MAINS | {"online": "1"}, MAINS | {"online": "0"}


def supply(folder, *supplies):
    for i, files in enumerate(supplies):
        (folder / f"s{i}").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"s{i}" / name).write_text(text + "\n")


@pytest.mark.parametrize("supplies, runs_on_battery", [
    ((), False), ((ON,), False), ((EMPTYING,), True), ((FILLING,), False), ((FULL,), False),
    ((EMPTYING, OFF), True), ((EMPTYING, ON), False), ((FULL, EMPTYING), True), ((MOUSE,), False),
    ((MOUSE, EMPTYING), True),
    ((EMPTYING, {"type": "USB", "online": "1"}), False), ((EMPTYING, {"type": "USB", "online": "0"}), True),
    ((BATTERY,), False), (({},), False), ((BATTERY | {"status": "Unknown"}, OFF), False),
])
def test_whether_the_machine_runs_on_its_battery(tmp_path, supplies, runs_on_battery):
    supply(tmp_path, *supplies)
    assert on_battery(tmp_path) == runs_on_battery


def test_supplies_that_cannot_be_read_are_none(tmp_path):
    assert not on_battery(tmp_path / "none")
    supply(tmp_path, BATTERY)
    (tmp_path / "s0" / "status").mkdir()
    (tmp_path / "file").write_bytes(b"\xff")
    assert not on_battery(tmp_path)


def test_nothing_is_read_on_battery(talk, tmp_path):
    clock = Clock()
    supply(tmp_path, EMPTYING, OFF)
    reader = Reader(talk, Power(tmp_path, clock).on_battery, clock)
    reader.note(MESSAGE)
    assert reader.step() == POWER_SECONDS and talk.session.position == 0
    supply(tmp_path, EMPTYING, ON)
    assert reader.step() == POWER_SECONDS, "the supply is looked at every few seconds"
    clock.now += POWER_SECONDS
    rest(reader)
    n = talk.session.position
    assert n > 0
    supply(tmp_path, EMPTYING, OFF)
    reader.note(MESSAGE * 2)
    clock.now += POWER_SECONDS
    assert reader.step() == POWER_SECONDS and talk.session.position == n


# ---- the thread --------------------------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "preread"]


def wait_until(true, seconds=60):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.002)


def test_the_thread_reads_and_is_gone_afterwards(talk):
    with Preread(reader_of(talk)) as ahead:
        assert len(threads()) == 1
        wait_until(lambda: talk.session.tokens == talk.coming(""))
        ahead.note("the old mill by the sea ")
        wait_until(lambda: talk.session.tokens == talk.coming("the old mill by the sea "))
    assert threads() == []
    held = talk.session.position
    ahead.note("and the river and the old wheel ")
    assert threads() == [] and talk.session.position == held
    list(talk.ask("the old mill by the sea and more"))
    assert talk.stats.reused_tokens == held


def test_enter_waits_for_one_pass_at_most(talk):
    passes, entered = [], threading.Event()
    reader = reader_of(talk)

    def eval(ids, logits):
        passes.append(len(ids))
        entered.wait(60)

    talk.session.eval = eval
    with Preread(reader) as ahead:
        ahead.note(MESSAGE * 10)
        wait_until(lambda: passes)
        free = threading.Thread(target=lambda: (wait_until(lambda: ahead._stopping), entered.set()))
        free.start()
    assert len(passes) == 1 and threads() == []
    free.join()


@pytest.mark.parametrize("error", [pybmc.OutOfMemoryError("full"), pybmc.ContextFullError("full"),
                                   MemoryError(), ValueError("odd")])
def test_an_error_ends_it_until_the_next_message_and_nobody_is_told(talk, error, capfd):
    def fail(*_):
        raise error

    reader, read = reader_of(talk), talk.session.eval
    talk.session.eval = fail
    with Preread(reader) as ahead:
        wait_until(lambda: not threads())
        ahead.note("the old mill ")
        assert threads() == []
    talk.session.eval = read
    with ahead:
        wait_until(lambda: talk.session.position)
    assert capfd.readouterr() == ("", "")
    assert len(answered(talk, "the old mill")) == 6


def test_a_message_that_does_not_fit_is_the_turns_concern(model):
    with model.session(context=64) as session:
        talk = Conversation(model, session, max_tokens=2)
        with Preread(reader_of(talk)) as ahead:
            ahead.note("word " * 100)
            wait_until(lambda: not threads())
        with pytest.raises(pybmc.ContextFullError, match="room for 64"):
            list(talk.ask("word " * 100))


def test_an_interrupt_while_it_stops_leaves_no_thread(talk, monkeypatch):
    join, interrupts = threading.Thread.join, [KeyboardInterrupt]

    def interrupted(self, *args):
        if interrupts:
            raise interrupts.pop()
        join(self, *args)

    ahead = Preread(reader_of(talk))
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with ahead:
            pass
    assert threads() == []


# ---- the line editor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts, line, text", [
    ([], "hello wor", "hello wor"), ([], "/set temp", ""), ([], "/api\nis new", "/api\nis new"),
    ([], '"""/api ', "/api "), (["one", "two"], "thr", "one\ntwo\nthr"), ([""], "/exit", "/exit"),
    (["/a"], "/b", "/a\n/b"), ([], "caf\udce9 ", "caf\ufffd "),
    (["one"], '"""', 'one\n"""'),
])
def test_the_message_that_is_typed(parts, line, text):
    assert begun(parts, line) == text


def test_it_reads_while_a_line_is_asked_for_and_at_no_other_time(talk, monkeypatch):
    """.. whichever way the prompt is left: Enter, Ctrl-C, Ctrl-D."""
    answers = ["one", KeyboardInterrupt, "two", EOFError]
    seen = []

    def editor(typed):
        def ask(prompt):
            seen.append(len(threads()))
            typed("the old mill ")
            wait_until(lambda: talk.session.tokens == talk.coming(begun(parts, "the old mill ")))
            answer = answers.pop(0)
            if isinstance(answer, str):
                return answer
            raise answer
        return ask

    monkeypatch.setattr("pybmc.cli.repl.editor", editor)
    parts = []
    read = lines(True, Preread(reader_of(talk)), parts)
    assert next(read) == "one" and threads() == []
    parts.append("before")
    assert next(read) == "two" and threads() == []
    assert list(read) == [] and threads() == [] and seen == [1, 1, 1, 1]


@pytest.mark.parametrize("flags, terminal, reads",
                         [([], True, True), (["--no-preread"], True, False), ([], False, False)])
def test_it_reads_at_a_terminal_unless_a_flag_forbids_it(monkeypatch, flags, terminal, reads):
    given = []
    monkeypatch.setattr("pybmc.cli.repl.is_terminal", lambda stream: terminal)
    monkeypatch.setattr("pybmc.cli.repl.lines", lambda terminal, ahead, parts: given.append(ahead)
                        or iter(()))
    run = CliRunner().invoke(cli, ["chat", str(tiny.model("llama")), *flags])
    assert run.exit_code == 0 and [ahead is not None for ahead in given] == [reads], run.output


def test_the_line_editor_tells_what_is_typed(monkeypatch):
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from pybmc.cli import repl

    monkeypatch.setattr(repl, "is_terminal", lambda stream: True)
    monkeypatch.setattr(repl, "history_file", lambda: None)
    heard = []
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        ask = repl.editor(heard.append)
        keys.send_text("ab\x7fc\r")
        assert ask("> ") == "ac" and heard[:4] == ["a", "ab", "a", "ac"]


# ---- the bench ---------------------------------------------------------------------------------------------


def test_the_bench_types_a_message_both_ways():
    run = CliRunner().invoke(main, [str(tiny.model("llama")), "--answer", "9", "--wpm", "1e6", "--runs", "1",
                                    "--message", "Who are you?", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    (without,), (with_it,) = found["without"], found["with"]
    assert with_it["prompt"] == without["prompt"] and 0 < with_it["read"] <= without["read"]
    assert found["ratio"] > 0


@pytest.mark.parametrize("flags", [["--message", " "], ["--wpm", "0"], ["--answer", "0"]])
def test_the_bench_refuses_what_is_no_message(flags):
    run = CliRunner().invoke(main, [str(tiny.model("llama")), *flags])
    assert run.exit_code == 2 and "Traceback" not in run.output
