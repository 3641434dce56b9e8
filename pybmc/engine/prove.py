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

# Of guesses -> Speculation's settings. Some need a draft model, others a draft head in the file.
KINDS: dict[str, dict | None] = {
    "rehearsed": None, "repetitions": {"spec": "ngram", "fixed": 7},
    "draft": {"spec": "draft"}, "draft of 5": {"spec": "draft", "fixed": 5},
    "head": {"spec": "mtp"}, "head of 5": {"spec": "mtp", "fixed": 5},
}
ON_GPU = "rehearsed on the GPU"
BY_CUBLAS = "rehearsed on the GPU, prompt by cuBLAS"
STREAMED = 12                           # tokens of the passes from which on weights go through the GPU


Passes = list[tuple[int, list[int]]]    # the position and the tokens of each


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


@dataclass(frozen=True)
class Answer:
    """What a model writes without drafts. text: ids of the prompt and the answer; facts: number of tokens ->
    digest of the logits after them."""

    prompt: int
    sampler: Sampler
    n_prompt: int
    text: list[int]
    tokens: list[Token]
    facts: dict[int, bytes]


# ---- the proof ---------------------------------------------------------------------------------------------


def prove(model, prompts: Sequence = PROMPTS, max_tokens: int = 64, draft=None,
          temperatures: Sequence[float] = (0.0, 0.8), seed: int = 0, gpu=None) -> Iterator[Comparison]:
    """Compare each prompt at each temperature. gpu: the same model with layers on a GPU, whose tokens and
    logits are compared with those of the CPU too; where its prompts are by cuBLAS, with its own without
    drafts. Raises PairError if the draft does not go with the model."""
    if draft is not None:
        connect(model, draft)
    kinds = [kind for kind in KINDS if (draft is not None or "draft" not in kind)
             and (model.head is not None or "head" not in kind)]
    for i, prompt in enumerate(prompts):
        tokens = encode_text(model.tokenizer, prompt)
        for temperature in temperatures:
            sampler = Sampler(temperature=temperature, seed=seed + i)
            answer = answered(model, i, tokens, max_tokens, sampler)
            if gpu is not None and gpu.prompt_chunk:
                yield compare_by_cublas(model, gpu, i, tokens, max_tokens, sampler)
            elif gpu is not None:
                yield compare_machines(model, gpu, answer)
            for kind in kinds:
                yield compare(model, answer, kind, draft)


def answered(model, i: int, tokens: list[int], max_tokens: int, sampler: Sampler) -> Answer:
    found, _ = decode(model, tokens, max_tokens, sampler, None, {"spec": "off"})
    text = [*tokens, *(token.id for token in found)]
    return Answer(i, sampler, len(tokens), text, found, digests(model, text, len(tokens)))


def decode(model, tokens, max_tokens: int, sampler: Sampler, draft,
           settings: dict) -> tuple[list[Token], Stats]:
    """What an engine writes, and its Stats."""
    with Engine(model, speculation=Speculation(model, draft, **settings), parallel=1) as engine:
        sequence, found = engine.add(Request(tokens, max_tokens, sampler)), []
        while not sequence.done:
            found += [token for _, token in engine.step()]
        if sequence.error:
            raise sequence.error
        return found, sequence.stats


def compare(model, answer: Answer, kind: str, draft=None) -> Comparison:
    """Decode with guesses of a kind. Where the passes are known they run again for their logits."""
    settings = KINDS[kind]
    if settings is None:
        return compared(model, model, answer, kind, *rehearse(model, answer))
    prompt = answer.text[:answer.n_prompt]
    guessed, stats = decode(model, prompt, len(answer.tokens), answer.sampler, draft, settings)
    return compared(model, model, answer, kind, guessed, stats, [])


def compare_machines(model, gpu, answer: Answer) -> Comparison:
    """Decode on the GPU with guesses of every length, and run the passes again for their logits;
    then the text as one long pass."""
    guessed, stats, passes = rehearse(gpu, answer)
    first = answer.n_prompt - 1
    passes += [(0, answer.text[:first])] * (first > 0) + [(first, answer.text[first:])]
    return compared(model, gpu, answer, ON_GPU, guessed, stats, passes)


def compare_by_cublas(model, gpu, i: int, tokens: list[int], max_tokens: int, sampler: Sampler) -> Comparison:
    """Drafts change nothing on the GPU, after a prompt with a whole chunk; how far the exact logits are."""
    prompt = list(islice(cycle(tokens), gpu.prompt_chunk + len(tokens)))
    answer = answered(gpu, i, prompt, max_tokens, sampler)
    far = distance(model, gpu, answer.text, len(prompt))
    return replace(compare(gpu, answer, "rehearsed"), drafts=BY_CUBLAS, distance=far)


