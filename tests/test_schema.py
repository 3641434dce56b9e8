"""Requests that follow a schema: masks allow each token, with and without guesses, alone and in company."""

import copy
import random

import engines
import numpy as np
import numpy_sampling
import pytest
import tiny
from engines import events

import pybmc
from pybmc import ArgumentError, BmcError, Engine, Request
from pybmc.engine import Schema, schema
from pybmc.engine.sampler import Sampler
from pybmc.spec.speculation import Speculation

SIZE = 401


def bits(allowed):
    mask = np.zeros((SIZE + 31) // 32 * 32, np.uint8)
    mask[list(allowed)] = 1
    return np.packbits(mask, bitorder="little").view(np.uint32)


class Cycle:
    """A toy grammar: sets of ids take turns, None allows all. A set with one id forces it."""

    def __init__(self, *sets):
        self.sets, self.text = sets, []

    def _set(self, at):
        return self.sets[at % len(self.sets)]

    def mask(self, tokens):
        for i, token in enumerate(tokens):
            allowed = self._set(len(self.text) + i)
            assert allowed is None or token in allowed, "a token that its mask forbids"
        allowed = self._set(len(self.text) + len(tokens))
        return None if allowed is None else bits(allowed)

    def accept(self, token):
        assert self._set(len(self.text)) is None or token in self._set(len(self.text))
        self.text.append(token)

    def forced(self):
        found, at = [], len(self.text)
        while len(found) < 40 and self._set(at + len(found)) and len(self._set(at + len(found))) == 1:
            found += self._set(at + len(found))
        return found


DIGITS, LETTERS = range(20, 30), range(100, 126)
GRAMMARS = [Cycle(DIGITS), Cycle(DIGITS, LETTERS), Cycle([7], [8], [9], DIGITS, None), Cycle(None),
            Cycle([5, 6], [40], None, None)]
SAMPLERS = [Sampler(), Sampler(temperature=1.5, seed=3, top_p=1.0),
            Sampler(temperature=0.8, seed=1, repeat_penalty=1.3)]


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=600), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def drafts(model):
    """The model itself, one that is mostly right, one with another vocabulary."""
    with pybmc.Model(tiny.model("llama", n_ctx=600, types="Q4_0"), threads=1) as coarse, \
            pybmc.Model(tiny.model("phi3", n_ctx=600, vocab_size=900), threads=1) as text:
        yield {"twin": model, "coarse": coarse, "text": text}


def write(model, request, speculation=None):
    """The tokens, and the Stats, of a request with a schema like the one given."""
    request = fresh(request)
    found, stats = engines.write(model, request, speculation)
    assert request.schema.text == [token.id for token in found]
    return found, stats


def fresh(request):
    """A request whose schema is at its beginning."""
    return Request(**vars(request) | {"schema": copy.deepcopy(request.schema)})


@pytest.mark.parametrize("grammar", range(len(GRAMMARS)))
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_tokens_are_those_of_masked_decoding_one_by_one(model, grammar, sampler):
    """Numpy chooses from the logits of one token at a time, where ids that the mask forbids have -inf."""
    schema, text = copy.deepcopy(GRAMMARS[grammar]), [1, 2, 3]
    found, _ = write(model, Request(text, 25, sampler, schema=schema))
    with model.session() as session:
        session.eval(text[:-1], "none")
        for i, token in enumerate(found):
            row, allowed = session.eval(text[-1:], "last"), schema._set(i)
            masked = row.copy() if allowed is None else np.full(SIZE, -np.inf, np.float32)
            if allowed is not None:
                masked[list(allowed)] = row[list(allowed)]
            assert token.id == numpy_sampling.choose(sampler, masked, len(text), text)
            assert token.logprob == pytest.approx(numpy_sampling.logprobs(row)[token.id], abs=1e-4)
            text.append(token.id)


