"""Training by a clock of its own: Muon for the matrices, AdamW for the rest,
checkpoints that a later call goes on from."""

import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

LONGEST_STEP = 20.0     # seconds; a step that took longer was interrupted, and counts as this


def rate_at(schedule, spent):
    """The learning rate's factor after `spent` (0..1) of the time: up, level, then straight down to zero."""
    if spent < schedule.warm_up:
        return max(spent / schedule.warm_up, 0.02)
    return min(1.0, max(0.0, (1.0 - spent) / (1.0 - schedule.decay_from)))


def optimizers(model, schedule):
    """Muon turns the blocks' matrices; AdamW moves the embedding (not decayed) and the norms."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if p.dim() == 1 or not name.startswith("blocks")]
    return (
        torch.optim.Muon(matrices, lr=schedule.muon_rate, weight_decay=schedule.weight_decay, momentum=0.95),
        torch.optim.AdamW(rest, lr=schedule.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    )


class Progress:
    """One line: step, loss, tokens/s, time left.
    On a terminal it rewrites itself, in a log it comes every half minute."""

    def __init__(self, name, out=sys.stderr):
        self.name, self.out, self.last = name, out, 0.0
        self.live = out.isatty()

    def __call__(self, text, force=False):
        if force or time.monotonic() - self.last > (1 if self.live else 30):
            self.last = time.monotonic()
            print(f"{self.name}  {text}", end="\r" if self.live else "\n", file=self.out, flush=True)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Trainer:
    """Steps until the schedule's seconds, or the share `until` of them, are spent.

    `batch(spent, cursor)` gives a step's micro batches, tuples that end with the mask of the tokens to learn;
    `loss_of(*micro batch)` the loss summed over them. `after` is a trainer whose clock and place in the data
    this one takes over, `cursor` such a place alone.
    """

    def __init__(self, name, model, schedule, loss_of, batch, checkpoint, until=1.0, after=None, cursor=None,
                 save_every=180.0):
        self.name, self.model, self.schedule, self.loss_of, self.batch = name, model, schedule, loss_of, batch
        self.optimizers = optimizers(model, schedule)
        for block in model.blocks:
            block.dropout.p = schedule.dropout
        self.checkpoint, self.save_every, self.end = Path(checkpoint), save_every, until * schedule.seconds
        self.step, self.seconds, self.tokens, self.cursor = 0, 0.0, 0, dict(cursor or {})
        if after:
            self.step, self.seconds = after.step, after.seconds
            self.tokens, self.cursor = after.tokens, dict(after.cursor)
        if self.checkpoint.exists():
            self.load()

    def load(self):
        saved = torch.load(self.checkpoint, weights_only=True, map_location=torch.get_default_device())
        self.model.load_state_dict(saved["weights"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.step, self.seconds, self.tokens, self.cursor = (saved[k]
                                                             for k in ("step", "seconds", "tokens", "cursor"))

    def save(self):
        part = self.checkpoint.with_suffix(".part")
        torch.save({
            "weights": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step, "seconds": self.seconds, "tokens": self.tokens, "cursor": self.cursor,
        }, part)
        os.replace(part, self.checkpoint)

    def counts(self):
        """What the training came to."""
        return {"steps": self.step, "tokens": self.tokens, "seconds": round(self.seconds)}

    def set_rates(self, spent):
        for optimizer, rate in zip(self.optimizers, (self.schedule.muon_rate, self.schedule.adam_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(self.schedule, spent)

    def train_step(self, spent):
        """One update; returns the mean loss of its tokens, in nats."""
        device = torch.get_default_device()
        micro = [tuple(part.to(device) for part in parts) for parts in self.batch(spent, self.cursor)]
        total, count = 0.0, sum(int(m[-1].abs().sum()) for m in micro)
        for part in micro:
            loss = self.loss_of(*part) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.set_rates(spent)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tokens += sum(m[-1].numel() for m in micro)
        return total

    def run(self):
        report, smooth, speed, saved = Progress(self.name), None, None, time.monotonic()
        while self.seconds < self.end:
            began, tokens = time.monotonic(), self.tokens
            loss = self.train_step(self.seconds / self.schedule.seconds)
            took = time.monotonic() - began
            self.seconds += min(took, LONGEST_STEP)
            self.step += 1
            smooth = loss if smooth is None else 0.97 * smooth + 0.03 * loss
            speed = ((self.tokens - tokens) / took if speed is None
                     else 0.9 * speed + 0.1 * (self.tokens - tokens) / took)
            report(f"step {self.step}  loss {smooth:.3f}  {speed:.0f} tokens/s  {self.tokens / 1e6:.2f}M "
                   f"tokens  left {clock(self.schedule.seconds - self.seconds)}")
            if time.monotonic() - saved > self.save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        report(f"step {self.step}  loss {smooth or math.nan:.3f}  {self.tokens / 1e6:.2f}M tokens  done",
               force=True)


def take(rows, learn, cursor, key, n):
    """The next n rows after the cursor, round and round:
    ids (n, length) int64 and mask of the tokens to predict (n, length - 1)."""
    at = [(cursor.get(key, 0) + i) % len(rows) for i in range(n)]
    cursor[key] = (cursor.get(key, 0) + n) % len(rows)
    return torch.from_numpy(rows[at].astype("int64")), torch.from_numpy(learn[at][:, 1:].astype("float32"))


def text_batches(schedule, short, long):
    """Batches of text rows: short = (ids, mask) of n_ctx + 1 tokens a row,
    long = the same of twice as many for the end, or None."""

    def batch(spent, cursor):
        key, (rows, learn) = ("long", long) if spent >= schedule.long_from else ("short", short)
        n_tok = rows.shape[1] - 1
        micro = max(1, schedule.micro_rows * (short[0].shape[1] - 1) // n_tok)
        n_micro = max(1, schedule.batch_tokens // (micro * n_tok))
        return [take(rows, learn, cursor, key, micro) for _ in range(n_micro)]

    return batch


def text_loss(model, bf16, compiled):
    """Cross entropy of the next token, summed where the mask is 1;
    where it is -1, that of the next token being another one."""

    def loss_of(ids, learn):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            logits = model.logits(ids[:, :-1]).flatten(0, 1).float()
            loss, learn = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none"), learn.flatten()
            # of -log p, so that a token that is nearly certain moves too
            other = -torch.log(-torch.expm1(-loss.clamp_min(1e-7)))
            return (loss * learn.clamp_min(0) + other * (-learn).clamp_min(0)).sum()

    return torch.compile(loss_of, dynamic=False) if compiled else loss_of
