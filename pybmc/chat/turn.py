"""A turn of a chat: the prompt that messages and tools make, what the answer has to follow,
and who reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..engine.model import Model
from ..engine.schema import Schema
from ..errors import ArgumentError, SchemaError
from ..grammar.asked import Asked
from ..grammar.grammar import Grammar
from ..tokenizers import Tokenizer
from .calls import Calls, new_id
from .events import Reader
from .feed import Parser
from .reader import Both, Joined, Plain, Split, channel_tail
from .reasoning import is_open
from .schema import answer_schema, behind_thought, limited
from .template import ChatTemplate
from .toolgrammar import grammar_text
from .tools import Format, Tools, format_of, written


def prompt_of(template: ChatTemplate, messages: Sequence[Mapping], tools: Tools | None, variables: Mapping,
              add_generation_prompt: bool = True, continue_final_message: bool = True) -> list[int]:
    """The ids of what a chat template makes of messages and tools."""
    messages, more = written(format_of(template), messages, tools)
    ids = template.encode(messages, add_generation_prompt, continue_final_message, **{**variables, **more})
    if not ids:
        raise ArgumentError("messages: their prompt is empty; expected some text")
    return ids


@dataclass
class Turn:
    """What is asked, and what it comes to. split: thoughts are told apart from content. budget: tokens that a
    thought may have; None: any number. wish: what an answer that is no call follows.

    tokens: the prompt's ids. begun: the beginning of the answer that it ends with.
    shown: control tokens that readers read.
    """

    model: Model
    template: ChatTemplate
    messages: Sequence[Mapping]
    tools: Tools | None = None
    variables: Mapping = field(default_factory=dict)
    split: bool = True
    budget: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = True
    wish: Asked | None = None

    def __post_init__(self) -> None:
        self.format: Format = format_of(self.template)
        turns = {"add_generation_prompt": self.add_generation_prompt,
                 "continue_final_message": self.continue_final_message}
        self.tokens = prompt_of(self.template, self.messages, self.tools, self.variables, **turns)
        last, goes_on = self.messages[-1], all(turns.values())
        content = last.get("content") if goes_on and last["role"] == "assistant" else ""
        self.begun = content if isinstance(content, str) else ""
        ids = self._tokenizer.vocab.ids
        calls = frozenset(ids[name] for name in self.format.shown if name in ids and self.tools)
        self.shown = self.template.shown | calls & self._tokenizer.vocab.silent
        self._compiled = self._grammar()

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.template.tokenizer

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keywords of schemas that have no effect."""
        return self._compiled.ignored if self._compiled else ()

    def note_ignored(self) -> None:
        """Log what of the schemas has no effect."""
        if self._compiled:
            self._compiled.note_ignored()

    # ---- what it follows

    def _grammar(self) -> Grammar | None:
        alone = self.wish.compiled(self.model) if self.wish else None   # beside tools too: so errors name it
        if self.tools is None:
            return alone
        if self.wish and self.wish.kind != "schema":
            raise ArgumentError(f"{self.wish.field}: expected no tools beside a grammar; "
                                "a JSON schema may have some")
        try:
            return Grammar.lark(grammar_text(self.format, self.tools, self._tokenizer, self._final),
                                self.model)
        except SchemaError:
            for tool in self.tools.tools:                       # whose schema it is
                try:
                    Grammar.json(tool.parameters, self.model, tool.strict)
                except SchemaError as error:
                    raise type(error)(f"{tool.place}: {error}") from None
            raise

    @property
    def _final(self) -> Mapping | None:
        """The schema of an answer that is no call."""
        if self.wish is None:
            return None
        value = json.loads(self.wish.value) if isinstance(self.wish.value, str) else self.wish.value
        return value if isinstance(value, Mapping) else {}

    def schema(self) -> Schema | None:
        """The state of a new answer, or None where it is free."""
        inner: Schema | None
        if self.tools and self._compiled:
            inner = self._calls(self.tools, self._compiled)
        else:
            inner = answer_schema(self._compiled, self._tokenizer, self.tokens, self.template,
                                  bool(self.begun))
        return limited(inner, self.model, self.tokens, self.template, self.budget)

    def _calls(self, tools: Tools, compiled: Grammar) -> Schema:
        free = bool(self.format.mark) and not tools.forced and self.wish is None
        state = compiled.after(self.format.mark) if free else compiled.start()
        if self.template.channels:
            return state
        thinks = self.template.thinks and not self.begun
        return behind_thought(state, self._tokenizer, self.tokens, thinks, self.template.marks,
                              ends=not tools.forced)

    # ---- who reads it

    def reader(self, make_id: Callable[[], str] = lambda: new_id("call_")) -> Reader:
        if self.template.channels:
            parser = self._parser(make_id)
            parser.push(channel_tail(self._tokenizer, self.tokens))
            return parser if self.split else Joined(parser)
        calls: Reader = self._parser(make_id) if self.tools else Plain()
        if not self.split:
            return calls
        marks = self.template.marks
        return Both(Split(is_open(self._tokenizer, self.tokens, marks), self.begun, marks), calls)

    def _parser(self, make_id: Callable[[], str]) -> Parser:
        known = {tool.name: tool.parameters for tool in self.tools.callable} if self.tools else {}
        whole = self.wish is not None or self.tools is not None and self.tools.forced
        calls = Calls(known, make_id, loose=self.format.kind == "object" and not whole, first=whole)
        return Parser(lambda feed: self.format.parse(feed, calls))
