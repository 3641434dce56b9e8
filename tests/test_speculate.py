"""Speculative decoding: whatever is drafted, the text is plain decoding's; and drafters that follow a text."""

import logging
import random
import signal
from bisect import bisect_right

import numpy as np
import pytest
import tiny
from fakes import END, VOCAB, FakeModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pybmc
from pybmc import ArgumentError, BmcError, OutOfMemoryError, decode
from pybmc.controller import Controller, CostCurve, FixedLength, Plan, Source
from pybmc.decode import BULK, Choice, Chooser, generate
from pybmc.drafters import NOTHING, Draft, ModelDrafter, NgramDrafter, PairError, check_pair, first_difference, guess
from pybmc.model import Session, speculate
from pybmc.sampling import Sampler, logprob
from pybmc.speculate import EARLY, JUDGED, Speculation, attach, leave, usual


class Whim(Controller):
    """Any length at any time, and any part of a draft is checked."""

    def __init__(self, seed):
        super().__init__()
        self.rng, self.min_gain = random.Random(seed), 0.0
        self.rest = self.rng.choice([0, 0, 1, 5])

    @property
    def resting(self):
        return True

    def plan(self, source, room, others=0, lag=0.0, new=False):
        return Plan(max(0, self.rng.randint(-6, min(16, room))))

    def cut(self, source, marks, spent, others=0):
        n = self.rng.randint(0, len(marks))
        return n, self.rng.random() * 100


class Liar:
    """Proposes the text that plain decoding says, with some lies; share: how much of it is true."""

    def __init__(self, answer, vocab_size, share, seed):
        self.answer, self.vocab_size, self.share, self.rng = answer, vocab_size, share, random.Random(seed)

    def follow(self, text):
        self.start = len(text)

    def lag(self, text):
        return 0

    def propose(self, text, k, p_min, sampler):
        truth = self.answer[len(text) - self.start:][:k]
        ids = [t if self.rng.random() < self.share else self.rng.randrange(self.vocab_size) for t in truth]
        ids += [self.rng.randrange(self.vocab_size) for _ in range(self.rng.randint(0, k - len(ids)))]
        return Draft(ids, [self.rng.randrange(16) for _ in ids])

    def close(self):
        pass


def lying(model, answer, share, seed, spec="auto"):
    made = Speculation(model, None, spec, controller=Whim(seed))
    made.drafter = Liar(answer, model.config.vocab_size, share, seed)
    return made


def same(plain, drafted):
    """Equal in everything but where tokens came from."""
    def strip(tokens):
        return [(t.id, t.text, t.logprob, t.finish_reason) for t in tokens]
    assert strip(drafted) == strip(plain)


SETTINGS = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, 0.0, 0.6, 1.5]), "seed": st.integers(0, 99),
    "repeat_penalty": st.sampled_from([1.0, 1.0, 1.4]), "frequency_penalty": st.sampled_from([0.0, 0.0, 0.7]),
    "top_k": st.sampled_from([0, 1, 40]), "repeat_last_n": st.sampled_from([-1, 0, 3, 64])})


# ---- lossless ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    with pybmc.Model(tiny.model(request.param), threads=1) as model:
        yield model


@pytest.mark.long
@settings(max_examples=60)
@given(data=st.data(), chosen=SETTINGS, share=st.sampled_from([0.0, 0.5, 0.9, 1.0]), seed=st.integers(0, 999))
def test_any_draft_gives_the_plain_text(model, data, chosen, share, seed):
    """Random, partly right and right drafts, of any length, on a session with any past, cut by any rule."""
    rng = random.Random(seed)
    prompt = [rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, 30))]
    limit = rng.randint(1, 40)
    free = list(generate(model, prompt, limit, stop_tokens=(), **chosen))
    rules = {"stop_tokens": ()}
    kind = data.draw(st.sampled_from(["none", "token", "string", "context"]))
    context = None
    if kind == "token":
        rules["stop_tokens"] = [rng.choice(free).id]
    elif kind == "string":
        text = "".join(t.text for t in free)
        at = rng.randrange(max(len(text), 1))
        rules["stop"] = [text[at:at + rng.randint(1, 6)] or "x", "zzz"]
    elif kind == "context":
        context = len(prompt) + rng.randint(0, limit)
    with model.session(context) as one, model.session(context) as two:
        plain = list(generate(model, prompt, limit, session=one, **rules, **chosen))
        speculation = lying(model, [t.id for t in free], share, seed)
        stream = generate(model, prompt, limit, session=two, draft=speculation, **rules, **chosen)
        drafted = list(stream)
        same(plain, drafted)
        assert two.tokens == one.tokens
        assert sum(t.from_draft for t in drafted) == stream.stats.draft_n_accepted <= stream.stats.draft_n
        more = list(generate(model, two.tokens[:5], 6, session=two, draft=speculation, stop_tokens=(), **chosen))
        same(list(generate(model, one.tokens[:5], 6, session=one, stop_tokens=(), **chosen)), more)


