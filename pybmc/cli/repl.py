"""The chat on a terminal, or from a pipe: reads messages and commands, prints answers."""

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..cache import user_folder
from ..chat.conversation import Conversation, whole_characters
from ..chat.preread import Preread, Reader
from ..chat.reader import splitter_of
from ..engine.sampler import Sampler
from ..errors import ArgumentError, BmcError
from . import report
from .terminal import ReaderLeft, Voice, is_terminal, note, progress, sentence, write

SETTINGS = {                            # what /set calls them, after the flags
    "temp": "temperature", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "seed": "seed",
    "n": "max_tokens", "repeat-penalty": "repeat_penalty", "presence-penalty": "presence_penalty",
    "frequency-penalty": "frequency_penalty", "repeat-last-n": "repeat_last_n",
}
WHOLE = {"top-k", "seed", "n", "repeat-last-n"}
CHOICES = {"think": ("on", "off"), "thoughts": ("show", "hide")}

COMMANDS = {                            # what follows /NAME, and what the command does
    "help": ("", "this list"),
    "exit": ("", "leave"),
    "clear": ("", "forget the conversation, but not the system prompt"),
    "regen": ("", "answer the last message again"),
    "undo": ("", "forget the last message and its answer"),
    "think": (" on|off", "whether the model thinks before it answers"),
    "set": (" NAME VALUE", "change a setting, such as temp or think; without a value show all"),
    "stats": ("", "speed of the last answer, and memory"),
    "why": ("", "where the time of the last answer went, and what drafting was based on"),
    "save": (" FILE", "write the conversation to a file"),
    "load": (" FILE", "take up a saved conversation"),
}


class Exit(Exception):
    """Leave the chat."""


class Block(str):
    """A message that stood between three double quotes: no command, whatever it begins with."""


