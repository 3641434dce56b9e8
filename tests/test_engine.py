"""The engine: whatever shares its steps, a request's tokens are those it has alone and without guesses."""

import os
import random
from contextlib import ExitStack
from dataclasses import replace

import engines
import numpy as np
import numpy_sampling
import pytest
import tiny

import pybmc
from pybmc import (
    ArgumentError,
    BmcError,
    BusyError,
    ClosedError,
    ContextFullError,
    Engine,
    OutOfMemoryError,
    Request,
)
from pybmc.engine.sampler import Sampler
from pybmc.spec import speculation
from pybmc.spec.speculation import Speculation
from tools.lab import lib

MIXES = int(os.environ.get("PYBMC_MIXES", "20"))
CONTEXT = 600


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=CONTEXT), threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    """Always right, mostly right, a stranger, one with a short context, three with other vocabularies."""
    paths = {
        "twin": tiny.model("llama", n_ctx=CONTEXT),
        "coarse": tiny.model("llama", n_ctx=CONTEXT, types="Q4_0"),
        "stranger": tiny.model("llama", n_ctx=CONTEXT, n_layers=1, seed=1),
        "short": tiny.model("llama", n_ctx=96, types="Q4_0"),
        "padded": tiny.model("llama", n_ctx=CONTEXT, vocab_size=440),
        "shuffled": tiny.shuffled(tmp_path_factory.mktemp("e") / "shuffled.gguf",
                                  random.Random(1).sample(range(401), 401), n_ctx=CONTEXT, types="Q4_0"),
        "text": tiny.model("phi3", n_ctx=CONTEXT, vocab_size=900),
    }
    with ExitStack() as stack:
        yield {name: stack.enter_context(pybmc.Model(path, threads=2)) for name, path in paths.items()}


@pytest.fixture
def short_calls(monkeypatch):
    """Calls of one round, so that there are many steps."""
    monkeypatch.setattr("pybmc.engine.engine.CALL_SECONDS", 0.0)


def outcome(tokens):
    """All of tokens but who guessed them."""
    return [(t.id, t.text, t.logprob, t.finish_reason, t.top) for t in tokens]


def busy(engine):
    """Counts steps while there are requests."""
    for step in range(20_000):
        if not engine.waiting and not engine.running:
            return
        yield step
    raise AssertionError("requests do not end")


def finish(engine):
    """Step until nobody is left; the tokens of each sequence."""
    found = {}
    for sequence, token in engines.events(engine):
        found.setdefault(sequence, []).append(token)
    return found


def alone(model, request):
    """What a request gives by itself, without guesses, in a session of its own."""
    context = request.session.context if request.session else request.context
    with Engine(model, spec="off", parallel=1) as engine:
        sequence = engine.add(replace(request, session=None, context=context))
        tokens = finish(engine).get(sequence, [])
        assert sequence.done and not sequence.error
        return tokens


# ---- mixes -------------------------------------------------------------------------------------------------


