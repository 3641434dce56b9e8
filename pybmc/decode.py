"""From a prompt to a stream of tokens: evaluate the prompt, then choose and evaluate, one token at a time.

A decoding loop yields choices, in order, and asks for the passes that it needs; it knows nothing of text. What ends
a text (stop tokens, stop strings, counts) stands around it, in one place, for every loop, and so does who runs the
passes: a session alone, or many sessions together.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from math import inf, isfinite
from numbers import Integral
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from . import checks
from .errors import ArgumentError, BmcError, BusyError, ClosedError, ContextFullError
from .model import Round, Session, speculate
from .sampling import Sampler, check_bias, logprob

log = logging.getLogger(__name__)

BULK, BULK_SECONDS = 128, 0.016         # rounds that are one call into the library: at most, and how long they may go on


class Token(NamedTuple):
    """One token of an answer. text is what became certain with it: it may be empty, or end an earlier token's.

    logprob is the model's own, before settings. finish_reason is set on the last token: "stop" (the model ended,
    or a stop string was found), "length" (max_tokens) or "context" (no room for more).
    """

    id: int
    text: str
    logprob: float
    from_draft: bool = False
    finish_reason: str | None = None


# ---- text --------------------------------------------------------------------------------------------------


class StopStrings:
    """Passes text on, except from the first of some strings on; holds back what may be the beginning of one.

    The string that is complete first counts, and of those that end together the longest: what comes out does not
    depend on how the text was cut.

    tokenizer: strings may contain names of tokens whose text is not shown, such as control tokens. names has
    those that do, by id; such a name is pushed as hidden: it never comes out, and strings without a name are
    looked for as if it was not there.
    """

    def __init__(self, strings: Iterable[str] = (), tokenizer=None):
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        for string in self.strings:
            if not isinstance(string, str) or not string:
                raise ArgumentError(f"a stop string is {string!r}; expected text that is not empty")
        silent = tokenizer.silent_names() if self.strings and tokenizer else {}
        self.names = {id: name for id, name in silent.items() if any(name in s for s in self.strings)}
        self._whole = [s for s in self.strings if any(name in s for name in self.names.values())]
        self._shown = [s for s in self.strings if s not in self._whole]
        self.found: str | None = None
        self._held: list[tuple[str, bool]] = []         # characters, and whether they are hidden

    def push(self, text: str, hidden: bool = False) -> str:
        """What is certain to come before any stop string."""
        if not self.strings:
            return "" if hidden else text
        if self.found:
            return ""
        chars = self._held + [(char, hidden) for char in text]
        at = self._search(chars)
        if at is None:
            at = self._safe(chars)
        self._held = [] if self.found else chars[at:]
        return _visible(chars[:at])

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        chars, self._held = self._held, []
        return _visible(chars)

    def _views(self, chars: list[tuple[str, bool]]) -> Iterator[tuple[str, list[int], list[str]]]:
        """A text, where its characters stand among chars, and the strings to look for in it."""
        if self._shown:
            places = [at for at, (_, hidden) in enumerate(chars) if not hidden]
            yield "".join(chars[at][0] for at in places), places, self._shown
        if self._whole:
            yield "".join(char for char, _ in chars), list(range(len(chars))), self._whole

    def _search(self, chars: list[tuple[str, bool]]) -> int | None:
        """Where the string begins that ends first; found becomes that string."""
        ends = [(places[at + len(string) - 1], places[at], string)
                for text, places, strings in self._views(chars)
                for string in strings if (at := text.find(string)) >= 0]
        if not ends:
            return None
        _, at, self.found = min(ends)
        return at

    def _safe(self, chars: list[tuple[str, bool]]) -> int:
        """Up to where the characters begin no string."""
        safe = len(chars)
        for text, places, strings in self._views(chars):
            n = max(self._partial(text, string) for string in strings)
            safe = min(safe, places[len(text) - n] if n else safe)
        return safe

    @staticmethod
    def _partial(text: str, string: str) -> int:
        """How many characters at the end of text begin the string."""
        return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)


def _visible(chars: list[tuple[str, bool]]) -> str:
    return "".join(char for char, hidden in chars if not hidden)


# ---- prompt ------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, prompt, chat_template=None, variables: Mapping | None = None) -> list[int]:
    """Token ids of a prompt: a text, in which control tokens count, a list of ids, or a list of chat messages.

    chat_template and variables are for messages, as in generate().
    """
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        checks.refuse("prompt", "a text, a list of token ids or a list of messages", prompt)
    items = prompt if isinstance(prompt, str) else list(prompt)
    if items and isinstance(items[0], Mapping):
        from .chat import checked_variables, template_of
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


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with together."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def rewind_to(session, tokens: Sequence[int]) -> int:
    """Keep the rows that `tokens` can use, all but the last token's at most; returns how many."""
    kept = min(common_prefix(session.tokens, tokens), len(tokens) - 1)
    session.rewind(kept)
    return kept