class Repl:
    """run() talks until the input ends or /exit. COMMANDS names the commands; do_NAME runs one.

    tint: show which tokens were drafted; thoughts: "show" or "hide" what a model thinks before it answers;
    preread: at a terminal, read ahead while the user types. session_file: where the session and the messages
    are saved, whenever these have changed.
    """

    def __init__(self, conversation: Conversation, messages: Iterator[str] | None = None, tint: bool = False,
                 thoughts: str = "show", preread: bool = False,
                 session_file: str | os.PathLike | None = None):
        self.talk, self.tint, self.thoughts = conversation, tint, thoughts
        self.session_file, self.kept = session_file, list(conversation.messages) if session_file else []
        self.terminal = is_terminal(sys.stdin)
        parts: list[str] = []
        ahead = Preread(Reader(conversation)) if preread and self.terminal else None
        self.messages = joined(lines(self.terminal, ahead, parts), parts) if messages is None else messages

    def run(self) -> int:
        """The exit status: 1 where a message from a pipe got no answer."""
        if self.terminal:
            note("/help lists commands; Ctrl-D leaves.", dim=True)
        status = 0
        for message in self.messages:
            if not message.strip():
                continue
            try:
                self.handle(message)
            except Exit:
                break
            except ReaderLeft:
                raise
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
            except Exception as error:
                status |= not self.terminal and not is_command(message)
                tell(error)
        return int(status)

    def handle(self, message: str) -> None:
        try:
            self.obey(message)
        finally:
            self.keep()

    def keep(self) -> None:
        """Save what is new of the conversation, also where an answer was interrupted."""
        if self.session_file is not None and self.talk.messages != self.kept:
            self.talk.save_session(self.session_file)
            self.kept = list(self.talk.messages)

    def obey(self, message: str) -> None:
        if not is_command(message):
            self.answer(lambda update: self.talk.ask(str(message), update))
            return
        name, _, rest = message[1:].partition(" ")
        if name not in COMMANDS:
            raise ArgumentError(f"there is no command /{name:.30}; /help lists them. "
                                f'Between three double quotes it is a message: """{message:.30}"""')
        getattr(self, f"do_{name}")(rest.strip())

    def answer(self, start: Callable) -> None:
        """Stream an answer; Ctrl-C ends it and what was said stays."""
        reason, voice = None, None
        with progress("reading") as update:
            stream = start(update)
            try:
                for token in stream:
                    voice = voice or self.voice()
                    voice.say(token)
                    reason = token.finish_reason
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                reason = "interrupted"
            finally:
                stream.close()
        if voice:
            voice.end()
        write("\n")
        self.remark(reason)

    def voice(self) -> Voice:
        """What prints an answer, once its prompt is known."""
        splitter = splitter_of(self.talk.template, self.talk.model.tokenizer, self.talk.prompt)
        return Voice(self.thoughts, splitter, self.tint)

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

    # ---- commands

    def do_help(self, _: str) -> None:
        note("\n".join(f"/{name}{what}: {does}" for name, (what, does) in COMMANDS.items()))

    def do_exit(self, _: str) -> None:
        raise Exit

    def do_clear(self, _: str) -> None:
        self.talk.clear()

    def do_regen(self, _: str) -> None:
        if self.talk.settings.get("temperature", 0) == 0:
            note("(at temperature 0 an answer is always the same; /set temp 0.8 varies it)", dim=True)
        self.answer(self.talk.again)

    def do_undo(self, _: str) -> None:
        note(f"(forgotten: {self.talk.undo():.60})", dim=True)

    def do_think(self, rest: str) -> None:
        if rest:
            self.choose("think", rest)
        note(f"think {self.shown('think')}", dim=True)

    def do_set(self, rest: str) -> None:
        words = rest.split()
        if not words:
            note("\n".join(f"{name} {self.shown(name)}" for name in [*SETTINGS, *CHOICES]))
        elif len(words) == 2 and words[0] in CHOICES:
            self.choose(*words)
        elif len(words) == 2 and words[0] in SETTINGS:
            self.talk.settings |= changed(self.talk.settings, *words)
        else:
            raise ArgumentError(f"expected /set NAME VALUE; names are {', '.join([*SETTINGS, *CHOICES])}")

    def choose(self, name: str, value: str) -> None:
        if value not in CHOICES[name]:
            raise ArgumentError(f"{name} is {' or '.join(CHOICES[name])}, not {value!r:.30}")
        if name == "thoughts":
            self.thoughts = value
        else:
            self.talk.variables["enable_thinking"] = value == "on"
            note_unread(self.talk.template, ["enable_thinking"])

    def shown(self, name: str):
        if name == "thoughts":
            return self.thoughts
        if name == "think":
            think = self.talk.variables.get("enable_thinking")
            return "as the template has it" if think is None else "on" if think else "off"
        value = self.talk.settings.get(SETTINGS[name])
        return -1 if name == "n" and value is None else value

    def do_stats(self, _: str) -> None:
        stats, arena = self.talk.stats, self.talk.session.arena_stats()
        note(f"prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} of them held; "
             f"the others {stats.prompt_tok_s:.1f} tok/s\n"
             f"answer {stats.predicted_tokens} tokens, {stats.predicted_tok_s:.1f} tok/s\n"
             f"context {self.talk.session.position} of {self.talk.session.context} tokens; "
             f"{arena.rows_reserved} rows reserved, {arena.bytes_reserved / 1e6:.1f} MB")

    def do_why(self, _: str) -> None:
        note("\n".join(report.why(self.talk.stats, self.talk.session.speculation)))

    def do_save(self, path: str) -> None:
        self.talk.save(named(path))

    def do_load(self, path: str) -> None:
        self.talk.load(named(path))
        note(f"({len(self.talk.messages)} messages)", dim=True)


def sampler_settings(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name in Sampler.__dataclass_fields__}


def is_command(message: str) -> bool:
    """Several lines are a message, such as a paste that begins with a path."""
    return message.startswith("/") and "\n" not in message and not isinstance(message, Block)


def tell(error: Exception) -> None:
    note(sentence(error))
    if not isinstance(error, (BmcError, OSError, MemoryError)) and os.environ.get("PYBMC_DEBUG"):
        traceback.print_exception(error)


