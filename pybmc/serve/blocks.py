"""An answer as blocks, one behind another: thoughts, texts, calls of tools.
The Responses and the Messages API tell it so."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from ..chat.events import CallBegin, Content, End, Event, Thought
from ..engine.text import Token
from .answers import Choice, OneAnswer, Update

SEAL = "pybmc:"                         # what a sealed thought begins with


@dataclass
class Block:
    """kind: "thought", "text" or "call". text: of a call its arguments. cut: it ended with the last token
    that there may be. call: id and name of a call. tokens: of a text; new: those of its last piece."""

    index: int
    kind: str
    text: str = ""
    cut: bool = False
    call: tuple[str, str] = ("", "")
    tokens: list[Token] = field(default_factory=list)
    new: list[Token] = field(default_factory=list)


@dataclass
class Blocks:
    """Makes blocks of an answer's events."""

    found: list[Block] = field(default_factory=list)
    _open: Block | None = None

    def take(self, events: Iterable[Event]) -> Iterator[tuple[str, Block, str]]:
        """("begin", block, ""), ("piece", block, text), ("end", block, ""): neighbouring pieces are one."""
        for kind, its in groupby(events, kind_of):
            several = list(its)
            match several[0]:
                case CallBegin() | End():
                    for event in several:
                        yield from self._mark(event)
                case _:
                    text = "".join(getattr(event, "text", "") for event in several)
                    tokens = [token for event in several for token in getattr(event, "tokens", ())]
                    yield from self._piece(kind, text, tokens) if text else ()

    def _mark(self, event: Event) -> Iterator[tuple[str, Block, str]]:
        match event:
            case CallBegin(_, id, name):
                yield from self._begin("call", (id, name))
            case End(reason):
                if reason == "stop" and not any(block.kind != "thought" for block in self.found):
                    yield from self._begin("text")      # clients look for a text
                yield from self._end(reason == "length")

    def _piece(self, kind: str, text: str, tokens: list[Token]) -> Iterator[tuple[str, Block, str]]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        block = self.found[-1]
        block.text += text
        block.new = tokens
        block.tokens += tokens
        yield "piece", block, text

    def _begin(self, kind: str, call: tuple[str, str] = ("", "")) -> Iterator[tuple[str, Block, str]]:
        yield from self._end()
        self._open = Block(len(self.found), kind, call=call)
        self.found.append(self._open)
        yield "begin", self._open, ""

    def _end(self, cut: bool = False) -> Iterator[tuple[str, Block, str]]:
        block, self._open = self._open, None
        if block:
            block.cut = cut
            yield "end", block, ""


def kind_of(event: Event) -> str:
    return {Thought: "thought", Content: "text", CallBegin: "begin", End: "end"}.get(type(event), "call")


class BlockAnswer(OneAnswer, ABC):
    """The one answer to a request, told as blocks; a subclass has the words of an API."""

    def __init__(self, choices: list[Choice]):
        super().__init__(choices)
        self.blocks = Blocks()

    def take(self, update: Update) -> list[dict]:
        return self.tell(self.choice.take(update))

    def tell(self, events: Iterable[Event]) -> list[dict]:
        tell = {"begin": self.begun, "piece": self.grown, "end": self.ended}
        return [chunk for step, block, text in self.blocks.take(events) for chunk in tell[step](block, text)]

    @abstractmethod
    def begun(self, block: Block, text: str) -> list[dict]: ...

    @abstractmethod
    def grown(self, block: Block, text: str) -> list[dict]: ...

    @abstractmethod
    def ended(self, block: Block, text: str) -> list[dict]: ...


def sealed(thought: str) -> str:
    """A thought as clients keep it that do not show it: they send it back as it is."""
    return SEAL + base64.b64encode(thought.encode()).decode()


def unsealed(text: str) -> str:
    """The thought in it; "" in one of another server."""
    if not text.startswith(SEAL):
        return ""
    try:
        return base64.b64decode(text.removeprefix(SEAL), validate=True).decode()
    except ValueError:
        return ""
