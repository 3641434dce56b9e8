"""The draft learns the target's choices: at every position of the target's own text,
what pybmc chat may choose, and its first choice."""

import math

import numpy as np
import torch

from .generate import CHAT

FIRST_CHOICE = 0.5      # weight of the first choice beside the distribution's


def told_rows(work):
    """All generated rows of the work folder, as one dict of arrays."""
    parts = [np.load(path) for path in sorted(work.glob("told-*.npz"))]
    return {key: np.concatenate([p[key] for p in parts]) for key in ("ids", "top_ids", "top_logp", "own")}


def told_batches(schedule, told, seed):
    """Batches in a fresh order each round. A micro batch: ids (n, n_tok),
    top ids and log probabilities (n, n_tok, top), mask (n, n_tok)."""
    n_rows, n_tok = told["own"].shape
    n = max(1, schedule.batch_tokens // n_tok)

    def batch(spent, cursor):
        done = cursor.get("row", 0)
        if done % n_rows + n > n_rows:
            done += n_rows - done % n_rows
        order = np.random.default_rng((seed, done // n_rows)).permutation(n_rows)
        at = np.sort(order[done % n_rows : done % n_rows + n])
        cursor["row"] = done + n
        part = lambda key, kind: torch.from_numpy(told[key][at].astype(kind))
        return [(part("ids", "int64")[:, :-1], part("top_ids", "int64"), part("top_logp", "float32"),
                 part("own", "float32"))]

    return batch


def narrowed(top_logp):
    """Chances of the target's top tokens (log probabilities,
    likeliest first) once CHAT's settings have narrowed them."""
    shares = top_logp.exp()
    kept = (shares.cumsum(-1) - shares < CHAT["top_p"]) & (top_logp >= top_logp[..., :1]
                                                           + math.log(CHAT["min_p"]))
    kept &= torch.arange(top_logp.shape[-1]) < CHAT["top_k"]
    return torch.where(kept, top_logp / CHAT["temperature"], -torch.inf).softmax(-1)


def told_loss(model, compiled):
    """Cross entropy of the target's choices with the draft's, at CHAT's temperature,
    and of its first choice: the tails, which are never chosen, are not worth a small model's weights."""

    def loss_of(ids, top_ids, top_logp, own):
        logits = model.logits(ids).float()
        logp = lambda z: z.gather(-1, top_ids) - z.logsumexp(-1, keepdim=True)
        choices = (narrowed(top_logp) * logp(logits / CHAT["temperature"])).sum(-1)
        return -((choices + FIRST_CHOICE * logp(logits)[..., 0]) * own).sum()

    return torch.compile(loss_of, dynamic=False) if compiled else loss_of
