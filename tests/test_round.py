"""bmc_round by itself: whatever is guessed, tokens are plain decoding's; limits, masks, failures."""

import math
import random

import numpy as np
import numpy_sampling
import pytest
import tiny

import pybmc
from pybmc import ArgumentError, BusyError, ContextFullError, OutOfMemoryError
from pybmc._native import check, ffi
from pybmc.engine.sampler import Sampler
from pybmc.spec.speculation import Speculation, plain
from tools.lab import lib

GUESSES = 32                            # of one sequence in a pass, at most (native/round.h)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    with pybmc.Model(tiny.model(request.param), threads=2) as model:
        yield model


class Item:
    """A bmc_item and what it points to."""

    def __init__(self, session, pending, max_tokens, guesses=None, sampler=None, masks=None, n_top=0,
                 stops=(), drafter=None, choose=1):
        n = max(max_tokens, 1)
        self.session, self.top, self.kept = session, n_top, [sampler, drafter]
        self.native = item = ffi.new("bmc_item *")
        item.session = session._live()
        item.pending, item.n_pending = self.keep("int32_t[]", pending), len(pending)
        item.choose, item.max_tokens = choose, max_tokens
        item.stops, item.n_stops = self.keep("int32_t[]", list(stops)), len(stops)
        if guesses is not None:
            item.guesses, item.n_guesses = self.keep("int32_t[]", guesses or 1), len(guesses)
        if masks is not None:
            item.masks = self.keep("uint32_t[]", masks)
        if sampler is not None:
            item.sampler = sampler.native
        if drafter is not None:
            item.drafter = drafter.native
        item.n_top = n_top
        item.top_ids, item.top_logprobs = (self.keep(f"{kind}[]", n * n_top) for kind in ("int32_t", "float"))
        item.ids, item.logprobs, item.drafted = (self.keep(f"{kind}[]", n)
                                                 for kind in ("int32_t", "float", "uint8_t"))

    def keep(self, kind, values):
        self.kept.append(ffi.new(kind, values))
        return self.kept[-1]

    @property
    def tokens(self):
        """(id, log-probability) of each token given."""
        return list(zip(ffi.unpack(self.native.ids, self.native.n),
                        ffi.unpack(self.native.logprobs, self.native.n)))

    @property
    def ids(self):
        return [id for id, _ in self.tokens]

    @property
    def drafted(self):
        return list(ffi.unpack(self.native.drafted, self.native.n))


def run(*items, n_rounds=1, seconds=1e9, policy=ffi.NULL):
    """One call; how many rounds there were."""
    limits = ffi.new("bmc_limits *", {"n_rounds": n_rounds, "seconds": seconds, "policy": policy})
    return check(lib.bmc_round(ffi.new("bmc_item *[]", [item.native for item in items]), len(items), limits))


def truth(model, prompt, n, sampler=None):
    """(id, log-probability) of n tokens, one pass each."""
    found, pending = [], list(prompt)
    with model.session() as session:
        while len(found) < n:
            if len(pending) > 1:
                session.eval(pending[:-1], "none")
            best = session.eval(pending[-1:], "best", sampler=sampler)
            pending = [int(best.ids[0])]
            found.append((pending[0], float(best.logprobs[0])))
    return found


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SAMPLERS = [None, Sampler(temperature=0.8, seed=3, top_k=0), Sampler(repeat_penalty=1.3, repeat_last_n=-1),
            Sampler(temperature=1.2, seed=1, frequency_penalty=0.6, logit_bias={5: 3.0, 7: -math.inf})]


def ready(model, prompt=PROMPT, context=None):
    """A session that holds the prompt without its last token."""
    session = model.session(context)
    session.eval(prompt[:-1], "none")
    return session


# ---- guesses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_any_guesses_give_the_plain_tokens(model, sampler):
    rng, expected = random.Random(1), truth(model, PROMPT, 60, sampler)
    answer = [id for id, _ in expected]
    for _ in range(12):
        found, pending = [], PROMPT[-1:]
        with ready(model) as session:
            while len(found) < 60:
                at = len(found)
                guesses = [id if rng.random() < 0.9 else rng.randrange(model.config.vocab_size)
                           for id in answer[at:at + rng.randint(0, GUESSES)]]
                item = Item(session, pending, 60 - at, guesses, sampler)
                assert run(item) == 1
                right = next((i for i, (a, b) in enumerate(zip(guesses, answer[at:])) if a != b),
                             len(guesses))
                right = min(right, 60 - at - 1)
                assert item.drafted == [1] * right + [0] and item.native.stats.accepted == right
                assert item.native.stats.checked == min(len(guesses), 60 - at - 1)
                found += item.tokens
                pending = item.ids[-1:]
                assert session.tokens == PROMPT + [id for id, _ in found][:-1]
        assert found == expected