def random_sampler(rng):
    kinds = [{}, {}, {"temperature": rng.choice([0.5, 1.0, 3.0])},
             {"temperature": 0.8, "repeat_penalty": 1.3, "repeat_last_n": rng.choice([-1, 5, 64])},
             {"frequency_penalty": 0.5, "presence_penalty": 0.3},
             {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
             {"temperature": 0.7, "logit_bias": {rng.randrange(401): rng.choice([-np.inf, 5.0, 15.0])
                                                 for _ in range(3)}}]
    return Sampler(seed=rng.randrange(1000), **rng.choice(kinds))


def random_prompt(rng):
    n = rng.choice([1, 1, 2, rng.randint(3, 40), rng.randint(3, 40), rng.randint(65, 200), 300])
    period = rng.choice([n, n, 3, 7])
    return [rng.randrange(401) for _ in range(min(period, n))] * (n // min(period, n)) or [5]


def random_request(rng, model):
    """A request, and the tokens that it has to give."""
    request = Request(random_prompt(rng),
                      rng.choice([1, rng.randint(2, 20), rng.randint(20, 60), rng.randint(130, 150)]),
                      random_sampler(rng), top=rng.choice([0, 0, 3]), priority=rng.choice([0, 0, 1, -1]),
                      speculate=rng.random() < 0.9)
    if rng.random() < 0.15:
        request = replace(request, context=len(request.tokens) + rng.randint(0, 30))
    free = alone(model, request)
    kind, text = rng.random(), "".join(t.text for t in free)
    if kind < 0.25:
        request = replace(request, stop_ids=frozenset({rng.choice(free).id, 7}))
    elif kind < 0.5 and text:
        at = rng.randrange(len(text))
        request = replace(request, stop=["zzz", text[at:at + rng.randint(1, 5)]])
    return request, alone(model, request)


def random_engine(rng, model, drafts):
    name = rng.choice([None, None, *drafts])
    spec = rng.choice(["auto", "auto", "draft"] if name else ["off", "ngram", "auto", "self"])
    made = Speculation(model, drafts.get(name), spec, most=rng.choice([1, 4, 16, 32]),
                       fixed=rng.choice([0, 0, 0, 1, 3, 8]))
    row = model.session(16)
    row.eval([1])
    memory = rng.choice([None, rng.randint(460, 900) * row.arena_stats().row_bytes])  # any request fits alone
    return Engine(model, speculation=made, parallel=rng.choice([1, 2, 3, 8]), memory=memory,
                  keep=memory is not None and rng.random() < 0.7)


def check_memory(engine):
    assert engine.memory is None or engine.used <= engine.memory


class Mix:
    """2 to 8 requests that arrive and are cancelled at random steps; some sessions have a second turn."""

    def __init__(self, seed, model, drafts):
        self.rng, self.model = random.Random(seed), model
        self.engine = random_engine(self.rng, model, drafts)
        self.arrivals = [(self.rng.choice([0, 0, self.rng.randint(0, 12)]), *random_request(self.rng, model))
                         for _ in range(self.rng.randint(2, 8))]
        self.expected, self.cancelled, self.kept, self.found = {}, {}, [], {}

    def add(self, request, expected):
        rng = self.rng
        if rng.random() < 0.3:
            session = self.model.session(request.context, rows=rng.choice(["auto", 16]))
            session.eval([*request.tokens[:rng.randint(0, len(request.tokens))], 9][:session.context], "none")
            request = replace(request, session=session)
        sequence = self.engine.add(request)
        self.expected[sequence] = expected
        if rng.random() < 0.2:
            self.cancelled[sequence] = rng.randint(0, 6)
        return sequence

    def step(self):
        events = self.engine.step()
        for sequence, token in events:
            assert self.cancelled.get(sequence, 0) >= 0, "a token of a cancelled sequence"
            self.found.setdefault(sequence, []).append(token)
        check_memory(self.engine)
        for sequence in list(self.cancelled):
            self.cancelled[sequence] -= 1
            if self.cancelled[sequence] == -1:
                self.engine.cancel(sequence)
                assert sequence.done and sequence not in (*self.engine.running, *self.engine.waiting)

    def run(self):
        for step in range(13):
            for _, *arrival in [a for a in self.arrivals if a[0] == step]:
                self.add(*arrival)
            self.step()
        for _ in busy(self.engine):
            self.step()

    def check(self):
        for sequence, expected in self.expected.items():
            tokens, session = self.found.get(sequence, []), sequence.request.session
            assert sequence.done and not sequence.error
            complete = sequence not in self.cancelled or bool(tokens and tokens[-1].finish_reason)
            assert outcome(tokens) == outcome(expected if complete else expected[:len(tokens)])
            stats = sequence.stats
            assert stats.predicted_tokens == len(tokens) and stats.draft_n_accepted <= stats.draft_n
            assert sum(t.from_draft for t in tokens) <= stats.draft_n_accepted
            if session is not None and tokens:
                text = [*sequence.prompt, *(t.id for t in tokens)]
                assert session.tokens == text[:-1] and complete or session.tokens == text[:session.position]

    def second_turn(self):
        """What sessions hold, and what drafters know, does not change how a text goes on."""
        for sequence in [s for s in self.expected if s.request.session]:
            session = sequence.request.session
            text = [*session.tokens, 11][:session.context]
            request = Request(text, 20, random_sampler(self.rng), session=session)
            again = self.engine.add(request)
            assert outcome(finish(self.engine).get(again, [])) == outcome(alone(self.model, request))
            assert not again.error


@pytest.mark.long
@pytest.mark.parametrize("seed", range(MIXES))
def test_company_and_guesses_change_nothing(seed, model, drafts, monkeypatch):
    monkeypatch.setattr(speculation, "SELF_WINDOW", 16)     # so that its own drafts are wrong at times
    monkeypatch.setattr("pybmc.engine.engine.CALL_SECONDS", [0.0, 0.002, 0.016][seed % 3])
    mix = Mix(seed, model, drafts)
    with mix.engine:
        mix.run()
        mix.check()
        mix.second_turn()


# ---- one request -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5, "top_k": 0},
                                      {"repeat_penalty": 1.4, "repeat_last_n": -1}], ids=repr)
