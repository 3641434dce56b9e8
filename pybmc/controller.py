"""How many tokens to draft: what a pass costs by its width, how often drafts come true, and the best of it.

    rate(k) = tokens that k drafts may give / (pass of k + 1 tokens + k drafts)

k = 0, plain decoding, is always among the choices. Everything is measured while the text is written: the cost of
passes by their width, the drafter's, and acceptance by place and by mark (how sure the drafter was). What is
expected may be wrong, so drafting has a purse: it may lose a few tokens' time, a small share of all time, and what it
has gained, and no more. Nothing here knows of models: times come in as numbers, so a simulation can drive it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from operator import mul

from .cache import RECORD
from .costs import FADE, Average, CostCurve, DraftCost

WIDEST = 16                             # tokens in a draft
MIN_GAIN = 1.03                         # predicted, before speculating begins; it ends below 1
GRANT = 3.0                             # plain tokens whose time drafting may lose before it has gained any ..
ALLOWED = 0.01                          # .. and of each token's time, ever ..
BANK = 8.0                              # .. and at most at once, whatever it gained before
DEBT = 1.0                              # most that is kept of what a round lost beyond that: it may have met a hiccup
DECIDING, LOOKING = 0.003, 0.01         # of the time, for decisions against drafting; where only the text is looked at
KEPT = 6.0                              # drafts that what was seen in another run counts as
FIRST = 3                               # tokens of a first draft: what they take is not known yet
REST, REST_SECONDS = 32, 0.05           # plain tokens after a decision against drafting before the next: at most, or so long
EAGER, LATELY = 3, 0.3                  # .. of them, while the purse is full and guesses paid lately; what the last one counts in that
HOPELESS = 0.02                         # chance below which no more of a draft is looked at
CLEAR = 1.3                             # a gain that need not be looked at closely
TRIED = 4                               # rounds of a trial, at most
FRESH = 96                              # rounds after which a plain pass is measured again, sooner where the gain is not clear ..
EVERY = 40                              # .. which is after so many, the last two of them plain, where the library makes many in a call ..
COLD = 2                                # .. of which the first ones take longer


def telling(widths: Sequence[int]) -> list[int]:
    """Which passes of a call say by their time what such passes take: not the first ones, where there are others, and no plain one
    right after a wider one, which leaves the caches to it."""
    first = COLD if len(widths) > COLD else 0
    return [i for i in range(first, len(widths)) if widths[i] > 1 or i == 0 or widths[i - 1] == 1]


# ---- chances -----------------------------------------------------------------------------------------------


class Counts:
    """How often something came true, in each of n classes; what is older counts less."""

    def __init__(self, n: int):
        self._true, self._n = [0.0] * n, [0.0] * n

    def add(self, i: int, came_true: bool) -> None:
        self._true[i] = FADE * self._true[i] + came_true
        self._n[i] = FADE * self._n[i] + 1

    @property
    def seen(self) -> float:
        return sum(self._n)

    def record(self) -> list[list[float]]:
        return [[true, n] for true, n in zip(self._true, self._n)]

    def recall(self, record: Sequence[Sequence[float]]) -> None:
        """Take up what was seen another time; it counts as KEPT at most."""
        for i, (true, n) in enumerate(record[:len(self._n)]):
            share = min(1.0, KEPT / n) if n > 0 else 0.0
            self._true[i], self._n[i] = share * min(true, n), share * n


class Chances(Counts):
    """Where a class has seen little, its expectation counts, with the odds by which all classes together surpass theirs."""

    def __init__(self, expected: Sequence[float], weight: float = 4.0):
        super().__init__(len(expected))
        self._expected, self._weight = list(expected), weight

    def at(self, i: int) -> float:
        return self._at(i, self._odds())

    def each(self) -> list[float]:
        odds = self._odds()
        return [self._at(i, odds) for i in range(len(self._n))]

    def _at(self, i: int, odds: float) -> float:
        expected = self._expected[i] * odds / (1 - self._expected[i] * (1 - odds))
        return (self._true[i] + self._weight * expected) / (self._n[i] + self._weight)

    def _odds(self) -> float:
        n, true = sum(self._n) + 2 * self._weight, sum(self._true) + self._weight
        expected = sum(map(mul, self._n, self._expected)) + self._weight
        return true / (n - true) * (n - expected) / expected


class Chain(Counts):
    """Chance by place: of the i-th, given that those before came true. Places seen little take after the others."""

    def __init__(self, n: int, expected: float):
        super().__init__(n)
        self._expected = expected

    def fade(self, first: int) -> None:
        """What was seen of the places from `first` on, which are not tried now, is forgotten by and by."""
        for i in range(first, len(self._n)):
            self._true[i] *= FADE
            self._n[i] *= FADE

    def each(self) -> Iterator[float]:
        mean = (sum(self._true) + 2 * self._expected) / (sum(self._n) + 2)
        return ((t + 3 * mean) / (n + 3) for t, n in zip(self._true, self._n))


class Source:
    """What is known of one drafter: acceptance by place and by mark, length of its drafts, seconds a token."""

    def __init__(self, name: str, marks: Sequence[float], expected: float = 0.6, edges: Sequence[float] = ()):
        self.name, self.edges = name, edges             # edges: the drafter's confidence where one mark ends
        self.by_mark = Chances(marks)
        self.accepted = Chain(WIDEST, expected)         # checked and accepted, of those asked for
        self.offered = Chain(WIDEST, 0.9)               # worth checking, of those asked for
        self.seconds = DraftCost()
        self.reading = Average()                        # seconds for a token of the text that the drafter lacks

    @property
    def reading_seconds(self) -> float:
        """For a token that the drafter lacks. Many in a pass cost less than one by one."""
        return self.reading.value if self.reading.n else self.seconds.slope / 4

    def most(self, n: int) -> float:
        """The most seconds that a draft of n tokens counts as: more is a hiccup of the machine."""
        return 3 * self.seconds.at(n) if self.seconds.n > 1 else inf

    def record(self) -> dict[str, list[list[float]]]:
        """What is worth keeping for another run."""
        return {name: getattr(self, name).record() for name in RECORD}

    def recall(self, record: dict[str, list[list[float]]]) -> None:
        for name, rows in record.items():
            getattr(self, name).recall(rows)

    def least(self, chance: float) -> float:
        """The confidence from which on a token comes true with this chance at least."""
        marks = enumerate(self.edges)
        return next((self.edges[i - 1] if i else 0.0 for i, _ in marks if self.by_mark.at(i) >= chance),
                    self.edges[-1] if self.edges else chance)

    def learn(self, asked: int, checked: int, marks: Sequence[int], hits: Sequence[bool]) -> None:
        """A draft is over. hits: for each proposed token that could be judged, whether it came true; one that
        was proposed and not checked can be judged where it would have been next."""
        for i, (came_true, sure) in enumerate(zip(hits, marks)):
            self.by_mark.add(sure, came_true)
            if i < asked and i < checked:
                self.accepted.add(i, came_true)
        right = next((i for i, hit in enumerate(hits) if not hit), len(hits))
        if checked < asked and right >= checked:        # it stopped early, and had been right so far
            self.accepted.add(checked, False)
        for i in range(min(asked, checked + 1)):
            self.offered.add(i, i < checked)
        if asked:
            self.accepted.fade(asked)
            self.offered.fade(asked)


# ---- the choice --------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """k tokens to draft, and to stop after one that is less probable than p_min. trial: it is not expected to pay, and all are to be
    checked; patient: where no guess is worth it, decoding goes on plainly."""

    k: int
    p_min: float = 0.0
    trial: bool = False
    patient: bool = False
    gain: float = 1.0


@dataclass
class Account:
    """What drafting may lose, in tokens: the time that plain decoding takes for them."""

    purse: float = GRANT
    tokens: float = 0                   # of the texts so far; of several at a time, each one's share
    trials: float = 0.0                 # what trials lost
    lately: float = 0.0                 # gained at a time

    def enter(self, tokens: float, gained: float, trial: bool = False) -> None:
        """So many tokens of a text, and the tokens' time that drafting gained by them."""
        self.tokens += tokens
        self.lately += LATELY * (gained - self.lately)
        self.trials += max(0.0, -gained) if trial else 0.0
        self.purse = max(-DEBT, min(self.purse + gained + ALLOWED * tokens, BANK))

    def allows_trial(self, loss: float) -> bool:
        return loss <= self.purse and self.trials + loss <= ALLOWED * self.tokens


