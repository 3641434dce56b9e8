"""Speculative decoding: guess some tokens, check them all in one pass, keep those that are what plain decoding says.

A round evaluates the last token and k drafted ones. Each row of the pass gives the token that plain decoding would
choose there: as long as the drafted one is the same, the next row counts too. What comes out is plain decoding's
text whatever the drafts, because a token's logits do not depend on what shares its pass.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from . import cache, checks
from .controller import COLD, DECIDING, LOOKING, WIDEST, Controller, CostCurve, Plan, Source, telling
from .decode import BULK, BULK_SECONDS, Choice, Chooser, Loop, Pass, Stats, leave, plain_rounds
from .drafters import (
    EDGES,
    NOTHING,
    Draft,
    ModelDrafter,
    NgramDrafter,
    Overlap,
    PairError,
    SelfDrafter,
    connect,
    drafter_of,
    mark,
)
from .errors import ArgumentError, BmcError, ClosedError, OutOfMemoryError
from .model import Session
from .sampling import Sampler

log = logging.getLogger(__name__)

SPECS = ("auto", "draft", "ngram", "self", "off")
TIMED = 3                               # of a size, for how many their mean counts at most
PLAIN, QUICK = 5, 0.002                 # plain ones that tell what plain decoding takes, where a pass takes less than so many seconds
SURE = 4                                # drafts that are seen one by one before
JUDGED, EARLY = 8, 6                    # n-grams' guesses that are seen before a call has more than so many rounds: it learns nothing meanwhile
MEASURED = (1, 2, 3, 4, 6, 8, 12, 16)       # widths that a first calibration times

# What a mark promises before anything was seen. Two models' best tokens are the same more often than they are sure.
_MODEL_MARKS = [1 - (1 - (a + b) / 2) ** 2 for a, b in zip((0.0, *EDGES), (*EDGES, 1.0))]
_NGRAM_MARKS = [0.0, 0.5, 0.25, 0.4, 0.55, 0.65, 0.7, 0.75, *[0.8] * 8, *[0.9] * (NgramDrafter.n_marks - 16)]


@dataclass
class Round:
    """A draft on its way: what was asked, proposed, and how much of it is in the pass."""

    source: Source | None = None
    asked: int = 0
    draft: Draft = NOTHING
    checked: int = 0
    trial: bool = False                 # drafting is not expected to pay
    shadow: Draft = NOTHING             # what the n-grams said, where another draft was taken
    drafting: float = 0.0               # seconds ..
    reading: float = 0.0                # .. and of them, those for a prompt
    work: float = 0.0                   # all seconds between the pass before and this one's, but for choosing and the reader
    others: int = 0
    start: int = 0                      # tokens of the text when it was drafted
    rest: int = 0                       # plain tokens before anything is asked again ..
    quiet: bool = False                 # .. which the library may make by itself
    bulk: object = None                 # the drafter with whose guesses rounds are left to the library ..
    plan: Plan | None = None            # .. and of how many

    @property
    def ids(self) -> list[int]:
        return self.draft.ids[:self.checked]


class Speculation:
    """The drafters of one session, and what was learned of them; it may serve many texts, one after the other.

    draft: a smaller Model, or None. spec: "draft", "ngram" (the text itself), "auto" (both) or "self" (the target with
    less attention).
    draft_max and draft_min bound what is checked in a pass. controller and clock are for tests and comparisons; what
    is learned is shared with the one that this is like. link: what connect() says of the pair.
    """

    def __init__(self, model, draft=None, spec: str = "auto", draft_max: int = WIDEST, draft_min: int = 0,
                 controller: Controller | None = None, clock: Callable[[], float] = time.perf_counter,
                 like: Speculation | None = None, link: Overlap | str | None = None):
        self.model, self.clock = model, clock
        self.draft_max, self.draft_min = checked_bounds(draft_max, draft_min)
        self.draft, self.link = draft, link
        self.ngram = NgramDrafter() if spec in ("auto", "ngram") else None
        self.drafter = None
        if draft is not None and spec in ("auto", "draft"):
            self.drafter = drafter_of(model, draft, link)
        elif spec == "self":
            self.drafter = SelfDrafter(model)
        self._fixed = controller
        self._controllers: dict[str, Controller] = like._controllers if like else {}
        self._sources: dict[tuple[str, str], Source] = like._sources if like else {}
        self._new = True                # the drafter has not been asked about this text yet
        self._warm = False              # the drafter has drafted before
        self.kept = True                # for the next text too
        self._owned = None              # a draft model to be closed with this

    # ---- what is known

    def controller(self, kind: str) -> Controller:
        """Passes of different kinds (Chooser.kind) do not cost the same."""
        if self._fixed is not None:
            return self._fixed
        if kind not in self._controllers:
            self._controllers[kind] = Controller(curve_of(self.model, kind, self.clock), self.draft_max, self.draft_min)
        return self._controllers[kind]

    def source(self, name: str, kind: str) -> Source:
        if (name, kind) not in self._sources:
            made = (Source(name, _MODEL_MARKS, edges=EDGES) if name == "draft"
                    else Source(name, _NGRAM_MARKS, edges=NgramDrafter.edges))
            if name == "draft" and self._fixed is None:
                made.recall(cache.load_record(self._pair(kind)) or {})
            self._sources[name, kind] = made
        return self._sources[name, kind]

    def _pair(self, kind: str) -> dict | None:
        return cache.pair(self.model, self.draft, kind)

    # ---- a text

    def follow(self, text: list[int], kind: str) -> None:
        """Take up a text. Costs that nobody knows are measured, what other runs learned is read, and greedy drafts of a
        large vocabulary are prepared for; the draft model reads the text before its first draft."""
        self.controller(kind)
        self._new = True
        if self.drafter:
            self.source("draft", kind)
        if kind == "best" and self.draft is not None and self.drafter:
            self._unless_it_fails(self._coarsen)
        if isinstance(self.drafter, ModelDrafter) and not self._warm:
            self._unless_it_fails(self.drafter.warm)
            self._warm = True
        for drafter in filter(None, (self.ngram, self.drafter)):
            drafter.follow(text)

    def _coarsen(self) -> None:
        with suppress(OutOfMemoryError):                # without it, drafts take longer
            self.draft.coarsen()

    def loop(self, session, text: list[int], result, chooser: Chooser, limit: float, stats: Stats,
             others: Callable[[], int] | None = None) -> Loop:
        """Yields what plain_loop yields. limit: how many tokens may come at most. text grows with the choices. others: tokens that
        share the next pass with it; None: none ever do, so that passes may be left to the library.

        When it is closed the session holds the text without the last choice, as after plain decoding.
        """
        controller, clock = self.controller(chooser.kind), self.clock
        if isinstance(self.drafter, SelfDrafter):
            self.drafter.session = session
        rows, round, limit = chooser.rows(result), Round(), limit + len(text)
        sent: list[int] = []
        self._ahead = 0                 # tokens that the session may hold beyond the text
        resumed = clock()
        try:
            while True:
                began, choosing, away = len(text), 0.0, 0.0
                for i, row in enumerate(rows):
                    started = clock()
                    choice = chooser.choose(row, text)
                    chosen = clock()
                    choosing += chosen - started
                    accepted = i < round.checked and choice.id == round.ids[i]
                    stats.draft_n_accepted += accepted
                    yield Choice(choice.id, choice.logprob, accepted)
                    away += clock() - chosen
                    text.append(choice.id)
                    if not accepted:
                        break
                if sent:
                    if round.checked:
                        session.rewind(len(text) - 1)
                    self._learn(round, text, len(text) - began, chooser, choosing, stats, reply)
                round = self._draft(text, min(self.draft_max, limit - len(text) - 1), chooser, others() if others else 0,
                                    None if others else session)
                round.work = clock() - resumed - choosing - away
                if round.quiet:
                    yield from self._quietly(round, session, text, limit - len(text), chooser, stats)
                    rows, sent, resumed = (), [], clock()
                    continue
                if round.bulk:
                    rounds = self._rounds(round, session, text, limit - len(text), chooser)
                    if rounds:
                        spent = clock() - resumed - choosing - away - round.reading
                        yield from self._written(round, rounds, text, spent, chooser, stats)
                        rows, sent, resumed = (), [], clock()
                        continue
                    if round.bulk is self.drafter:
                        self._ask_model(round, round.plan, text, chooser)
                if round.rest:
                    yield from self._plainly(round, text, chooser, stats)
                elif round.checked and session.context is not None:
                    session.reserve(min(1 + self.draft_max, session.context - session.position))
                sent = [text[-1], *round.ids]
                self._ahead = len(sent)
                reply = yield chooser.ask(sent)
                resumed = clock()
                rows = chooser.rows(reply.result)
                if reply.width:
                    controller.passed(reply.width, reply.seconds)
                stats.count(round.checked, round.drafting, reply.seconds)
        finally:
            with suppress(ClosedError):
                leave(session, text, self._ahead)

    def _rounds(self, round: Round, session, text: list[int], n_tokens: int, chooser: Chooser) -> list:
        """Rounds that the library drafts, checks and accepts by itself; none if it cannot."""
        controller, source, k = self.controller(chooser.kind), self.source(round.bulk.name, chooser.kind), round.plan.k
        if round.rest and self.drafter:         # then it is the draft model's turn to be asked
            n_tokens = min(n_tokens, round.rest)
        terms = {} if round.plan.trial else controller.terms(source, k)
        n_rounds = BULK
        if round.bulk is self.drafter and (source.seconds.n < SURE or round.plan.trial):
            n_rounds = controller.trials(k, source.seconds.at(k)) if round.plan.trial else 1
        elif round.bulk is self.ngram and source.by_mark.seen < JUDGED:
            n_rounds = EARLY
        self._ahead = n_rounds * (k + 1)
        if round.bulk is self.drafter:
            self._read(round, round.plan, text, source)
            if not self.drafter:
                return []
        try:
            return round.bulk.rounds(session, text, k, min(n_tokens, self._ahead), chooser.sampler, n_rounds=n_rounds,
                                     seconds=BULK_SECONDS, p_min=round.plan.p_min, patient=round.plan.patient,
                                     script=chooser.script(text), **terms)
        except BmcError:                # whoever asks next is told why
            return []

    def _written(self, round: Round, rounds: list, text: list[int], spent: float, chooser: Chooser, stats: Stats) -> Loop:
        """The tokens of rounds that took so long, and what there is to learn from them."""
        controller, source = self.controller(chooser.kind), self.source(round.bulk.name, chooser.kind)
        n, passing, drafting = sum(len(r.ids) for r in rounds), sum(r.verify_s for r in rounds), sum(r.draft_s for r in rounds)
        for checked, seconds, count in usual((r.n_checked, r.verify_s) for r in rounds):
            controller.observe(checked + 1, seconds, count)
        if round.bulk is self.drafter:
            for length, seconds, count in usual((len(r.sure), r.draft_s) for r in rounds):
                for _ in range(count if length else 0):
                    source.seconds.add(length, seconds)
        for r in rounds:
            if r.sure:
                hits = [True] * r.n_right + [False] * (r.n_right < min(len(r.sure), len(r.ids)))
                source.learn(r.n_asked if round.bulk is self.drafter else 0, r.n_checked, round.bulk.marks(r.sure), hits)
        for checked, passes in Counter(r.n_checked for r in rounds).items():
            stats.count(checked, 0.0, 0.0, passes)
        between, most = max(0.0, spent - passing - drafting), source.most(round.plan.k)
        controller.wrote([r.n_checked + 1 for r in rounds], n, sum(min(r.draft_s, most) for r in rounds), between,
                         passing / BULK_SECONDS, round.plan.trial)
        stats.draft_s += round.drafting + drafting
        stats.verify_s += passing
        stats.plain_n += n
        stats.plain_s += n / controller.plain()
        for r in rounds:
            for i, row in enumerate(zip(r.ids, r.logprobs)):
                choice = chooser.choose(row, text)
                accepted = i < r.n_accepted
                stats.draft_n_accepted += accepted
                yield Choice(choice.id, choice.logprob, accepted)
                text.append(choice.id)
        self._ahead = 0
        if round.shadow.ids:
            self.source("ngram", chooser.kind).learn(0, 0, round.shadow.marks, judged(round.shadow.ids, text[round.start:]))

    def _plainly(self, round: Round, text: list[int], chooser: Chooser, stats: Stats) -> Loop:
        """Some tokens without any draft, at the price of plain decoding."""
        clock, verifying, choosing = self.clock, 0.0, 0.0
        try:
            for _ in range(round.rest):
                reply = yield chooser.ask([text[-1]])
                rows = chooser.rows(reply.result)
                started = clock()
                choice = chooser.choose(rows[0], text)
                choosing += clock() - started
                verifying += reply.seconds
                yield choice
                text.append(choice.id)
        finally:
            stats.choose_s += choosing
            self._rested(round, len(text) - round.start, verifying, chooser, stats)

    def _quietly(self, round: Round, session, text: list[int], limit: float, chooser: Chooser, stats: Stats) -> Loop:
        """The same, from passes that the library makes by itself."""
        controller, times = self.controller(chooser.kind), []

        def told(rounds):
            taken = [r.verify_s for r in rounds]
            times.extend(taken)
            warm = taken[COLD:] or taken
            controller.observe(1, sum(warm) / len(warm), min(len(warm), TIMED))

        try:
            yield from plain_rounds(session, text, (), chooser, min(round.rest, limit), told)
        finally:
            self._ahead = 0
            self._rested(round, len(text) - round.start, sum(times), chooser, stats)

    def _rested(self, round: Round, n: int, verifying: float, chooser: Chooser, stats: Stats) -> None:
        controller, sharing = self.controller(chooser.kind), 1 + round.others
        controller.rested(n / sharing, round.work)
        stats.count(0, round.drafting, verifying, n)
        stats.plain_n += n
        stats.plain_s += n / controller.plain(round.others) * sharing

    def _draft(self, text: list[int], room: int, chooser: Chooser, others: int, alone) -> Round:
        """What to check next: of plain decoding, the n-grams and the draft model the one with the best rate. alone: the session, where
        nobody else has a part in its passes."""
        controller, started = self.controller(chooser.kind), self.clock()
        round = Round(others=others, start=len(text))
        if room < 1:
            return round
        quick = controller.curve.at(1) < QUICK          # then a call of the library holds many rounds, plain ones among them
        if controller.stale and not (quick and self._bulk(self.drafter or self.ngram, chooser, alone)):
            round.quiet = self._bulk(None, chooser, alone)
            round.rest = (PLAIN if quick else 1) * round.quiet
            return round
        n, rate = 0, 0.0
        if self.ngram:
            round.shadow = self.ngram.propose(text, room)
            n, rate = controller.cut(self.source("ngram", chooser.kind), round.shadow.marks, controller.overhead.value,
                                     others)
        plan = self._plan(text, room, chooser, others)
        if n and rate > max(plan.gain, controller.min_gain) * controller.plain(others):
            round.source, round.draft, round.asked, round.checked = self.source("ngram", chooser.kind), round.shadow, n, n
            round.shadow = NOTHING
            if self._bulk(self.ngram, chooser, alone):
                round.bulk, round.plan = self.ngram, Plan(max(n, controller.affordable(room)), patient=not self.drafter)
        elif plan.k and self._bulk(self.drafter, chooser, alone):
            round.bulk, round.plan = self.drafter, replace(plan, patient=True)
        elif plan.k:
            self._ask_model(round, plan, text, chooser)
        elif controller.resting or not self.drafter:
            round.rest = controller.break_after(self.clock() - started, DECIDING if self.drafter else LOOKING)
            watching = controller.affordable(room) if self.ngram else 0
            if round.rest and watching and self._bulk(self.ngram, chooser, alone):     # the library looks at the text meanwhile
                round.bulk, round.plan, round.shadow = self.ngram, Plan(watching, patient=True), NOTHING
            else:
                round.quiet = round.rest > 0 and self._bulk(None, chooser, alone)
        round.drafting = self.clock() - started
        return round

    def _bulk(self, drafter, chooser: Chooser, session) -> bool:
        """Whether rounds may be left to the library: nothing in Python has a say in them. drafter: None for plain ones."""
        free = chooser.kind != "all" and isinstance(session, Session)
        return free and (drafter is None or isinstance(drafter, (ModelDrafter, NgramDrafter)) and drafter.bulk(session))

    def _ask_model(self, round: Round, plan: Plan, text: list[int], chooser: Chooser) -> None:
        """The draft model's part of a round. What it lacks of the text it reads first, apart from what a draft costs."""
        controller, source = self.controller(chooser.kind), self.source("draft", chooser.kind)
        self._read(round, plan, text, source)
        if not self.drafter:
            return
        started = self.clock()
        round.source, round.asked, round.trial = source, plan.k, plan.trial
        round.draft = self._propose(text, plan, chooser)
        spent = self.clock() - started
        if round.draft.ids:
            source.seconds.add(len(round.draft.ids), spent)
        round.checked = (len(round.draft.ids) if plan.trial
                         else controller.cut(source, round.draft.marks, spent, round.others)[0])

    def _read(self, round: Round, plan: Plan, text: list[int], source: Source) -> None:
        """What the draft model lacks of the text, beyond the usual few tokens."""
        lag, started = self.drafter.lag(text), self.clock()
        if lag:
            self._unless_it_fails(lambda: self.drafter.read(text))
            spent = self.clock() - started
            source.reading.add(spent / lag)
            round.reading = spent if self._new and not plan.trial else 0.0
        self._new = False

    def _plan(self, text, room: int, chooser: Chooser, others: int) -> Plan:
        if not self.drafter or isinstance(self.drafter, SelfDrafter) and len(text) < self.drafter.shortest:
            return Plan(0)
        source = self.source("draft", chooser.kind)
        lag = self.drafter.lag(text) * source.reading_seconds
        return self.controller(chooser.kind).plan(source, room, others, lag, self._new)

    def _propose(self, text: list[int], plan: Plan, chooser: Chooser) -> Draft:
        found = self._unless_it_fails(lambda: self.drafter.propose(text, plan.k, plan.p_min, chooser.sampler))
        return found or NOTHING

    def _unless_it_fails(self, work: Callable):
        """A draft model that fails is a draft model less: the text goes on."""
        try:
            return work()
        except BmcError as error:
            log.warning("the draft model failed (%s); decoding goes on without it", error)
            with suppress(BmcError):
                self.drafter.close()
            self.drafter = None

    def _learn(self, round: Round, text: list[int], n: int, chooser: Chooser, choosing: float, stats: Stats,
               reply) -> None:
        """The last n tokens of the text came from this round's pass."""
        controller, said = self.controller(chooser.kind), text[round.start:]
        if round.source:
            round.source.learn(round.asked, round.checked, round.draft.marks, judged(round.draft.ids, said))
        if round.shadow.ids:
            self.source("ngram", chooser.kind).learn(0, 0, round.shadow.marks, judged(round.shadow.ids, said))
        stats.choose_s += choosing
        stats.plain_n += n
        stats.plain_s += n / controller.plain(round.others) * (1 + round.others)
        controller.choosing.add(choosing / n)
        if round.source:
            controller.overhead.add(round.work - round.drafting)
        passing = controller.curve.at(round.checked + 1 + round.others) if round.others else reply.seconds
        controller.ended(round.checked, n, round.work - round.reading, passing + choosing, round.others, round.trial)

    # ---- the end

    def release(self) -> None:
        """A text is over: keep for the next time what was measured, and close unless this is kept as well."""
        for kind, controller in self._controllers.items():
            if sum(controller.curve.counts.values()) >= 8:
                cache.save(cache.identity(self.model, kind), controller.curve.seconds())
        for (name, kind), source in self._sources.items():
            if name == "draft" and self._fixed is None and source.seconds.n >= 8:
                cache.save_record(self._pair(kind), source.record())
        if not self.kept:
            self.close()

    def close(self) -> None:
        """Let the draft's session go, and the draft model if it was opened for this."""
        if self.drafter:
            self.drafter.close()
            self.drafter = None
        if self._owned is not None:
            self._owned.close()
            self._owned = None


