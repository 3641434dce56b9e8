"""What the draft learns from: the target's own text, and the corpus, with the target's likeliest tokens at every position."""

import math
import random
import time

import numpy as np
import torch

from .model import KVCache
from .tokens import END_OF_TURN, ask
from .train import Progress, clock

TEMPERATURES = (0.0, 0.8)           # rows take turns
MIN_P = 0.05                        # as pybmc chat: what is less likely than this share of the likeliest is not chosen
PREFIX_SHARE = 0.15                 # rows that go on from corpus text rather than from a request
PREFIX_TOKENS = 24


def prompts(tokenizer, requests, running, rng):
    """Endless first prompts: mostly requests in the template's form, some beginnings of running text. running: ids of one long text."""
    while True:
        if rng.random() < PREFIX_SHARE:
            start = rng.randrange(len(running) - PREFIX_TOKENS)
            yield [int(i) for i in running[start : start + PREFIX_TOKENS]]
        else:
            yield tokenizer.encode(ask(rng.choice(requests))).ids


def seeded(seed):
    """A generator of random numbers where tensors are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def pick(logits, temperature, generator):
    """One token a row, by MIN_P and each row's temperature (0: the likeliest). logits (batch, vocab_size), temperature (batch,)."""
    logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(MIN_P), -torch.inf)
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()      # Gumbel
    return (logits + noise * temperature[:, None]).argmax(-1)


@torch.inference_mode()
def generate_rows(model, prompt_of, temperature, n_tok, top, end_id, next_turn, generator):
    """A batch of rows that grow in step. A row reads its prompt token by token, then writes; when its turn ends it reads the next request.

    prompt_of: list of id lists; temperature (batch,). Returns ids (batch, n_tok + 1), top ids and their log probabilities
    (batch, n_tok, top), and own (batch, n_tok): 1 where the following token was the model's choice.
    """
    batch = len(prompt_of)
    cache = KVCache(model.config, batch, n_tok)
    waiting = [list(p) for p in prompt_of]
    ids = torch.zeros(batch, n_tok + 1, dtype=torch.long)
    ids[:, 0] = torch.tensor([w.pop(0) for w in waiting])
    top_ids = torch.zeros(batch, n_tok, top, dtype=torch.int32)
    top_logp = torch.zeros(batch, n_tok, top, dtype=torch.float16)
    own = torch.zeros(batch, n_tok, dtype=torch.uint8)
    for pos in range(n_tok):
        logits = model.logits(ids[:, pos : pos + 1], cache)[:, 0]
        best = logits.topk(top)
        top_ids[:, pos], top_logp[:, pos] = best.indices, best.values - logits.logsumexp(-1, keepdim=True)
        ids[:, pos + 1] = pick(logits, temperature, generator)
        for row, left in enumerate(waiting):
            if left:
                ids[row, pos + 1] = left.pop(0)
            else:
                own[row, pos] = 1
                if ids[row, pos + 1] == end_id:
                    waiting[row] = next_turn()
    return ids, top_ids, top_logp, own


def save_rows(path, rows):
    ids, top_ids, top_logp, own = (r.cpu().numpy() for r in rows)
    np.savez(path, ids=ids.astype(np.uint16), top_ids=top_ids.astype(np.uint16), top_logp=top_logp, own=own)


@torch.inference_mode()
def score_rows(model, ids, learn, top):
    """Rows that are written already: ids (batch, n_tok + 1), learn likewise. Returns what generate_rows does; own says where to learn."""
    logits = model.logits(ids[:, :-1]).float()
    best = logits.topk(top)
    logp = best.values - logits.logsumexp(-1, keepdim=True)
    return ids, best.indices.to(torch.int32), logp.to(torch.float16), learn[:, 1:]


def read(model, rows, recipe, work, seconds):
    """Batches of the corpus's rows (ids, mask) into work/told-read-NNN.npz, likewise."""
    report, spent, n, size = Progress("read"), 0.0, 0, recipe.generate_tokens + 1
    ids, learn = (part[:, : part.shape[1] // size * size].reshape(-1, size) for part in rows)
    while spent < seconds and (n + 1) * recipe.generate_batch <= len(ids):
        path, began = work / f"told-read-{n:03d}.npz", time.monotonic()
        at = slice(n * recipe.generate_batch, (n + 1) * recipe.generate_batch)
        if not path.exists():
            batch = torch.from_numpy(ids[at].astype("int64")).to(torch.get_default_device())
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.bf16):
                save_rows(path, score_rows(model, batch, torch.from_numpy(learn[at]), recipe.top))
        spent += min(time.monotonic() - began, seconds / 4)
        n += 1
        report(f"batch {n}  {n * ids[at].size / 1e6:.2f}M tokens  left {clock(max(0, seconds - spent))}", force=spent >= seconds)


def generate(model, tokenizer, requests, running, recipe, work, seconds):
    """Batches of rows into work/told-NNN.npz until `seconds` are spent; batches that are there already count as their own time."""
    report, spent = Progress("generate"), 0.0
    end_id, turn_break = tokenizer.token_to_id(END_OF_TURN), tokenizer.encode("\n").ids
    n = 0
    while spent < seconds:
        path, began = work / f"told-{n:03d}.npz", time.monotonic()
        rng = random.Random(recipe.seed * 1000 + n)
        source = prompts(tokenizer, requests, running, rng)
        if not path.exists():
            temperature = torch.tensor([TEMPERATURES[i % len(TEMPERATURES)] for i in range(recipe.generate_batch)])
            save_rows(path, generate_rows(
                model, [next(source) for _ in temperature], temperature, recipe.generate_tokens, recipe.top, end_id,
                lambda: turn_break + tokenizer.encode(ask(rng.choice(requests))).ids, seeded(recipe.seed * 1000 + n),
            ))
        took = time.monotonic() - began
        spent += min(took, seconds / 4)
        n += 1
        tokens = recipe.generate_batch * recipe.generate_tokens
        report(f"batch {n}  {tokens / took:.0f} tokens/s  {n * tokens / 1e6:.2f}M tokens  left {clock(max(0, seconds - spent))}", force=spent >= seconds)
