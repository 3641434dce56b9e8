"""generate() and generate_batch(): an engine with one request, and one with many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf

from ..errors import ArgumentError, ContextFullError
from ..sampling import Sampler
from ..spec.speculation import Speculation
from .engine import Engine, Request, Stats
from .text import Token


def generate(model, prompt, max_tokens: int | None = 256, *, session=None, draft=None, spec: str = "auto",
             draft_max: int = 16, draft_min: int = 0, stop=(), stop_tokens=None, progress=None, **settings) -> Generation:
    tokens = encode_prompt(model.tokenizer, prompt)
    stops = model.tokenizer.stop_ids if stop_tokens is None else frozenset(stop_tokens)
    request = Request(tokens, inf if max_tokens is None else max_tokens, Sampler(**settings), stop, stops, session, progress=progress)
    engine = Engine(model, parallel=1, speculation=speculation_of(session, model, draft, spec, draft_max, draft_min))
    return Generation(engine, request)


def encode_prompt(tokenizer, prompt) -> list[int]:
    return tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else list(prompt)


def speculation_of(session, model, draft, spec, most, least) -> Speculation:
    """The Speculation for a session: the same for the same wishes, so that the draft model holds what it has of a text."""
    if isinstance(draft, Speculation):
        return draft
    if isinstance(draft, str) or hasattr(draft, "__fspath__"):
        from ..model import Model
        draft = Model(draft, threads=model.threads)
    asked = (draft, spec, most, least)
    kept = getattr(session, "_speculation", None)
    if kept is None or kept[0] != asked:
        kept = asked, Speculation(model, draft, spec, most, least)
        if session is not None:
            session._speculation = kept
    return kept[1]


class Generation(Iterator[Token]):
    """An iterator of Token. prompt holds the prompt's ids, stats counts and times so far; close() ends it early."""

    def __init__(self, engine: Engine, request: Request):
        self._engine, self._request, self._ready = engine, request, deque()
        self.prompt, self._sequence = list(request.tokens), None
        self._sequence = engine.add(request)

    @property
    def stats(self) -> Stats:
        return self._sequence.stats

    def __next__(self) -> Token:
        while not self._ready:
            if self._sequence.done:
                self._engine.close()
                if self._sequence.error:
                    raise self._sequence.error
                raise StopIteration
            self._ready.extend(token for _, token in self._engine.step())
        return self._ready.popleft()

    def close(self) -> None:
        self._engine.close()
