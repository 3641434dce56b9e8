"""Readers: from the text of an answer to events."""

from __future__ import annotations

from ..tokenizers import Tokenizer
from .calls import Calls, harmony, new_id
from .events import Content, Event, Reader, Thought
from .feed import Parser
from .reasoning import START, THINK, Marks, Reasoning, is_open
from .template import ChatTemplate


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
        events = [Thought(self._thought(text)) if is_thought else Content(text)
                  for text, is_thought in pieces]
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


class Joined:
    """Reads thoughts as content, a blank line between the two."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self._last: type = Content

    def push(self, text: str) -> list[Event]:
        return self._joined(self._reader.push(text))

    def flush(self) -> list[Event]:
        return self._joined(self._reader.flush())

    def _joined(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if isinstance(event, (Content, Thought)):
                changed = self._last is Thought and isinstance(event, Content)
                self._last = type(event)
                event = Content("\n\n" * changed + event.text)
            found.append(event)
        return found


class Channels:
    """Splits an answer in channels into (text, is thought), without the marks; in place of a Reasoning."""

    def __init__(self, tail: str = ""):
        self._parser = Parser(lambda feed: harmony(feed, Calls({}, lambda: new_id("call_"))))
        self._thought = False
        self._parser.push(tail)

    def push(self, text: str) -> list[tuple[str, bool]]:
        return self._pieces(self._parser.push(text))

    def flush(self) -> list[tuple[str, bool]]:
        return self._pieces(self._parser.flush())

    def _pieces(self, events: list[Event]) -> list[tuple[str, bool]]:
        found = []
        for event in events:
            if isinstance(event, (Content, Thought)):
                thought = isinstance(event, Thought)
                found += [("\n\n", True)] * (self._thought and not thought) + [(event.text, thought)]
                self._thought = thought
        return found


def splitter_of(template: ChatTemplate | None, tokenizer: Tokenizer,
                prompt: list[int]) -> Reasoning | Channels:
    """What splits the answer to a prompt into (text, is thought)."""
    if template is not None and template.channels:
        return Channels(channel_tail(tokenizer, prompt))
    marks = template.marks if template else THINK
    return Reasoning(is_open(tokenizer, prompt, marks), marks)


def channel_tail(tokenizer: Tokenizer, prompt: list[int]) -> str:
    """What of an answer in channels the prompt ends with."""
    text = tokenizer.decode(prompt, special=True)
    return text[text.rfind(START) + len(START):] if START in text else ""
