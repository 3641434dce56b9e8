"""Run plain and speculative decoding side by side, and compare every token, every log-probability and every bit of the
logits that a verification computes.

Drafts are made on purpose: the plain answer with mistakes, in every length, so that passes of all widths, with
acceptances and rejections at every place, are among those compared; and those of a draft model, if there is one, first round by
round and then in rounds that are left to the library, whose logits nobody sees.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from .controller import WIDEST, FixedLength, Plan
from .decode import encode_prompt, eval_prompt, generate
from .drafters import Draft, connect
from .speculate import Speculation

PROMPTS = (
    "Once upon a time there was a mouse who lived in a mill, and every evening",
    "Question: which is larger, a river or a brook? Answer:",
    "def fibonacci(n):\n    \"\"\"The n-th Fibonacci number.\"\"\"\n",
    "one apple, two pears, three plums; one apple, two pears, three plums; one apple, two",
)


KINDS = ("rehearsed", "draft", "rounds")        # of drafts; the last two need a draft model


@dataclass(frozen=True)
class Difference:
    """Where two runs part. gap: between the two best plain logits there; largest: how far any logits are apart."""

    position: int
    what: str
    plain: int
    drafted: int
    gap: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    """One prompt at one temperature with one kind of drafts. rows: of logits, compared bit by bit."""

    prompt: int
    temperature: float
    drafts: str
    tokens: int
    passes: int
    drafted: int
    accepted: int
    rows: int
    difference: Difference | None


class AnyLength(FixedLength):
    """Drafts of every length in turn, all of them checked."""

    def __init__(self, seed: int):
        super().__init__(WIDEST)
        self.rng = random.Random(seed)

    def plan(self, source, room, others=0, lag=0.0, new=False) -> Plan:
        return Plan(min(self.rng.randint(0, WIDEST), room))


class Rehearsed:
    """Drafts the answer that is known, with a mistake now and then."""

    def __init__(self, answer: Sequence[int], vocab_size: int, seed: int):
        self.answer, self.vocab_size, self.rng, self.start = answer, vocab_size, random.Random(seed), 0

    def follow(self, text) -> None:
        self.start = len(text)

    def lag(self, text) -> int:
        return 0

    def propose(self, text, k, p_min, sampler) -> Draft:
        ids = list(self.answer[len(text) - self.start:][:k])
        ids += [self.rng.randrange(self.vocab_size) for _ in range(k - len(ids))]
        if self.rng.random() < 0.7:
            ids[self.rng.randrange(k)] = self.rng.randrange(self.vocab_size)
        return Draft(ids, [0] * k)

    def close(self) -> None:
        pass


class Recorder:
    """A session that remembers its passes, but for those of drafts: (position, tokens)."""

    def __init__(self, session):
        self.session, self.passes = session, []

    def eval(self, tokens, logits="last", last=0, sampler=None):
        if not last:
            self.passes.append((self.session.position, list(tokens)))
        return self.session.eval(tokens, logits, last, sampler)

    def __getattr__(self, name):
        return getattr(self.session, name)


# ---- the proof ---------------------------------------------------------------------------------------------


def prove(model, prompts: Sequence = PROMPTS, max_tokens: int = 64, draft=None,
          temperatures: Sequence[float] = (0.0, 0.8), seed: int = 0) -> Iterator[Comparison]:
    """Compare each prompt at each temperature. Raises PairError if the draft does not go with the model."""
    link = connect(model, draft) if draft is not None else None
    for i, prompt in enumerate(prompts):
        tokens = encode_prompt(model.tokenizer, prompt)
        for temperature in temperatures:
            settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed + i, "stop_tokens": ()}
            plain = list(generate(model, tokens, **settings))
            facts = digests(model, [*tokens, *(t.id for t in plain)], len(tokens))
            for kind in KINDS[:1 if draft is None else None]:
                made = speculation(model, draft, link, kind, plain, seed + i)
                yield compare(model, tokens, plain, facts, made, i, kind, settings)


def speculation(model, draft, link, kind: str, plain, seed: int) -> Speculation:
    if kind == "rehearsed":
        made = Speculation(model, None, "draft", controller=AnyLength(seed))
        made.drafter = Rehearsed([t.id for t in plain], model.config.vocab_size, seed)
        return made
    return Speculation(model, draft, "draft", controller=AnyLength(seed), link=link)


def compare(model, tokens, plain, facts, made: Speculation, i: int, kind: str, settings: dict) -> Comparison:
    """Decode with drafts, then run the same passes again for their logits."""
    session, rows = model.session(), 0
    recorder = Recorder(session)
    try:
        stream = generate(model, tokens, session=session if kind == "rounds" else recorder, draft=made, **settings)
        drafted = list(stream)
        difference = first_difference(plain, drafted, len(tokens))
        if difference is None:
            rows, difference = replay(model, [*tokens, *(t.id for t in plain)], recorder.passes, facts)
        if difference is not None:
            difference = explained(model, [*tokens, *(t.id for t in plain)], difference)
    finally:
        made.close()
        session.close()
    stats = stream.stats
    return Comparison(i, settings["temperature"], kind, len(drafted), stats.rounds, stats.draft_n,
                      stats.draft_n_accepted, rows, difference)


def digest(row: np.ndarray) -> bytes:
    return blake2b(np.ascontiguousarray(row), digest_size=16).digest()


def digests(model, text: Sequence[int], n_prompt: int) -> dict[int, bytes]:
    """Of the logits after so many tokens of a text: each token evaluated by itself."""
    session, found = model.session(), {}
    try:
        found[n_prompt] = digest(eval_prompt(session, text[:n_prompt]))
        for at in range(n_prompt, len(text) - 1):
            found[at + 1] = digest(session.eval(text[at:at + 1], "last"))
    finally:
        session.close()
    return found


def first_difference(plain, drafted, n_prompt: int) -> Difference | None:
    """Of two answers: ids, log-probabilities bit by bit, texts, ends."""
    for i, (one, other) in enumerate(zip(plain, drafted)):
        what = next((name for name in ("id", "logprob", "text", "finish_reason")
                     if getattr(one, name) != getattr(other, name)), None)
        if what:
            return Difference(n_prompt + i, what, one.id, other.id, 0.0, 0.0)
    if len(plain) != len(drafted):
        return Difference(n_prompt + min(len(plain), len(drafted)), "length", len(plain), len(drafted), 0.0, 0.0)
    return None


def replay(model, text: Sequence[int], passes, facts: dict[int, bytes]) -> tuple[int, Difference | None]:
    """Run recorded passes for all their logits; how many rows were compared, and the first that differs."""
    session, n = model.session(), 0
    try:
        for position, tokens in passes:
            session.rewind(position)
            if position + len(tokens) < min(facts):
                session.eval(tokens, "none")
                continue
            for at, row in rows_of(session, tokens, min(facts)):
                if at > len(text) or tokens[at - position - 1] != text[at - 1]:     # a draft that was wrong
                    break
                n += 1
                if digest(row) != facts.get(at, digest(row)):
                    return n, Difference(at, "logits", -1, -1, 0.0, differs(model, text, at, row))
    finally:
        session.close()
    return n, None


def rows_of(session, tokens: Sequence[int], first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(position after it, logits) of each token from position `first` on; of a prompt's piece only the last."""
    position = session.position
    if position + 1 >= first:
        rows = session.eval(tokens, "all")
        return ((position + 1 + i, row) for i, row in enumerate(rows))
    return iter([(position + len(tokens), session.eval(tokens, "last"))])


def plain_row(model, text: Sequence[int], at: int) -> np.ndarray:
    session = model.session()
    try:
        if at > 1:
            eval_prompt(session, text[:at - 1], logits="none")
        return session.eval(text[at - 1:at], "last")
    finally:
        session.close()


def differs(model, text: Sequence[int], at: int, row: np.ndarray) -> float:
    return float(np.abs(plain_row(model, text, at) - row).max())


def explained(model, text: Sequence[int], found: Difference) -> Difference:
    """With the gap between the two best plain logits: a small one is a near tie."""
    best = np.sort(plain_row(model, text, min(found.position, len(text))))[-2:]
    return Difference(found.position, found.what, found.plain, found.drafted, float(best[1] - best[0]), found.largest)
