"""Many prompts through one engine: their passes are one pass, so the weights are read once for all of them.

Each prompt has a session and a decoding loop of its own; the passes that the loops ask for, and pieces of prompts still
to be read, go through eval_batch together. A prompt takes the place of one that is done. What comes out for a prompt is
what generate() gives for it alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from . import checks
from .decode import (
    Chooser,
    Ending,
    Pass,
    Reply,
    Stats,
    StopStrings,
    Token,
    Wishes,
    check_room,
    encode_prompt,
    start_loop,
)
from .model import eval_batch
from .sampling import Sampler
from .speculate import another, attach

PIECE, PIECE_ALONE = 96, 512            # tokens of prompts in a pass: beside others that write, and otherwise
NARROW = 64                             # passes up to this width teach what passes cost


class Stream:
    """One prompt: first its pieces, then its loop's passes."""

    def __init__(self, index: int, tokens: list[int], session, chooser: Chooser, ending: Ending, speculation,
                 max_tokens: float):
        self.index, self.tokens, self.session, self.chooser = index, tokens, session, chooser
        self.ending, self.speculation, self.max_tokens = ending, speculation, max_tokens
        self.stats = Stats(prompt_tokens=len(tokens))
        self.read, self.loop, self.wanted, self.done = 0, None, None, max_tokens < 1
        self.since = time.perf_counter()

    def next_pass(self, room: int) -> Pass | None:
        """What to evaluate next. room: tokens of a prompt that still fit in the pass."""
        if self.loop:
            return self.wanted
        n = min(room, len(self.tokens) - self.read)
        if n < 1:
            return None
        piece = self.tokens[self.read:self.read + n]
        self.read += n
        return Pass(piece, "last" if self.read == len(self.tokens) else "none")

    def take(self, reply: Reply, others) -> Iterator[Token]:
        """The tokens that a reply gives."""
        if not self.loop:
            if self.read < len(self.tokens):
                return
            if self.speculation:
                self.speculation.follow(self.tokens, self.chooser.kind)
            self.loop = start_loop(self.session, self.tokens, reply.result, self.chooser, self.speculation,
                                   self.max_tokens, self.stats, others)
            self.stats.prompt_s = self._lap()
            reply = None
        while not self.done:
            step = self.loop.send(reply)
            if isinstance(step, Pass):
                self.wanted = step
                break
            reply = None
            token = self.ending.token(step)
            self.done = token.finish_reason is not None
            self.stats.predicted_tokens += 1
            self.stats.predicted_s += self._lap() if self.stats.predicted_tokens > 1 else 0.0
            yield token

    def _lap(self) -> float:
        since, self.since = self.since, time.perf_counter()
        return self.since - since

    def close(self) -> None:
        self.done = True
        if self.loop:
            self.loop.close()
        if self.speculation:
            self.speculation.close()
        self.session.close()


class Batch(Iterator[tuple[int, Token]]):
    """An iterator of (number of the prompt, Token). stats: each prompt's Stats, once it has begun. close() ends all."""

    def __init__(self, streams: Iterator[tuple[int, Token]], stats: dict[int, Stats]):
        self._streams, self.stats = streams, stats

    def __next__(self) -> tuple[int, Token]:
        return next(self._streams)

    def close(self) -> None:
        self._streams.close()


def generate_batch(model, prompts: Iterable, max_tokens: int | None = 256, *, draft=None, spec: str = "auto",
                   draft_max: int = 16, draft_min: int = 0, parallel: int = 8, context: int | None = None,
                   stop: str | Sequence[str] | None = (), stop_tokens: int | Iterable[int] | None = None,
                   chat_template=None, chat_template_kwargs=None, **settings) -> Batch:
    """Continue many prompts together: an iterator of (number of the prompt, Token), as tokens come.

    Prompts and settings are those of generate(), and so is each prompt's text. parallel: how many are written at a
    time; context: a cap on each one's rows. Drafts get shorter the more prompts share a pass: then tokens of others fill it.
    """
    checks.settings(settings, Sampler.__dataclass_fields__, ("max_tokens", *generate_batch.__kwdefaults__))
    wishes = Wishes.of(model, max_tokens, stop, stop_tokens, Sampler(**settings))
    chooser, limit = Chooser(wishes.sampler), wishes.limit
    parallel = checks.whole("parallel", parallel, 1)
    context = None if context is None else checks.whole("context", context, 1)
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        checks.refuse("prompts", "a list of prompts", prompts)
    texts = [encode_prompt(model.tokenizer, prompt, chat_template, chat_template_kwargs)
             for prompt in prompts]
    for text in texts:
        check_room(context or model.config.n_ctx, text)
    first = attach(None, model, draft, spec, draft_max, draft_min)

    def start(index: int) -> Stream:
        session = model.session(context)
        strings = StopStrings(wishes.stop, model.tokenizer)
        ending = Ending(len(texts[index]), session.context, model.tokenizer.stream(), limit, strings,
                        wishes.stop_ids)
        return Stream(index, texts[index], session, chooser, ending, another(first), limit)

    stats: dict[int, Stats] = {}
    return Batch(_run(start, deque(range(len(texts))), parallel, first, stats), stats)


def _run(start, waiting: deque[int], parallel: int, first, stats: dict[int, Stats]) -> Iterator[tuple[int, Token]]:
    running: list[Stream] = []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                running.append(start(waiting.popleft()))
                stats[running[-1].index] = running[-1].stats
            yield from _pass(running)
            for stream in [s for s in running if s.done]:
                stream.close()
                running.remove(stream)
    finally:
        for stream in running:
            stream.close()
        if first:
            first.release()


def _pass(running: list[Stream]) -> Iterator[tuple[int, Token]]:
    """One pass for all, and the tokens that it gives."""
    writing = any(s.loop for s in running)
    room, parts = PIECE if writing else PIECE_ALONE, []
    for stream in (s for s in running if not s.done):
        wanted = stream.next_pass(room)
        if wanted:
            parts.append((stream, wanted))
            room -= 0 if stream.loop else len(wanted.tokens)
    if not parts:
        return
    started = time.perf_counter()
    results = eval_batch([(stream.session, wanted.tokens, wanted.want, 0, wanted.sampler) for stream, wanted in parts])
    seconds = time.perf_counter() - started
    width = sum(len(wanted.tokens) for _, wanted in parts)
    known = width if width <= NARROW and all(stream.loop for stream, _ in parts) else 0
    for stream, result in zip((stream for stream, _ in parts), results):
        for token in stream.take(Reply(result, seconds, known), lambda me=stream: _others(running, me)):
            yield stream.index, token
        known = 0                       # one pass, learned from once


def _others(running: list[Stream], me: Stream) -> int:
    """Tokens that the other streams have in the next pass; one each where that is not known yet."""
    return sum(len(s.wanted.tokens) if s.wanted else 1 for s in running if s is not me and not s.done)
