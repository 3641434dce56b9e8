"""generate() and generate_batch(): an engine with one request, and one with many."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from numbers import Integral

from .. import checks
from ..errors import ArgumentError, BusyError, ContextFullError
from ..model import Model
from ..sampling import Sampler, check_bias
from ..spec.speculation import Speculation
from .engine import Engine, Request, Stats
from .text import Token

log = logging.getLogger(__name__)


def generate(model, prompt, max_tokens: int | None = 256, *, session=None, draft=None, spec: str = "auto",
             draft_max: int = 16, draft_min: int = 0, stop: str | Sequence[str] | None = (),
             stop_tokens: int | Iterable[int] | None = None, chat_template=None,
             chat_template_kwargs: Mapping | None = None, progress: Callable[[int, int], None] | None = None,
             **settings) -> Generation:
    """Continue a prompt: an iterator of Token.

    prompt     a text, a list of token ids, or a list of chat messages ({"role": .., "content": ..}). Where the
               last message is the assistant's, its content is continued
    max_tokens at most so many tokens; None: until the model ends or the context is full
    session    evaluate in this session, and keep it: what the prompt has in common with its tokens is not evaluated
               again. Without one a new session is used and closed. A generation in it ends the one before
    draft      a smaller model that guesses ahead, best with the same vocabulary: a Model or a path. The text is the same
               as without it, at any temperature; only the time differs
    spec       who guesses: "auto" (repetitions in the text, and the draft model if there is one), "draft", "ngram"
               (repetitions alone), "self" (the model itself with less attention: in long texts) or "off"
    draft_max, draft_min  bounds of the guesses in a pass; how many pay is found out while decoding
    stop       strings that end the text and are not part of it; they may name control tokens; None: none
    stop_tokens ids that end the text, or one id; None: the vocabulary's end-of-text and end-of-turn tokens, (): none
    chat_template  how messages are written: a name such as "chatml", a Jinja source, a file, or a
               pybmc.chat.ChatTemplate; None: the model's own
    chat_template_kwargs  more variables for the template, such as {"enable_thinking": False}
    progress   called with (done, total) while a prompt is evaluated
    settings   those of pybmc.sampling.Sampler: temperature, seed, top_k, top_p, min_p, repeat_penalty, ...; None: default

    The last Token tells why it was the last (finish_reason). The same prompt, settings and seed give the same text. A
    text that begins with the vocabulary's BOS gets no second one. Wrong arguments raise ArgumentError at once.
    """
    checks.settings(settings, Sampler.__dataclass_fields__, ("max_tokens", *generate.__kwdefaults__))
    wishes = checked_wishes(model, max_tokens, stop, stop_tokens, settings)
    if session is not None and getattr(session, "model", None) is not model:
        checks.refuse("session", "a session of the same model", session)
    tokens = encode_prompt(model.tokenizer, prompt, chat_template, chat_template_kwargs)
    speculation = speculation_of(session, model, draft, spec, draft_max, draft_min)
    request = Request(tokens, session=session, progress=progress, **wishes)
    return Generation(Engine(model, parallel=1, speculation=speculation), request)


class Generation(Iterator[Token]):
    """An iterator of Token. prompt holds the prompt's ids, stats counts and times so far; close() ends it early: a session that
    was given then holds what was read, without its last token.

    A session given to generate() serves one generation at a time. The next one that begins in it ends this one, which
    then raises BusyError when it is asked for another token. The same happens after other calls used the session.
    """

    def __init__(self, engine: Engine, request: Request):
        self.prompt = list(request.tokens)
        self._engine, self._ready, self._lock = engine, deque(), threading.Lock()
        self._sequence = engine.add(request)

    @property
    def stats(self) -> Stats:
        return self._sequence.stats

    def __next__(self) -> Token:
        if not self._lock.acquire(blocking=False):
            raise BusyError("this generation is in use by another thread")
        try:
            return self._next()
        finally:
            self._lock.release()

    def _next(self) -> Token:
        if self._ready:
            self._sequence.check_unread()
        while not self._ready:
            if self._sequence.done:
                self._engine.close()
                raise self._sequence.error or StopIteration
            self._ready.extend(token for _, token in self._engine.step())
        return self._ready.popleft()

    def close(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise BusyError("this generation is in use by another thread")
        try:
            unread = len(self._ready)
            self._ready.clear()
            self._engine.close()
            self._sequence.error = None
            if unread and self._sequence.request.session is not None:
                self._sequence.take_back(unread)
        finally:
            self._lock.release()

    def __del__(self):
        if getattr(self, "_sequence", None) is not None and not (self._sequence.done and not self._ready):
            self.close()


def generate_batch(model, prompts: Iterable, max_tokens: int | None = 256, *, draft=None, spec: str = "auto",
                   draft_max: int = 16, draft_min: int = 0, parallel: int = 8, context: int | None = None,
                   stop: str | Sequence[str] | None = (), stop_tokens: int | Iterable[int] | None = None,
                   chat_template=None, chat_template_kwargs=None, **settings) -> Batch:
    """Continue many prompts together: an iterator of (number of the prompt, Token), as tokens come.

    Prompts and settings are those of generate(), and so is each prompt's text. parallel: how many are written at a
    time; context: a cap on each one's rows. There are fewer guesses the more prompts share a pass: the next one goes to
    the prompt where it is likeliest to come true.
    """
    checks.settings(settings, Sampler.__dataclass_fields__, ("max_tokens", *generate_batch.__kwdefaults__))
    wishes = checked_wishes(model, max_tokens, stop, stop_tokens, settings)
    parallel = checks.whole("parallel", parallel, 1)
    context = None if context is None else checks.whole("context", context, 1)
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        checks.refuse("prompts", "a list of prompts", prompts)
    texts = [encode_prompt(model.tokenizer, prompt, chat_template, chat_template_kwargs) for prompt in prompts]
    room = context or model.config.n_ctx
    for text in texts:
        if len(text) > room:
            raise ContextFullError(f"the prompt has {len(text)} tokens, the context has room for {room}")
    speculation = speculation_of(None, model, draft, spec, draft_max, draft_min)
    engine = Engine(model, parallel=parallel, speculation=speculation)
    return Batch(engine, [engine.add(Request(text, context=context, **wishes)) for text in texts])


class Batch(Iterator[tuple[int, Token]]):
    """An iterator of (number of the prompt, Token). stats: each prompt's Stats. close() ends all."""

    def __init__(self, engine: Engine, sequences: list):
        self._engine, self._sequences, self._ready = engine, sequences, deque()

    @property
    def stats(self) -> dict[int, Stats]:
        return {s.number: s.stats for s in self._sequences}

    def __next__(self) -> tuple[int, Token]:
        while not self._ready:
            failed = next((s.error for s in self._sequences if s.error), None)
            if failed or all(s.done for s in self._sequences):
                self._engine.close()
                raise failed or StopIteration
            self._ready.extend((sequence.number, token) for sequence, token in self._engine.step())
        return self._ready.popleft()

    def close(self) -> None:
        self._ready.clear()
        self._engine.close()


