"""Requests whose texts begin alike share the rows of their beginning, and no text depends on that."""

import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import test_draft_head
import tiny
from test_engine import alone, busy, finish, outcome

import pybmc
from pybmc import Engine, OutOfMemoryError, Request
from pybmc.engine import prefixes
from pybmc.engine.prefixes import Prefixes
from pybmc.engine.sampler import Sampler
from pybmc.engine.session import Session

SIZE = 401
RECURRENT = ("qwen35", "lfm2")


@lru_cache(maxsize=None)
def load(arch="llama"):
    if arch == "draft head":
        return test_draft_head.load()
    return pybmc.Model(tiny.model(arch, n_ctx=600), threads=1)


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    monkeypatch.setattr("pybmc.engine.engine.CALL_SECONDS", 0.0)


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, SIZE, n).tolist()


def costs(model, rows):
    """Bytes of a session of this many rows that grows finely, and of its states."""
    with model.session(max(rows, 600), rows=16) as session:
        session.reserve(rows)
        if model.head:
            session.keep_hidden()
        return session.arena_stats().bytes_reserved, session.arena_stats().state_bytes


def cost(model, rows):
    return costs(model, rows)[0]


def slow(engine):
    """Let it read pieces of 16 tokens."""
    engine._prompt_rate = 1e-9
    return engine


def count_reads(engine):
    """Tokens of prompts that its sequences read themselves."""
    found = []
    engine._turns.charge = lambda client, read=0, written=0: found.append(read)
    return found


# ---- no text depends on it


def tree(rng, n):
    """Prompts, some of which begin as others do."""
    found = [ids(rng.randint(1, 120), rng.randrange(1000))]
    for _ in range(n - 1):
        stem = rng.choice(found)
        found.append([*stem[:rng.randint(0, len(stem))], *ids(rng.randint(1, 60), rng.randrange(1000))])
    return found