def usual(times: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float, int]]:
    """Of rounds in their order, (guesses, seconds): what those of so many guesses take, and as how many that counts."""
    times = list(times)
    found: dict[int, list[float]] = {}
    for i in telling([size + 1 for size, _ in times]):
        found.setdefault(times[i][0], []).append(times[i][1])
    for size, several in found.items():
        yield size, sum(several) / len(several), min(len(several), TIMED)


def judged(proposed: list[int], said: list[int]) -> list[bool]:
    """For each proposed token that can be judged, whether it came true: none after the first that did not."""
    hits = []
    for guess, token in zip(proposed, said):
        hits.append(guess == token)
        if guess != token:
            break
    return hits


def checked_bounds(draft_max: int, draft_min: int) -> tuple[int, int]:
    draft_max, draft_min = checks.draft_bounds(draft_max, draft_min)
    return min(draft_max, WIDEST), min(draft_min, WIDEST)


# ---- costs of a model --------------------------------------------------------------------------------------


def curve_of(model, kind: str, clock: Callable[[], float]) -> CostCurve:
    """What passes of this model cost here: kept from before, or measured now and kept."""
    known = cache.load(cache.identity(model, kind))
    if not known:
        known = calibrate(model, kind, clock)
        cache.save(cache.identity(model, kind), known)
    return CostCurve(known)


