"""The sampler: the library's choices are those of its definition in numpy, alone and through a pass."""

from math import inf, nan

import numpy as np
import numpy_sampling
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import pybmc
from pybmc import ArgumentError
from pybmc.engine.sampler import Sampler

PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}            # no filter

positions = st.integers(0, 100_000)
seeds = st.integers(-2**63, 2**64)


@st.composite
def logits_of(draw, low=1, high=600):
    """Arrays of one decimal, so that ties are common, now and then with banned ids."""
    n, spread = draw(st.integers(low, high)), draw(st.sampled_from([0, 0.1, 2, 10]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(0, spread, n).round(1).astype(np.float32)
    if n > 4 and draw(st.booleans()):
        logits[rng.integers(0, n, n // 4)] = -inf
        logits[n // 2] = 0
    return logits


@st.composite
def samplers(draw, size):
    """Any settings, each one off now and then."""
    def often_off(values, off):
        return draw(st.one_of(st.just(off), values))

    ids = draw(st.lists(st.integers(0, size - 1), max_size=4, unique=True))
    return Sampler(
        temperature=often_off(st.floats(0.05, 5), 0.0), seed=draw(seeds),
        top_k=often_off(st.integers(1, 700), 0),
        top_p=often_off(st.floats(0, 1), 1.0), min_p=often_off(st.floats(0, 1), 0.0),
        repeat_penalty=often_off(st.floats(0.5, 2), 1.0), presence_penalty=often_off(st.floats(-2, 2), 0.0),
        frequency_penalty=often_off(st.floats(-2, 2), 0.0),
        repeat_last_n=draw(st.sampled_from([-1, 0, 1, 5, 64])),
        logit_bias={id: draw(st.one_of(st.floats(-20, 20), st.just(-inf))) for id in ids[:size - 1]})


# ---- choices -----------------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(logits_of(high=2000), positions, st.data())
def test_choices_equal_numpys(logits, position, data):
    n = len(logits)
    sampler = data.draw(samplers(n))
    history = data.draw(st.lists(st.integers(0, min(n, 20) - 1), max_size=100))
    before = logits.copy()
    if np.isfinite(numpy_sampling.altered(sampler, logits, history).max()):
        expected = numpy_sampling.choose(sampler, logits, position, history)
        assert sampler.sample(logits, position, history) == expected
    assert np.array_equal(before, logits)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("filters", [{}, PLAIN, {**PLAIN, "top_p": 0.9}, {**PLAIN, "min_p": 0.02},
                                     {"top_k": 3000}])
def test_choices_from_a_large_vocabulary_equal_numpys(spread, filters):
    rng, sampler = np.random.default_rng(5), Sampler(temperature=0.8, seed=9, repeat_penalty=1.1, **filters)
    for position in range(20):
        logits = rng.normal(0, spread, 100_000).astype(np.float32)
        history = np.argsort(-logits)[:50].tolist()
        expected = numpy_sampling.choose(sampler, logits, position, history)
        assert sampler.sample(logits, position, history) == expected


def test_known_choices_stay_as_they_are():
    """A change here changes every sampled text: it breaks the promise that a seed names a text."""
    logits = np.linspace(-3, 3, 1000, dtype=np.float32)
    plain, usual = Sampler(temperature=1.0, seed=7, **PLAIN), Sampler(temperature=0.8, seed=7)
    assert [plain.sample(logits, p) for p in range(8)] == [960, 917, 994, 939, 988, 870, 842, 939]
    assert [usual.sample(logits, p) for p in range(8)] == [983, 987, 994, 997, 988, 962, 989, 985]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("n", [5, 400])
def test_choices_over_many_positions_follow_the_softmax(temperature, n):
    logits = np.random.default_rng(n).normal(0, 2, n).astype(np.float32)
    sampler, draws = Sampler(temperature=temperature, seed=3, **PLAIN), 20_000
    counts = np.bincount([sampler.sample(logits, p) for p in range(draws)], minlength=n)
    expected = draws * np.exp(numpy_sampling.logprobs(logits / temperature))
    rare = expected < 10
    observed, expected = (np.append(v[~rare], v[rare].sum()) for v in (counts, expected))
    chi2 = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = len(observed) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5        # four standard deviations


@given(logits_of(), seeds, positions, st.integers(1, 50), st.floats(0.1, 0.99), st.floats(0.01, 0.5))
def test_filters_change_no_choice_that_they_leave(logits, seed, position, k, p, m):
    filtered = Sampler(temperature=1.0, seed=seed, top_k=k, top_p=p, min_p=m)
    left = numpy_sampling.kept(filtered, logits)
    free = Sampler(temperature=1.0, seed=seed, **PLAIN).sample(logits, position)
    found = filtered.sample(logits, position)
    assert found == free if free in left else found in left


@given(logits_of(), seeds, positions)
def test_greedy_top_k_1_and_a_tiny_temperature_agree(logits, seed, position):
    best = int(logits.argmax())
    assert Sampler().sample(logits, position) == best
    assert Sampler(temperature=2.0, top_k=1, seed=seed).sample(logits, position) == best
    cold = Sampler(temperature=1e-6, seed=seed, **PLAIN).sample(logits, position)
    assert logits[cold] == logits[best]


def test_penalties_look_at_the_last_tokens_only():
    logits = np.array([1, 0.9, 0], np.float32)
    history = [0] + [2] * 64
    assert Sampler(repeat_penalty=2.0).sample(logits, 65, history) == 0
    assert Sampler(repeat_penalty=2.0, repeat_last_n=-1).sample(logits, 65, history) == 1
    assert Sampler(repeat_penalty=2.0, repeat_last_n=0).sample(logits, 65, [0]) == 0


# ---- through a pass ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    with pybmc.Model(tiny.model(request.param), threads=2) as model:
        yield model


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.5, "seed": 4, **PLAIN},
    {"repeat_penalty": 1.5, "repeat_last_n": -1},
    {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": 1.0, "repeat_last_n": 7, "top_k": 5,
     "min_p": 0.0},
    {"temperature": 0.9, "logit_bias": {5: 12.0, 7: -inf, 9: -3.0}, "repeat_penalty": 0.8},
    {"logit_bias": {5: 9.0, 300: -inf}},
], ids=repr)
def test_a_pass_chooses_what_numpy_does(model, settings):
    """One token at a time and many in a pass; log-probabilities are the model's own."""
    text = np.random.default_rng(1).integers(0, 60, 150).tolist()
    sampler = Sampler(**settings)
    with model.session() as one, model.session() as other:
        rows = one.eval(text, "all")
        ids, logprobs = other.eval(text, "best", sampler=sampler)
        assert ids.tolist() == [numpy_sampling.choose(sampler, row, i, text[:i])
                                for i, row in enumerate(rows, 1)]
        assert logprobs == pytest.approx([numpy_sampling.logprobs(row)[id] for row, id in zip(rows, ids)],
                                         abs=1e-4)
        one.rewind(0)
        for i, token in enumerate(text[:20]):
            found = one.eval([token], "best", sampler=sampler)
            assert (found.ids[0], found.logprobs[0]) == (ids[i], logprobs[i])


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[nan, 1, 2], [1, inf], [-inf, -inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_without_a_finite_largest_are_refused(bad, temperature):
    with pytest.raises(ArgumentError, match="largest logit is"):
        Sampler(temperature=temperature).sample(np.array(bad, np.float32), 5)


@pytest.mark.parametrize("settings", [
    {"temperature": -1}, {"temperature": nan}, {"temperature": inf}, {"top_k": -2}, {"top_k": 1.5},
    {"top_p": 1.1}, {"min_p": -0.1}, {"repeat_penalty": 0}, {"repeat_last_n": -2}, {"seed": 0.5},
    {"logit_bias": {0: inf}}, {"logit_bias": {0: nan}}, {"temperature": "warm"}])
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        Sampler(**settings)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ArgumentError, match="token 9"):
        Sampler(logit_bias={9: 1.0}).sample(np.zeros(4, np.float32), 0)
    with pytest.raises(ArgumentError, match="0 to 3, found 4"):
        Sampler(repeat_penalty=2.0).sample(np.zeros(4, np.float32), 1, [4])