@settings(max_examples=40)
@given(st.binary(min_size=1, max_size=12), SETTINGS, st.integers(0, 99), st.integers(1, 30), st.integers(0, 30))
def test_a_reader_may_leave_at_any_token(prompt, chosen, seed, limit, leaves):
    model = FakeModel()
    answer = [t.id for t in generate(model, list(prompt), limit, stop_tokens=(), **chosen)]
    sessions = []
    for draft in (None, lying(model, answer, 0.8, seed)):
        session = model.session()
        stream = generate(model, list(prompt), limit, session=session, draft=draft, stop_tokens=(), **chosen)
        for _, _token in zip(range(leaves), stream):
            pass
        stream.close()
        sessions.append(session)
    assert sessions[0].tokens == sessions[1].tokens


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("spec", ["auto", "draft", "ngram"])
def test_real_drafters_give_the_plain_text(model, temperature, spec):
    chosen = {"temperature": temperature, "seed": 7, "stop_tokens": (), "top_p": 1.0}
    prompt = "the mouse and the sparrow and the mouse and"
    plain = list(generate(model, prompt, 60, **chosen))
    for k in (1, 2, 5, 16):
        with pybmc.Model(model.path, threads=1) as twin:            # its own draft: everything is accepted
            speculation = Speculation(model, twin, spec, controller=FixedLength(k))
            stream = generate(model, prompt, 60, draft=speculation, **chosen)
            same(plain, list(stream))
            if spec == "draft":
                assert stream.stats.draft_n == stream.stats.draft_n_accepted > 0
                assert stream.stats.rounds == -(-59 // (k + 1))
            speculation.close()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_stranger_as_draft_and_the_controller(model, temperature, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arch = model.config.arch if hasattr(model.config, "arch") else model.metadata["general.architecture"]
    other = tiny.model(arch, seed=1, n_layers=1 if arch == "llama" else None)
    plain = list(generate(model, "the mill", 80, temperature=temperature, stop_tokens=()))
    with model.session() as session:
        for _ in range(2):
            stream = generate(model, "the mill", 80, session=session, draft=str(other), temperature=temperature,
                              stop_tokens=())
            same(plain, list(stream))
            assert stream.stats.plain_tok_s > 0 and sum(stream.stats.lengths.values()) == stream.stats.rounds
    assert list((tmp_path / "pybmc" / "costs").iterdir())


# ---- rounds in the library ---------------------------------------------------------------------------------


SAMPLERS = [None, Sampler(temperature=0.7, seed=3), Sampler(temperature=1.5, seed=4, top_k=0, top_p=1.0, min_p=0.0)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_passes_choose_what_the_sampler_does(model, sampler):
    """One by one, in a wide pass, and as a draft; log-probabilities are the model's own."""
    text = np.random.default_rng(1).integers(0, model.config.vocab_size, 150).tolist()
    sampler = sampler or Sampler()
    with model.session() as one, model.session() as other, model.session() as third:
        rows = one.eval(text, "all")
        ids, logprobs = other.eval(text, "best", sampler=sampler)
        assert ids.tolist() == [sampler.sample(row, i) for i, row in enumerate(rows, 1)]
        assert logprobs == pytest.approx([logprob(row, id) for row, id in zip(rows, ids)], abs=1e-4)
        one.rewind(0)
        for i, token in enumerate(text[:20]):
            found = one.eval([token], "best", sampler=sampler)
            assert found.ids[0] == ids[i] and found.logprobs[0] == logprobs[i]
        want = [t.id for t in generate(model, text, 12, temperature=sampler.temperature, seed=sampler.seed, top_k=sampler.top_k,
                                       top_p=sampler.top_p, min_p=sampler.min_p, stop_tokens=())]
        drafted = third.draft(text, 12, sampler=sampler)
        assert drafted.ids.tolist() == want and (drafted.logprobs <= 0).all()
        third.rewind(len(text) - 1)
        sure = np.exp(drafted.logprobs)
        least = float(sure[:4].min()) + 1e-6
        assert len(third.draft(text[-1:], 12, least, sampler=sampler).ids) == 1 + int((sure < least).argmax())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_rounds_in_the_library_are_those_in_python(model, sampler, k, monkeypatch):
    """Passes, guesses, acceptances, text and what sessions hold, with a draft that is right at times."""
    arch = model.metadata["general.architecture"]
    chosen = {} if sampler is None else {name: getattr(sampler, name) for name in ("temperature", "seed", "top_k", "top_p", "min_p")}
    found, calls, rounds = [], [], ModelDrafter.rounds
    monkeypatch.setattr(ModelDrafter, "rounds", lambda *args, **terms: calls.append(1) or rounds(*args, **terms))
    with pybmc.Model(tiny.model(arch, types="Q4_0"), threads=1) as draft:
        for bulk in (False, True):
            monkeypatch.setattr(ModelDrafter, "bulk", lambda self, target, bulk=bulk: bulk)
            made = Speculation(model, draft, "draft", controller=FixedLength(k))
            with model.session() as session:
                stream = generate(model, "the mill", 60, session=session, draft=made, stop_tokens=(), **chosen)
                tokens, stats = list(stream), stream.stats
                found.append((tokens, stats.rounds, stats.draft_n, stats.draft_n_accepted, stats.lengths, session.tokens))
                assert made.drafter.session.agreement(session.tokens) == made.drafter.session.position
                assert bool(calls) == bulk
            made.close()
    assert found[0] == found[1]
    assert 0 < found[0][3] and (sampler is None or arch == "gemma3" or found[0][3] < found[0][2])     # gemma3's is always right


def texts_of(model, draft, n=40):
    """A session whose last token is not evaluated, the draft's session, the text, and how it goes on."""
    text = model.tokenizer.encode("the mouse and the sparrow")
    plain = [t.id for t in generate(model, text, n, stop_tokens=())]
    session, other = model.session(), draft.session()
    session.eval(text[:-1], "none")
    other.eval(text[:-3], "none")
    return session, other, text, plain


@given(chances=st.lists(st.floats(0, 1), min_size=4, max_size=4), steep=st.floats(0, 1), start=st.floats(0, 0.5), choosing=st.floats(0, 0.3),
       least=st.integers(1, 4))
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_as_much_of_a_draft_is_checked_as_the_controller_says(model, chances, steep, start, choosing, least):
    curve = CostCurve({n: 1000 * (1 + start * (n > 1) + steep * (n - 1)) for n in range(1, 18)})     # a draft is nothing beside it
    controller, source = Controller(curve, least=least), Source("draft", chances, edges=(0.1, 0.3, 0.6))
    controller.choosing.add(1000 * choosing)
    controller.account.purse = 1e9
    session, other, text, plain = texts_of(model, model)
    with session, other:
        [round] = speculate(session, other, text[-3:], 8, 100, **controller.terms(source, 8))
        marks = [bisect_right(source.edges, sure) for sure in round.sure]
        assert len(marks) == 8 and round.n_checked == controller.cut(source, marks, round.draft_s)[0]
        assert round.ids == plain[:len(round.ids)] and round.n_accepted == min(round.n_checked, round.n_right) == round.n_checked


def test_rounds_end_with_the_text_the_contexts_and_the_time(model):
    session, other, text, plain = texts_of(model, model)
    with session, other:
        rounds = speculate(session, other, text[-3:], 4, 12, n_rounds=9)
        assert [len(r.ids) for r in rounds] == [5]                      # no time for another
        rounds += speculate(session, other, [*text, *plain[:5]][other.position:], 4, 7, n_rounds=9, seconds=60)
        assert [len(r.ids) for r in rounds] == [5, 5, 2] and [r.n_asked for r in rounds] == [4, 4, 1]
        said = sum((r.ids for r in rounds), [])
        assert said == plain[:12] and session.tokens == [*text, *said[:-1]]
        assert speculate(session, other, said[-1:], 4, 1) == []         # a token that needs no round
        assert other.agreement([*text, *said]) == other.position
    for context, draft_context in ((len(text) + 7, None), (None, len(text) + 7)):
        session, other = model.session(context), model.session(draft_context)
        with session, other:
            session.eval(text[:-1], "none")
            other.eval(text[:-1], "none")
            rounds = speculate(session, other, text[-1:], 4, 100, n_rounds=99, seconds=60)
            said = sum((r.ids for r in rounds), [])
            assert said == plain[:len(said)] and 7 <= len(said) <= (8 if context else 9) and session.position == len(text) + len(said) - 1


def test_rounds_end_without_a_guess_that_is_worth_it_unless_patient_and_when_the_stake_is_lost(model):
    """What follows the text's last two tokens was another one before, and after that nothing was."""
    session, other, text, plain = texts_of(model, model)
    costs = [0.0, 1.0, *[2.0] * 4]                  # a wrong guess loses a second
    for chance, patient, stake, given in ((0.0, True, 0.5, 6), (0.0, False, 0.5, 1), (1.0, True, 0.5, 1), (1.0, True, 1.5, 6),
                                          (1.0, False, 1.5, 2)):
        with model.session() as session:
            session.eval(text[:-1], "none")
            index = NgramDrafter()
            index.follow([*text[-2:], plain[0] ^ 1, *text])
            script = [plain[0], *range(1, 12)] if chance else ()
            rounds = speculate(session, None, text[-1:], 4, 12, ngrams=index._handle, edges=(2,), chances=(0.0, chance), costs=costs,
                               n_rounds=6, seconds=60, patient=patient, stake=stake, script=script)
            assert [r.n_checked for r in rounds] == ([4, 0, 0, 0, 0, 0] if chance else [0] * 6)[:given]
            assert not any(r.n_accepted for r in rounds)
            said = [id for r in rounds for id in r.ids]
            assert said == (script or plain)[:given] and session.tokens == [*text, *said[:-1]]
    session.close(), other.close()


@pytest.mark.parametrize("since", [0, 1, 2, 3])
def test_plain_rounds_stand_among_the_others(model, since):
    """The last two of four; the draft guesses after them with what it lacks, and has nothing but the text at the end."""
    session, other, text, plain = texts_of(model, model)
    with session, other:
        rounds = speculate(session, other, text[-3:], 2, 30, n_rounds=12, seconds=60, every=4, since=since)
        assert [r.n_asked for r in rounds] == ([2, 2, 0, 0] * 4)[since:since + 12] and all(r.n_checked == r.n_right == r.n_asked for r in rounds)
        said = [id for r in rounds for id in r.ids]
        assert said == plain[:24] and session.tokens == [*text, *said[:-1]]
        assert other.agreement([*text, *said]) == other.position >= len(text) + len(said) - 4


def test_what_rounds_teach_of_their_times():
    """Not the first two, not a plain one that follows others, the mean of what is left, and that a few times at most."""
    times = [(2, 9.0), (2, 9.0), (2, 1.0), (2, 3.0), (0, 9.0), (0, 5.0), (1, 4.0), (2, 2.0), (2, 2.0)]
    assert sorted(usual(times)) == [(0, 5.0, 1), (1, 4.0, 1), (2, 2.0, 3)]
    assert list(usual([(3, 7.0)])) == [(3, 7.0, 1)] and list(usual([(0, 7.0)])) == [(0, 7.0, 1)] and list(usual([])) == []


def test_plain_decoding_is_timed_among_short_calls():
    """Calls of ten rounds: every fourth one has a pair of plain rounds, which is seen, and none of Python's passes is needed."""
    controller = Controller(CostCurve({1: 1e-3, 4: 1.2e-3}))
    source = Source("draft", [0.9] * 16, 0.9)
    for n in (1, 2, 4, 8):
        source.seconds.add(n, n * 1e-5)
    pairs = 0
    for _ in range(40):
        since, every = (controller.terms(source, 3)[key] for key in ("since", "every"))
        widths = [1 if (since + i) % every >= every - 2 else 4 for i in range(10)]
        pairs += (1, 1) in list(zip(widths, widths[1:]))
        controller.wrote(widths, 30, 1e-4, 1e-4, 1.0)
        assert controller._since_plain <= every
    assert 400 / every - 1 <= pairs <= 400 / every + 1


class Resting(Controller):
    """Never asks; seven tokens go by, and what the text guesses meanwhile is worth checking."""

    stale, resting = False, True

    def plan(self, source, room, others=0, lag=0.0, new=False):
        return Plan(0)

    def cut(self, source, marks, spent, others=0):
        return 0, 0.0

    def break_after(self, deciding, share=0.0):
        return 7

    def affordable(self, k):
        return min(k, 4)

    def terms(self, source, k):
        return {"chances": [1.0], "costs": [1.0] * (k + 2)}


def test_a_text_is_looked_at_while_a_draft_rests(model, monkeypatch):
    """The tokens meanwhile are the library's, in rounds that find the text's own repetitions."""
    calls, rounds, script = [], NgramDrafter.rounds, [*range(40, 80), *range(1, 30), *range(50, 80), *range(10, 40)]
    monkeypatch.setattr(NgramDrafter, "rounds", lambda *args, **terms: calls.append((terms, found := rounds(*args, **terms))) or found)
    monkeypatch.setattr(Chooser, "script", lambda self, text: script[len(text) - 3:])
    monkeypatch.setattr(Chooser, "choose", lambda self, row, text: Choice(script[len(text) - 3], 0.0))
    made = Speculation(model, model, "auto", controller=Resting())
    with model.session() as session:
        said = [t.id for t in generate(model, [1, 2, 3], len(script), session=session, draft=made, stop_tokens=())]
    made.close()
    assert said == script and calls and all(terms["patient"] for terms, _ in calls)
    assert all(sum(len(r.ids) for r in found) <= 7 for _, found in calls)
    found = [r for _, found in calls for r in found]
    assert sum(not r.n_checked for r in found) > 50 and sum(r.n_accepted == 4 for r in found) > 3


def test_an_interrupt_between_a_call_and_its_bookkeeping(model, monkeypatch):
    """Ctrl-C comes when a call is over, before what it wrote is noted: whoever asks next finds it."""
    settled, heard = Session._settled, []

    def interrupted(self):
        if self._coming and not heard:
            heard.append(True)
            raise KeyboardInterrupt
        return settled(self)

    session, other, text, plain = texts_of(model, model)
    with session, other:
        monkeypatch.setattr(Session, "_settled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            speculate(session, other, text[-3:], 4, 10, n_rounds=2, seconds=60)
        assert session.tokens == [*text, *plain[:9]] and other.agreement([*text, *plain]) == other.position > len(text)


def test_with_an_empty_purse_plain_tokens_still_come_many_at_a_time(model, monkeypatch):
    """A draft that was never right has cost what it may; the tokens that it rests for are one call."""
    calls = []
    monkeypatch.setattr(decode, "BULK_SECONDS", 60)
    monkeypatch.setattr(decode, "speculate", lambda *args, **more: calls.append(found := speculate(*args, **more)) or found)
    monkeypatch.setattr(Resting, "terms", lambda self, source, k: {"chances": [1.0], "costs": [1.0] * (k + 2), "stake": 0.0})
    made = Speculation(model, model, "draft", controller=Resting())
    with model.session() as session:
        list(generate(model, [1, 2, 3], 60, session=session, draft=made, stop_tokens=()))
    made.close()
    assert len(calls) <= 10 and sum(map(len, calls)) >= 50


def test_rounds_with_a_vocabulary_of_another_size(model):
    """What only the target has is token 0 for the draft; what only the draft has is not proposed."""
    arch, size = model.metadata["general.architecture"], model.config.vocab_size
    for other_size in (size - 40, size + 64):
        with pybmc.Model(tiny.model(arch, vocab_size=other_size), threads=1) as draft:
            for temperature in (0.0, 2.0):
                chosen = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop_tokens": ()}
                plain = list(generate(model, "the mill", 60, **chosen))
                made = Speculation(model, draft, "draft", controller=FixedLength(3))
                with model.session() as session:
                    same(plain, list(generate(model, "the mill", 60, session=session, draft=made, **chosen)))
                made.close()


def test_what_rounds_cannot_be(model):
    session, other, text, _ = texts_of(model, model)
    with session, other:
        for wrong in ({"k": 0}, {"k": 65}, {"n_rounds": 0}, {"text": text * 9}, {"costs": [1.0]}, {"draft": session}):
            asked = {"target": session, "draft": other, "text": text[-3:], "k": 4, "n_tokens": 9} | wrong
            with pytest.raises(BmcError):
                speculate(**asked)
            assert session.tokens == text[:-1] and other.tokens == text[:-3]


def test_without_memory_for_a_coarse_head_drafts_go_on(model, monkeypatch):
    def no_memory(self):
        raise OutOfMemoryError("no memory")

    monkeypatch.setattr(pybmc.Model, "coarsen", no_memory)
    plain = list(generate(model, "the mill", 20, stop_tokens=()))
    with pybmc.Model(model.path, threads=1) as twin:
        stream = generate(model, "the mill", 20, stop_tokens=(),
                          draft=Speculation(model, twin, "draft", controller=FixedLength(3)))
        same(plain, list(stream))
    assert stream.stats.draft_n == stream.stats.draft_n_accepted > 0


def test_the_end_inside_a_draft_and_a_full_context():
    for limit, context in ((100, None), (3, None), (100, 8), (100, 6)):
        results = []
        for share in (None, 1.0, 0.5):
            fake = FakeModel("one two three", context)
            fake.asked = 3
            draft = None if share is None else lying(fake, fake.script, share, 3)
            results.append(list(generate(fake, "abc", limit, draft=draft)))
            assert not draft or fake.sessions[0].closed
        same(results[0], results[1])
        same(results[0], results[2])


def test_a_failing_draft_is_a_draft_less(model, caplog):
    plain = list(generate(model, "a mouse", 30, stop_tokens=()))
    with pybmc.Model(model.path, threads=1) as twin:
        speculation = Speculation(model, twin, "draft", controller=FixedLength(4))
        stream = generate(model, "a mouse", 30, draft=speculation, stop_tokens=())
        drafted = [next(stream) for _ in range(3)]
        twin.close()
        with caplog.at_level(logging.WARNING):
            drafted += stream
        same(plain, drafted)
        assert "the draft model failed" in caplog.text and speculation.drafter is None


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_interrupts_anywhere_leave_sessions_that_work(temperature):
    def interrupt(*_):
        raise KeyboardInterrupt

    rng, heard = random.Random(0), 0
    with pybmc.Model(tiny.model("llama"), threads=1) as model, pybmc.Model(model.path, threads=1) as twin:
        chosen = {"temperature": temperature, "stop_tokens": ()}
        want = [t.id for t in generate(model, "Once upon a time", 40, **chosen)]
        speculation = Speculation(model, twin, "auto", controller=FixedLength(5))
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with model.session() as session:
                for _ in range(200):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
                        got = [t.id for t in generate(model, "Once upon a time", 40, session=session, draft=speculation,
                                                      **chosen)]
                        signal.setitimer(signal.ITIMER_REAL, 0)
                        assert got == want
                    except KeyboardInterrupt:
                        heard += 1
                    session.rewind(rng.randrange(session.position + 1))
                assert heard > 20 and speculation.drafter is not None
                assert [t.id for t in generate(model, "Once upon a time", 40, session=session, draft=speculation,
                                               **chosen)] == want
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_a_stale_stream_leaves_a_session_alone():
    model = FakeModel()
    session = model.session()
    answer = [t.id for t in generate(model, "abc", 40, stop_tokens=())]
    stream = generate(model, "abc", 40, session=session, draft=lying(model, answer, 1.0, 1), stop_tokens=())
    for _ in range(5):
        next(stream)
    session.rewind(2)
    session.eval([1, 2, 3, 4, 5, 6, 7])
    before = list(session.tokens)
    stream.close()
    assert session.tokens == before
    leave(session, before, 1)
    assert session.tokens == before


# ---- wishes ------------------------------------------------------------------------------------------------


def test_without_a_draft_there_is_nothing_to_attach():
    model = FakeModel()
    assert attach(None, model) is None and attach(None, model, spec="off") is None
    assert attach(None, model, FakeModel(), draft_max=0) is None
    ngram = attach(None, model, spec="ngram")
    assert ngram.drafter is None and ngram.ngram is not None


def test_a_session_keeps_its_drafter():
    model, draft = FakeModel(), FakeModel()
    session = model.session()
    made = attach(session, model, draft)
    assert attach(session, model, draft) is made and attach(session, model, draft, draft_max=4) is not made
    assert attach(model.session(), model, draft) is not made


@pytest.mark.parametrize("wishes", [{"spec": "some"}, {"spec": "draft"}, {"draft_max": -1}, {"draft_min": 3, "draft_max": 2}])
def test_odd_wishes_are_refused(wishes):
    with pytest.raises(ArgumentError):
        generate(FakeModel(), "x", **({"spec": "ngram"} | wishes))


def test_pairs_are_compared_by_bytes(caplog):
    llama, other = (pybmc.Model(path, threads=1) for path in (tiny.model("llama"), tiny.model("phi3", vocab_size=900)))
    with llama, other:
        with pytest.raises(PairError, match=r"token 0 is b'.*' in .* and b'<unk>'"):
            check_pair(llama, other)
        check_pair(llama, llama)
        plain = list(generate(llama, "x", 5, stop_tokens=()))
        with caplog.at_level(logging.WARNING):
            same(plain, list(generate(llama, "x", 5, draft=other, stop_tokens=())))
        assert "token 0" in caplog.text
        llama.tokenizer.tokens = [*llama.tokenizer.tokens]
        assert first_difference(llama.tokenizer, llama.tokenizer) is None


def test_padded_vocabularies_work_together(tmp_path):
    with pybmc.Model(tiny.model("llama", vocab_size=900), threads=1) as large, \
            pybmc.Model(tiny.model("llama", vocab_size=860, seed=3), threads=1) as small:
        for target, draft in ((large, small), (small, large)):
            for temperature in (0.0, 1.0):
                chosen = {"temperature": temperature, "stop_tokens": (), "max_tokens": 30}
                try:
                    check_pair(target, draft)
                except PairError:
                    pytest.skip("these vocabularies are not padded ones")
                speculation = Speculation(target, draft, controller=FixedLength(3))
                same(list(generate(target, [1, 2, target.config.vocab_size - 1], **chosen)),
                     list(generate(target, [1, 2, target.config.vocab_size - 1], draft=speculation, **chosen)))


def shuffled(path, order):
    """A copy of a model whose token i is the original's order[i]."""
    metadata, tensors = tiny.parts("llama")
    for key in ("tokens", "token_type"):
        values = metadata[f"tokenizer.ggml.{key}"]
        metadata[f"tokenizer.ggml.{key}"] = [values[i] for i in order]
    for key in ("bos", "eos", "eot"):
        key = f"tokenizer.ggml.{key}_token_id"
        metadata[key] = order.index(metadata[key])
    for name in ("token_embd.weight", "output.weight"):
        kind, rows = tensors[name]
        tensors[name] = kind, np.ascontiguousarray(rows[order])
    return tiny.save(path, metadata, tensors)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ids_are_mapped_where_vocabularies_overlap(tmp_path, monkeypatch, temperature):
    order = list(range(401))
    random.Random(1).shuffle(order)
    with pybmc.Model(tiny.model("llama"), threads=1) as model, \
            pybmc.Model(shuffled(tmp_path / "shuffled.gguf", order), threads=1) as draft:
        overlap = check_pair(model, draft)
        assert overlap.to_target.tolist() == order
        chosen = {"temperature": temperature, "stop_tokens": (), "max_tokens": 40, "seed": 3, "top_p": 1.0}
        made = Speculation(model, draft, "draft", controller=FixedLength(4), link=overlap)
        stream = generate(model, "the mill", draft=made, **chosen)
        same(list(generate(model, "the mill", **chosen)), list(stream))
        assert stream.stats.draft_n == stream.stats.draft_n_accepted > 20         # it is the same model, after all
        monkeypatch.setattr("pybmc.speculate.Controller", lambda *_: FixedLength(4))   # not by what passes take here
        stream = generate(model, "the mill", draft=draft, **chosen)
        list(stream)
        assert stream.stats.draft_n_accepted > 20


# ---- drafters ----------------------------------------------------------------------------------------------


def longest_match(text, most):
    """(length, what followed) of the longest earlier match of the text's end; the latest of equals."""
    for length in range(min(most, len(text) - 1), 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length:end] == text[-length:]:
                return length, text[end:]
    return 0, []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 10), st.integers(0, 40))
def test_ngrams_find_the_longest_match(text, k, cut):
    drafter = NgramDrafter()
    drafter.follow(text[:cut])
    draft = drafter.propose(text, k)
    length, follows = longest_match(text, drafter.n_marks - 1)
    if not length:
        assert draft == NOTHING
        return
    looped = (follows * k)[:k] if len(follows) < k else follows[:k]
    assert draft.ids == looped and draft.marks == [min(length + i, drafter.n_marks - 1) for i in range(k)]


def test_calls_are_short_until_ngrams_were_judged(model, monkeypatch):
    asked, rounds = [], NgramDrafter.rounds
    monkeypatch.setattr(NgramDrafter, "rounds", lambda *args, **terms: asked.append(terms["n_rounds"]) or rounds(*args, **terms))
    made = Speculation(model, None, "ngram", controller=FixedLength(4))
    list(generate(model, [5, 6, 7, 8] * 8, 200, draft=made, stop_tokens=()))
    assert asked[0] == EARLY and BULK in asked and made.source("ngram", "best").by_mark.seen >= JUDGED


def test_ngrams_forget_another_text():
    drafter = NgramDrafter()
    drafter.follow([1, 2, 3, 1, 2])
    assert drafter.propose([1, 2, 3, 1, 2], 2).ids == [3, 1]
    drafter.follow([1, 2, 4, 1, 2])
    assert drafter.propose([1, 2, 4, 1, 2], 1).ids == [4]


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.7]))
def test_a_model_drafter_follows_any_text(seed, temperature):
    """Its rows are the text's before each draft, and its draft is what it would say."""
    model, rng = FakeModel(), random.Random(seed)
    sampler = Sampler(temperature=temperature, seed=seed, top_p=1.0)
    drafter = ModelDrafter(model, VOCAB)
    text = [rng.randrange(4) for _ in range(rng.randint(1, 60))]
    drafter.follow(text)
    for _ in range(6):
        k = rng.randint(1, 6)
        draft = drafter.propose(text, k, 0.0, sampler)
        want = [t.id for t in generate(model, text, k, temperature=temperature, seed=seed, top_p=1.0, stop_tokens=())]
        assert draft.ids == want
        n = rng.randint(0, k)
        text += [*draft.ids[:n], *(rng.randrange(4) for _ in range(rng.randint(1, 30) if rng.random() < 0.3 else 1))]
        if rng.random() < 0.2:
            text = text[:rng.randint(1, len(text))]
            drafter.follow(text)