@pytest.mark.parametrize("arch", ["llama", "gemma3", *RECURRENT, "draft head"])
def test_company_that_begins_alike_changes_nothing(arch, monkeypatch):
    """Forks of running and of kept sessions, several answers, sequences put aside and cancelled,
    in all orders."""
    monkeypatch.setattr("pybmc.engine.sequence.ANSWER", 8)        # so that memory gets short later
    model, shared, aside = load(arch), 0, 0
    for seed in range(3 if arch == "draft head" else 10):
        rng = random.Random(seed)
        requests = [Request(prompt, rng.randint(1, 50), Sampler(temperature=rng.choice([0, 0.8]), seed=i),
                            priority=rng.choice([0, 0, 1]), score=rng.choice([None] * 9 + [0]),
                            reuse=rng.random() < 0.9)
                    for prompt in tree(rng, 7) for i in range(rng.choice([1, 1, 3]))]
        rows, states = costs(model, rng.choice([300, 400, 900]))
        memory = rows + rng.choice([1, 2, 3]) * states
        with Engine(model, spec=rng.choice(["auto", "mtp"] if model.head else ["off", "ngram"]),
                    parallel=rng.choice([2, 3, 5]), memory=memory, keep=rng.random() < 0.7) as engine:
            if rng.random() < 0.7:
                slow(engine)
            found, cancelled, later = {}, set(), requests[len(requests) // 2:]
            for request in requests[:len(requests) // 2]:
                found[engine.add(request)] = []
            while engine.waiting or engine.running or later:
                if later and rng.random() < 0.3:
                    found[engine.add(later.pop())] = []
                for sequence, token in engine.step():
                    found[sequence].append(token)
                assert engine.used <= memory
                if rng.random() < 0.02:
                    cancelled.add(rng.choice(list(found)))
                    for sequence in cancelled:
                        engine.cancel(sequence)
            for sequence, tokens in found.items():
                expected = outcome(alone(model, sequence.request))
                whole = sequence not in cancelled or len(tokens) == len(expected)
                assert not sequence.error and outcome(tokens) == expected[:None if whole else len(tokens)]
            shared += sum(s.stats.reused_tokens for s in found)
            aside += engine.put_aside
    assert shared > 50 and (aside or arch in ("qwen35", "draft head"))


# ---- who shares, and who waits


@pytest.mark.parametrize("arch", ["llama", "gemma3", *RECURRENT])
def test_answers_to_one_prompt_read_it_once(arch):
    prompt = ids(200)
    with Engine(load(arch), spec="off") as engine:
        read = count_reads(slow(engine))
        sequences = [engine.add(Request(prompt, 5, Sampler(temperature=1.0, seed=i))) for i in range(4)]
        found = finish(engine)
        assert ([outcome(found[s]) for s in sequences]
                == [outcome(alone(load(arch), s.request)) for s in sequences])
        assert sum(read) <= 200 + 3 and [s.stats.reused_tokens for s in sequences] == [0, 199, 199, 199]


def test_shared_rows_count_once():
    model, prompt = load(), ids(160)
    one = cost(model, 170)
    with Engine(model, spec="off", memory=1.7 * one) as engine:
        for i in range(4):
            engine.add(Request(prompt, 8, Sampler(seed=i)))
        most = 0
        for _ in busy(engine):
            engine.step()
            most = max(most, len(engine.running))
            assert engine.used <= engine.memory
        assert most == 4 and not engine.put_aside


def test_the_second_of_two_unread_texts_waits_for_the_first():
    stem = ids(120)
    with slow(Engine(load(), spec="off")) as engine:
        first, second, other = (engine.add(Request(text, 4))
                                for text in ([*stem, *ids(100, 1)], [*stem, *ids(9, 2)], ids(20, 3)))
        engine.step()
        assert engine.running == [first, other] and second.awaits is first
        while not second.started:
            engine.step()
            assert second.started or first.session.position <= 120
        assert first.session.position < 160 and first.reading
        found = finish(engine)
        assert second.stats.reused_tokens == 120
        assert outcome(found[second]) == outcome(alone(load(), second.request))


def test_nobody_waits_for_a_few_tokens():
    with slow(Engine(load(), spec="off")) as engine:
        for i in range(2):
            engine.add(Request([*ids(15), *ids(100, i + 1)], 4))
        engine.step()
        assert len(engine.running) == 2
        finish(engine)


def test_who_is_waited_for_takes_the_turn_of_those_that_wait():
    stem = ids(100)
    with slow(Engine(load(), spec="off")) as engine:
        first, other = engine.add(Request([*stem, 5], 3)), engine.add(Request(ids(100, 1), 3, priority=1))
        engine.step()
        assert other.session.position == 16 and first.session.position == 0
        engine.add(Request([*stem, 6], 3, priority=2))
        engine.step()
        assert other.session.position == 16 and first.session.position == 16
        finish(engine)


def test_who_waited_for_a_cancelled_request_reads_itself():
    stem = ids(100)
    with slow(Engine(load(), spec="off")) as engine:
        first, second = engine.add(Request([*stem, 5], 3)), engine.add(Request([*stem, 6], 3))
        engine.step()
        engine.cancel(first)
        assert outcome(finish(engine)[second]) == outcome(alone(load(), second.request))
        assert not second.stats.reused_tokens


def test_a_text_that_is_written_can_be_forked():
    with Engine(load(), spec="off") as engine:
        first = engine.add(Request(ids(50), 60))
        while len(first.text) < 60:
            engine.step()
        second = engine.add(Request([*ids(40), 1, 2], 5))
        found = finish(engine)
        assert second.stats.reused_tokens == 40
        assert outcome(found[second]) == outcome(alone(load(), second.request))
        assert outcome(found[first]) == outcome(alone(load(), first.request))[-len(found[first]):]


def test_requests_can_do_without():
    with Engine(load(), spec="off") as engine:
        sequences = [engine.add(Request(ids(80), 3, reuse=False)) for _ in range(2)]
        engine.step()
        assert len(engine.running) == 2
        finish(engine)
        assert not sequences[1].stats.reused_tokens


# ---- kept sessions


def keeping(model, rows=2000, **more):
    return Engine(model, spec="off", memory=cost(model, rows), keep=True, **more)


def test_a_kept_session_serves_many_texts():
    stem = ids(100)
    with keeping(load()) as engine:
        engine.add(Request(stem, 5))
        finish(engine)
        for i in range(3):
            sequence = engine.add(Request([*stem, i, i], 5))
            assert outcome(finish(engine)[sequence]) == outcome(alone(load(), sequence.request))
            assert sequence.stats.reused_tokens == 100
        assert len(engine.prefixes) == 4
        assert engine.used < cost(load(), 112) + 4 * cost(load(), 32)


def test_who_was_put_aside_finds_what_is_left():
    with keeping(load(), 600) as engine:
        sequences = [engine.add(Request(ids(30, i), 350)) for i in range(2)]
        found = finish(engine)
        assert engine.put_aside
        assert ([outcome(found[s]) for s in sequences]
                == [outcome(alone(load(), s.request)) for s in sequences])


def test_another_one_may_take_what_was_put_aside():
    with keeping(load(), 600) as engine:
        first, second = engine.add(Request(ids(30), 100)), engine.add(Request(ids(30, 1), 60))
        found = {first: [], second: []}
        for _ in range(10):
            for sequence, token in engine.step():
                found[sequence].append(token)
        assert engine._drop_youngest([second]) is None and second in engine.waiting
        third = engine.add(Request([*second.text, 7], 5, priority=1))
        for sequence, tokens in finish(engine).items():
            found.setdefault(sequence, []).extend(tokens)
        assert third.stats.reused_tokens == len(third.prompt) - 2
        for sequence, tokens in found.items():
            assert not sequence.error and outcome(tokens) == outcome(alone(load(), sequence.request))


def test_a_kept_session_makes_way_for_its_own_fork():
    """Where most of it is in the way."""
    model = load()
    with Engine(model, spec="off", memory=cost(model, 500), keep=True) as engine:
        engine.add(Request(ids(350), 10))
        finish(engine)
        sequence = engine.add(Request([*ids(20), *ids(330, 1)], 10))
        assert outcome(finish(engine)[sequence]) == outcome(alone(model, sequence.request))
        assert not engine.put_aside
        assert engine.used <= engine.memory


@pytest.mark.parametrize("arch", RECURRENT)
def test_recurrent_texts_are_used_again_from_where_others_left_them(arch):
    """The first one is read to its end without a stop; the second one leaves a snapshot where it differs."""
    stem = ids(150)
    with keeping(load(arch)) as engine:
        reused = []
        for i in range(4):
            sequence = engine.add(Request([*stem, *ids(60, i + 1)], 4))
            assert outcome(finish(engine)[sequence]) == outcome(alone(load(arch), sequence.request))
            reused.append(sequence.stats.reused_tokens)
        assert reused[:2] == [0, 0] and min(reused[2:]) >= 150 - 48


def test_a_conversation_of_a_recurrent_model_goes_on():
    with keeping(load("qwen35")) as engine:
        first = engine.add(Request(ids(100), 20))
        text = [*ids(100), *(t.id for t in finish(engine)[first])]
        second = engine.add(Request([*text, 5, 6], 5))
        finish(engine)
        assert second.stats.reused_tokens == 119


def test_snapshots_stay_in_the_memory():
    model = load("qwen35")
    for memory in (cost(model, 250), 1.2 * cost(model, 250), 3 * cost(model, 250)):
        with Engine(model, spec="off", memory=memory, keep=True) as engine:
            for i in range(3):
                engine.add(Request([*ids(100), *ids(50, i)], 20))
                for _ in busy(engine):
                    engine.step()
                    assert engine.used <= memory


def test_what_fits_without_snapshots_is_written_to_its_end():
    """Though snapshots were taken while there was room, more than was thought of."""
    model = load("qwen35")
    with Engine(model, spec="off", memory=cost(model, 416), keep=True) as engine:
        engine._room.snapshot_bytes = 1
        for i in range(4):
            sequence = engine.add(Request([*ids(100), *ids(100, i + 1)], 200))
            assert outcome(finish(engine)[sequence]) == outcome(alone(model, sequence.request))
        assert engine.put_aside


def test_rows_behind_a_window_are_read_again():
    with pybmc.Model(tiny.model("gemma3", n_ctx=4096), threads=1) as model, keeping(model, 9000) as engine:
        engine.add(Request(ids(2500), 2))
        finish(engine)
        sequence = engine.add(Request([*ids(60), 5], 5))
        assert outcome(finish(engine)[sequence]) == outcome(alone(model, sequence.request))
        assert sequence.stats.reused_tokens == 0


def test_a_fork_without_memory_is_a_new_session(monkeypatch):
    def fork(self, position):
        raise OutOfMemoryError("no memory")

    with Engine(load(), spec="off") as engine:
        sequences = [engine.add(Request(ids(50), 5)) for _ in range(2)]
        monkeypatch.setattr(Session, "fork", fork)
        found = finish(engine)
        assert [outcome(found[s]) for s in sequences] == [outcome(alone(load(), sequences[0].request))] * 2


def test_scores_begin_anew_after_their_sequence_was_put_aside():
    with slow(keeping(load(), 1000)) as engine:
        request = Request(ids(100), 2, score=0)
        expected = engine.add(request)
        finish(engine)
        beside, sequence = engine.add(Request(ids(5), 40)), engine.add(replace(request))
        for _ in range(3):
            engine.step()
        assert 0 < len(sequence.scores) < 99 and engine.relieve() and beside in engine.running
        while sequence in engine.running:
            assert engine.relieve()
        finish(engine)
        assert sequence.scores == expected.scores and len(sequence.scores) == 99


class Told:
    """A session as Prefixes needs it."""

    context = 7

    def __init__(self, tokens, steps):
        self.tokens, self.steps, self.position = tokens, steps, len(tokens)

    def nearest(self, n):
        return n // self.steps * self.steps


def test_the_longest_beginning_is_found():
    rng = random.Random(1)
    for _ in range(200):
        kept, sessions = Prefixes(), []
        for _ in range(rng.randint(0, 12)):
            sessions.append(Told([rng.randrange(2) for _ in range(rng.randint(1, 9))],
                                 rng.choice([1, 1, 2, 3])))
            kept.give(sessions[-1])
        tokens = np.array([rng.randrange(2) for _ in range(rng.randint(0, 9))], np.int32)
        best = max((s.nearest(prefixes.common(np.array(s.tokens, np.int32), tokens)) for s in sessions),
                   default=0)
        found = kept.match(tokens, 7)
        assert (found.n if found else 0) == best
        assert not found or found.session.tokens[:found.n] == tokens[:found.n].tolist()
