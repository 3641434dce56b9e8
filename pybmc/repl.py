"""The chat on a terminal, or from a pipe: reads messages and commands, prints answers."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import report
from .cache import user_folder
from .conversation import Conversation
from .errors import ArgumentError, BmcError
from .sampling import Sampler
from .speculate import of_session
from .terminal import is_terminal, note, progress, sentence, write

SETTINGS = {                            # what /set calls them, after the flags
    "temp": "temperature", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "seed": "seed", "n": "max_tokens",
    "repeat-penalty": "repeat_penalty", "presence-penalty": "presence_penalty",
    "frequency-penalty": "frequency_penalty", "repeat-last-n": "repeat_last_n",
}
WHOLE = {"top-k", "seed", "n", "repeat-last-n"}


class Exit(Exception):
    """Leave the chat."""


class Repl:
    """run() talks until the input ends or /exit. Commands are the methods named do_<command>."""

    def __init__(self, conversation: Conversation, messages: Iterator[str] | None = None, tint: bool = False):
        self.talk, self.tint = conversation, tint       # tint: show which tokens were drafted
        self.terminal = is_terminal(sys.stdin)
        self.messages = messages if messages is not None else joined(lines(self.terminal))

    def run(self) -> None:
        if self.terminal:
            note("/help lists commands; Ctrl-D leaves.", dim=True)
        for message in self.messages:
            if not message.strip():
                continue
            try:
                self.handle(message)
            except Exit:
                return
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
            except (BmcError, OSError) as error:
                if not self.terminal and not message.startswith("/"):
                    raise
                note(sentence(error))

    def handle(self, message: str) -> None:
        if not message.startswith("/"):
            self.answer(lambda update: self.talk.ask(message, update))
            return
        name, _, rest = message[1:].partition(" ")
        command = getattr(self, f"do_{name}", None)
        if command is None:
            raise ArgumentError(f"there is no command /{name:.30}; /help lists them")
        command(rest.strip())

    def answer(self, start: Callable) -> None:
        """Stream an answer; Ctrl-C ends it and what was said stays."""
        reason = None
        with progress("reading") as update:
            stream = start(update)
            try:
                for token in stream:
                    write(token.text, self.tint and token.from_draft)
                    reason = token.finish_reason
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                reason = "interrupted"
            finally:
                stream.close()
        write("\n")
        self.remark(reason)

    def remark(self, reason: str | None) -> None:
        if self.terminal and is_terminal(sys.stderr) and self.talk.stats.predicted_tokens > 1:
            note(report.summary(self.talk.stats, self.talk.session.arena_stats()), dim=True)
        if self.talk.dropped:
            note(f"(the context was full: the first {self.talk.dropped} messages are forgotten)", dim=True)
        if reason == "context":
            note(f"(the context of {self.talk.session.context} tokens is full; /clear starts anew, "
                 "-c N makes room)", dim=True)
        elif reason == "length":
            note("(cut off by -n; /set n -1 lifts it)", dim=True)
        elif reason == "interrupted":
            note("(interrupted)", dim=True)

    # ---- commands; the first line of a docstring is its help

    def do_help(self, _: str) -> None:
        """/help: this list"""
        names = [name for name in vars(Repl) if name.startswith("do_")]
        note("\n".join(getattr(self, name).__doc__ for name in names))

    def do_exit(self, _: str) -> None:
        """/exit: leave"""
        raise Exit

    def do_clear(self, _: str) -> None:
        """/clear: forget the conversation, but not the system prompt"""
        self.talk.clear()

    def do_regen(self, _: str) -> None:
        """/regen: answer the last message again"""
        if self.talk.settings.get("temperature", 0) == 0:
            note("(at temperature 0 an answer is always the same; /set temp 0.8 varies it)", dim=True)
        self.answer(self.talk.again)

    def do_undo(self, _: str) -> None:
        """/undo: forget the last message and its answer"""
        note(f"(forgotten: {self.talk.undo():.60})", dim=True)

    def do_set(self, rest: str) -> None:
        """/set NAME VALUE: change a setting, such as temp or top-k; without a value show all"""
        words = rest.split()
        if not words:
            note("\n".join(f"{name} {self.shown(name)}" for name in SETTINGS))
            return
        if len(words) != 2 or words[0] not in SETTINGS:
            raise ArgumentError(f"expected /set NAME VALUE; names are {', '.join(SETTINGS)}")
        self.talk.settings |= changed(self.talk.settings, *words)

    def shown(self, name: str):
        value = self.talk.settings.get(SETTINGS[name])
        return -1 if name == "n" and value is None else value

    def do_stats(self, _: str) -> None:
        """/stats: speed of the last answer, and memory"""
        stats, arena = self.talk.stats, self.talk.session.arena_stats()
        note(f"prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} of them held; "
             f"the others {stats.prompt_tok_s:.1f} tok/s\n"
             f"answer {stats.predicted_tokens} tokens, {stats.predicted_tok_s:.1f} tok/s\n"
             f"context {self.talk.session.position} of {self.talk.session.context} tokens; "
             f"{arena.rows_reserved} rows reserved, {arena.bytes_reserved / 1e6:.1f} MB")

    def do_why(self, _: str) -> None:
        """/why: where the time of the last answer went, and what drafting was based on"""
        kind = Sampler(**sampler_settings(self.talk.settings)).kind
        note("\n".join(report.why(self.talk.stats, of_session(self.talk.session), kind)))

    def do_save(self, path: str) -> None:
        """/save FILE: write the conversation to a file"""
        self.talk.save(named(path))

    def do_load(self, path: str) -> None:
        """/load FILE: take up a saved conversation"""
        self.talk.load(named(path))
        note(f"({len(self.talk.messages)} messages)", dim=True)


def sampler_settings(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name in Sampler.__dataclass_fields__}


def named(rest: str) -> str:
    words = shlex.split(rest)
    if len(words) != 1:
        raise ArgumentError("expected a file name")
    return os.path.expanduser(words[0])


def changed(settings: dict, name: str, value: str) -> dict:
    """{setting: new value}, checked as a Sampler checks it."""
    try:
        number = int(value) if name in WHOLE else float(value)
    except ValueError:
        raise ArgumentError(f"{name} is a {'whole ' * (name in WHOLE)}number, not {value!r}") from None
    if name == "n":
        return {"max_tokens": None if number < 0 else number}
    Sampler(**{SETTINGS[name]: number})
    return {SETTINGS[name]: number}


# ---- input -------------------------------------------------------------------------------------------------


def joined(read: Iterator[str]) -> Iterator[str]:
    """Messages out of lines: a backslash at the end goes on in the next, \"\"\" opens and closes a block."""
    parts, in_block = [], False
    for line in read:
        if in_block:
            end = line.rstrip().endswith('"""')
            parts.append(line.rstrip()[:-3] if end else line)
            in_block = not end
        elif not parts and line.lstrip().startswith('"""'):
            rest = line.lstrip()[3:]
            closes = rest.rstrip().endswith('"""')
            parts.append(rest.rstrip()[:-3] if closes else rest)
            in_block = not closes
        elif line.endswith("\\"):
            parts.append(line[:-1])
            continue
        else:
            parts.append(line)
        if not in_block:
            yield "\n".join(parts).strip("\n")
            parts = []
    if parts:
        yield "\n".join(parts).strip("\n")


def lines(terminal: bool) -> Iterator[str]:
    """Lines of stdin; at a terminal with editing and a history, and Ctrl-C only clears the line."""
    if not terminal:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    ask = editor()
    while True:
        try:
            yield ask("> ")
        except KeyboardInterrupt:
            note("(Ctrl-D leaves)", dim=True)
        except EOFError:
            note("")
            return


def editor() -> Callable[[str], str]:
    """How a line is asked for: prompt_toolkit where it is installed, else what Python has."""
    if is_terminal(sys.stdout):
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.history import FileHistory
        except ImportError:
            pass
        else:
            history = history_file()
            return PromptSession(history=FileHistory(str(history)) if history else None).prompt
    try:
        import readline  # noqa: F401  (gives input() its editing)
    except ImportError:
        pass
    return input


def history_file() -> Path | None:
    """Where the history is kept: the user's state directory; None where it cannot be written."""
    home = user_folder("XDG_STATE_HOME", ".local/state")
    if home is None:
        return None
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = home / "history"
        path.touch(mode=0o600)
    except OSError:
        return None
    return path
