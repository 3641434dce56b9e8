"""Text that comes in pieces, for parsers that are written as if all of it was there.

A parser is a generator over a Feed. It takes text from the feed and yields events; where it needs more
text to go on, it yields MORE. What it gives must not depend on how the text was cut: it decides only by
what no further text can change.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from .events import Content, Event


class More:
    """A parser waits for text."""


MORE = More()
Steps = Generator[Event | More, None, Any]
WHITE = " \t\r\n"


class Feed:
    """The text that was not taken yet. ended: nothing follows."""

    def __init__(self) -> None:
        self.text, self.ended = "", False
        self.taken: list[str] = []              # since begin()

    def begin(self) -> None:
        """Remember what is taken from here on."""
        self.taken = []

    def take(self, n: int) -> str:
        found, self.text = self.text[:n], self.text[n:]
        self.taken.append(found)
        return found


class Parser:
    """A Reader that runs a parser over what is pushed. What the parser leaves is content."""

    def __init__(self, parse: Callable[[Feed], Steps]):
        self._feed = Feed()
        self._steps = parse(self._feed)

    def push(self, text: str) -> list[Event]:
        self._feed.text += text
        return self._run()

    def flush(self) -> list[Event]:
        self._feed.ended = True
        return self._run()

    def _run(self) -> list[Event]:
        found: list[Event] = []
        for step in self._steps:
            if isinstance(step, More):
                return found
            found.append(step)
        rest = self._feed.take(len(self._feed.text))
        return found + [Content(rest)] * bool(rest)


# ---- what parsers are made of ------------------------------------------------------------------------------


def space(feed: Feed) -> Steps:
    """Take white space."""
    while True:
        feed.take(len(feed.text) - len(feed.text.lstrip(WHITE)))
        if feed.text or feed.ended:
            return
        yield MORE


def word(feed: Feed, *words: str) -> Steps:
    """Take one of some words, the longest that is there. Returns it, or "" where there is none."""
    while True:
        longer = any(len(w) > len(feed.text) and w.startswith(feed.text) for w in words)
        if feed.ended or not longer:
            return feed.take(max((len(w) for w in words if feed.text.startswith(w)), default=0))
        yield MORE


def until(feed: Feed, marks: Sequence[str], make: Callable[[str], Event] | None = None,
          trim: bool = False) -> Steps:
    """Take text up to the first of some marks, and the mark. Returns (text, mark); the mark is "" at the end
    of the text. make: yield the pieces as events. trim: white space before a mark is part of no piece."""
    parts: list[str] = []
    while True:
        at, mark = min(((at, m) for m in marks if (at := feed.text.find(m)) >= 0), default=(-1, ""))
        keep = 0 if mark or feed.ended else partial(feed.text, marks)
        end = at if mark else len(feed.text) - keep
        shown = len(feed.text[:end].rstrip(WHITE)) if trim and not (feed.ended and not mark) else end
        text = feed.take(shown)
        if make and text:
            yield make(text)
        parts.append(text)
        if mark or feed.ended:
            parts.append(feed.take(end - shown))
            feed.take(len(mark))
            return "".join(parts), mark
        yield MORE


def partial(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may begin a mark."""
    longest = min(max(map(len, marks)) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in marks)), 0)


def value(feed: Feed, make: Callable[[str], Event] | None = None) -> Steps:
    """Take a JSON value. Returns its text. make: yield its pieces as events as well."""
    parts, depth, quoted, escaped, scalar = [], 0, False, False, False
    while True:
        n, done = 0, False
        for n, char in enumerate(feed.text, 1):
            if quoted:
                quoted, escaped = escaped or char != '"', not escaped and char == "\\"
                done = not quoted and not depth
            elif scalar and (char in ",]}" or char in WHITE):
                n, done = n - 1, True
            elif char == '"':
                quoted = True
            elif char in "[{":
                depth += 1
            elif char in "]}":
                depth -= 1
                done = depth <= 0
            else:
                scalar = not depth
            if done:
                break
        text = feed.take(n)
        parts.append(text)
        if make and text:
            yield make(text)
        if done or feed.ended:
            return "".join(parts)
        yield MORE