def eval_prompt(session, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None,
                seconds: float = 0.25, logits: str = "last"):
    """Evaluate tokens in pieces of about `seconds`, so that an interrupt is heard; the last one's logits.

    progress(done, total) is called after each piece. However a prompt is cut, its logits are the same. logits="none"
    does without them.
    """
    done, piece, total = 0, 64, len(tokens)
    while True:
        n = min(piece, total - done)
        last = done + n == total
        started = time.perf_counter()
        found = session.eval(tokens[done:done + n], logits=logits if last else "none")
        taken = time.perf_counter() - started
        done += n
        if progress:
            progress(done, total)
        if last:
            return found
        piece = min(max(16, int(n * seconds / max(taken, 1e-9)) // 16 * 16), 1024)


# ---- loops -------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A token that a decoding loop yields."""

    id: int
    logprob: float
    from_draft: bool = False


class Pass(NamedTuple):
    """What a decoding loop wants evaluated next; it is sent a Reply."""

    tokens: list[int]
    want: str                           # as in Session.eval: "best", "last" (of one token) or "all"
    sampler: Sampler | None = None      # as in Session.eval


class Reply(NamedTuple):
    """What a pass gave, its seconds, and its tokens, other sequences' too (0: nothing is to be learned from it)."""

    result: object
    seconds: float
    width: int


Loop = Generator["Choice | Pass", "Reply | None", None]


class Chooser:
    """A Sampler at the end of passes, which choose by themselves where nothing changes the logits before."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.kind = sampler, sampler.kind

    @property
    def native(self) -> Sampler | None:
        """The sampler of passes that choose; None: they take the best."""
        return self.sampler if self.kind == "sampled" else None

    def ask(self, tokens: list[int]) -> Pass:
        """A pass over tokens after each of which something may be chosen."""
        want = "best" if self.kind != "all" else "last" if len(tokens) == 1 else "all"
        return Pass(tokens, want, self.native)

    def script(self, text: Sequence[int]) -> Sequence[int]:
        """For experiments: how the text is taken to go on, whatever the model says; nothing: as the model says."""
        return ()

    def rows(self, result) -> Sequence:
        """What a pass gave, token by token."""
        if isinstance(result, tuple):
            return list(zip(result[0].tolist(), result[1].tolist()))
        return result if result.ndim == 2 else result[None]

    def choose(self, row, text: Sequence[int]) -> Choice:
        """The token that follows the text; row is what the text's last token gave."""
        if not isinstance(row, tuple):
            token = self.sampler.sample(row, len(text), text if self.sampler.penalizes else ())
            return Choice(token, logprob(row, token))
        if not isfinite(row[1]):
            raise BmcError(f"no token can be chosen at position {len(text)}: the best has a logprob of {row[1]}")
        return Choice(*row)


def plain_loop(text: list[int], result, chooser: Chooser) -> Loop:
    """Choose from what the text's last token gave, evaluate the choice, and so on. text grows with the choices.

    The last choice yielded is not in the session yet.
    """
    rows = chooser.rows(result)
    while True:
        choice = chooser.choose(rows[0], text)
        yield choice
        text.append(choice.id)
        rows = chooser.rows((yield chooser.ask([choice.id])).result)


def plain_rounds(session: Session, text: list[int], rows: Iterable, chooser: Chooser, limit: float,
                 told: Callable[[list[Round]], None] = lambda rounds: None) -> Loop:
    """What plain_loop yields, `limit` of them, from passes that the library makes by itself, as many at a time as take BULK_SECONDS:
    a small model's passes are short beside what happens between them here.

    rows: what the text's last token gave, or nothing, if it is not in the session yet. chooser: one whose passes choose. told: is
    called with what each call gave. When it is closed the session holds the text without the last choice.
    """
    end, ahead = len(text) + limit, 0
    try:
        while True:
            for row in rows:
                choice = chooser.choose(row, text)
                yield choice
                text.append(choice.id)
            ahead = n = int(min(BULK, end - len(text)))
            if n < 1:
                return
            rounds = speculate(session, None, text[-1:], 0, n, n_rounds=n, seconds=BULK_SECONDS, patient=True,
                               sampler=chooser.native, script=chooser.script(text))
            told(rounds)
            rows = [row for round in rounds for row in zip(round.ids, round.logprobs)]
    finally:
        with suppress(ClosedError):
            leave(session, text, ahead)


def leave(session, text: list[int], ahead: int) -> None:
    """Take rows that are not the text's off the session, `ahead` at most; unless it went on to something else meanwhile."""
    held = session.tokens
    if len(text) < len(held) <= len(text) + ahead and held[:len(text)] == text:
        session.rewind(len(text))


def alone(loop: Loop, session, clock: Callable[[], float] = time.perf_counter) -> Iterator[Choice]:
    """The choices of a loop whose passes this session runs."""
    with closing(loop):
        reply = None
        while True:
            step = loop.send(reply)
            if isinstance(step, Pass):
                started = clock()
                result = session.eval(step.tokens, step.want, sampler=step.sampler)
                reply = Reply(result, clock() - started, len(step.tokens))
            else:
                yield step
                reply = None


# ---- generation --------------------------------------------------------------------------------------------


@dataclass
class Stats:
    """Counts and seconds of a generation. The first token comes with the prompt: its time is the prompt's."""

    prompt_tokens: int = 0
    reused_tokens: int = 0          # of the prompt: already in the session
    prompt_s: float = 0.0
    predicted_tokens: int = 0
    predicted_s: float = 0.0
    draft_n: int = 0                # drafted tokens that were checked
    draft_n_accepted: int = 0
    rounds: int = 0                 # passes after the prompt
    draft_s: float = 0.0            # of predicted_s: drafting, checking, choosing
    verify_s: float = 0.0
    choose_s: float = 0.0
    plain_n: int = 0                # tokens of which is known what plain decoding would have taken ..
    plain_s: float = 0.0            # .. and what it is
    lengths: dict[int, int] = field(default_factory=dict)       # drafted tokens in a pass -> how many passes

    def count(self, checked: int, drafting: float, verifying: float, passes: int = 1) -> None:
        """A pass with so many drafted tokens, or several."""
        self.rounds += passes
        self.draft_n += checked * passes
        self.draft_s += drafting
        self.verify_s += verifying
        self.lengths[checked] = self.lengths.get(checked, 0) + passes

    @property
    def mean_k(self) -> float:
        return self.draft_n / self.rounds if self.rounds else 0.0

    @property
    def plain_tok_s(self) -> float:
        """What plain decoding would have given, as far as is known; 0 without a draft."""
        return self.plain_n / self.plain_s if self.plain_s else 0.0

    @property
    def accepted_share(self) -> float:
        return self.draft_n_accepted / self.draft_n if self.draft_n else 0.0

    @property
    def prompt_tok_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_s if self.prompt_s else 0.0

    @property
    def predicted_tok_s(self) -> float:
        return (self.predicted_tokens - 1) / self.predicted_s if self.predicted_s else 0.0


_latest: WeakKeyDictionary = WeakKeyDictionary()        # session -> weak reference to the Generation it serves


class Generation(Iterator[Token]):
    """An iterator of Token. prompt holds the prompt's ids, stats counts and times so far; close() ends it early.

    A session given to generate() serves one generation at a time. The next one that begins in it ends this one, which
    then raises BusyError when it is asked for another token. The same happens after other calls used the session.
    """

    def __init__(self, tokens: Generator[Token, None, None], prompt: list[int], stats: Stats, session=None):
        self._tokens, self.prompt, self.stats, self._session = tokens, prompt, stats, session
        self._uses: int | None = None       # of the session, when the last token came; None before the first
        self._lost = ""                     # why it cannot go on

    def __next__(self) -> Token:
        self._unless_running()
        if self._session is None:
            return next(self._tokens)
        if self._uses is None:
            self._begin()
        elif self._uses != uses(self._session):
            self._lose("the session was used by other calls meanwhile")
        if self._lost:
            raise BusyError(f"this generation cannot go on: {self._lost}")
        try:
            return next(self._tokens)
        finally:
            self._uses = uses(self._session)

    def _begin(self) -> None:
        before = _latest.get(self._session, lambda: None)()
        if before is not None:
            before._lose("another one began in its session")
        _latest[self._session] = ref(self)

    def _lose(self, why: str) -> None:
        if self._tokens.gi_frame is not None:       # not at its end yet
            self.close()
            self._lost = why

    def close(self) -> None:
        self._unless_running()
        self._tokens.close()

    def _unless_running(self) -> None:
        if self._tokens.gi_running:
            raise BusyError("this generation is in use by another thread")


def uses(session) -> int:
    """How often the rows of a session were moved on or back."""
    return getattr(session, "uses", 0)


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
    draft      a smaller model that guesses ahead, best with the same vocabulary: a Model or a path. The text is the same as
               without it, at any temperature; only the time differs
    spec       who guesses: "draft", "ngram" (repetitions in the text; needs no draft), "auto" (both, where there is a
               draft), "self" (the model itself with less attention: in long texts) or "off"
    draft_max, draft_min  bounds of the tokens guessed at a time; how many pay is found out while decoding
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
    checks.draft_bounds(draft_max, draft_min)
    wishes = Wishes.of(model, max_tokens, stop, stop_tokens, Sampler(**settings))
    if session is not None and getattr(session, "model", None) is not model:
        checks.refuse("session", "a session of the same model", session)
    tokens = encode_prompt(model.tokenizer, prompt, chat_template, chat_template_kwargs)
    stats = Stats(prompt_tokens=len(tokens))
    speculation = None
    if draft is not None or spec != "auto":
        from .speculate import attach
        speculation = attach(session, model, draft, spec, draft_max, draft_min)
    strings = StopStrings(wishes.stop, model.tokenizer)
    run = _run(model, tokens, wishes.limit, session, Chooser(wishes.sampler), speculation, strings,
               wishes.stop_ids, progress, stats)
    return Generation(run, tokens, stats, session)


class Wishes(NamedTuple):
    """What generate() and generate_batch() have in common, checked."""

    sampler: Sampler
    limit: float                        # tokens at most
    stop: list[str]
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, model, max_tokens, stop, stop_tokens, sampler: Sampler) -> "Wishes":
        if not hasattr(model, "tokenizer"):
            checks.refuse("model", "a Model", model)
        if model.tokenizer is None:
            raise ArgumentError(f"{model.path} has no vocabulary: it can evaluate tokens, but not write text")
        size = model.config.vocab_size
        check_bias(sampler.logit_bias, size)
        return cls(sampler, inf if max_tokens is None else checks.whole("max_tokens", max_tokens, 0, inf),
                   checks.strings("stop", stop), stop_ids(model.tokenizer, stop_tokens, size))


def stop_ids(tokenizer, stop_tokens, size: int) -> frozenset[int]:
    if stop_tokens is None:
        return tokenizer.stop_ids
    one = isinstance(stop_tokens, Integral) and not isinstance(stop_tokens, bool)
    return frozenset(checks.ids("stop_tokens", [stop_tokens] if one else stop_tokens, size))


def _run(model, tokens, max_tokens, session, chooser, speculation, stop_strings, stop_ids, progress,
         stats) -> Iterator[Token]:
    own = None if session is not None else model.session()
    session = own if session is None else session
    try:
        check_room(session.context, tokens)
        started = time.perf_counter()
        stats.reused_tokens = rewind_to(session, tokens)
        logits = eval_prompt(session, tokens[stats.reused_tokens:], progress)
        if speculation and max_tokens > 1:
            speculation.follow(tokens, chooser.kind)
        stats.prompt_s = time.perf_counter() - started
        if max_tokens:
            loop = start_loop(session, tokens, logits, chooser, speculation, max_tokens, stats)
            ending = Ending(len(tokens), session.context, model.tokenizer.stream(), max_tokens, stop_strings, stop_ids)
            with closing(timed(alone(loop, session), stats)) as choices:
                yield from ending.tokens(choices)
    finally:
        if speculation:
            speculation.release()
        if own is not None:
            own.close()


def start_loop(session, tokens, logits, chooser: Chooser, speculation, max_tokens: float, stats: Stats,
               others: Callable[[], int] | None = None) -> Loop:
    """The decoding loop after a prompt, which the session holds. others: tokens that share the next pass with it; None: none
    ever do."""
    limit = min(max_tokens, inf if session.context is None else session.context - len(tokens) + 1)
    if speculation:
        return speculation.loop(session, list(tokens), logits, chooser, limit, stats, others)
    if others is None and chooser.kind != "all" and isinstance(session, Session):
        return plain_rounds(session, list(tokens), chooser.rows(logits), chooser, limit)
    return plain_loop(list(tokens), logits, chooser)


def check_room(context: int | None, tokens: Sequence[int]) -> None:
    """A prompt that cannot fit is an error before any of it is evaluated."""
    if context is not None and len(tokens) > context:
        raise ContextFullError(f"the prompt has {len(tokens)} tokens, the context has room for {context}")


def timed(choices: Iterator[Choice], stats: Stats) -> Iterator[Choice]:
    """Counts choices, and the seconds that making them takes: not those that their reader takes."""
    with closing(choices):
        while True:
            started = time.perf_counter()
            choice = next(choices)
            stats.predicted_s += time.perf_counter() - started
            stats.predicted_tokens += 1
            yield choice


class Ending:
    """Turns choices into Tokens with text, and says which one is the last.

    context: the most rows that the session may hold, of which a last token needs none.
    """

    def __init__(self, n_prompt: int, context: int | None, decoder, max_tokens: float, stop_strings: StopStrings,
                 stop_ids: frozenset[int]):
        self.left = max_tokens
        self.room = inf if context is None else context - n_prompt + 1
        self.decoder, self.stop_strings, self.stop_ids = decoder, stop_strings, stop_ids

    def token(self, choice: Choice) -> Token:
        self.left, self.room = self.left - 1, self.room - 1
        ends, stop_strings = choice.id in self.stop_ids, self.stop_strings
        name = stop_strings.names.get(choice.id)
        if name:
            text = stop_strings.push(name, hidden=True)
        else:
            text = "" if ends else stop_strings.push(self.decoder.push(choice.id))
        reason = None
        if ends or stop_strings.found:
            reason = "stop"
        elif self.left <= 0:
            reason = "length"
        elif self.room <= 0:
            reason = "context"
        if reason and not stop_strings.found:
            text += stop_strings.push(self.decoder.flush()) + stop_strings.flush()
        return Token(choice.id, text, choice.logprob, choice.from_draft, reason)

    def tokens(self, choices: Iterator[Choice]) -> Iterator[Token]:
        """Until the last one."""
        for choice in choices:
            token = self.token(choice)
            yield token
            if token.finish_reason:
                return