def test_guesses_beyond_a_stop_id_do_not_count(model):
    sampler = Sampler(temperature=9.0, top_k=0, top_p=1.0, min_p=0.0)
    answer = [id for id, _ in truth(model, PROMPT, 10, sampler)]
    stop = next(i for i in range(2, 10) if answer[i] not in answer[:i])
    with ready(model) as session:
        item = Item(session, PROMPT[-1:], 20, answer, sampler, stops=[answer[stop]])
        assert run(item) == 1 and item.native.ended
        assert item.ids == answer[:stop + 1] and session.tokens == PROMPT + answer[:stop]


@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_guesses_end_with_the_context_and_with_max_tokens(model, room):
    expected = truth(model, PROMPT, 12)
    answer = [id for id, _ in expected]
    with ready(model, context=len(PROMPT) - 1 + room) as session:
        item = Item(session, PROMPT[-1:], 20, answer)
        assert run(item) == 1 and item.tokens == expected[:room] and session.position == session.context
        with pytest.raises(ContextFullError):
            run(Item(session, answer[room - 1:room], 20))
    with ready(model) as session:
        item = Item(session, PROMPT[-1:], room, answer)
        assert run(item, n_rounds=0) == 1 and item.tokens == expected[:room] and item.native.ended


def test_a_full_context_ends_the_rounds_of_a_call(model):
    """What came before is given; the next call says why there is no more."""
    expected = truth(model, PROMPT, 5)
    with ready(model, context=len(PROMPT) + 4) as session:
        item = Item(session, PROMPT[-1:], 20)
        assert run(item, n_rounds=0) == 5 and item.tokens == expected
        with pytest.raises(ContextFullError):
            run(Item(session, item.ids[-1:], 20))


# ---- many sequences, limits --------------------------------------------------------------------------------


def test_sequences_share_passes_with_pieces_of_prompts(model):
    """A reader of a piece, one of its last piece, and writers with guesses and samplers of their own."""
    texts = [PROMPT, PROMPT[::-1], [7] * 90, [8, 9]]
    expected = [truth(model, text, 6, sampler) for text, sampler in zip(texts, SAMPLERS)]
    sessions = [ready(model, texts[0]), ready(model, texts[1]), model.session(), ready(model, texts[3])]
    first = [Item(sessions[0], texts[0][-1:], 6, [id for id, _ in expected[0]], SAMPLERS[0]),
             Item(sessions[1], texts[1][-1:], 6, [0, 1], SAMPLERS[1]),
             Item(sessions[2], texts[2][:60], 6, choose=0),
             Item(sessions[3], texts[3][-1:], 6, sampler=SAMPLERS[3])]
    assert run(*first, n_rounds=0) == 1 and first[2].native.n == 0 and sessions[2].position == 60
    second = [Item(sessions[1], first[1].ids[-1:], 6 - len(first[1].ids), sampler=SAMPLERS[1]),
              Item(sessions[2], texts[2][60:], 6, sampler=SAMPLERS[2]),
              Item(sessions[3], first[3].ids[-1:], 6 - len(first[3].ids), sampler=SAMPLERS[3])]
    assert run(*second, n_rounds=0) == 1
    assert first[0].tokens == expected[0]
    found = [first[1].tokens + second[0].tokens, second[1].tokens, first[3].tokens + second[2].tokens]
    assert all(few == right[:len(few)] and few for few, right in zip(found, expected[1:]))
    assert [len(few) for few in found] == [2, 1, 2]
    for session in sessions:
        session.close()


def test_rounds_and_seconds_limit_a_call(model):
    expected = truth(model, PROMPT, 9)
    with ready(model) as session:
        item = Item(session, PROMPT[-1:], 9)
        assert run(item, n_rounds=4) == 4 and item.tokens == expected[:4] and not item.native.ended
        more = Item(session, item.ids[-1:], 5)
        assert run(more, n_rounds=0, seconds=0.0) == 1
        last = Item(session, more.ids[-1:], 4)
        assert run(last, n_rounds=0) == 4 and last.native.ended and last.native.stats.rounds == 4
        assert item.tokens + more.tokens + last.tokens == expected


def test_one_that_ends_ends_the_call_for_all(model):
    sessions = [ready(model), ready(model)]
    items = [Item(session, PROMPT[-1:], n) for session, n in zip(sessions, (3, 9))]
    assert run(*items, n_rounds=0) == 3 and [item.native.ended for item in items] == [1, 0]
    assert items[0].tokens == items[1].tokens == truth(model, PROMPT, 3)
    for session in sessions:
        session.close()


def test_the_likeliest_ids_are_those_of_the_logits(model):
    k, sampler = 7, Sampler(temperature=1.5, seed=2, logit_bias={3: 20.0})
    answer = [id for id, _ in truth(model, PROMPT, 8, sampler)]
    with ready(model) as session, model.session() as other:
        rows = other.eval(PROMPT + answer, "all")[len(PROMPT) - 1:]
        item = Item(session, PROMPT[-1:], 8, answer[:5], sampler, n_top=k)
        run(item, n_rounds=0)
        for i in range(8):
            order, logprobs = np.argsort(-rows[i], kind="stable")[:k], numpy_sampling.logprobs(rows[i])
            assert ffi.unpack(item.native.top_ids + i * k, k) == order.tolist()
            found = ffi.unpack(item.native.top_logprobs + i * k, k)
            assert found == pytest.approx(logprobs[order], abs=1e-5)


