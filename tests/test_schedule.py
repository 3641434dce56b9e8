"""What the engine decides: whose turn it is, which rows are kept and used again, who is put aside;
and scores of prompts."""

import random

import numpy as np
import numpy_sampling
import pytest
import tiny
from test_engine import alone, busy, finish, outcome

import pybmc
from pybmc import ArgumentError, Engine, OutOfMemoryError, Request
from pybmc.engine.prefixes import Prefixes
from pybmc.engine.sampler import Sampler
from pybmc.engine.schedule import LONG, PATIENCE, WRITTEN, Turns
from pybmc.spec.speculation import Speculation


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=600), threads=1) as model:
        yield model


@pytest.fixture
def short_calls(monkeypatch):
    monkeypatch.setattr("pybmc.engine.engine.CALL_SECONDS", 0.0)


# ---- turns


def served(turns, requests, rounds):
    """Who is served in each of some rounds of one unit of 10 tokens;
    requests: number -> client, all of equal length."""
    order = []
    for _ in range(rounds):
        number = min(requests, key=lambda n: turns.key(requests[n], 10, 0.0, n))
        turns.charge(requests[number], read=10)
        order.append(requests[number])
    return order


def test_clients_get_equal_shares_whatever_they_queue():
    turns, requests = Turns(), dict(enumerate(["many"] * 20 + ["few"]))
    for client in requests.values():
        turns.enter(client)
    order = served(turns, requests, 40)
    assert abs(order.count("many") - order.count("few")) <= 1


def test_a_client_that_comes_back_starts_at_the_least_of_those_present():
    turns = Turns()
    for client in ("a", "b"):
        turns.enter(client)
    turns.charge("a", read=1000)
    turns.charge("b", written=100)
    turns.enter("c")
    key = {client: turns.key(client, 1, 0.0, 0)[0] for client in "abc"}
    assert key == {"a": 1000, "b": 100 * WRITTEN, "c": 100 * WRITTEN}
    turns.leave("a")
    turns.enter("a")
    assert turns.key("a", 1, 0.0, 0)[0] == 100 * WRITTEN


def test_short_prompts_go_ahead_of_a_long_one_until_it_has_waited():
    turns = Turns()
    turns.enter("a")
    long, short = (LONG + 1, 0), (5, 1)
    first = lambda waited: min((long, short), key=lambda r: turns.key("a", r[0], waited, r[1]))
    assert first(0.0) == short and first(PATIENCE) == long


def test_turns_forget_clients_that_left():
    turns = Turns()
    for i in range(100):
        turns.enter(i)
        turns.charge(i, read=1)
        turns.leave(i)
        turns.charge(i, read=1)         # of a call that was still running
    assert not turns._given and not turns._present


def test_a_client_with_many_requests_does_not_hold_up_another(model, short_calls):
    with Engine(model, spec="off", parallel=1) as engine:
        many = [engine.add(Request([1, 2], 20, client="many")) for _ in range(6)]
        few = engine.add(Request([3], 20, client="few"))
        order = list(finish(engine))
        assert order.index(few) == 1 and all(s.done for s in many)


# ---- kept rows


def bounded(model, rows, **more):
    return Engine(model, spec=more.pop("spec", "off"), memory=rows * model.config.kv_row_bytes,
                  keep=True, **more)


def test_rows_of_an_ended_request_serve_the_next_one_that_begins_alike(model):
    with bounded(model, 2000) as engine:
        first = engine.add(Request(list(range(50)), 10))
        text = list(range(50)) + [t.id for t in finish(engine)[first]]
        again = engine.add(Request([*text, 7, 8], 10))
        assert outcome(finish(engine)[again]) == outcome(alone(model, again.request))
        assert again.stats.reused_tokens == 59 and len(engine.prefixes) == 1
        other = engine.add(Request([9, 9, 9], 5))
        fresh = engine.add(Request([*text, 7, 8], 10, reuse=False))
        finish(engine)
        assert other.stats.reused_tokens == fresh.stats.reused_tokens == 0


