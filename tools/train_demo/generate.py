"""What the draft learns from: the target's own text, and the corpus,
with the target's likeliest tokens at every position."""

import random
import time

import numpy as np
import torch

import pybmc

from .tokens import ask
from .train import Progress, clock

CHAT = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}      # as pybmc chat chooses
WAYS = ({"temperature": 0.0}, CHAT)         # batches take turns
PARALLEL = 16                       # texts that are written at a time
PREFIX_SHARE = 0.15                 # texts that go on from the corpus rather than answer a request
PREFIX_TOKENS = 24


def prompts(tokenizer, requests, running, rng):
    """Endless prompts: mostly requests in the template's form, some beginnings of running text.
    running: ids of one long text."""
    while True:
        if rng.random() < PREFIX_SHARE:
            start = rng.randrange(len(running) - PREFIX_TOKENS)
            yield [int(i) for i in running[start : start + PREFIX_TOKENS]]
        else:
            yield tokenizer.encode(ask(rng.choice(requests))).ids


def write_texts(model, asked, n_tok, **settings):
    """What the model answers to each prompt: (ids, own) of n_tok + 1 tokens, filled up with zeros;
    own says which tokens are its own."""
    told = [list(prompt) for prompt in asked]
    for i, token in pybmc.generate_batch(model, asked, n_tok, parallel=PARALLEL, **settings):
        told[i].append(token.id)
    ids, own = (np.zeros((len(asked), n_tok + 1), kind) for kind in (np.uint16, np.int8))
    for row, mine, text, prompt in zip(ids, own, told, asked):
        n = min(len(text), n_tok + 1)
        row[:n], mine[len(prompt) : n] = text[:n], 1
    return ids, own


def score_rows(model, ids, learn, top):
    """The model's `top` likeliest tokens after each one of rows that are written already.

    ids (n, n_tok + 1), learn likewise: which tokens were to be learned. Returns ids, top ids and their log
    probabilities (n, n_tok, top), and own (n, n_tok): learn, of the token that follows.
    """
    top_ids, top_logp = (np.zeros((len(ids), ids.shape[1] - 1, top), kind)
                         for kind in (np.uint16, np.float16))
    with model.session() as session:
        for row, its_ids, its_logp in zip(ids, top_ids, top_logp):
            session.rewind(0)
            logits = torch.from_numpy(session.eval(row[:-1].astype(np.int32), logits="all"))
            best = logits.topk(top)
            its_ids[:], its_logp[:] = best.indices, best.values - logits.logsumexp(-1, keepdim=True)
    return {"ids": ids, "top_ids": top_ids, "top_logp": top_logp, "own": learn[:, 1:]}


def batches(name, work, seconds, batch):
    """Batches, dicts of arrays, into work/<name>-NNN.npz until `seconds` are spent or batch(n) gives none;
    those that are there already count as their own time."""
    report, spent, n, tokens = Progress(name), 0.0, 0, 0
    while spent < seconds:
        path, began = work / f"{name}-{n:03d}.npz", time.monotonic()
        if not path.exists():
            rows = batch(n)
            if rows is None:
                return
            np.savez(path, **rows)
            tokens += rows["own"].size
        took = time.monotonic() - began
        spent += min(took, seconds / 4)
        n += 1
        report(f"batch {n}  {tokens / max(spent, 1e-3):.0f} tokens/s  {tokens / 1e6:.2f}M tokens  left "
               f"{clock(max(0, seconds - spent))}",
               force=spent >= seconds)


def read(model, rows, recipe, work, seconds):
    """The corpus's rows (ids, mask), into work/told-read-NNN.npz."""
    size = recipe.generate_tokens + 1
    ids, learn = (part[:, : part.shape[1] // size * size].reshape(-1, size) for part in rows)

    def batch(n):
        at = slice(n * recipe.generate_batch, (n + 1) * recipe.generate_batch)
        return score_rows(model, ids[at], learn[at], recipe.top) if len(ids[at]) else None

    batches("told-read", work, seconds, batch)


def generate(model, tokenizer, requests, running, recipe, work, seconds):
    """The target's own texts, into work/told-NNN.npz."""

    def batch(n):
        rng = random.Random(recipe.seed * 1000 + n)
        source = prompts(tokenizer, requests, running, rng)
        asked = [next(source) for _ in range(recipe.generate_batch)]
        ids, own = write_texts(model, asked, recipe.generate_tokens, seed=rng.randrange(1 << 30),
                               **WAYS[n % len(WAYS)])
        return score_rows(model, ids, own, recipe.top)

    batches("told", work, seconds, batch)
