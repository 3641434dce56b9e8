"""What an answer consists of, as it comes: thoughts, content, calls of tools, the end. A reader makes these
events of a text; each API writes them in its own words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..engine.text import Token


@dataclass(frozen=True)
class Thought:
    """Text of a thought, without its marks. by: who guessed the token that it came with."""

    text: str
    by: str | None = None


@dataclass(frozen=True)
class Content:
    """Text of the answer. tokens: whose text it is, where that is known."""

    text: str
    by: str | None = None
    tokens: tuple[Token, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class CallBegin:
    """A call of a tool begins. index counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments; the pieces together are a JSON object."""

    index: int
    text: str
    by: str | None = None


@dataclass(frozen=True)
class End:
    """The answer is complete. reason: "stop", "length" or "tool_calls"."""

    reason: str


Event = Thought | Content | CallBegin | CallArguments | End


class Reader(Protocol):
    """Makes events of one answer's text, the same however the text was cut; all but End."""

    def push(self, text: str) -> list[Event]:
        """What is certain of the text so far."""

    def flush(self) -> list[Event]:
        """What was held back, when nothing follows."""