class Controller:
    """Plans rounds and learns from them. least and most bound a draft that is made at all."""

    def __init__(self, curve: CostCurve | None = None, most: int = WIDEST, least: int = 0):
        self.curve = curve or CostCurve()
        self.most, self.least = min(most, WIDEST), max(least, 1)
        self.min_gain = MIN_GAIN
        self.choosing = Average()       # seconds to choose a token from its row
        self.overhead = Average()       # seconds of a round for everything but the draft, the pass and choosing
        self.calling = Average()        # seconds around a call of the library, for rounds as for plain tokens
        self.account = Account()
        self._since_plain, self._active = 0, True
        self.rest, self._fresh = REST, FRESH
        self._warm = self._plain_before = True

    # ---- predictions

    @property
    def stale(self) -> bool:
        """Whether a plain pass is due: what speculation is compared with has to be known."""
        return self._since_plain >= self._fresh

    @property
    def resting(self) -> bool:
        """Whether drafting was found not to pay."""
        return not self._active

    def break_after(self, deciding: float, share: float = DECIDING) -> int:
        """Plain tokens before another decision like one against drafting, which took so long, and a call of the library on its own. The
        pass after it is slower than others, so that it costs more than its own share."""
        plain, deciding = self.plain(), deciding + self.calling.value
        if self.account.purse > BANK / 2 and self.account.lately > 0:
            return min(self.rest, EAGER)
        return min(max(self.rest, int(REST_SECONDS * plain)) if self.rest else 0, int(deciding * plain / share))

    def plain(self, others: int = 0) -> float:
        """Tokens a second without a draft. others: tokens of other sequences that share the pass."""
        return (1 + others) / (self.curve.at(1 + others) + self.choosing.value)

    def rate(self, tokens: float, width: float, drafting: float, others: int = 0, hoped: bool = False) -> float:
        """Tokens a second of rounds that give so many tokens from passes of a mean width, after so long drafting. hoped: if passes
        cost as little as they may."""
        cost = self.curve.hope if hoped else self.curve.at
        return (tokens + others) / (cost(width + others) + drafting + tokens * self.choosing.value)

    def loss(self, k: int, drafting: float, others: int = 0) -> float:
        """Plain tokens whose time a round takes too long if none of its k drafted tokens comes true."""
        return (self.curve.at(k + 1 + others) + drafting) / self.curve.at(1 + others) - 1

    def trials(self, k: int, drafting: float) -> int:
        """Rounds of a trial: what the drafter lacks of the text is read once for all of them. As many, TRIED at most, as the purse can lose."""
        return max(1, min(TRIED, int(self.account.purse / max(self.loss(k, drafting), 1e-9))))

    def affordable(self, k: int) -> int:
        """As many of k drafted tokens as the purse can lose, where a draft takes no time."""
        while k and self.loss(k, 0.0) > self.account.purse:
            k -= 1
        return k

    def plan(self, source: Source, room: int, others: int = 0, lag: float = 0.0, new: bool = False) -> Plan:
        """What to ask of a drafter whose drafts cost time. room: the most tokens that may be drafted.

        lag: seconds that it needs first, to catch up; new: with a prompt, which counts only if drafting is not expected to pay.
        """
        most = min(self.most, room)
        if most < self.least:
            return Plan(0)
        source.seconds.follow(self.curve.at(1))
        best, plain = self._best(source, most, others), self.plain(others)
        best.gain /= plain
        known = source.seconds.n > 1    # a single draft may have met a hiccup
        self._active = best.gain >= (1.0 if self._active else self.min_gain) or not known
        if not self._active:
            loss = self.loss(self.least, lag + source.seconds.at(self.least), others)
            return Plan(self.least, trial=True) if self.account.allows_trial(loss) else Plan(0)
        if not known:
            best.k = max(self.least, min(best.k, FIRST))
        while best.k and self.loss(best.k, source.seconds.at(best.k) + (0.0 if new else lag), others) > self.account.purse:
            best.k = best.k - 1 if best.k > self.least else 0
        if not best.k:
            self._active = False
            return Plan(0)
        step = (self.curve.at(best.k + 1 + others) - self.curve.at(1 + others)) / best.k
        best.p_min = source.least(min(0.9, (source.seconds.slope + step) * plain * best.gain))
        self._fresh = FRESH if best.gain > CLEAR else FRESH // 6
        return best

    def _best(self, source: Source, most: int, others: int) -> Plan:
        """The best k from 1 up; its gain is a rate yet."""
        tokens, width, right, offered, best, most_rate, next_rate = 1.0, 1.0, 1.0, 1.0, 0, 0.0, 0.0
        start, slope = source.seconds.line()
        for k, (true, offer) in enumerate(zip(source.accepted.each(), source.offered.each()), 1):
            right *= true
            tokens += right
            offered *= offer
            width += offered
            drafting = max(0.0, start + k * slope) + self.overhead.value
            rate = self.rate(tokens, width, drafting, others)
            if k >= self.least and rate > most_rate:
                best, most_rate = k, rate
            elif k == best + 1:
                next_rate = self.rate(tokens, width, drafting, others, hoped=True)
            if k == most or k > max(best, self.least) + 4:      # past the best, and past any step of the costs
                break
        hopeful = best < most and next_rate > most_rate and self.account.purse > BANK / 2
        return Plan(best + hopeful, gain=most_rate)

    def cut(self, source: Source, marks: Sequence[int], spent: float, others: int = 0) -> tuple[int, float]:
        """How many tokens of a draft to check, as far as the purse goes, and the rate that this gives. spent: seconds the
        draft took."""
        tokens, right, best = 1.0, 1.0, (0, self.rate(1, 1, spent, others))
        for n, sure in enumerate(marks, 1):
            right *= source.by_mark.at(sure)
            tokens += right
            rate = self.rate(tokens, n + 1, spent, others, hoped=True)
            if n >= self.least and rate > best[1]:
                if self.loss(n, 0.0, others) > self.account.purse:
                    break
                best = n, rate
            elif right < HOPELESS:
                break
        return best

    def terms(self, source: Source, k: int) -> dict:
        """What speculate() has to know to do what cut() does."""
        every = FRESH if self._fresh == FRESH else EVERY
        return {"least": self.least, "edges": source.edges, "chances": source.by_mark.each(),
                "costs": [0.0, *map(self.curve.hope, range(1, k + 2))], "choosing": self.choosing.value,
                "drafting": source.most(k), "every": every, "since": min(self._since_plain, every - 2 - COLD),
                "stake": max(0.0, self.account.purse) / self.plain()}

    # ---- lessons

    def passed(self, width: int, seconds: float) -> None:
        """A pass of so many tokens took so long. One token right after drafting takes longer than in plain decoding,
        which it stands for: the caches hold other things. So it counts only after another one."""
        self._warm = width > 1 or self._plain_before or not self.curve.known
        self._plain_before = width == 1
        if self._warm:
            self.observe(width, seconds)

    def observe(self, width: int, seconds: float, count: int = 1) -> None:
        """So many passes of a width took so long on the average. On another machine, what plain decoding takes has to be found anew."""
        if self.curve.observe(width, seconds, count):
            self._since_plain = FRESH

    def rested(self, n: float, deciding: float) -> None:
        """So many plain tokens, after it took so many seconds to decide that they are."""
        self.account.enter(n, -deciding / self.curve.at(1))
        self._since_plain, self._plain_before = 0, n > 0

    def ended(self, checked: int, tokens: int, work: float, passing: float, others: int = 0, trial: bool = False) -> None:
        """A round gave so many tokens. checked: drafted tokens in its pass; seconds of the draft and all work around it, and
        of the pass with choosing its tokens."""
        self._since_plain = self._since_plain + 1 if checked or not self._warm else 0
        token, sharing = self.curve.at(1 + others) + self.choosing.value, 1 + others
        gained = -work / token
        if checked:                                     # the others' tokens come later, too
            gained += (tokens + others) / sharing - min(passing, 3 * self.curve.at(checked + 1 + others)) / token
        self.account.enter(tokens / sharing, gained, trial)

    def wrote(self, widths: Sequence[int], tokens: int, drafting: float, between: float, share: float, trial: bool = False) -> None:
        """A call of rounds with passes of so many tokens gave so many. Passes count as what they usually take: that of these few
        says more about the machine's other work.

        drafting: seconds; between: those around the call; share: of a plain call's passes, those of this one, at most 1:
        plain decoding has calls too.
        """
        plain = [i for i in telling(widths) if widths[i] == 1]
        self._since_plain = len(widths) - 1 - plain[-1] if plain else self._since_plain + len(widths)
        self._plain_before = widths[-1] == 1
        self.calling.add(between)
        spent = drafting + between - min(share, 1.0) * self.calling.value + sum(map(self.curve.at, widths))
        self.account.enter(tokens, tokens - spent / self.curve.at(1), trial)


class FixedLength(Controller):
    """Always drafts k tokens and checks them all: for comparisons and proofs."""

    def __init__(self, k: int, curve: CostCurve | None = None):
        super().__init__(curve)
        self.k, self.min_gain, self.rest = k, 0.0, 0

    stale = False

    def plan(self, source: Source, room: int, others: int = 0, lag: float = 0.0, new: bool = False) -> Plan:
        return Plan(max(0, min(self.k, room)))

    def cut(self, source: Source, marks: Sequence[int], spent: float, others: int = 0) -> tuple[int, float]:
        n = self.affordable(len(marks))
        return n, inf if n else 0.0

    def affordable(self, k: int) -> int:
        return min(k, self.k)

    def terms(self, source: Source, k: int) -> dict:
        return {}