# ---- arguments ---------------------------------------------------------------------------------------------


def checked_wishes(model, max_tokens, stop, stop_tokens, settings: Mapping) -> dict:
    """The fields of a Request that generate() and generate_batch() have in common, checked."""
    if not hasattr(model, "tokenizer"):
        checks.refuse("model", "a Model", model)
    if model.tokenizer is None:
        raise ArgumentError(f"{model.path} has no vocabulary: it can evaluate tokens, but not write text")
    sampler, size = Sampler(**settings), model.config.vocab_size
    check_bias(sampler.logit_bias, size)
    limit = inf if max_tokens is None else checks.whole("max_tokens", max_tokens, 0, inf)
    return {"max_tokens": limit, "sampler": sampler, "stop": checks.strings("stop", stop),
            "stop_ids": stop_ids(model.tokenizer, stop_tokens, size)}


def stop_ids(tokenizer, stop_tokens, size: int) -> frozenset[int]:
    if stop_tokens is None:
        return tokenizer.stop_ids
    one = isinstance(stop_tokens, Integral) and not isinstance(stop_tokens, bool)
    return frozenset(checks.ids("stop_tokens", [stop_tokens] if one else stop_tokens, size))


def encode_prompt(tokenizer, prompt, chat_template=None, variables: Mapping | None = None) -> list[int]:
    """Token ids of a prompt: a text, in which control tokens count, a list of ids, or a list of chat messages.

    chat_template and variables are for messages, as in generate().
    """
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        checks.refuse("prompt", "a text, a list of token ids or a list of messages", prompt)
    items = prompt if isinstance(prompt, str) else list(prompt)
    if items and isinstance(items[0], Mapping):
        from ..chat import checked_variables, template_of
        tokens = template_of(chat_template, tokenizer).encode(items, **checked_variables(variables or {}))
    elif chat_template is not None or variables:
        raise ArgumentError("a chat template needs messages: expected mappings with role and content")
    elif isinstance(items, str):
        tokens = one_bos(tokenizer, tokenizer.encode(items, special=True))
    else:
        tokens = checks.ids("prompt", items, tokenizer.vocab_size)
    if not tokens:
        raise ArgumentError("the prompt is empty")
    return tokens


def one_bos(tokenizer, tokens: list[int]) -> list[int]:
    """The tokens of a text without a second BOS: a text copied from a model card may begin with it."""
    bos = tokenizer.bos_id
    if not tokenizer.add_bos or bos is None or tokens[:2] != [bos, bos]:
        return tokens
    log.warning("the prompt begins with the BOS token %r, which every text gets; it is not added again",
                tokenizer.piece(bos).decode("utf-8", "replace"))
    return tokens[1:]


def speculation_of(session, model, draft, spec: str, most: int, least: int) -> Speculation:
    """A Speculation of these wishes: for a session the one that it had before, if they are the same, so that the draft model
    holds what it has of a text. draft: a Model, the path of one, a Speculation, or None."""
    if isinstance(draft, Speculation):
        if draft.model is not model:
            checks.refuse("draft", "a Speculation of the same model", draft)
        return draft
    if not (draft is None or is_path(draft) or isinstance(draft, Model)):
        checks.refuse("draft", "a Model or a path", draft)
    most, least = checks.draft_bounds(most, least)
    asked = (str(draft) if is_path(draft) else draft, spec, most, least)
    kept = getattr(session, "speculation", None)
    if kept is not None and kept.asked == asked:
        return kept
    opened = None
    if is_path(draft) and spec in ("auto", "draft"):
        opened = Model(draft, threads=model.threads)
    made = Speculation(model, opened or (None if is_path(draft) else draft), spec, most, least)
    made.asked = asked
    if session is not None:
        session.speculation = made
    return made


def is_path(draft) -> bool:
    return isinstance(draft, str) or hasattr(draft, "__fspath__")
