"""Answers as OpenAI's clients read them: dicts and chunks, made of tokens. Nothing here knows of HTTP."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import isfinite

from ..chat.events import CallArguments, CallBegin, Content, End, Event, Reader, Thought
from ..chat.reader import Plain
from ..engine.request import Stats
from ..engine.score import Score
from ..engine.text import Token
from .errors import Refused

NEVER = -9999.0                         # a log-probability that JSON cannot hold


def reason(token: Token | None) -> str:
    """Why an answer ended, by its last token; without one there was nothing to write."""
    return "stop" if token is not None and token.finish_reason == "stop" else "length"


# ---- tokens and their log-probabilities --------------------------------------------------------------------


def spelled(tokenizer, id: int) -> str:
    """A token as text; one that is a part of a character as its bytes."""
    piece = tokenizer.piece(id)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def finite(logprob: float) -> float:
    return logprob if isfinite(logprob) else NEVER


def one_logprob(tokenizer, id: int, logprob: float) -> dict:
    return {"token": spelled(tokenizer, id), "logprob": finite(logprob), "bytes": list(tokenizer.piece(id))}


def chat_logprob(tokenizer, token: Token, n_top: int) -> dict:
    top = [one_logprob(tokenizer, id, logprob) for id, logprob in token.top[:n_top]]
    return one_logprob(tokenizer, token.id, token.logprob) | {"top_logprobs": top}


class Offsets:
    """Where in a text its tokens begin, as they come."""

    def __init__(self, tokenizer):
        self._stream, self._at = tokenizer.stream(), 0

    def next(self, id: int) -> int:
        at = self._at
        self._at += len(self._stream.push(id))
        return at


def text_logprobs(tokenizer, entries: Iterable[tuple], n_top: int, offsets: Offsets) -> dict:
    """The shape of the older completions. entries: (id, its log-probability, the likeliest ids with theirs);
    the first token of a prompt has None."""
    found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for id, logprob, top in entries:
        name, value = spelled(tokenizer, id), None if logprob is None else finite(logprob)
        likeliest: dict[str, float | None] = {spelled(tokenizer, other): finite(its)
                                              for other, its in top[:n_top]}
        likeliest |= {name: value} if n_top else {}
        for key, its in (("tokens", name), ("token_logprobs", value), ("text_offset", offsets.next(id)),
                         ("top_logprobs", None if logprob is None else likeliest)):
            found[key].append(its)
    return found


# ---- one answer as it grows --------------------------------------------------------------------------------


@dataclass
class Update:
    """What is new of one answer. progress: tokens read, of how many, and the seconds since the first, each
    time. scores: of the prompt's tokens, once they are known. At the end done is set, and error where it
    failed."""

    index: int
    tokens: list[Token] = field(default_factory=list)
    stats: Stats | None = None
    progress: list[tuple[int, int, float]] = field(default_factory=list)
    done: bool = False
    error: Refused | None = None
    stop_string: str | None = None
    scores: Sequence[Score] = ()


@dataclass
class Call:
    """A call of a tool; arguments are a JSON object."""

    id: str
    name: str
    arguments: str = ""

    def object(self) -> dict | None:
        """The arguments; None where the answer was cut within them."""
        try:
            return json.loads(self.arguments)
        except ValueError:
            return None


def last_tokens(tokens: Sequence[Token], text: str, stops: frozenset[int]) -> list[Token]:
    """The last of some tokens, as many as a text takes, with those that are parts of its first character.
    stops: ids that have no text."""
    first, left = len(tokens), len(text)
    while first and (left > 0 or not tokens[first - 1].text):
        first -= 1
        left -= len(tokens[first].text)
    return [token for token in tokens[first:] if token.id not in stops]


@dataclass
class Choice:
    """One of the answers to a request."""

    index: int
    reader: Reader = field(default_factory=Plain)
    stops: frozenset[int] = frozenset()     # ids whose tokens are no text
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    scores: Sequence[Score] = ()
    stats: Stats = field(default_factory=Stats)
    reasoning_tokens: int = 0
    finish_reason: str | None = None
    stop_string: str | None = None
    _held: list[Token] = field(default_factory=list)    # whose text has not come out yet
    _n_given: int = 0                       # tokens that news() has given

    def take(self, update: Update) -> list[Event]:
        """The events that come with an update."""
        events: list[Event] = []
        self.stats, self.scores = update.stats or self.stats, update.scores or self.scores
        for token in update.tokens:
            self.tokens.append(token)
            found = self.reader.push(token.text)
            if token.finish_reason:
                found += self.reader.flush()
            found = self._shared(found, token)
            events += [event if isinstance(event, (CallBegin, End)) else replace(event, by=token.by)
                       for event in found]
        for event in events:
            self._note(event)
        if update.done:
            self.finish_reason = self._reason()
            self.stop_string = update.stop_string
            events.append(End(self.finish_reason))
        return events

    def _note(self, event: Event) -> None:
        match event:
            case Content(text):
                self.content += text
            case Thought(text):
                self.reasoning += text
            case CallBegin(_, id, name):
                self.calls.append(Call(id, name))
            case CallArguments(index, text):
                self.calls[index].arguments += text

    def _shared(self, events: list[Event], token: Token) -> list[Event]:
        """The events that came with a token; it belongs to the first of them, or to the next one that has
        text. Those of thoughts are counted, those of content go with it."""
        self._held.append(token)
        if not events:
            return events
        its, self._held = self._held, []
        match events[0]:
            case Thought():
                self.reasoning_tokens += len(its)
            case Content(text):
                return [replace(events[0], tokens=tuple(last_tokens(its, text, self.stops))), *events[1:]]
        return events

    def _reason(self) -> str:
        ended = reason(self.tokens[-1] if self.tokens else None)
        return "tool_calls" if self.calls and ended == "stop" else ended

    def told(self) -> dict[str, str]:
        """Its texts by kind, for a log."""
        calls = "\n".join(f"{call.name} {call.arguments}" for call in self.calls)
        return {"content": self.content, "reasoning": self.reasoning} | ({"calls": calls} if calls else {})

    @property
    def shown(self) -> list[Token]:
        """Its tokens without the one that only ended it."""
        return [token for token in self.tokens if token.id not in self.stops]

    def news(self) -> list[Token]:
        """Those of them that came since the last time."""
        new, self._n_given = self.tokens[self._n_given:], len(self.tokens)
        return [token for token in new if token.id not in self.stops]


# ---- counts ------------------------------------------------------------------------------------------------


def usage_of(choices: Sequence[Choice], n: int = 1, predicted: bool = False) -> dict:
    """What a request took; the prompts count once, whatever the number n of answers to each is. predicted: it
    brought a text that the answer may repeat."""
    prompts = choices[::n]
    read = sum(c.stats.prompt_tokens for c in prompts)
    written = sum(c.stats.predicted_tokens for c in choices)
    details = {"reasoning_tokens": sum(c.reasoning_tokens for c in choices)}
    if predicted:
        accepted = sum(token.by == "ngram" for c in choices for token in c.tokens)
        rejected = sum(c.stats.draft_n - c.stats.draft_n_accepted for c in choices)
        details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(c.stats.reused_tokens for c in prompts)},
            "completion_tokens_details": details}


def timings_of(stats: Stats) -> dict:
    """Times and rates under llama-server's names, and the rate that plain decoding would have had."""
    def per_token(seconds: float, n: int) -> float:
        return 1e3 * seconds / n if n > 0 else 0.0

    read, written = stats.prompt_tokens - stats.reused_tokens, stats.predicted_tokens
    return {"cache_n": stats.reused_tokens, "prompt_n": read, "prompt_ms": 1e3 * stats.prompt_s,
            "prompt_per_token_ms": per_token(stats.prompt_s, read), "prompt_per_second": stats.prompt_tok_s,
            "predicted_n": written, "predicted_ms": 1e3 * stats.predicted_s,
            "predicted_per_token_ms": per_token(stats.predicted_s, written - 1),
            "predicted_per_second": stats.predicted_tok_s, "draft_n": stats.draft_n,
            "draft_n_accepted": stats.draft_n_accepted, "plain_per_second": stats.plain_tok_s}


