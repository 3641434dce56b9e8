"""Answers to lines, from one engine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import checks
from ..chat.events import CallArguments, CallBegin, Content, Reader
from ..chat.generate import encode_prompt
from ..chat.reader import Plain
from ..chat.schema import schema_of
from ..chat.template import ChatTemplate, checked_variables, template_of
from ..chat.tools import tools_of
from ..chat.turn import Turn
from ..engine.engine import Engine
from ..engine.generate import checked_wishes
from ..engine.request import Request
from ..engine.sampler import Sampler
from ..engine.sequence import Sequence
from ..engine.text import Token
from ..errors import ArgumentError, BmcError
from ..grammar.asked import asked as wished
from ..grammar.asked import grammar_asked
from .lines import CHAT, Line, failure, parsed

AHEAD = 16                              # lines begun before the oldest is done, for each written at a time


@dataclass
class _Job:
    line: Line
    asked: dict
    seed: int
    reader: Reader
    ignored: tuple[str, ...]            # keywords of its schemas without effect
    tokens: list[Token] = field(default_factory=list)

    def answer(self, sequence: Sequence) -> dict:
        if sequence.error:
            return failure(self.line, sequence.error)
        stats, text, calls = sequence.stats, *self._read()
        reason = self.tokens[-1].finish_reason if self.tokens else "length"
        return {"index": self.line.number, **({"id": self.asked["id"]} if "id" in self.asked else {}),
                "key": self.line.key, "text": text, **({"tool_calls": calls} if calls else {}),
                "finish_reason": "tool_calls" if calls and reason == "stop" else reason, "seed": self.seed,
                "prompt_tokens": stats.prompt_tokens, "completion_tokens": stats.predicted_tokens,
                **({"schema_ignored": list(self.ignored)} if self.ignored else {})}

    def _read(self) -> tuple[str, list[dict]]:
        """The text, and the calls of tools, as OpenAI's answers have them."""
        text = ""
        calls: list[dict[str, Any]] = []
        for event in self.reader.push("".join(token.text for token in self.tokens)) + self.reader.flush():
            match event:
                case Content(piece):
                    text += piece
                case CallBegin(_, id, name):
                    calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": ""}})
                case CallArguments(index, piece):
                    calls[index]["function"]["arguments"] += piece
        return text, calls


class Worker:
    """A model and an engine that answer lines. settings: a line's, unless it has its own.
    context: a cap on each one's rows.

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
        more, parallel = True, self.engine.parallel
        while more or begun:
            while more and len(running) < 2 * parallel and len(begun) < AHEAD * parallel:
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
            request, reader, ignored = self._request(asked)
            running[self.engine.add(request)] = _Job(line, asked, request.sampler.seed, reader, ignored)
        except (BmcError, OSError) as error:
            ready[line.number] = failure(line, error)

    def _request(self, asked: dict) -> tuple[Request, Reader, tuple[str, ...]]:
        """A line's request, who reads its answer, and keywords of its schemas that have no effect."""
        wishes = {**self.settings, **asked}
        settings = {name: wishes[name] for name in Sampler.__dataclass_fields__ if name in wishes}
        if settings.get("seed") is None:
            settings["seed"] = int.from_bytes(os.urandom(4), "little") if settings.get("temperature") else 0
        fields = checked_wishes(self.model, wishes.get("max_tokens"), wishes.get("stop"), None, settings)
        fields["context"] = self.context
        if "messages" in asked:
            turn = self._turn(asked)
            request = Request(turn.tokens, schema=turn.schema(), shown=turn.shown, **fields)
            return request, turn.reader(), turn.ignored
        for name in (*CHAT, "chat_template_kwargs"):
            if name in asked:
                raise ArgumentError(f"{name}: expected messages beside it, found a prompt")
        tokens = encode_prompt(self.model.tokenizer, asked["prompt"])
        grammar = grammar_asked(asked, self.model)
        schema = schema_of(grammar, self.model.tokenizer, tokens)
        return Request(tokens, schema=schema, **fields), Plain(), grammar.ignored if grammar else ()

    def _turn(self, asked: dict) -> Turn:
        if self._template is None:
            self._template = template_of(None, self.model.tokenizer)
        if not isinstance(asked["messages"], list) or not asked["messages"]:
            checks.refuse("messages", "a list of messages", asked["messages"])
        several = asked.get("parallel_tool_calls", True) is not False
        tools = tools_of(asked.get("tools"), asked.get("tool_choice"), several,
                         asked.get("functions"), asked.get("function_call"))
        budget = checks.whole("reasoning_budget", asked.get("reasoning_budget", -1), -1)
        variables = checked_variables(asked.get("chat_template_kwargs") or {})
        return Turn(self.model, self._template, asked["messages"], tools, variables, split=False,
                    budget=None if budget < 0 else budget, wish=wished(asked))

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