@pytest.mark.parametrize("fixed", [0, 4])
@pytest.mark.parametrize("source", ["ngram", "self", "twin", "coarse", "text"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_guesses_change_nothing(model, drafts, source, sampler, fixed):
    for grammar in GRAMMARS:
        request = Request([1, 2, 3, 20, 21] * 4, 40, sampler, schema=grammar)
        spec = source if source in ("ngram", "self") else "auto"
        made = Speculation(model, drafts.get(source), spec, fixed=fixed)
        found, stats = write(model, request, made)
        assert found == write(model, request)[0]
        assert stats.draft_n >= stats.draft_n_accepted


def test_forbidden_guesses_are_not_verified(model, drafts):
    """A draft model knows nothing of the schema: what it proposes beside it costs no place in a pass."""
    request = Request([1, 2, 3], 60, schema=Cycle(DIGITS))
    _, stats = write(model, request, Speculation(model, drafts["twin"], "draft", fixed=8))
    assert stats.draft_n < 60 and 8 not in stats.lengths and stats.draft_s > 0


def test_forced_tokens_share_a_pass(model):
    request = Request([1, 2, 3], 60, schema=Cycle([7], [8], [9], [10], DIGITS))
    always = Speculation(model, spec="ngram", fixed=16)   # all guesses are checked, whatever passes cost here
    found, stats = write(model, request, always)
    assert [t.id for t in found][:4] == [7, 8, 9, 10]
    assert stats.rounds < 40 and stats.draft_n_accepted > 20


def test_a_stop_id_among_the_guesses_ends_the_text(model, drafts):
    request = Request([1, 2, 3], 60, stop_ids=frozenset({9}), schema=Cycle(DIGITS, [7], [9], [8]))
    twin = Speculation(model, drafts["twin"], "draft", fixed=4)
    for made in (None, twin, Speculation(model, spec="ngram")):
        found, _ = write(model, request, made)
        assert [t.id for t in found][1:] == [7, 9] and found[-1].finish_reason == "stop"


@pytest.mark.parametrize("seed", range(6))
def test_company_changes_nothing(model, drafts, seed):
    """Requests with and without schemas, some of them in sessions, some cancelled."""
    rng = random.Random(seed)
    source = rng.choice([None, *drafts])
    with Engine(model, speculation=Speculation(model, drafts.get(source), "auto"), parallel=3) as engine:
        expected = {}
        for _ in range(6):
            prompt = [rng.randrange(SIZE) for _ in range(rng.randint(1, 90))]
            schema = rng.choice([*GRAMMARS, None])
            request = Request(prompt, rng.randint(1, 60), rng.choice(SAMPLERS), schema=schema)
            expected[engine.add(fresh(request))], _ = engines.write(model, fresh(request))
        cancelled, found = rng.choice(list(expected)), {sequence: [] for sequence in expected}
        for n, (sequence, token) in enumerate(events(engine)):
            found[sequence].append(token._replace(from_draft=False, by=None))
            if n == 20:
                engine.cancel(cancelled)
        for sequence, tokens in expected.items():
            assert not sequence.error
            whole = sequence is not cancelled or len(found[sequence]) == len(tokens)
            assert found[sequence] == tokens[:None if whole else len(found[sequence])]


# ---- failures ----------------------------------------------------------------------------------------------


class Broken(Cycle):
    """One of its methods fails at a place of the text."""

    def __init__(self, method, answer, at=3):
        super().__init__(DIGITS, [7])
        self.method, self.answer, self.at = method, answer, at

    def _answer(self, method, usual):
        if method != self.method or len(self.text) < self.at:
            return usual
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def mask(self, tokens):
        return self._answer("mask", super().mask(tokens))

    def accept(self, token):
        super().accept(token)
        self._answer("accept", None)

    def forced(self):
        return self._answer("forced", super().forced())


@pytest.mark.parametrize("method, answer, message", [
    ("mask", ValueError("no such state"), "the schema failed: ValueError: no such state"),
    ("mask", bits([]), "no token can be chosen at position 6"),
    ("mask", np.zeros(5, np.uint32), r"schema.mask\(\): expected shape \(13,\), got \(5,\)"),
    ("mask", np.zeros(13), r"schema.mask\(\): expected uint32 values, got float64"),
    ("mask", "x" * 13, r"schema.mask\(\): expected shape"),
    ("accept", KeyError(7), "the schema failed: KeyError: 7"),
    ("forced", ZeroDivisionError("no"), "the schema failed: ZeroDivisionError: no"),
    ("forced", [SIZE], r"schema.forced\(\)"), ("forced", 5, r"schema.forced\(\)")])
def test_a_schema_that_fails_ends_its_own_request(model, drafts, method, answer, message):
    for made in (Speculation(model, spec="off"), Speculation(model, drafts["twin"], "auto", fixed=3)):
        with Engine(model, speculation=made) as engine:
            other = engine.add(Request([5], 30))
            bad = engine.add(Request([1, 2, 3], 30, schema=Broken(method, answer)))
            tokens = {other: [], bad: []}
            for sequence, token in events(engine):
                tokens[sequence].append(token)
            assert len(tokens[other]) == 30 and not other.error
            assert 3 <= len(tokens[bad]) < 30 and bad.done
            with pytest.raises(BmcError, match=message):
                raise bad.error


@pytest.mark.parametrize("method", ["mask", "accept", "forced"])
def test_an_interrupt_in_a_schema_comes_through(model, method):
    with Engine(model, spec="ngram") as engine, model.session() as session:
        broken = Broken(method, KeyboardInterrupt())
        sequence = engine.add(Request([1, 2, 3], 30, session=session, schema=broken))
        with pytest.raises(KeyboardInterrupt):
            list(events(engine))
        engine.cancel(sequence)
        again = engine.add(Request([1, 2, 3], 5, session=session))
        assert len([token for who, token in events(engine) if who is again]) == 5


def test_schemas_are_checked(model):
    assert isinstance(GRAMMARS[0], Schema)
    with Engine(model) as engine, pytest.raises(ArgumentError, match="schema: expected an object with mask"):
        engine.add(Request([1], schema="digits"))


def test_an_interrupt_before_the_callback_catches_it_comes_through(model, monkeypatch):
    def interrupted(self, guesses, n):
        raise KeyboardInterrupt

    monkeypatch.setattr(schema.Masks, "allow", interrupted)
    with Engine(model, spec="off") as engine:
        engine.add(Request([1, 2, 3], 9, schema=Cycle(DIGITS)))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