def test_a_session_is_taken_only_where_it_holds_nothing_else(model):
    kept = Prefixes()
    with model.session() as session:
        session.eval(list(range(100)), "none")
        kept.give(session)
        texts = [np.array(text, np.int32) for text in ([*range(60), 5], [*range(100), 5], [5])]
        part, whole, none = (kept.match(text, session.context) for text in texts)
        assert (part.n, part.whole, whole.n, whole.whole, none) == (60, False, 100, True, None)
        assert kept.match(texts[0], 77) is None
        with kept.take(part) as fork:
            assert fork.tokens == list(range(60)) and kept.rows == 100
        assert kept.take(whole) is session and not kept.rows and not kept.bytes


def test_kept_rows_make_way_the_least_recently_used_first(model):
    with bounded(model, 200) as engine:
        for first in (1, 2, 3):
            engine.add(Request([first] * 60, 2))
            finish(engine)
        assert len(engine.prefixes) == 3
        engine.add(Request([4] * 60, 2))
        finish(engine)
        held = [int(kept.tokens[0]) for kept in engine.prefixes._kept]
        assert held[-1] == 4 and 1 not in held and engine.used <= engine.memory


def test_cancelled_and_failed_requests_keep_nothing(model, short_calls):
    with bounded(model, 1000) as engine:
        sequence = engine.add(Request([1, 2], 400))
        engine.step()
        session = sequence.session
        engine.cancel(sequence)
        assert not engine.prefixes.rows and not session._handle


def test_closing_an_engine_frees_what_it_keeps(model):
    before = sum(bool(s._handle) for s in model._sessions)
    with bounded(model, 1000) as engine:
        engine.add(Request([1, 2], 4))
        finish(engine)
        assert engine.prefixes.rows
    assert sum(bool(s._handle) for s in model._sessions) == before


def test_keeping_needs_a_bound(model):
    with pytest.raises(ArgumentError, match="expected memory"):
        Engine(model, keep=True)


# ---- memory


def test_the_youngest_is_put_aside_and_its_text_stays_the_same(model, short_calls):
    requests = [Request([i, 5], 350, Sampler(temperature=0.7 * (i % 2), seed=i)) for i in range(3)]
    expected = [outcome(alone(model, request)) for request in requests]
    with bounded(model, 900, spec="ngram") as engine:
        sequences, found = [engine.add(request) for request in requests], {}
        for _ in busy(engine):
            for sequence, token in engine.step():
                found.setdefault(sequence, []).append(token)
            assert engine.used <= engine.memory
        assert [outcome(found[s]) for s in sequences] == expected and engine.put_aside > 0
        assert [s.stats.predicted_tokens for s in sequences] == [len(tokens) for tokens in expected]


def test_what_does_not_fit_alone_ends_with_an_error(model):
    with bounded(model, 100) as engine:
        prompt, answer = engine.add(Request([1] * 100, 5)), engine.add(Request([2] * 50, 200))
        tokens = finish(engine)[answer]
        assert isinstance(prompt.error, OutOfMemoryError) and isinstance(answer.error, OutOfMemoryError)
        assert outcome(tokens) == outcome(alone(model, answer.request))[:len(tokens)] and len(tokens) >= 45
        small = engine.add(Request([3], 5))
        assert len(finish(engine)[small]) == 5


def test_a_session_that_was_given_is_never_taken_away(model, short_calls):
    with bounded(model, 200) as engine, model.session() as large:    # it grows by more rows than there are
        given = engine.add(Request([1, 2], 40, session=large))
        waits = engine.add(Request([3], 5))
        for _ in range(3):
            engine.step()
        assert engine.running == [given] and engine.waiting == [waits]
        finish(engine)
        assert given.stats.predicted_tokens == 40 and waits.stats.predicted_tokens == 5
        assert large.position == 41