def calibrate(model, kind: str, clock: Callable[[], float], reps: int = 3, least: float = 0.1) -> dict[int, float]:
    """Seconds of passes of a kind (Chooser.kind) by their width, the least of a few, or of as many as fit in `least` seconds.
    Widths take turns: a moment in which the machine does other things meets all of them."""
    want, sampler = ("best", Sampler(temperature=1.0)) if kind == "sampled" else (kind, None)
    with model.session(context=min(MEASURED[-1], model.config.n_ctx)) as session:
        tokens, times = [0] * session.context, {}
        session.eval(tokens, want, sampler=sampler)     # memory is touched for the first time
        session.rewind(0)
        began, done = clock(), 0
        while done < reps or clock() - began < least and done < 100:
            for n in (n for n in MEASURED if n <= session.context):
                started = clock()
                session.eval(tokens[:n], want, sampler=sampler)
                times[n] = min(times.get(n, 1e9), max(clock() - started, 1e-9))
                session.rewind(0)
            done += 1
    return times


# ---- sessions and their drafters ---------------------------------------------------------------------------

_kept: WeakKeyDictionary = WeakKeyDictionary()          # session -> (what was asked for, Speculation)


def attach(session, model, draft=None, spec: str = "auto", draft_max: int = WIDEST,
           draft_min: int = 0) -> Speculation | None:
    """The Speculation for a session (None: one that is yet to come); None if there is nothing to draft with.

    draft: a Model, the path of one, a Speculation, or None. For the same session and wishes it is the same object, so
    that the draft model holds what it has of a conversation.
    """
    checks.choice("spec", spec, SPECS)
    draft_max, draft_min = checked_bounds(draft_max, draft_min)
    if isinstance(draft, Speculation):
        if draft.model is not model:
            checks.refuse("draft", "a Speculation of the same model", draft)
        return draft
    if draft is not None and not is_path(draft) and not hasattr(draft, "tokenizer"):
        checks.refuse("draft", "a Model, a path or None", draft)
    if spec == "draft" and draft is None:
        raise ArgumentError("spec is 'draft', but there is no draft")
    if spec == "off" or draft_max == 0 or draft is None and spec == "auto":
        return None
    asked = (str(draft) if is_path(draft) else draft, spec, draft_max, draft_min)
    if session is not None and session in _kept and _kept[session][0] == asked:
        return _kept[session][1]
    made = _open(model, draft, spec, draft_max, draft_min)
    if session is not None:
        _kept[session] = asked, made
    elif made is not None:
        made.kept = False
    return made


