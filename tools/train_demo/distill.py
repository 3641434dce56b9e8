"""The draft learns the target's choices: at every position of the target's own text, its whole distribution and its first choice."""

import numpy as np
import torch

FIRST_CHOICE = 0.5      # weight of the first choice beside the distribution's


def told_rows(work):
    """All generated rows of the work folder, as one dict of arrays."""
    parts = [np.load(path) for path in sorted(work.glob("told-*.npz"))]
    return {key: np.concatenate([p[key] for p in parts]) for key in ("ids", "top_ids", "top_logp", "own")}


def told_batches(schedule, told, seed):
    """Batches in a fresh order each round. A micro batch: ids (n, n_tok), top ids and log probabilities (n, n_tok, top), mask (n, n_tok)."""
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
        return [(part("ids", "int64")[:, :-1], part("top_ids", "int64"), part("top_logp", "float32"), part("own", "float32"))]

    return batch


def told_loss(model, compiled):
    """Kullback-Leibler from the target's distribution (its top tokens, and the rest as one) to the draft's, and its first choice's cross entropy."""

    def loss_of(ids, top_ids, top_logp, own):
        logits = model.logits(ids).float()
        logp = logits.gather(-1, top_ids) - logits.logsumexp(-1, keepdim=True)      # the draft's, of the target's top tokens
        rest = lambda lp: (1 - lp.exp().sum(-1)).clamp_min(1e-5)
        p, p_rest = top_logp.exp(), rest(top_logp)
        divergence = (p * (top_logp - logp)).sum(-1) + p_rest * (p_rest.log() - rest(logp).log())
        return ((divergence - FIRST_CHOICE * logp[..., 0]) * own).sum()

    return torch.compile(loss_of, dynamic=False) if compiled else loss_of