@given(SETTINGS, st.integers(0, 999), st.sampled_from([0.0, 0.05]), st.sampled_from([2, 3, 300]))
def test_a_guess_is_the_samplers_choice(chosen, seed, min_p, size):
    rng = np.random.default_rng(seed)
    history = rng.integers(0, size, 20).tolist()
    same = 0
    for top_p in (1.0, 0.9):
        sampler = Sampler(**chosen, min_p=min_p, top_p=top_p)
        for position in range(20):
            logits = rng.normal(0, 3, size).astype(np.float32)
            id, sure = guess(sampler, logits, position, history)
            found = id == sampler.sample(logits, position, history)
            assert 0 <= sure <= 1 and (found or top_p < 1 or sampler.top_k == 0 and min_p == 0)
            same += found
    assert same >= 30


def test_a_guess_among_odd_logits():
    sampler = Sampler(temperature=1.0)
    assert guess(sampler, np.full(5, np.nan, np.float32), 3, []) == (0, 0.0)
    assert guess(sampler, np.array([0, -np.inf, -np.inf], np.float32), 3, []) == (0, 1.0)
    assert guess(Sampler(), np.array([1.0], np.float32), 3, []) == (0, 1.0)


def test_a_draft_stops_where_it_is_unsure():
    model = FakeModel()
    drafter = ModelDrafter(model, VOCAB)
    for temperature in (0.0, 0.9):
        draft = drafter.propose([1, 2, 3], 8, 0.999, Sampler(temperature=temperature))
        assert len(draft.ids) == 1
    assert drafter.propose([1, 2, 3], 8, 0.0, Sampler()).ids[0] != END


def test_a_draft_ends_where_the_drafts_context_does():
    drafter = ModelDrafter(FakeModel(context=10), VOCAB)
    for n, most in ((5, 6), (9, 2), (10, 1), (11, 0), (30, 0)):
        assert len(drafter.propose(list(range(n)), 8, 0.0, Sampler()).ids) == most
