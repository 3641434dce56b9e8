"""A target and a drafter that only take time, by a clock of their own: to see what a controller makes of it."""

import random

import numpy as np

from pybmc.controller import Controller, CostCurve, FixedLength, Source
from pybmc.decode import Chooser, Stats, alone
from pybmc.drafters import Draft, mark
from pybmc.engine.sampler import Sampler
from pybmc.engine.session import Best
from pybmc.speculate import Speculation


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Target:
    """Says the numbers that truth holds; a pass of n tokens takes cost(n)."""

    context = None

    def __init__(self, truth, cost, clock, noise, rng, busy):
        self.truth, self.cost, self.clock, self.noise, self.rng, self.busy = truth, cost, clock, noise, rng, busy
        self.position = 1

    @property
    def tokens(self):
        return []

    def eval(self, tokens, want="best", sampler=None):
        self.clock.now += self.busy(self.position, self.cost(len(tokens))) * self.rng.lognormvariate(0, self.noise)
        at, n = self.position, len(tokens)
        self.position += n
        return Best(np.array(self.truth[at + 1:at + 1 + n]), np.zeros(n))

    def rewind(self, n):
        self.position = n

    def reserve(self, rows):
        pass


class Guesser:
    """Right with probability share(position); takes d seconds a token. honest: its marks tell what will come true."""

    def __init__(self, truth, share, d, clock, rng, honest, busy):
        self.truth, self.share, self.d, self.clock, self.rng, self.honest, self.busy = truth, share, d, clock, rng, honest, busy

    def follow(self, text):
        pass

    def lag(self, text):
        return 0

    def propose(self, text, k, p_min, sampler):
        ids, marks, share = [], [], self.share(len(text))
        for i in range(k):
            sure = self.rng.betavariate(4 * share, 4 * (1 - share)) if self.honest and 0 < share < 1 else share
            ids.append(self.truth[len(text) + i] if self.rng.random() < sure else -1)
            marks.append(mark(sure) if self.honest else 12)
            self.clock.now += self.busy(len(text), self.d)
            if self.honest and sure < p_min:
                break
        return Draft(ids, marks)

    def close(self):
        pass


def run(cost, share, d, n=1000, controller=None, noise=0.03, seed=0, known=True, honest=False,
        record=None, busy=lambda position, seconds: seconds, marks=None):
    """Tokens a second, and the Stats, of n tokens. share: a number, or a function of the position; record: what is believed
    of the drafter; busy: what work of so many seconds takes there; marks: positions, of which the times are added."""
    rng, clock = random.Random(seed), Clock()
    truth = [rng.randrange(1000) for _ in range(n + 64)]
    target = Target(truth, cost, clock, noise, rng, busy)
    if controller is None:
        controller = Controller(CostCurve({w: cost(w) for w in (1, 2, 4, 8, 16)} if known else None))
    speculation = Speculation(None, None, "draft", controller=controller, clock=clock)
    if record:
        speculation.source("draft", "best").recall(record)
    chance = share if callable(share) else lambda position: share
    speculation.drafter = Guesser(truth, chance, d, clock, rng, honest, busy)
    stats = Stats()
    loop = speculation.loop(target, [truth[0]], Best(np.array(truth[1:2]), np.zeros(1)), Chooser(Sampler()), n, stats)
    target.position = 1
    choices = alone(loop, target, clock)
    for i in range(n):
        next(choices)
        if marks and i in marks:
            marks[i] = clock.now
    choices.close()
    return n / clock.now, stats


def fixed(cost, share, d, k, **settings):
    return run(cost, share, d, controller=FixedLength(k), **settings)[0]


def cheap_controller():
    """A controller of a model whose first few tokens in a pass are nearly free, and a drafter that is right at 80%."""
    controller = Controller(CostCurve({n: 1 + 0.02 * (n - 1) if n <= 6 else 1.1 + 0.15 * (n - 6) for n in range(1, 33)}))
    source = Source("draft", [0.8] * 16, 0.8)
    for k in (1, 2, 4, 8):
        source.seconds.add(k, 0.1 * k)
    return controller, source