def of_session(session) -> Speculation | None:
    """What drafts for a session, if anything does."""
    return _kept.get(session, (None, None))[1]


def is_path(draft) -> bool:
    return isinstance(draft, str) or hasattr(draft, "__fspath__")


def _open(model, draft, spec: str, draft_max: int, draft_min: int) -> Speculation | None:
    from .model import Model

    if spec in ("ngram", "self"):
        draft = None
    opened = Model(draft, threads=model.threads) if is_path(draft) else None
    draft = opened or draft
    link = None
    try:
        if draft is not None:
            link = connect(model, draft)
    except PairError as error:
        log.warning("%s; decoding goes on without it", error)
        draft = None
        if opened:
            opened.close()
        if spec == "draft":
            return None
        opened = None
    made = Speculation(model, draft, spec, draft_max, draft_min, link=link)
    made._owned = opened
    return made


def another(made: Speculation | None) -> Speculation | None:
    """One more of the same for another session: the models and what is learned are shared."""
    if made is None:
        return None
    spec = "self" if isinstance(made.drafter, SelfDrafter) else "ngram" if made.draft is None else "auto" if made.ngram else "draft"
    return Speculation(made.model, made.draft, spec, made.draft_max, made.draft_min, clock=made.clock, like=made,
                       link=made.link)