def test_a_request_alone_is_a_plain_loop(model, settings):
    """Ids, log-probabilities and the likeliest ids are numpy's, from the logits of one token at a time."""
    sampler, text = Sampler(**settings), [5, 9, 300, 9]
    found = alone(model, Request(text, 30, sampler, top=5))
    with model.session() as session:
        session.eval(text[:-1], "none")
        for token in found:
            row = session.eval(text[-1:], "last")
            logprobs, order = numpy_sampling.logprobs(row), np.argsort(-row, kind="stable")[:5]
            assert token.id == numpy_sampling.choose(sampler, row, len(text), text)
            assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-4)
            assert [id for id, _ in token.top] == order.tolist()
            assert [p for _, p in token.top] == pytest.approx(logprobs[order], abs=1e-4)
            text.append(token.id)
    assert [t.finish_reason for t in found] == [None] * 29 + ["length"]


@pytest.mark.parametrize("n", [0, 1])
def test_max_tokens_of_0_and_1(model, n):
    with Engine(model, spec="auto") as engine, model.session() as session:
        sequence = engine.add(Request([1, 2, 3], n, session=session))
        tokens = finish(engine).get(sequence, [])
        assert [t.finish_reason for t in tokens] == ["length"] * n and sequence.done and not sequence.error
        assert session.tokens == [1, 2, 3][:2 + n]          # the text without its last token
        assert sequence.stats.rounds == 0


def test_a_model_without_a_vocabulary_gives_ids(tmp_path, model):
    metadata, tensors = tiny.parts("llama", n_ctx=CONTEXT)
    path = tiny.save(tmp_path / "bare.gguf", {k: v for k, v in metadata.items()
                                              if not k.startswith("tokenizer")}, tensors)
    with pybmc.Model(path, threads=1) as bare:
        found = alone(bare, Request([1, 2, 3], 9))
        assert [t.id for t in found] == [t.id for t in alone(model, Request([1, 2, 3], 9))]
        assert not any(t.text for t in found)


