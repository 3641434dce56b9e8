"""What people see: notes and progress on stderr, answers on stdout. Colour and bars only on a terminal."""

import os
import sys
import time
from contextlib import contextmanager
from typing import Any

from ..chat.reasoning import Reasoning
from ..errors import BmcError

PATIENCE = 0.5                          # seconds before a bar appears

# What a model or a file says must not steer a terminal: control characters but tab and newline become dots.
_CONTROLS = {c: "\u00b7" for c in [*range(0x20), *range(0x7F, 0xA0)] if c not in (0x09, 0x0A)}


def is_terminal(stream) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:                  # closed
        return False


def clean(text: str) -> str:
    """Text that is safe to show."""
    return text.translate(_CONTROLS)


class ReaderLeft(Exception):
    """Nobody reads our output any more."""


def write(text: str, tint: bool = False, dim: bool = False) -> None:
    """A piece of an answer to stdout, at once.
    On a terminal it is made safe to show, and perhaps coloured."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    if is_terminal(sys.stdout):
        text = clean(text)
        if (tint or dim) and text and "NO_COLOR" not in os.environ:
            text = f"\x1b[{36 if tint else 2}m{text}\x1b[0m"
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderLeft from None


def note(text: str, dim: bool = False) -> None:
    """A line for people, to stderr."""
    if sys.stderr is None:
        return
    text = clean(text)
    if dim and is_terminal(sys.stderr) and "NO_COLOR" not in os.environ:
        text = f"\x1b[2m{text}\x1b[0m"
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def sentence(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename if isinstance(error.filename, (str, bytes)) else ""
        return f"{os.fsdecode(name)}: {error.strerror}" if name else error.strerror
    if isinstance(error, (BmcError, OSError)):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    what = " ".join(str(error).split())
    return f"internal error: {type(error).__name__}: {what} (PYBMC_DEBUG=1 shows where)"


class Voice:
    """Writes an answer's tokens to stdout.
    thoughts: "show" or "hide" them; reasoning: what tells them apart."""

    def __init__(self, thoughts: str = "show", reasoning=None, tint: bool = False):
        self.thoughts, self.tint = thoughts, tint
        self.reasoning = reasoning or Reasoning()
        self.hidden = self.spoken = False       # whether thoughts were left out, whether anything was written

    def say(self, token) -> None:
        self._write(self.reasoning.push(token.text), self.tint and token.from_draft)

    def end(self) -> None:
        self._write(self.reasoning.flush(), False)
        if self.hidden and not self.spoken:
            note("(the answer ended within its thoughts, which are hidden)", dim=True)

    def _write(self, pieces: list[tuple[str, bool]], tint: bool) -> None:
        for text, is_thought in pieces:
            if is_thought and self.thoughts == "hide":
                self.hidden = True
            else:
                self.spoken = True
                write(text, tint, dim=is_thought)


@contextmanager
def progress(label: str):
    """Gives an update(done, total) function that shows a bar while there is more to do, if it takes a while;
    None where there is no terminal."""
    bar = _Bar(label)
    try:
        yield bar.update if is_terminal(sys.stderr) else None
    finally:
        bar.stop()


class _Bar:
    def __init__(self, label: str):
        self.label, self.started = label, time.perf_counter()
        self.bar: Any = None

    def update(self, done: float, total: float) -> None:
        if done >= total:
            self.stop()
        elif self.bar is not None:
            self.bar.update(self.task, completed=done)
        elif time.perf_counter() - self.started > PATIENCE:
            self._start(done, total)

    def _start(self, done: float, total: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                            TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task(self.label, total=total, completed=done)
        self.bar.start()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
