"""What the pair is worth: bits per byte of text it never saw, next to xz,
and how many drafted tokens the target accepts."""

import lzma
import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from . import simulate
from .choose import LOOP, repeated, share_named
from .generate import CHAT, write_texts
from .model import KVCache
from .tokens import END_OF_TURN, ask

K = 4                       # tokens drafted a round
KNOWN, SIMULATED = 8, 10_000    # this many tokens in a row of one of that many simulated tales are its words
MIN_P = CHAT["min_p"]       # what is less likely than this share of the likeliest is not chosen for a tale


@torch.inference_mode()
def bits_per_byte(model, tokenizer, text):
    """Every token scored once: windows of n_ctx tokens, each half a window on;
    all but the first half have half a window before them."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    n_ctx, nats, at = model.config.n_ctx, math.log(model.config.vocab_size), 1
    while at < len(ids):
        begin = max(0, at - n_ctx // 2)
        window = ids[begin : begin + n_ctx + 1]
        new = slice(at - begin - 1, len(window) - 1)
        logits = model.logits(window[None, :-1])[0, new]
        nats += F.cross_entropy(logits.float(), window[1:][new], reduction="sum").item()
        at = begin + len(window)
    return {"bits_per_byte": nats / math.log(2) / len(text.encode()), "tokens": len(ids),
            "nats_per_token": nats / len(ids)}


def xz_bits_per_byte(text, known=""):
    """xz -9e on the text alone, or what the text adds to `known` text before it."""
    size = lambda s: len(lzma.compress(s.encode(), preset=9 | lzma.PRESET_EXTREME))
    return 8 * (size(known + text) - (size(known) if known else 0)) / len(text.encode())


def seeded(seed):
    """A generator of random numbers where tensors are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def pick(logits, temperature, generator):
    """A token by MIN_P and temperature (0: the likeliest). logits (vocab_size,)."""
    logits = logits.masked_fill(logits < logits.max() + math.log(MIN_P), -torch.inf)
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()      # Gumbel
    return int((logits + noise * temperature).argmax())


@torch.inference_mode()
def answer(model, tokenizer, request, n_tok, temperature, seed):
    """Ids of the prompt and of an answer of up to n_tok tokens, with its end of turn where it came to one."""
    prompt, end = tokenizer.encode(ask(request)).ids, tokenizer.token_to_id(END_OF_TURN)
    n_tok, generator = min(n_tok, model.config.n_ctx - len(prompt) + 1), seeded(seed)
    cache, told = KVCache(model.config, 1, len(prompt) + n_tok - 1), []
    while len(told) < n_tok and end not in told[-1:]:
        logits = model.logits(torch.tensor([told[-1:] or prompt]), cache)[0, -1]
        told.append(pick(logits, temperature, generator))
    return prompt, told


def runs(ids, n):
    """A number for each run of n of the ids; equal runs have equal ones. uint64 (len(ids) - n + 1,)."""
    windows = (np.lib.stride_tricks.sliding_window_view(np.asarray(ids, np.uint64), n) if len(ids) >= n
               else np.empty((0, n), np.uint64))
    return (windows * np.cumprod(np.full(n, 0x9E3779B97F4A7C15, np.uint64))).sum(-1, dtype=np.uint64)


def simulated_runs(tokenizer):
    """The runs of KNOWN that stand in SIMULATED tales."""
    tales = ["\n\n".join(simulate.tale(random.Random(seed)).paragraphs) for seed in range(SIMULATED)]
    return np.unique(np.concatenate([runs(encoded.ids, KNOWN)
                                     for encoded in tokenizer.encode_batch_fast(tales)]))


