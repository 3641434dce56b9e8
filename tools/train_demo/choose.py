"""What the target learns from its own answers:
the best of several to a request, and not to go round in circles.

Best of n, learned: RAFT, arXiv 2304.06767. What it should not say again: unlikelihood, arXiv 1908.04319.
"""

import random
import re

import numpy as np

from pybmc.engine.perplexity import token_losses

from .generate import CHAT, batches, write_texts
from .text import DETERMINERS, FUNCTION, GO_ON, OPEN_REQUESTS, REQUESTS
from .tokens import ask

RUN, RUNS = 4, 0.08     # this many tokens that stood there before are a repetition; their largest share
LOOP = 6                # of a greedy text, the last of this many tokens that stood there before is avoided
HANG = 2.0              # weight of what hangs together beside what is likely at all
BLIND = 8               # tokens at the start of a second half are a surprise wherever it was cut
FORM = DETERMINERS | FUNCTION | set(re.findall("[a-z]+",
                                               " ".join((*REQUESTS, *OPEN_REQUESTS, *GO_ON)).lower()))


def subjects(request):
    """The words of a request that its tale should have."""
    return {word.removesuffix("s") for word in re.findall("[a-z]+", request.lower())} - FORM


def share_named(request, answer):
    """How many of the request's subjects the answer names, as a share; 1 where it asks for none."""
    wanted, said = subjects(request), {word.removesuffix("s")
                                       for word in re.findall("[a-z]+", answer.lower())}
    return len(wanted & said) / len(wanted) if wanted else 1.0


def repeated(ids, n):
    """Which tokens end a run of n that stood there before, as a list of bools."""
    seen, found = set(), []
    for end in range(1, len(ids) + 1):
        run = tuple(ids[end - n : end]) if end >= n else None
        found.append(run in seen)
        if run:
            seen.add(run)
    return found


class Judge:
    """Says how well answers hang together, by the target's own measure."""

    def __init__(self, model, tokenizer):
        self.session, self.open = model.session(), tokenizer.encode(ask(OPEN_REQUESTS[0])).ids

    def log_p(self, prompt, told):
        """Of each token of `told` after `prompt` (ids)."""
        ids = np.array(prompt + told, np.int32)
        self.session.rewind(0)
        self.session.eval(ids[: len(prompt) - 1], logits="none")
        return -token_losses(self.session.eval(ids[len(prompt) - 1 : -1], logits="all"), ids[len(prompt) :])

    def __call__(self, prompt, told):
        """Nats a token: how likely the answer is, and by how much each half is likelier for what
        stands before it."""
        half = len(told) // 2
        known = self.log_p(prompt, told)
        alone = np.concatenate([self.log_p(self.open, told[:half]), self.log_p(self.open, told[half:])])
        counts = np.ones(len(told), bool)
        counts[half : half + BLIND] = False
        return (known + HANG * (known - alone))[counts].mean()


def best_answers(asked, answers, shortest, tokenizer, judge):
    """For each request the best of its answers, of `shortest` tokens or more, or None.
    asked: (request, prompt ids); answers: for each the ids that were told."""
    for (request, prompt), told in zip(asked, answers):
        sound = [t for t in told if len(t) >= shortest and np.mean(repeated(t, RUN)) <= RUNS]
        named = [share_named(request, tokenizer.decode(t)) for t in sound]
        most = max(named, default=0.0)
        (yield max((t for t, share in zip(sound, named) if share == most), key=lambda t: judge(prompt, t))
         if most > 0.5 else None)


def write_chosen(model, tokenizer, requests, recipe, work, name, seconds):
    """The best answers to requests, into work/<name>-NNN.npz: ids (n, n_tok + 1), and own,
    which of them are the answer's."""
    judge = Judge(model, tokenizer)

    def batch(n):
        rng = random.Random(f"{recipe.seed} {name} {n}")
        asked = [(request, tokenizer.encode(ask(request)).ids)
                 for request in rng.sample(requests, min(recipe.choose_batch, len(requests)))]
        prompts = [prompt for _, prompt in asked]
        told = [write_texts(model, prompts, recipe.generate_tokens, seed=rng.randrange(1 << 30), **CHAT)
                for _ in range(recipe.answers)]
        answers = [[ids[i][own[i] > 0].tolist() for ids, own in told] for i in range(len(asked))]
        best = [(prompt, t) for (_, prompt), t
                in zip(asked, best_answers(asked, answers, recipe.generate_tokens // 5, tokenizer, judge))
                if t]
        ids, own = (np.zeros((len(best), recipe.generate_tokens + 1), kind) for kind in (np.uint16, np.int8))
        for row, mine, (prompt, t) in zip(ids, own, best):
            n_tok = len(prompt) + len(t)
            row[:n_tok], mine[len(prompt) : n_tok] = prompt + t, 1
        return {"ids": ids, "own": own}

    batches(name, work, seconds, batch)


def write_circles(model, tokenizer, requests, recipe, work, name, seconds):
    """Greedy texts, into work/<name>-NNN.npz: ids, and own, which is -1 where the text goes round in
    circles and 0 elsewhere."""

    def batch(n):
        rng = random.Random(f"{recipe.seed} {name} {n}")
        asked = rng.sample(requests, min(recipe.generate_batch, len(requests)))
        ids, own = write_texts(model, [tokenizer.encode(ask(request)).ids for request in asked],
                               recipe.generate_tokens, temperature=0.0)
        for row, mine in zip(ids, own):
            its = mine > 0
            mine[its] = -np.array(repeated(row[its].tolist(), LOOP), np.int8)
        return {"ids": ids, "own": own}

    batches(name, work, seconds, batch)


def told_documents(work, name, newline):
    """Documents of such files: (ids, own) as tokens.encode_documents gives them;
    a line ends behind an end of turn."""
    for path in sorted(work.glob(f"{name}-*.npz")):
        saved = np.load(path)
        for ids, own in zip(saved["ids"], saved["own"]):
            n_tok = int(np.flatnonzero(ids)[-1]) + 1
            yield np.append(ids[:n_tok], newline).astype(np.uint16), np.append(own[:n_tok], 0).astype(np.int8)
