"""Answers to lines, from one engine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..chat.generate import read_prompt
from ..chat.schema import schema_of
from ..chat.template import ChatTemplate, template_of
from ..engine.engine import Engine
from ..engine.generate import checked_wishes
from ..engine.request import Request
from ..engine.sampler import Sampler
from ..engine.sequence import Sequence
from ..engine.text import Token
from ..errors import BmcError
from ..grammar.asked import grammar_asked
from ..grammar.grammar import Grammar
from .lines import Line, failure, parsed

AHEAD = 16                              # lines that are begun before the oldest is done, for each that is written at a time


@dataclass
class _Job:
    line: Line
    asked: dict
    seed: int
    ignored: tuple[str, ...]            # keywords of its schema without effect
    tokens: list[Token] = field(default_factory=list)

    def answer(self, sequence: Sequence) -> dict:
        if sequence.error:
            return failure(self.line, sequence.error)
        stats = sequence.stats
        return {"index": self.line.number, **({"id": self.asked["id"]} if "id" in self.asked else {}), "key": self.line.key,
                "text": "".join(token.text for token in self.tokens),
                "finish_reason": self.tokens[-1].finish_reason if self.tokens else "length", "seed": self.seed,
                "prompt_tokens": stats.prompt_tokens, "completion_tokens": stats.predicted_tokens,
                **({"schema_ignored": list(self.ignored)} if self.ignored else {})}


class Worker:
    """A model and an engine that answer lines. settings: a line's, unless it has its own. context: a cap on each one's rows.

    seed: of a line without one; None gives each a new one.
    """

    def __init__(self, model, settings: dict, parallel: int = 8, context: int | None = None, **drafting):
        self.model, self.settings, self.context = model, settings, context
        self.engine = Engine(model, parallel=parallel, **drafting)
        self._template: ChatTemplate | None = None

    def answers(self, lines: Iterable[Line]) -> Iterator[dict]:
        """An answer for each line, in their order. One that fails is an answer with an error."""
        lines = iter(lines)
        running: dict[Sequence, _Job] = {}
        begun: list[int] = []           # numbers in order
        ready: dict[int, dict] = {}     # answers by number
        more = True
        while more or begun:
            while more and len(running) < 2 * self.engine.parallel and len(begun) < AHEAD * self.engine.parallel:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    begun.append(line.number)
                    self._begin(line, running, ready)
            self._step(running, ready)
            while begun and begun[0] in ready:
                yield ready.pop(begun.pop(0))

    def _begin(self, line: Line, running: dict, ready: dict) -> None:
        try:
            asked = parsed(line, tuple(Sampler.__dataclass_fields__))
            grammar = grammar_asked(asked, self.model)
            request = self._request(asked, grammar)
            running[self.engine.add(request)] = _Job(line, asked, request.sampler.seed, grammar.ignored if grammar else ())
        except (BmcError, OSError) as error:
            ready[line.number] = failure(line, error)

    def _request(self, asked: dict, grammar: Grammar | None) -> Request:
        wishes = {**self.settings, **asked}
        settings = {name: wishes[name] for name in Sampler.__dataclass_fields__ if name in wishes}
        if settings.get("seed") is None:
            settings["seed"] = int.from_bytes(os.urandom(4), "little") if settings.get("temperature") else 0
        fields = checked_wishes(self.model, wishes.get("max_tokens"), wishes.get("stop"), None, settings)
        tokens, thinks = self._read(asked)
        schema = schema_of(grammar, self.model.tokenizer, tokens, thinks)
        return Request(tokens, context=self.context, schema=schema, **fields)

    def _read(self, asked: dict) -> tuple[list[int], bool]:
        """Ids of the prompt, and whether the answer may begin with a thought."""
        tokenizer = self.model.tokenizer
        if "prompt" in asked:
            return read_prompt(tokenizer, asked["prompt"], None, asked.get("chat_template_kwargs"))
        if self._template is None:
            self._template = template_of(None, tokenizer)
        return read_prompt(tokenizer, asked["messages"], self._template, asked.get("chat_template_kwargs"))

    def _step(self, running: dict, ready: dict) -> None:
        if running:
            for sequence, token in self.engine.step():
                running[sequence].tokens.append(token)
            for sequence in [sequence for sequence in running if sequence.done]:
                job = running.pop(sequence)
                ready[job.line.number] = job.answer(sequence)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
