"""Run plain and speculative decoding side by side, and compare every token, every log-probability and every
bit of the logits that a verification computes.

Guesses are made on purpose: the plain answer with mistakes, in every length, so that passes of all widths,
with acceptances and rejections at every place, are among those compared, logits included; then those of
repetitions in the text, and of a draft model, if there is one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import cycle, islice
from math import inf

import numpy as np

from ..spec.pair import connect
from ..spec.rounds import verify
from ..spec.speculation import Speculation
from .engine import Engine
from .generate import encode_text
from .request import Request, Stats
from .sampler import Sampler
from .text import Ending, StopStrings, Token

PROMPTS = (
    "Once upon a time there was a mouse who lived in a mill, and every evening",
    "Question: which is larger, a river or a brook? Answer:",
    "def fibonacci(n):\n    \"\"\"The n-th Fibonacci number.\"\"\"\n",
    "one apple, two pears, three plums; one apple, two pears, three plums; one apple, two",
)


KINDS: dict[str, dict | None] = {       # of guesses -> Speculation's settings; some need a draft model, or a draft head in the file
    "rehearsed": None, "repetitions": {"spec": "ngram", "fixed": 7}, "draft": {"spec": "draft"}, "draft of 5": {"spec": "draft", "fixed": 5},
    "head": {"spec": "mtp"}, "head of 5": {"spec": "mtp", "fixed": 5},
}


ON_GPU = "rehearsed on the GPU"
STREAMED = 12                           # tokens from which on passes send the weights of layers on the CPU through the GPU
BY_CUBLAS = "rehearsed on the GPU, prompt by cuBLAS"


@dataclass(frozen=True)
class Difference:
    """Where two runs part. gap: between the two best plain logits there;
    largest: how far any logits are apart."""

    position: int
    what: str
    plain: int
    drafted: int
    gap: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    """One prompt at one temperature with one kind of drafts. rows: of logits, compared bit by bit.
    distance: how far logits are from the exact ones at most, where the prompt was read by cuBLAS."""

    prompt: int
    temperature: float
    drafts: str
    tokens: int
    passes: int
    drafted: int
    accepted: int
    rows: int
    difference: Difference | None
    distance: float | None = None


# ---- the proof ---------------------------------------------------------------------------------------------


def prove(model, prompts: Sequence = PROMPTS, max_tokens: int = 64, draft=None,
          temperatures: Sequence[float] = (0.0, 0.8), seed: int = 0, gpu=None) -> Iterator[Comparison]:
    """Compare each prompt at each temperature. gpu: the same model with layers on a GPU, whose tokens and
    logits are compared with those of the CPU too; where its prompts are by cuBLAS, with its own without
    drafts. Raises PairError if the draft does not go with the model."""
    if draft is not None:
        connect(model, draft)
    kinds = [kind for kind in KINDS if (draft is not None or "draft" not in kind) and (model.head is not None or "head" not in kind)]
    for i, prompt in enumerate(prompts):
        tokens = encode_text(model.tokenizer, prompt)
        for temperature in temperatures:
            sampler = Sampler(temperature=temperature, seed=seed + i)
            plain, _ = decode(model, tokens, max_tokens, sampler, None, {"spec": "off"})
            text = [*tokens, *(t.id for t in plain)]
            facts = digests(model, text, len(tokens))
            if gpu is not None and gpu.prompt_chunk:
                yield compare_by_cublas(model, gpu, tokens, max_tokens, i, sampler)
            elif gpu is not None:
                yield compare_machines(model, gpu, text, len(tokens), plain, facts, i, sampler)
            for kind in kinds:
                yield compare(model, text, len(tokens), plain, facts, kind, i, sampler, draft)


def decode(model, tokens, max_tokens: int, sampler: Sampler, draft, settings: dict) -> tuple[list[Token], Stats]:
    """What an engine writes, and its Stats."""
    with Engine(model, speculation=Speculation(model, draft, **settings), parallel=1) as engine:
        sequence, found = engine.add(Request(tokens, max_tokens, sampler)), []
        while not sequence.done:
            found += [token for _, token in engine.step()]
        if sequence.error:
            raise sequence.error
        return found, sequence.stats


def compare(model, text, n_prompt: int, plain, facts, kind: str, i: int, sampler: Sampler, draft) -> Comparison:
    """Decode with guesses of a kind. Where the passes are known they run again for their logits."""
    rows, passes, settings = 0, [], KINDS[kind]
    if settings is None:
        guessed, stats, passes = rehearse(model, text, n_prompt, sampler, i)
    else:
        guessed, stats = decode(model, text[:n_prompt], len(plain), sampler, draft, settings)
    difference = first_difference(plain, guessed, n_prompt)
    if difference is None:
        rows, difference = replay(model, text, passes, facts)
    if difference is not None:
        difference = explained(model, text, difference)
    return Comparison(i, sampler.temperature, kind, len(guessed), stats.rounds, stats.draft_n, stats.draft_n_accepted, rows, difference)


def compare_machines(model, gpu, text, n_prompt: int, plain, facts, i: int, sampler: Sampler) -> Comparison:
    """Decode on the GPU with guesses of every length, and run the passes again for their logits;
    then the text as one long pass."""
    guessed, stats, passes = rehearse(gpu, text, n_prompt, sampler, i)
    rows, difference = 0, first_difference(plain, guessed, n_prompt)
    if difference is None:
        long = [(0, text[:n_prompt - 1])] * (n_prompt > 1) + [(n_prompt - 1, text[n_prompt - 1:])]
        rows, difference = replay(gpu, text, [*passes, *long], facts)
    if difference is not None:
        difference = explained(model, text, difference)
    return Comparison(i, sampler.temperature, ON_GPU, len(guessed), stats.rounds, stats.draft_n, stats.draft_n_accepted, rows, difference)


def compare_by_cublas(model, gpu, tokens: Sequence[int], max_tokens: int, i: int, sampler: Sampler) -> Comparison:
    """Drafts change nothing on the GPU, after a prompt with a whole chunk; how far the exact logits are."""
    prompt = list(islice(cycle(tokens), gpu.prompt_chunk + len(tokens)))
    plain, _ = decode(gpu, prompt, max_tokens, sampler, None, {"spec": "off"})
    text = [*prompt, *(t.id for t in plain)]
    found = compare(gpu, text, len(prompt), plain, digests(gpu, text, len(prompt)), "rehearsed", i, sampler, None)
    return replace(found, drafts=BY_CUBLAS, distance=distance(model, gpu, text, len(prompt)))


def distance(model, gpu, text: Sequence[int], n_prompt: int) -> float:
    """How far the logits after a prompt and its answer are apart at most."""
    rows = []
    for each in (model, gpu):
        with each.session() as session:
            session.eval(text[:n_prompt - 1], "none")
            rows.append(session.eval(text[n_prompt - 1:], "all"))
    return float(np.abs(rows[0] - rows[1]).max())


def rehearse(model, text: Sequence[int], n_prompt: int, sampler: Sampler, seed: int):
    """Decode with guesses of every length: the answer that is known, with a mistake now and then. Tokens,
    Stats, and the passes as (position, tokens)."""
    rng, size, stats = random.Random(seed), model.config.vocab_size, Stats()
    found: list[Token] = []
    passes: list[tuple[int, list[int]]] = []
    with model.session() as session:
        decoder = model.tokenizer.stream()
        ending = Ending(decoder, len(text) - n_prompt, inf, StopStrings(), frozenset())
        pending = list(text[:n_prompt])
        while len(found) < len(text) - n_prompt:
            at = n_prompt + len(found)
            k = 0 if len(pending) > 1 else min(rng.randint(0, 16), len(text) - at - 1)
            guesses = list(text[at:at + k])
            if k and rng.random() < 0.7:
                guesses[rng.randrange(k)] = rng.randrange(size)
            passes.append((session.position, pending + guesses))
            ids, logprobs, drafted = verify(session, pending, guesses, len(text) - at, sampler)
            found += [ending.token(*each) for each in zip(ids, logprobs, drafted)]
            stats.rounds, stats.draft_n = stats.rounds + 1, stats.draft_n + k
            stats.draft_n_accepted += sum(drafted)
            pending = ids[-1:]
    return found, stats, passes


def digest(row: np.ndarray) -> bytes:
    return blake2b(row.tobytes(), digest_size=16).digest()


def digests(model, text: Sequence[int], n_prompt: int) -> dict[int, bytes]:
    """Number of tokens -> digest of the logits after them, each token evaluated by itself."""
    session, found = model.session(), {}
    try:
        found[n_prompt] = digest(session.eval(text[:n_prompt]))
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
    """(position after it, logits) of each token from position `first` on;
    of a prompt's piece only the last."""
    position = session.position
    if position + 1 >= first:
        rows = session.eval(tokens, "all")
        return ((position + 1 + i, row) for i, row in enumerate(rows))
    return iter([(position + len(tokens), session.eval(tokens, "last"))])


def plain_row(model, text: Sequence[int], at: int) -> np.ndarray:
    session = model.session()
    try:
        if at > 1:
            session.eval(text[:at - 1], "none")
        return session.eval(text[at - 1:at], "last")
    finally:
        session.close()


def differs(model, text: Sequence[int], at: int, row: np.ndarray) -> float:
    return float(np.abs(plain_row(model, text, at) - row).max())


def explained(model, text: Sequence[int], found: Difference) -> Difference:
    """With the gap between the two best plain logits: a small one is a near tie."""
    best = np.sort(plain_row(model, text, min(found.position, len(text))))[-2:]
    return Difference(found.position, found.what, found.plain, found.drafted, float(best[1] - best[0]), found.largest)