@pytest.mark.parametrize("fixed", [1, 5, 16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 2}], ids=repr)
def test_a_draft_that_is_always_right_is_always_accepted(model, drafts, fixed, settings):
    """Also through a table of ids; the passes are as few as they can be."""
    request = Request([5, 6, 7], 60, Sampler(**settings, top_p=1.0))
    made = Speculation(model, drafts["twin"], "draft", fixed=fixed)
    with Engine(model, speculation=made) as engine:
        sequence = engine.add(request)
        assert outcome(finish(engine)[sequence]) == outcome(alone(model, request))
        assert sequence.stats.draft_n == sequence.stats.draft_n_accepted > 0
        assert sequence.stats.rounds == -(-59 // (fixed + 1))
        assert sum(sequence.stats.lengths.values()) == sequence.stats.rounds


# ---- many requests -----------------------------------------------------------------------------------------


def test_a_prompt_is_read_in_pieces_while_others_write(model, short_calls):
    with Engine(model, spec="off") as engine:
        writer, progress = engine.add(Request([1, 2], 300)), []
        for _ in range(2):
            engine.step()
        long = Request(list(range(400)), 4, progress=lambda done, total: progress.append((done, total)))
        engine._prompt_rate = 1e-9          # the machine seems slow: pieces are as small as they get
        reader, while_reading = engine.add(long), 0
        while reader.reading and not reader.done:
            events = engine.step()
            while_reading += sum(who is writer for who, _ in events)
            engine._prompt_rate = 1e-9
        assert len(progress) >= 400 // 16
        assert [done for done, _ in progress] == sorted(done for done, _ in progress)
        assert progress[-1] == (400, 400) and while_reading >= len(progress) - 1
        finish(engine)
        assert writer.stats.predicted_tokens == 300 and not reader.error


def test_requests_of_higher_priority_go_first(model):
    with Engine(model, spec="off", parallel=1) as engine:
        order = [engine.add(Request([1], 2, priority=p)) for p in (0, 2, 1, 2)]
        assert [s.number for s in finish(engine)] == [1, 3, 2, 0] and all(s.done for s in order)


def test_memory_bounds_how_many_run(model):
    with model.session() as session:
        session.eval([1])
        row = session.arena_stats().row_bytes
    with Engine(model, spec="off", memory=100 * row) as engine:
        for _ in range(5):
            engine.add(Request([1] * 10, 30))
        large, most = engine.add(Request([1] * 101, 5)), 0
        for _ in busy(engine):
            engine.step()
            most = max(most, len(engine.running))
            check_memory(engine)
            assert large not in engine.running
        assert most == 2 and isinstance(large.error, OutOfMemoryError)


def test_cancel_frees_rows(model, drafts, short_calls):
    before = len([s for m in (model, drafts["twin"]) for s in m._sessions if s._handle])
    with Engine(model, drafts["twin"], parallel=2) as engine:
        sequences = [engine.add(Request([1, 2], 500)) for _ in range(3)]
        for _ in range(3):
            engine.step()
        for sequence in sequences[1:]:
            engine.cancel(sequence)
            engine.cancel(sequence)
            assert sequence.done and (sequence.session is None or not sequence.session._handle)
        assert engine.running == sequences[:1] and not engine.waiting
    assert len([s for m in (model, drafts["twin"]) for s in m._sessions if s._handle]) == before


@pytest.mark.parametrize("reader", [False, True])
def test_a_cancelled_request_leaves_a_kept_session_at_its_text(model, reader, short_calls):
    request = Request(list(range(200)) if reader else [1, 2], 100)
    with Engine(model, spec="ngram") as engine, model.session() as session:
        sequence, tokens = engine.add(replace(request, session=session)), []
        for _ in range(1 if reader else 4):
            tokens += [token for _, token in engine.step()]
        engine.cancel(sequence)
        text = sequence.prompt + [t.id for t in tokens]
        assert session.tokens == (text[:-1] if tokens else text[:session.position]) and session.position > 0
        again = engine.add(replace(request, session=session))
        assert outcome(finish(engine)[again]) == outcome(alone(model, request))
        assert again.stats.reused_tokens > 0


# ---- failures ----------------------------------------------------------------------------------------------


def occupy(session):
    """Make it look as if another thread was in a call of the session."""
    session._user["thread"] = (os.getpid(), 1)


FAILURES = {
    "the session is closed": (lambda model, s: s.session.close(), ClosedError, "session is closed"),
    "the session was used": (lambda model, s: s.session.eval([1]), BusyError, "used by other calls"),
    "the session was rewound": (lambda model, s: s.session.rewind(0), BusyError, "used by other calls"),
    "another one began": (lambda model, s: next(pybmc.generate(model, [1], 5, session=s.session)), BusyError,
                          "another one began"),
    "another thread has the session": (lambda model, s: occupy(s.session), BusyError, "another thread"),
}


@pytest.mark.parametrize("why", FAILURES)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_failing_request_does_not_stop_the_others(model, why, steps, short_calls):
    do, error, message = FAILURES[why]
    requests = [Request([1, 2, 3], 200), Request([4, 5], 200), Request([6], 200, Sampler(temperature=1.0))]
    with Engine(model, spec="auto") as engine, model.session() as session:
        sequences = [engine.add(replace(r, session=session) if i == 1 else r) for i, r in enumerate(requests)]
        found = {s: [] for s in sequences}
        for _ in range(steps):
            for sequence, token in engine.step():
                found[sequence].append(token)
        do(model, sequences[1])
        for sequence, token in engine.step():
            found[sequence].append(token)
        session._user.clear()
        for sequence, tokens in finish(engine).items():
            found[sequence] += tokens
        assert isinstance(sequences[1].error, error)
        assert message in str(sequences[1].error) and sequences[1].done
        for i, sequence in enumerate(sequences):
            expected = outcome(alone(model, requests[i]))
            assert outcome(found[sequence]) == (expected if i != 1 else expected[:len(found[sequence])])
            assert i == 1 or not sequence.error


def test_a_request_that_cannot_start_has_an_error(model):
    with Engine(model, spec="off") as engine, model.session(8) as small, model.session() as closed, \
            model.session() as busy:
        closed.close()
        occupy(busy)
        sequences = [engine.add(Request([1] * 9, 5, session=small)),
                     engine.add(Request([1], 5, session=closed)),
                     engine.add(Request([1], 5, session=busy)), engine.add(Request([1] * (CONTEXT + 1), 5)),
                     engine.add(Request([1], 5))]
        assert [len(tokens) for tokens in finish(engine).values()] == [5]
        assert [type(s.error) for s in sequences] == [ContextFullError, ClosedError, BusyError,
                                                      ContextFullError, type(None)]
        assert all(s.done for s in sequences)
        busy._user.clear()


@pytest.mark.parametrize("wrong", [
    {"tokens": []}, {"tokens": [401]}, {"tokens": [-1]}, {"tokens": [1 << 40]}, {"tokens": "text"},
    {"tokens": [1.5]}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"sampler": Sampler(logit_bias={401: 1.0})},
    {"sampler": None}, {"stop": [""]}, {"stop": 5}, {"stop_ids": [401]}, {"top": -1}, {"top": 402},
    {"context": 0}, {"priority": "high"}, {"session": "mine"},
], ids=repr)
def test_requests_that_cannot_be_served_are_refused_at_once(model, wrong):
    with Engine(model, spec="off") as engine:
        with pytest.raises(ArgumentError):
            engine.add(Request(**{"tokens": [1, 2], "max_tokens": 3} | wrong))
        assert not engine.waiting


