"""From token ids to text: what has become certain, and what ends it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from ..errors import ArgumentError
from ..tokenizers import Tokenizer


class Token(NamedTuple):
    """One token of an answer.

    text: what became certain with it: it may be empty, or end an earlier token's.
    logprob: the model's own, before settings, unless the request wants it as drawn.
    finish_reason: of the last token: "stop" (the model ended, or a stop string was found), "length"
    (max_tokens) or "context" (no room for more).
    top: the likeliest (id, logprob), where they were asked for.
    by: who guessed it: "draft" (a model or a head), "ngram", "self" or "schema" (which forces it).
    """

    id: int
    text: str
    logprob: float
    from_draft: bool = False
    finish_reason: str | None = None
    top: tuple[tuple[int, float], ...] = ()
    by: str | None = None


class StopStrings:
    """Passes text on, except from the first of some strings on; holds back what may be the beginning of one.

    The string that is complete first counts, and of those that end together the longest: what comes out does
    not depend on how the text was cut.

    tokenizer: a string may contain names of tokens whose text is not shown, as control tokens, but for those
    in shown. A name that stands in a string is in names, by its id, and is pushed as hidden: it never comes
    out, and strings without a name are looked for as if it was not there.
    """

    def __init__(self, strings: Iterable[str] = (), tokenizer: Tokenizer | None = None,
                 shown: frozenset[int] = frozenset()):
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        for string in self.strings:
            if not isinstance(string, str) or not string:
                raise ArgumentError(f"a stop string is {string!r}; expected text that is not empty")
        silent = tokenizer.silent_names() if self.strings and tokenizer else {}
        self.names = {id: name for id, name in silent.items()
                      if id not in shown and any(name in string for string in self.strings)}
        self._whole = [string for string in self.strings
                       if any(name in string for name in self.names.values())]
        self._shown = [string for string in self.strings if string not in self._whole]
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
        most = min(len(string) - 1, len(text))
        return next((n for n in range(most, 0, -1) if text.endswith(string[:n])), 0)


def _visible(chars: list[tuple[str, bool]]) -> str:
    return "".join(char for char, hidden in chars if not hidden)


class Decoder(Protocol):
    """Ids to text, as far as it is certain: a tokenizer's stream()."""

    def push(self, id: int) -> str: ...
    def flush(self) -> str: ...


class NoText:
    """In place of a tokenizer's stream() for a model without a vocabulary."""

    def push(self, id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Ending:
    """Turns ids into Tokens with text, and says which one is the last.

    decoder: the tokenizer's stream(), or NoText. max_tokens and room, tokens that the context has room for,
    end a text as well.
    """

    def __init__(self, decoder: Decoder, max_tokens: float, room: float, stop_strings: StopStrings,
                 stop_ids: frozenset[int]):
        self.left, self.room = max_tokens, room
        self.decoder, self.stop_strings, self.stop_ids = decoder, stop_strings, stop_ids

    def token(self, id: int, logprob: float, from_draft: bool = False,
              top: tuple[tuple[int, float], ...] = (), by: str | None = None) -> Token:
        self.left, self.room = self.left - 1, self.room - 1
        ends, stop_strings = id in self.stop_ids, self.stop_strings
        name = stop_strings.names.get(id)
        if name:
            text = stop_strings.push(name, hidden=True)
        else:
            text = "" if ends else stop_strings.push(self.decoder.push(id))
        reason = None
        if ends or stop_strings.found:
            reason = "stop"
        elif self.left <= 0:
            reason = "length"
        elif self.room <= 0:
            reason = "context"
        if reason and not stop_strings.found:
            text += stop_strings.push(self.decoder.flush()) + stop_strings.flush()
        return Token(id, text, logprob, from_draft, reason, top, by)
