"""A draft model with another vocabulary: text in between.

The draft model reads the text in tokens of its own; what it writes is cut into the target's tokens, and those
are the guesses. Cutting is greedy about words, so a text that grows changes its last tokens now and then: the
last few are always cut anew. A cut that the target would not have made costs acceptance and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, isfinite
from typing import Any

from ..tokenizers import Tokenizer
from .interfaces import Session

TAIL = 8                                # tokens that are cut anew when a text grows
WINDOW = 64                             # tokens from the end of a text that the draft model reads at first


class TextDrafter:
    """Guesses for one sequence through a draft model with another vocabulary.

    target and draft: tokenizers. session: the draft model's own. plain(session, tokens, k) evaluates tokens
    and gives the k tokens that follow, with their log-probabilities.
    """

    def __init__(self, target: Tokenizer, draft: Tokenizer, session: Session,
                 plain: Callable[[Session, list[int], int], tuple[list[int], list[float]]]):
        self.ours, self.theirs, self.session, self._plain = target, draft, session, plain
        self._seen: list[int] = []      # the text as far as it is known, in the target's tokens ..
        self._text: list[int] = []      # .. and in the draft's, but for
        self._half = b""                # the bytes of a character that is not complete

    def propose(self, text: Sequence[int], k: int) -> tuple[list[int], list[float]]:
        """Up to k guesses at what follows a text, in the target's tokens,
        and how sure the draft model is of each."""
        self._follow(text)
        context = self.session.context
        if not self._text or self._half or len(self._text) + k > context:
            return [], []
        kept = self.session.sync(self._text[:-1])
        ids, logprobs = self._plain(self.session, self._text[kept:], k)
        return self._in_our_tokens(text, ids, [exp(p) if isfinite(p) else 0.0 for p in logprobs], k)

    def _follow(self, text: Sequence[int]) -> None:
        n = len(self._seen)
        if list(text[:n]) != self._seen or not n:
            first = max(0, len(text) - WINDOW)
            self._seen, self._text, self._half = list(text[:first]), [], b""
            if not first and self.theirs.add_bos and self.theirs.bos_id is not None:
                self._text = [self.theirs.bos_id]
        self._cut(text)

    def _cut(self, text: Sequence[int]) -> None:
        """Take the target's new tokens into the draft's text."""
        new = self._half
        for token in text[len(self._seen):]:
            if self.ours.is_control(token):
                self._write(new)
                new = b""
                self._text += self._control(token)
            else:
                new += self.ours.piece(token)
        whole = complete(new)
        self._write(new[:whole])
        self._half = new[whole:]
        self._seen += text[len(self._seen):]

    def _write(self, new: bytes) -> None:
        if new:
            start, cut = cut_anew(self.theirs, self._text, new)
            self._text[start:] = cut

    def _control(self, token: int) -> list[int]:
        """The draft's token for one of the target's control tokens: of the same name or use, or none."""
        ours, theirs = self.ours, self.theirs
        found = theirs.vocab.ids.get(ours.tokens[token])
        if found is None and token in ours.stop_ids:
            found = theirs.eot_id if theirs.eot_id is not None else theirs.eos_id
        return [] if found is None or token == ours.bos_id else [found]

    def _in_our_tokens(self, text: Sequence[int], ids: list[int], probs: list[float],
                       k: int) -> tuple[list[int], list[float]]:
        """What the draft wrote after the text, cut into the target's tokens;
        each as sure as the least sure it overlaps."""
        stop = next((i for i, id in enumerate(ids) if self.theirs.is_control(id)), len(ids))
        pieces = [self.theirs.piece(id) for id in ids[:stop]]
        said = b"".join(pieces)
        said = said[:complete(said)]
        found = continuation(self.ours, text, said) if said else []
        ends = [sum(map(len, pieces[:i + 1])) for i in range(stop)]
        sure, at = [], 0
        for token in found:
            end = at + len(self.ours.piece(token))
            overlapped = [p for p, a, b in zip(probs, [0, *ends], ends) if a < end and b > at]
            sure.append(min(overlapped, default=0.0))
            at = end
        last = self.ours.eot_id if self.ours.eot_id is not None else self.ours.eos_id
        if stop < len(ids) and ids[stop] in self.theirs.stop_ids and last is not None:
            found, sure = [*found, last], [*sure, probs[stop]]
        return found[:k], sure[:k]

    def close(self) -> None:
        self.session.close()


def complete(data: bytes) -> int:
    """How many bytes of UTF-8 there are before a character that has only begun."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if back >= needed else len(data) - back
        if byte < 0x80:
            break
    return len(data)


def cut_anew(tokenizer: Tokenizer, ids: Sequence[int], new: bytes) -> tuple[int, list[int]]:
    """(start, tokens): ids[:start] and these tokens are ids with `new` after them. start lies a few tokens
    back, at the beginning of a character, of a word if the vocabulary puts a space before a text, and after
    any control token."""
    codec: Any = tokenizer._codec
    spaced, start = codec.space_prefix, len(ids)
    while start > 0 and not tokenizer.is_control(ids[start - 1]):
        start -= 1
        first = tokenizer.piece(ids[start])[:1]
        if len(ids) - start >= TAIL and (first == b" " if spaced else not b"\x80" <= first < b"\xc0"):
            break
    old = b"".join(tokenizer.piece(id) for id in ids[start:])
    text = (old + new).decode("utf-8", "ignore")
    if spaced and old:
        text = text.removeprefix(" ")           # encode() puts it there
    return start, tokenizer.encode(text, bos=False)


def continuation(tokenizer: Tokenizer, ids: Sequence[int], new: bytes) -> list[int]:
    """Tokens for `new` after ids, which stay as they are:
    cut together with the last of them where that leaves them whole."""
    start, cut = cut_anew(tokenizer, ids, new)
    old = len(b"".join(tokenizer.piece(id) for id in ids[start:]))
    for i, id in enumerate(cut):
        if old <= 0:
            return cut[i:] if old == 0 else tokenizer.encode(new.decode("utf-8", "ignore"), bos=False)
        old -= len(tokenizer.piece(id))
    return []