def test_a_session_serves_one_request_of_an_engine(model):
    with Engine(model, spec="off") as engine, model.session() as session:
        engine.add(Request([1], 5, session=session))
        for _ in range(2):
            with pytest.raises(BusyError, match="serves another request"):
                engine.add(Request([2], 5, session=session))
            engine.step()


@pytest.mark.parametrize("kind", ["off", "ngram", "twin", "coarse", "text", "self"])
@pytest.mark.parametrize("n", [1, 3, 5, 6, 7, 8, 10, 12])
def test_without_memory_texts_stay_the_same(model, kind, n, drafts, monkeypatch, caplog, short_calls):
    """The n-th growth of an arena fails: the target's, and the step can be repeated, or a draft's."""
    prompt, settings = [5, 6] * 20, {"fixed": 5} if kind in drafts or kind == "self" else {}
    made = Speculation(model, drafts.get(kind), "draft" if kind in drafts else kind, **settings)
    monkeypatch.setattr(speculation, "SELF_WINDOW", 16)
    if kind in drafts:                      # arenas of drafts grow as often as the target's
        plain_session = drafts[kind].session
        monkeypatch.setattr(drafts[kind], "session", lambda: plain_session(rows=16))
    requests = [Request(prompt[i:], 60, Sampler(temperature=0.6 * i, seed=1)) for i in range(2)]
    expected = [outcome(alone(model, request)) for request in requests]
    with Engine(model, speculation=made) as engine, ExitStack() as stack:
        sequences = [engine.add(replace(r, session=stack.enter_context(model.session(rows=16))))
                     for r in requests]
        found, errors = {s: [] for s in sequences}, 0
        lib.bmc_fail_allocation(n)
        try:
            for _ in busy(engine):
                try:
                    for sequence, token in engine.step():
                        found[sequence].append(token)
                except OutOfMemoryError:
                    errors += 1
        finally:
            lib.bmc_fail_allocation(0)
        assert errors <= 1 and [outcome(found[s]) for s in sequences] == expected
        assert caplog.text.count("the draft model failed") <= 2 and not any(s.error for s in sequences)


