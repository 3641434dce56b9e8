"""A draft model with another vocabulary: text in between.

The draft model reads the text in tokens of its own; what it writes is cut into the target's tokens, and those are the
draft. Cutting is greedy about words, so a text that grows changes its last tokens now and then: the last few are
always cut anew. A cut that the target would not have made costs acceptance and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isfinite

from .decode import common_prefix
from .drafters import LAG, NOTHING, Draft, ModelDrafter, catch_up, mark
from .sampling import Sampler

TAIL = 8                                # tokens that are cut anew when a text grows


class TextDrafter:
    """A ModelDrafter for a target whose vocabulary is another one. Its drafts are greedy ones."""

    name = "draft"
    n_marks = ModelDrafter.n_marks

    def __init__(self, target, draft):
        self.model, self.ours, self.theirs = draft, target.tokenizer, draft.tokenizer
        self.session = draft.session()
        self._seen: list[int] = []      # the text as far as it is known, in the target's tokens ..
        self._text: list[int] = []      # .. and in the draft's, but for
        self._half = b""                # the bytes of a character that is not complete
        self._agreed = 0                # tokens that the session is known to share with it

    def follow(self, text: Sequence[int]) -> None:
        """Take up a text, which may have much in common with the one before. Nothing is evaluated yet."""
        if common_prefix(self._seen, text) < len(self._seen):
            self._seen, self._text, self._half = [], [], b""
        self._cut(text)
        self._agreed = self.session.agreement(self._text)

    def lag(self, text: Sequence[int]) -> int:
        return max(0, len(self._text) - self._agreed - LAG)

    def read(self, text: Sequence[int]) -> None:
        """Evaluate what is missing, all but the last token."""
        self._catch_up(0)

    def propose(self, text: Sequence[int], k: int, p_min: float, sampler: Sampler) -> Draft:
        """At most k tokens; the last of the draft's own is the first that is less probable than p_min, if there is one."""
        self._cut(text)
        if not self._text or self._half:
            return NOTHING
        at = self._catch_up(LAG)
        room = self.session.context - len(self._text) + 1 if self.session.context is not None else k
        if min(k, room) < 1:
            return NOTHING
        ids, logprobs = self.session.draft(self._text[at:], min(k, room), p_min)
        return self._in_our_tokens(text, ids.tolist(), [exp(p) if isfinite(p) else 0.0 for p in logprobs.tolist()]).cut(k)

    def _catch_up(self, lag: int) -> int:
        self._agreed = catch_up(self.session, self._text, self._agreed, lag)
        return self._agreed

    def _cut(self, text: Sequence[int]) -> None:
        """Take the target's new tokens into the draft's text."""
        if not self._seen and self.theirs.add_bos:
            self._text = [self.theirs.bos_id]
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
            self._agreed = min(self._agreed, start)

    def _control(self, token: int) -> list[int]:
        """The draft's token for one of the target's control tokens: of the same name or use, or none."""
        ours, theirs = self.ours, self.theirs
        found = theirs.vocab.ids.get(ours.tokens[token])
        if found is None and token in ours.stop_ids:
            found = theirs.eot_id if theirs.eot_id is not None else theirs.eos_id
        return [] if found is None or token == ours.bos_id else [found]

    def _in_our_tokens(self, text: Sequence[int], ids: list[int], probs: list[float]) -> Draft:
        """What the draft wrote after the text, cut into the target's tokens; each as sure as the least sure it overlaps."""
        stop = next((i for i, id in enumerate(ids) if self.theirs.is_control(id)), len(ids))
        pieces = [self.theirs.piece(id) for id in ids[:stop]]
        said = b"".join(pieces)
        said = said[:complete(said)]
        found = continuation(self.ours, text, said) if said else []
        ends = [sum(map(len, pieces[:i + 1])) for i in range(stop)]
        marks, at = [], 0
        for token in found:
            end = at + len(self.ours.piece(token))
            marks.append(mark(min((p for p, a, b in zip(probs, [0, *ends], ends) if a < end and b > at), default=0.0)))
            at = end
        if stop < len(ids) and ids[stop] in self.theirs.stop_ids and self.ours.stop_ids:
            last = self.ours.eot_id if self.ours.eot_id is not None else self.ours.eos_id
            found, marks = [*found, last], [*marks, mark(probs[stop])]
        return Draft(found, marks)

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


def cut_anew(tokenizer, ids: Sequence[int], new: bytes) -> tuple[int, list[int]]:
    """(start, tokens): ids[:start] and these tokens are ids with `new` after them. start lies a few tokens back, at the
    beginning of a character, of a word if the vocabulary puts a space before a text, and after any control token."""
    spaced, start = tokenizer._codec.space_prefix, len(ids)
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


def continuation(tokenizer, ids: Sequence[int], new: bytes) -> list[int]:
    """Tokens for `new` after ids, which stay as they are: cut together with the last of them where that leaves them whole."""
    start, cut = cut_anew(tokenizer, ids, new)
    old = len(b"".join(tokenizer.piece(id) for id in ids[start:]))
    for i, id in enumerate(cut):
        if old <= 0:
            return cut[i:] if old == 0 else tokenizer.encode(new.decode("utf-8", "ignore"), bos=False)
        old -= len(tokenizer.piece(id))
    return []