def test_a_session_that_is_closed_ends_its_sequence_alone(model, short_calls):
    with bounded(model, 600) as engine:
        session = model.session()
        given, other = engine.add(Request([1, 2], 40, session=session)), engine.add(Request([3], 5))
        engine.step()
        session.close()
        finish(engine)
        assert isinstance(given.error, pybmc.ClosedError) and other.stats.predicted_tokens == 5


def test_relieve_gives_kept_rows_back_first(model, short_calls):
    with bounded(model, 1000) as engine:
        engine.add(Request([7] * 20, 2))
        finish(engine)
        one, other = [engine.add(Request([i], 100)) for i in (1, 2)]
        engine.step()
        assert engine.relieve() and not engine.prefixes.rows and len(engine.running) == 2
        assert engine.relieve() and engine.running == [one] and engine.waiting == [other]
        finish(engine)
        assert engine.relieve() and engine.relieve() and not engine.relieve()       # what those two left
        assert other.stats.predicted_tokens == 100


# ---- hints


def test_a_hint_is_guessed_from_and_changes_nothing(model):
    request = Request([5, 6, 7], 80)
    expected = alone(model, request)
    ids = [t.id for t in expected]
    for hint, accepted in ((ids, True), (ids[:40] + [9] + ids[40:], True), ([1, 2, 3], False),
                           ([5] * 2000, False)):
        made = Speculation(model, None, "ngram", fixed=8)
        with Engine(model, speculation=made) as engine:
            sequence = engine.add(Request([5, 6, 7], 80, hint=hint))
            assert outcome(finish(engine)[sequence]) == outcome(expected)
            assert sequence.stats.draft_n_accepted >= 60 or not accepted


# ---- scores


@pytest.mark.parametrize("top", [0, 1, 3])
def test_scores_are_those_of_the_logits(model, top):
    rng = random.Random(top)
    tokens = [rng.randrange(401) for _ in range(150)]
    with model.session() as session:
        logprobs = np.array([numpy_sampling.logprobs(row) for row in session.eval(tokens, "all")])
    with bounded(model, 1000, parallel=2) as engine:
        engine._prompt_rate = 1e-9          # pieces are small
        sequence, beside = engine.add(Request(tokens, 3, score=top)), engine.add(Request([1, 2], 50))
        found = finish(engine)
        assert outcome(found[sequence]) == outcome(alone(model, Request(tokens, 3)))
        assert outcome(found[beside]) == outcome(alone(model, beside.request))
        assert len(sequence.scores) == 149
        for i, score in enumerate(sequence.scores):
            order = np.argsort(-logprobs[i], kind="stable")[:top]
            assert score.logprob == pytest.approx(logprobs[i][tokens[i + 1]], abs=1e-4)
            assert [id for id, _ in score.top] == order.tolist()
            assert [p for _, p in score.top] == pytest.approx(logprobs[i][order], abs=1e-4)
            assert all(p == score.logprob for id, p in score.top if id == tokens[i + 1]) or top > 1


def test_the_library_checks_given_ids(model):
    from pybmc._native import check, ffi, lib

    with model.session() as session, session._claimed() as handle:
        for given, room in (([401, 0], 2), ([0, -1], 2), ([0, 0], 0)):
            ids, out = ffi.new("int32_t[]", [1, 2]), ffi.new("float[]", 2)
            known = ffi.new("int32_t[]", given)
            span = ffi.new("bmc_span *",
                           {"session": handle, "tokens": ids, "n_tok": 2, "want": lib.BMC_WANT_ALL,
                            "given": known, "given_logprob": out if room else ffi.NULL})
            with pytest.raises(ArgumentError, match="given"):
                check(lib.bmc_eval(span, 1))


def test_sessions_grow_finely_only_where_memory_is_narrow(model):
    from pybmc.engine.memory import FINE, Room

    row = model.config.kv_row_bytes
    with model.session() as session:
        usual = session.arena_stats().r
    assert Room(model, 100 * row, 2).grain == FINE and Room(model, 8 * usual * row, 2).grain == usual
    assert [Room(model, 100 * row, 2).whole(n) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]