def test_a_draft_model_that_fails_is_not_asked_again(model, drafts, caplog, short_calls):
    """One that guesses through text; it is named once."""
    request = Request([5, 6, 7], 60)
    with Engine(model, speculation=Speculation(model, drafts["text"], "draft", fixed=3)) as engine:
        sequence = engine.add(request)
        found = [token for _ in range(3) for _, token in engine.step()]
        sequence.drafter._session.close()
        found += finish(engine).get(sequence, [])
        assert outcome(found) == outcome(alone(model, request)) and sequence.stats.draft_n > 0
    assert caplog.text.count("the draft model failed (this session is closed)") == 1


@pytest.mark.parametrize("kind", ["off", "twin", "text"])
def test_an_interrupt_loses_no_token(model, kind, drafts, monkeypatch, short_calls):
    """Ctrl-C during a call of the library is heard when it is over; or a report of progress raises it."""
    requests = [Request([5, 6, 7], 60), Request(list(range(150)), 40)]
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) % 2:
            raise KeyboardInterrupt

    class Interrupted:
        """The library, whose every third round ends with an interrupt."""

        def __getattr__(self, name):
            return getattr(lib, name)

        def bmc_round(self, *args):
            status = lib.bmc_round(*args)
            calls.append(0)
            if len(calls) % 3 == 0 and status:
                raise KeyboardInterrupt
            return status

    monkeypatch.setattr("pybmc.engine.engine.lib", Interrupted())
    made = Speculation(model, drafts.get(kind), "draft" if kind in drafts else kind,
                       fixed=4 * (kind in drafts))
    with Engine(model, speculation=made) as engine, model.session() as session:
        sequences = [engine.add(replace(requests[0], session=session)),
                     engine.add(replace(requests[1], progress=progress))]
        found, interrupts = {s: [] for s in sequences}, 0
        for _ in busy(engine):
            try:
                for sequence, token in engine.step():
                    found[sequence].append(token)
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts >= 5 and not any(s.error for s in sequences)
    monkeypatch.undo()
    assert [outcome(found[s]) for s in sequences] == [outcome(alone(model, r)) for r in requests]


def test_closed_engines_have_let_go(model):
    engine = Engine(model, spec="off")
    sequences = [engine.add(Request([1], 5)) for _ in range(2)]
    engine.step()
    engine.close()
    engine.close()
    assert all(s.done for s in sequences) and engine.step() == []
    for wrong in ({"parallel": 0}, {"parallel": "x"}, {"parallel": 1.5}, {"memory": "x"},
                  {"memory": float("nan")}):
        with pytest.raises(ArgumentError, match=f"^{next(iter(wrong))}: expected a"):
            Engine(model, **wrong)
    with pytest.raises(ArgumentError, match="^spec: expected one of"):
        next(pybmc.generate(model, "x", 1, spec=[]))
    with pytest.raises(BmcError):
        Engine(model, spec="draft")