def tales_told(model, tokenizer, requests, known, n_tok=200, seed=3):
    """What becomes of requests: how much of what they ask for is named, as a share, and of the tokens, how
    many go round in circles, and how many end one of the known runs; greedy and as pybmc chat chooses. model:
    pybmc's."""
    prompts = [tokenizer.encode(ask(request)).ids for request in requests]
    results = {}
    for way, settings in (("greedy", {"temperature": 0.0}), ("sampled", {**CHAT, "seed": seed})):
        told = [row[own > 0].tolist() for row, own in zip(*write_texts(model, prompts, n_tok, **settings))]
        named = [share_named(request, tokenizer.decode(t)) for request, t in zip(requests, told)]
        share = lambda counts: int(sum(counts)) / max(1, sum(map(len, told)))
        results[way] = {
            "named": float(np.mean(named)), "circles": share(sum(repeated(t, LOOP)) for t in told),
            "known": share(np.isin(runs(t, KNOWN), known).sum() for t in told),
        }
    return results


class Rounds:
    """Counts of drafting rounds: how many drafted tokens were accepted at each place of a round."""

    def __init__(self):
        self.rounds, self.tokens, self.accepted = 0, 0, [0] * K

    def add(self, n_accepted):
        self.rounds += 1
        self.tokens += n_accepted + 1
        for i in range(n_accepted):
            self.accepted[i] += 1

    def summary(self):
        return {
            "rounds": self.rounds, "drafted": self.rounds * K,
            "accepted": sum(self.accepted), "rate": sum(self.accepted) / (self.rounds * K),
            "by_position": [a / self.rounds for a in self.accepted],
            "tokens_a_round": self.tokens / self.rounds,
        }


@torch.inference_mode()
def greedy_acceptance(target, draft, tokenizer, requests, n_tok=128):
    """Speculation repeats the target's own text, so a round accepts as many tokens as the draft,
    reading that text, would choose alike."""
    counts = Rounds()
    for request in requests:
        prompt, told = answer(target, tokenizer, request, n_tok, 0.0, 0)
        ids = torch.tensor(prompt + told)
        alike = (draft.logits(ids[None, :-1])[0].argmax(-1) == ids[1:])[len(prompt) - 1 :].tolist()
        at = 1                                      # the prompt's own pass gives the first token
        while at < len(told):
            run = 0
            while run < K and at + run < len(told) and alike[at + run]:
                run += 1
            counts.add(run)
            at += run + 1
    return counts.summary()


def distribution(logits, temperature):
    return F.softmax(logits.float() / temperature, dim=-1)


@torch.inference_mode()
def sampled_acceptance(target, draft, tokenizer, requests, n_tok=128, temperature=0.8, seed=0):
    """Speculative sampling: a drafted token stays with probability min(1, p / q);
    the first refused one is drawn anew from max(0, p - q)."""
    counts, end = Rounds(), tokenizer.token_to_id(END_OF_TURN)
    g = seeded(seed)
    draw = lambda p: int(torch.multinomial(p, 1, generator=g))
    for request in requests:
        ids = tokenizer.encode(ask(request)).ids
        goal = min(len(ids) + n_tok, target.config.n_ctx - K - 1)
        caches = [KVCache(m.config, 1, goal + K + 1) for m in (target, draft)]
        step = lambda model, cache: distribution(model.logits(torch.tensor([ids[cache.length :]]), cache)[0],
                                                 temperature)
        ids.append(draw(step(target, caches[0])[-1]))
        while len(ids) < goal and ids[-1] != end:
            begin, q = len(ids), []
            for _ in range(K):
                q.append(step(draft, caches[1])[-1])
                ids.append(draw(q[-1]))
            p = step(target, caches[0])[-K - 1 :]
            n = 0
            while n < K and torch.rand(1, generator=g) * q[n][ids[begin + n]] < p[n][ids[begin + n]]:
                n += 1
                if ids[begin + n - 1] == end:
                    break
            counts.add(n)
            ended = n and ids[begin + n - 1] == end
            del ids[begin + n :]
            if not ended:
                ids.append(draw(p[n] if n == K else (p[n] - q[n]).clamp_min(0)))
            for cache in caches:
                cache.length = min(cache.length, len(ids) - 1)
    return counts.summary()
