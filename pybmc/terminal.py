"""What people see: notes and progress on stderr, answers on stdout. Colour and bars only on a terminal."""

import os
import sys
import time
from contextlib import contextmanager

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


def write(text: str) -> None:
    """A piece of an answer to stdout, at once. On a terminal it is made safe to show."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    try:
        sys.stdout.write(clean(text) if is_terminal(sys.stdout) else text)
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


@contextmanager
def progress(label: str):
    """Gives an update(done, total) function that shows a bar if there is a terminal and it takes a while."""
    started, bar, task = time.perf_counter(), None, None

    def update(done, total):
        nonlocal bar, task
        if bar is None and time.perf_counter() - started > PATIENCE and done < total:
            bar = _new_bar()
            task = bar.add_task(label, total=total)
        if bar is not None:
            bar.update(task, completed=done, total=total)

    try:
        yield update if is_terminal(sys.stderr) else None
    finally:
        if bar is not None:
            bar.stop()


def _new_bar():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True)
    bar.start()
    return bar