def note_unread(template, names: Iterable[str]) -> None:
    """Tell which variables have no effect, as the chat template does not look at them."""
    for name in names:
        if not template.reads(name):
            note(f"(this model's chat template does not read {name}: it has no effect)", dim=True)


def named(rest: str) -> str:
    """A file name, as a shell takes it or as it is: it's.json and my chat.json need no quotes."""
    try:
        words = shlex.split(rest)
    except ValueError:                              # a quote that does not close
        words = [rest]
    name = words[0] if len(words) == 1 else rest
    if not name:
        raise ArgumentError("expected a file name")
    return os.path.expanduser(name)


def changed(settings: dict, name: str, value: str) -> dict:
    """{setting: new value}, checked as a Sampler checks it."""
    try:
        number = int(value) if name in WHOLE else float(value)
    except ValueError:
        raise ArgumentError(f"{name} is a {'whole ' * (name in WHOLE)}number, not {value!r}") from None
    if name == "n":
        return {"max_tokens": None if number < 0 else number}
    setting: dict[str, Any] = {SETTINGS[name]: number}
    Sampler(**setting)
    return setting


# ---- input -------------------------------------------------------------------------------------------------


def joined(read: Iterator[str], parts: list[str] | None = None) -> Iterator[str]:
    """Messages out of lines: a backslash at the end goes on in the next, \"\"\" opens and closes a Block.
    parts: an empty list, to hold the lines of a message that goes on."""
    parts = [] if parts is None else parts
    in_block, kind = False, str
    for line in read:
        if in_block:
            end = line.rstrip().endswith('"""')
            parts.append(line.rstrip()[:-3] if end else line)
            in_block = not end
        elif not parts and line.lstrip().startswith('"""'):
            rest = line.lstrip()[3:]
            closes = rest.rstrip().endswith('"""')
            parts.append(rest.rstrip()[:-3] if closes else rest)
            in_block, kind = not closes, Block
        elif line.endswith("\\"):
            parts.append(line[:-1])
            continue
        else:
            parts.append(line)
        if not in_block:
            yield taken(parts, kind)
            kind = str
    if parts:
        yield taken(parts, kind)


def taken(parts: list[str], kind: type[str]) -> str:
    """The message that lines make, which empties their list."""
    message = kind("\n".join(parts).strip("\n"))
    parts.clear()
    return message


def begun(parts: Sequence[str], line: str) -> str:
    """The message so far while a line is typed, which follows those in parts; nothing of a command."""
    if not parts and line.lstrip().startswith('"""'):
        line = line.lstrip()[3:]
    elif not parts and is_command(line):
        return ""
    return whole_characters("\n".join([*parts, line]).lstrip("\n"))


def lines(terminal: bool, preread: Preread | None = None, parts: Sequence[str] = ()) -> Iterator[str]:
    """Lines of stdin; at a terminal with editing and a history, and Ctrl-C only clears the line.

    Bytes that are not text are U+FFFD. At a terminal a paste is one line, with ends of lines in it. preread
    is told what is typed after the lines in parts.
    """
    def typed(line: str) -> None:
        if preread:
            preread.note(begun(parts, line))

    if sys.stdin is None:
        raise BmcError("standard input is closed")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if not terminal:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    ask = editor(typed)
    while True:
        try:
            with preread or nullcontext():
                typed("")
                line = ask("> ")
        except KeyboardInterrupt:
            note("(Ctrl-D leaves)", dim=True)
        except EOFError:
            note("")
            return
        else:
            yield whole_characters(line)


def editor(typed: Callable[[str], None]) -> Callable[[str], str]:
    """How a line is asked for: prompt_toolkit where it is installed, which tells what is typed,
    else what Python has."""
    if is_terminal(sys.stdout):
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.history import FileHistory
        except ImportError:
            pass
        else:
            history = history_file()
            session: PromptSession = PromptSession(history=FileHistory(str(history)) if history else None)
            session.default_buffer.on_text_changed += lambda buffer: typed(buffer.text)
            return session.prompt
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