def compared(model, drafting, answer: Answer, drafts: str, guessed: list[Token], stats: Stats,
             passes: Passes) -> Comparison:
    """A model's answer with what another one, or the same, wrote with drafts; passes: of that one, which run
    again for their logits."""
    rows, difference = 0, first_difference(answer.tokens, guessed, answer.n_prompt)
    if difference is None:
        rows, difference = replay(drafting, answer, passes)
    if difference is not None:
        difference = explained(model, answer.text, difference)
    return Comparison(answer.prompt, answer.sampler.temperature, drafts, len(guessed), stats.rounds,
                      stats.draft_n, stats.draft_n_accepted, rows, difference)


def distance(model, gpu, text: Sequence[int], n_prompt: int) -> float:
    """How far the logits after a prompt and its answer are apart at most."""
    rows = []
    for each in (model, gpu):
        with each.session() as session:
            session.eval(text[:n_prompt - 1], "none")
            rows.append(session.eval(text[n_prompt - 1:], "all"))
    return float(np.abs(rows[0] - rows[1]).max())


def rehearse(model, answer: Answer) -> tuple[list[Token], Stats, Passes]:
    """Decode with guesses of every length: the answer that is known, with a mistake now and then."""
    rng, size, stats = random.Random(answer.prompt), model.config.vocab_size, Stats()
    text, n_prompt = answer.text, answer.n_prompt
    found: list[Token] = []
    passes: Passes = []
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
            ids, logprobs, drafted = verify(session, pending, guesses, len(text) - at, answer.sampler)
            found += [ending.token(*each) for each in zip(ids, logprobs, drafted)]
            stats.rounds, stats.draft_n = stats.rounds + 1, stats.draft_n + k
            stats.draft_n_accepted += sum(drafted)
            pending = ids[-1:]
    return found, stats, passes


def digest(row: np.ndarray) -> bytes:
    return blake2b(row.tobytes(), digest_size=16).digest()


def digests(model, text: Sequence[int], n_prompt: int) -> dict[int, bytes]:
    """Number of tokens -> digest of the logits after them, each token evaluated by itself."""
    with model.session() as session:
        found = {n_prompt: digest(session.eval(text[:n_prompt]))}
        for at in range(n_prompt, len(text) - 1):
            found[at + 1] = digest(session.eval(text[at:at + 1], "last"))
    return found


def first_difference(plain, drafted, n_prompt: int) -> Difference | None:
    """Of two answers: ids, log-probabilities bit by bit, texts, ends."""
    for i, (one, other) in enumerate(zip(plain, drafted)):
        what = next((name for name in ("id", "logprob", "text", "finish_reason")
                     if getattr(one, name) != getattr(other, name)), None)
        if what:
            return Difference(n_prompt + i, what, one.id, other.id, 0.0, 0.0)
    n, m = len(plain), len(drafted)
    if n != m:
        return Difference(n_prompt + min(n, m), "length", n, m, 0.0, 0.0)
    return None


def replay(model, answer: Answer, passes: Passes) -> tuple[int, Difference | None]:
    """Run recorded passes for all their logits; how many rows were compared, and the first that differs."""
    n, text, facts, first = 0, answer.text, answer.facts, min(answer.facts)
    with model.session() as session:
        for position, tokens in passes:
            session.rewind(position)
            if position + len(tokens) < first:
                session.eval(tokens, "none")
                continue
            for at, row in rows_of(session, tokens, first):
                if at > len(text) or tokens[at - position - 1] != text[at - 1]:     # a draft that was wrong
                    break
                n += 1
                if digest(row) != facts.get(at, digest(row)):
                    return n, Difference(at, "logits", -1, -1, 0.0, differs(model, text, at, row))
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
    with model.session() as session:
        if at > 1:
            session.eval(text[:at - 1], "none")
        return session.eval(text[at - 1:at], "last")


def differs(model, text: Sequence[int], at: int, row: np.ndarray) -> float:
    return float(np.abs(plain_row(model, text, at) - row).max())


def explained(model, text: Sequence[int], found: Difference) -> Difference:
    """With the gap between the two best plain logits: a small one is a near tie."""
    best = np.sort(plain_row(model, text, min(found.position, len(text))))[-2:]
    return replace(found, gap=float(best[1] - best[0]))