def progress_of(choice: Choice, update: Update, per_token: bool = False) -> list[dict]:
    """How far the prompt was read, as chunks tell it. per_token: with timings."""
    chunks = []
    for done, total, seconds in update.progress:
        told = {"total": total, "cache": choice.stats.reused_tokens, "processed": done,
                "time_ms": 1e3 * seconds}
        reading = Stats(done, choice.stats.reused_tokens, seconds)
        chunks.append({"prompt_progress": told} | ({"timings": timings_of(reading)} if per_token else {}))
    return chunks


class Answers:
    """The answers to a request, n to each prompt.
    begin(), take() and last() give chunks to stream; whole() gives the answer."""

    def __init__(self, choices: list[Choice], n: int = 1):
        self.choices, self.n = choices, n

    def begin(self) -> list[dict]:
        return []

    def last(self) -> list[dict]:
        """What follows when all answers have ended."""
        return []

    def usage(self) -> dict:
        return usage_of(self.choices, self.n)


class OneAnswer(Answers):
    """The one answer to a request, on a wire that has no words for several."""

    def __init__(self, choices: list[Choice]):
        super().__init__(choices)
        self.choice = choices[0]


# ---- OpenAI's ----------------------------------------------------------------------------------------------


@dataclass
class Head:
    """What an answer and all its chunks begin with."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def dict(self, object: str) -> dict:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model,
                "system_fingerprint": self.system_fingerprint}


class OpenAIAnswers(Answers, ABC):
    """What chats and completions have in common. object: what an answer is; chunk: what its chunks are.

    n_top: None, or how many likeliest ids each token's log-probability comes with. usage: a stream ends with
    the counts. per_token: chunks tell timings.
    """

    object = chunk = "text_completion"

    def __init__(self, head: Head, tokenizer, choices: list[Choice], n: int, n_top: int | None, usage: bool,
                 per_token: bool):
        super().__init__(choices, n)
        self.head, self.tokenizer, self.n_top = head, tokenizer, n_top
        self._usage, self._per_token = usage, per_token

    def last(self) -> list[dict]:
        """The counts, if they were asked for; llama-server's clients look for timings there."""
        return [self.head.dict(self.chunk) | {"choices": []} | self._counts()] if self._usage else []

    def whole(self) -> dict:
        choices = [{"index": choice.index, **self._choice(choice)} for choice in self.choices]
        return self.head.dict(self.object) | {"choices": choices} | self._counts()

    def _counts(self) -> dict:
        return {"usage": self.usage(), "timings": timings_of(self.choices[0].stats)}

    @abstractmethod
    def _choice(self, choice: Choice) -> dict:
        """An answer as a whole."""

    def _told(self, choice: Choice, **told) -> dict:
        """A chunk that tells something of an answer."""
        usage = {"usage": None} if self._usage else {}
        return self.head.dict(self.chunk) | {"choices": [{"index": choice.index, **told}]} | usage


