"""Readers: from the text of an answer to events."""

from __future__ import annotations

from .events import Content, Event, Reader, Thought
from .reasoning import THINK, Marks, Reasoning


class Plain:
    """Reads all of a text as content."""

    def push(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def flush(self) -> list[Event]:
        return []


class Both:
    """Reads thoughts first, and what is content then by another reader, which finds calls."""

    def __init__(self, thoughts: Reader, calls: Reader):
        self._thoughts, self._calls = thoughts, calls

    def push(self, text: str) -> list[Event]:
        return self._read(self._thoughts.push(text))

    def flush(self) -> list[Event]:
        return self._read(self._thoughts.flush()) + self._calls.flush()

    def _read(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += self._calls.push(event.text) if isinstance(event, Content) else [event]
        return found


class Split:
    """Reads what is thought and what is said, without the marks and the white space around a thought.

    inside: the prompt ends within a thought. begun: the beginning of the answer, which the prompt ends with.
    """

    def __init__(self, inside: bool = False, begun: str = "", marks: Marks = THINK):
        self._reasoning, self._marks, self._held, self._begun = Reasoning(inside, marks), marks, "", False
        self.push(begun)

    def push(self, text: str) -> list[Event]:
        return self._events(self._reasoning.push(text))

    def flush(self) -> list[Event]:
        return self._events(self._reasoning.flush())

    def _events(self, pieces: list[tuple[str, bool]]) -> list[Event]:
        events = [Thought(self._thought(text)) if is_thought else Content(text) for text, is_thought in pieces]
        return [event for event in events if event.text]

    def _thought(self, text: str) -> str:
        """What of a piece of a thought is neither mark nor white space around it."""
        self._held += text
        if not self._begun:
            self._held = self._held.lstrip().removeprefix(self._marks.opens).lstrip()
            self._begun = bool(self._held)
        said = self._held.split(self._marks.closes)[0].rstrip()
        self._held = self._held[len(said):]
        return said
