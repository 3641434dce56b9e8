"""A turn of a chat: the prompt that messages and tools make, what the answer has to follow, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..engine.generate import filled
from ..engine.model import Model
from ..engine.schema import Schema
from ..errors import ArgumentError
from ..grammar.asked import Asked
from ..grammar.grammar import Grammar
from ..tokenizers import Tokenizer
from .budget import Budget
from .calls import Calls, new_id
from .events import Content, Event, Reader, Thought
from .feed import Parser
from .reader import Both, Plain, Split
from .reasoning import Marks, is_open
from .schema import behind_thought
from .template import ChatTemplate
from .toolgrammar import grammar_text
from .tools import Format, Tools, format_of, written

START, FINAL = "<|start|>assistant", "<|channel|>final<|message|>"     # Harmony: an answer begins, its content begins
ANALYSIS = Marks("<|channel|>analysis<|message|>", "<|end|>")


@dataclass
class Turn:
    """What is asked, and what it comes to. split: thoughts are told apart from content. budget: tokens that a thought may have;
    None: any number. wish: what an answer that is no call follows.

    tokens: the prompt's ids. begun: the beginning of the answer that it ends with. shown: control tokens that readers read.
    """

    model: Model
    template: ChatTemplate
    messages: Sequence[Mapping]
    tools: Tools | None = None
    variables: Mapping = field(default_factory=dict)
    split: bool = True
    budget: int | None = None
    continued: bool = True
    wish: Asked | None = None

    def __post_init__(self) -> None:
        self.format: Format = format_of(self.template)
        messages, more = written(self.format, self.messages, self.tools)
        given = {**self.variables, **more}
        self.tokens = filled(self.template.encode(messages, continue_final_message=self.continued, **given))
        last = self.messages[-1]
        content = last.get("content") if self.continued and last["role"] == "assistant" else ""
        self.begun = content if isinstance(content, str) else ""
        ids = self._tokenizer.vocab.ids
        names = {*self.format.shown, *self.template.marks}
        self.shown = frozenset(ids[name] for name in names if name in ids) & self._tokenizer.vocab.silent
        self._compiled = self._grammar()

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.template.tokenizer

    @property
    def _thinks(self) -> bool:
        """Whether the answer may begin with a thought."""
        return self.template.thinks and not self.begun

    @property
    def _is_harmony(self) -> bool:
        return self.format.kind == "harmony"

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keywords of schemas that have no effect."""
        return self._compiled.ignored if self._compiled else ()

    # ---- what it follows

    def _grammar(self) -> Grammar | None:
        if self.tools is None:
            return self.wish.compiled(self.model) if self.wish else None
        if self.wish and self.wish.kind != "schema":
            raise ArgumentError(f"{self.wish.field}: expected no tools beside a grammar; a JSON schema may have some")
        return Grammar.lark(grammar_text(self.format, self.tools, self._tokenizer, self._final), self.model)

    @property
    def _final(self) -> Mapping | None:
        """The schema of an answer that is no call."""
        return None if self.wish is None else {} if self.wish.value is True else self.wish.value

    def schema(self) -> Schema | None:
        """The state of a new answer, or None where it is free."""
        inner = self._calls(self.tools, self._compiled) if self.tools and self._compiled else self._answer()
        if self.budget is None:
            return inner
        marks = ANALYSIS if self._is_harmony else self.template.marks
        end = self._tokenizer.encode(marks.closes + START * self._is_harmony, bos=False, special=True)
        inside = is_open(self._tokenizer, self.tokens, marks)
        return Budget(self._tokenizer, self.model.config.vocab_size, self.budget, marks, end, inside, self._is_harmony, inner)

    def _calls(self, tools: Tools, compiled: Grammar) -> Schema:
        free = bool(self.format.mark) and not tools.forced and self.wish is None
        state = compiled.after(self.format.mark) if free else compiled.start()
        if self._is_harmony:
            return state
        return behind_thought(state, self._tokenizer, self.tokens, self._thinks, self.template.marks, ends=free)

    def _answer(self) -> Schema | None:
        if self._compiled is None:
            return None
        if self._is_harmony and not self._tail().endswith(FINAL):
            return self._compiled.after(FINAL, ends=False)
        return behind_thought(self._compiled.start(), self._tokenizer, self.tokens, self._thinks, self.template.marks)

    # ---- who reads it

    def reader(self, make_id: Callable[[], str] = lambda: new_id("call_")) -> Reader:
        calls = Calls({tool.name: tool.parameters for tool in self.tools.callable} if self.tools else {}, make_id)
        parser = Parser(lambda feed: self.format.parse(feed, calls)) if self.tools or self._is_harmony else Plain()
        if self._is_harmony:
            parser.push(self._tail())
            return parser if self.split else Joined(parser)
        if not self.split:
            return parser
        thoughts = Split(is_open(self._tokenizer, self.tokens, self.template.marks), self.begun, self.template.marks)
        return Both(thoughts, parser)

    def _tail(self) -> str:
        """What of the answer the prompt ends with, in Harmony."""
        text = self._tokenizer.decode(self.tokens, special=True)
        return text[text.rfind(START) + len(START):] if START in text else ""


class Joined:
    """Reads thoughts as content."""

    def __init__(self, reader: Reader):
        self._reader = reader

    def push(self, text: str) -> list[Event]:
        return [Content(event.text) if isinstance(event, Thought) else event for event in self._reader.push(text)]

    def flush(self) -> list[Event]:
        return [Content(event.text) if isinstance(event, Thought) else event for event in self._reader.flush()]