# ---- chat --------------------------------------------------------------------------------------------------


def deltas(events: Iterable[Event], functions: bool = False) -> Iterator[tuple[dict, list[Event]]]:
    """OpenAI's deltas of some events, each with the events that it tells; neighbours of one kind share one.
    functions: the first call is told under its older name, and no other."""
    for _, its in groupby(events, lambda event: (type(event), getattr(event, "index", 0))):
        found = list(its)
        text = "".join(getattr(event, "text", "") for event in found)
        match found[0]:
            case Content():
                yield {"content": text}, found
            case Thought():
                yield {"reasoning_content": text}, found
            case CallBegin(index, _, name) if functions:
                yield from [({"function_call": {"name": name, "arguments": ""}}, found)] * (index == 0)
            case CallArguments(index) if functions:
                yield from [({"function_call": {"arguments": text}}, found)] * (index == 0)
            case CallBegin(index, id, name):
                yield {"tool_calls": [{"index": index} | told_call(id, name, "")]}, found
            case CallArguments(index):
                yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}, found


def told_call(id: str, name: str, arguments: str) -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


class ChatAnswer(OpenAIAnswers):
    """The answers to a chat request. per_token: chunks also tell who guessed. predicted: as in usage_of.
    functions: calls go by the older name."""

    object, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, head: Head, tokenizer, choices: list[Choice], n_top: int | None = None,
                 usage: bool = False, per_token: bool = False, predicted: bool = False,
                 functions: bool = False):
        super().__init__(head, tokenizer, choices, len(choices), n_top, usage, per_token)
        self._predicted, self._functions = predicted, functions

    def begin(self) -> list[dict]:
        return [self._chunk(choice, {"role": "assistant", "content": ""}) for choice in self.choices]

    def take(self, update: Update) -> list[dict]:
        choice = self.choices[update.index]
        events = choice.take(update)
        chunks = [self._chunk(choice, {}) | told for told in progress_of(choice, update, self._per_token)]
        for delta, its in deltas(events, self._functions):
            chunks.append(self._chunk(choice, delta, self._new_logprobs(choice))
                          | (self._per_token_extras(choice, its) if self._per_token else {}))
        if update.done:
            chunks.append(self._chunk(choice, {}, self._new_logprobs(choice), self._reason(choice))
                          | {"timings": timings_of(choice.stats)})
        return chunks

    def _per_token_extras(self, choice: Choice, events: list[Event]) -> dict:
        pieces = [{"text": event.text, "by": event.by}
                  for event in events if not isinstance(event, (CallBegin, End))]
        return {"timings": timings_of(choice.stats), "pybmc": {"pieces": pieces}}

    def usage(self) -> dict:
        return usage_of(self.choices, self.n, self._predicted)

    def _choice(self, choice: Choice) -> dict:
        return {"message": self._message(choice), "logprobs": self._logprobs(choice.shown),
                "finish_reason": self._reason(choice)}

    def _message(self, choice: Choice) -> dict:
        content = choice.content or (None if choice.calls else "")
        found: dict = {"role": "assistant", "content": content, "refusal": None}
        found |= {"reasoning_content": choice.reasoning} if choice.reasoning else {}
        if self._functions and choice.calls:
            call = choice.calls[0]
            return found | {"function_call": {"name": call.name, "arguments": call.arguments}}
        calls = [told_call(call.id, call.name, call.arguments) for call in choice.calls]
        return found | ({"tool_calls": calls} if calls else {})

    def _reason(self, choice: Choice) -> str | None:
        called = self._functions and choice.finish_reason == "tool_calls"
        return "function_call" if called else choice.finish_reason

    def _chunk(self, choice: Choice, delta: dict, logprobs: dict | None = None,
               finish_reason: str | None = None) -> dict:
        return self._told(choice, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    def _logprobs(self, tokens: Sequence[Token]) -> dict | None:
        if self.n_top is None:
            return None
        found = [chat_logprob(self.tokenizer, token, self.n_top) for token in tokens]
        return {"content": found, "refusal": None}

    def _new_logprobs(self, choice: Choice) -> dict | None:
        new = choice.news()
        return self._logprobs(new) if new else None


# ---- completions -------------------------------------------------------------------------------------------


class TextAnswer(OpenAIAnswers):
    """The answers to a completion request. prompts: (text, ids) of each; echo: the text comes first."""

    def __init__(self, head: Head, tokenizer, choices: list[Choice], prompts: list[tuple[str, list[int]]],
                 n_top: int | None = None, usage: bool = False, echo: bool = False, per_token: bool = False):
        super().__init__(head, tokenizer, choices, len(choices) // len(prompts), n_top, usage, per_token)
        self.prompts, self.echo = prompts, echo
        self._n_told = [0] * len(choices)       # tokens whose log-probabilities have gone out
        self._offsets = [Offsets(tokenizer) for _ in choices]

    def begin(self) -> list[dict]:
        """A prompt whose log-probabilities are told comes with them, when it is read."""
        return [self._chunk(c, self._prompt(c)[0]) for c in self.choices if self.echo and self.n_top is None]

    def take(self, update: Update) -> list[dict]:
        choice, first = self.choices[update.index], not self._n_told[update.index]
        text = "".join(event.text for event in choice.take(update) if isinstance(event, Content))
        progress = progress_of(choice, update, self._per_token)
        told = [self._chunk(choice, "") | one for one in progress]
        if not text and not update.done:
            return told
        logprobs = self._logprobs(choice, self._n_told[choice.index], self._offsets[choice.index])
        if logprobs:
            self._n_told[choice.index] += len(logprobs["tokens"])
            text = self._prompt(choice)[0] * (self.echo and first) + text
        timings = {"timings": timings_of(choice.stats)} if update.done or self._per_token else {}
        return [*told, self._chunk(choice, text, logprobs, choice.finish_reason) | timings]

    def _choice(self, choice: Choice) -> dict:
        return {"text": self._prompt(choice)[0] * self.echo + choice.content,
                "logprobs": self._logprobs(choice, 0, Offsets(self.tokenizer)),
                "finish_reason": choice.finish_reason}

    def _prompt(self, choice: Choice) -> tuple[str, list[int]]:
        return self.prompts[choice.index // self.n]

    def _logprobs(self, choice: Choice, told: int, offsets: Offsets) -> dict | None:
        """Those of the tokens that were not told yet."""
        if self.n_top is None:
            return None
        entries: list[tuple] = [(token.id, token.logprob, token.top) for token in choice.shown]
        if self.echo:
            ids = self._prompt(choice)[1]
            scored = ((id, *score) for id, score in zip(ids[1:], choice.scores))
            entries = [(ids[0], None, ()), *scored, *entries]
        return text_logprobs(self.tokenizer, entries[told:], self.n_top, offsets)

    def _chunk(self, choice: Choice, text: str, logprobs: dict | None = None,
               finish_reason: str | None = None) -> dict:
        return self._told(choice, text=text, logprobs=logprobs, finish_reason=finish_reason)