# ---- masks -------------------------------------------------------------------------------------------------


def mask_of(allowed, size):
    bits = np.zeros((size + 31) // 32 * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32).tolist()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_choices_stay_inside_the_mask(model, sampler):
    """One mask for each row; what is chosen is what numpy chooses where the other ids have -inf."""
    rng, size = random.Random(4), model.config.vocab_size
    for _ in range(10):
        sets = [sorted(rng.sample(range(size), rng.choice([1, 2, 40, size - 1]))) for _ in range(3)]
        with ready(model) as session, model.session() as other:
            guesses = [rng.choice(few) for few in sets[:2]]
            item = Item(session, PROMPT[-1:], 9, guesses, sampler,
                        masks=sum((mask_of(few, size) for few in sets), []))
            assert run(item, n_rounds=0) == 1
            text = PROMPT + item.ids
            rows = other.eval(text[:-1], "all")[len(PROMPT) - 1:]
            for i, (row, allowed) in enumerate(zip(rows, sets)):
                masked = np.full(size, -math.inf, np.float32)
                masked[allowed] = row[allowed]
                expected = numpy_sampling.choose(sampler or Sampler(), masked, len(PROMPT) + i,
                                                 text[:len(PROMPT) + i])
                assert item.ids[i] == expected
                assert item.tokens[i][1] == pytest.approx(numpy_sampling.logprobs(row)[expected], abs=1e-4)


@pytest.mark.parametrize("sampler", [None, Sampler(temperature=1.0)], ids=repr)
def test_a_mask_that_allows_nothing_ends_the_item(model, sampler):
    with ready(model) as session:
        item = Item(session, PROMPT[-1:], 9, sampler=sampler, masks=mask_of([], model.config.vocab_size))
        assert run(item, n_rounds=0) == 1 and item.ids == [-1]
        assert item.native.ended and math.isnan(item.tokens[0][1])


# ---- failures ----------------------------------------------------------------------------------------------


def test_arguments_are_checked(model):
    size = model.config.vocab_size
    with ready(model) as session, model.session() as other, pybmc.Model(model.path, threads=1) as twin, \
            twin.session() as foreign:
        made = Speculation(model, spec="ngram")
        drafter = made.drafter()
        good = {"session": session, "pending": PROMPT[-1:], "max_tokens": 4}
        for wrong, message in (
                ({"pending": []}, "at least one token"), ({"max_tokens": 0}, "1 or more tokens, found 0"),
                ({"pending": [size]}, f"found {size}"),
                ({"pending": [-1]}, "found -1"),
                ({"guesses": [0] * (GUESSES + 1)}, f"up to {GUESSES} guesses, found {GUESSES + 1}"),
                ({"guesses": [size]}, f"found {size}"), ({"guesses": [-1]}, "found -1"),
                ({"drafter": drafter}, "no policy"),
                ({"sampler": Sampler(logit_bias={size: 1.0})}, f"token {size}"),
                ({"n_top": size + 1}, f"n_top: expected 0 to {size}"),
                ({"session": foreign}, "different models")):
            with pytest.raises(ArgumentError, match=message):
                run(Item(other, [1], 1), Item(**good | wrong))
            assert session.tokens == PROMPT[:-1] and other.position == 0
        with pytest.raises(BusyError):
            run(Item(session, [1], 1), Item(session, [1], 1))
        assert lib.bmc_round(ffi.NULL, 0, ffi.NULL) == lib.BMC_EINVAL
        with pytest.raises(ArgumentError, match=f"found {size}"):
            run(Item(**good | {"pending": [size], "drafter": drafter}), policy=made.policy)


@pytest.mark.parametrize("n", range(1, 5))
@pytest.mark.parametrize("guesses", [0, 9])
@pytest.mark.parametrize("n_rounds", [1, 3])
def test_without_memory_the_text_goes_on_later(model, n, guesses, n_rounds):
    """The n-th growth fails: an error with nothing changed, or fewer rounds; and then the same text."""
    expected = truth(model, PROMPT, 60)
    answer, found, errors = [id for id, _ in expected], [], 0
    with model.session(rows=16) as session:
        session.eval(PROMPT[:-1], "none")
        lib.bmc_fail_allocation(n)
        try:
            while len(found) < 60:
                before, at = session.tokens, len(found)
                item = Item(session, (PROMPT + answer)[len(PROMPT) - 1 + at:][:1], 60 - at,
                            answer[at:at + guesses])
                try:
                    run(item, n_rounds=n_rounds)
                    found += item.tokens
                except OutOfMemoryError:
                    errors += 1
                    assert session.tokens == before
        finally:
            lib.bmc_fail_allocation(0)
    assert found == expected and (errors == 1 or n_rounds > 1)


def test_plain_gives_the_likeliest_tokens(model):
    expected = truth(model, PROMPT, 9)
    for k in (1, 2, 9):
        with model.session() as session:
            assert list(zip(*plain(session, PROMPT, k))) == expected[:k]
