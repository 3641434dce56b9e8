"""Sampling: its laws, and the exact noise that later drafters rely on."""

from math import exp, inf, log, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybmc import ArgumentError, BmcError
from pybmc import sampling
from pybmc.sampling import Sampler

import numpy_sampling

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


def probabilities(logits):
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


# ---- noise -------------------------------------------------------------------------------------------------


def test_splitmix64_gives_the_published_numbers():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                 16408922859458223821]
    assert [sampling.splitmix64(1234567, i) for i in range(5)] == published


@given(seeds, positions, st.integers(1, 20_000))
@settings(max_examples=30)
def test_noise_is_defined_by_seed_position_and_id_alone(seed, position, n):
    every = numpy_sampling.uniforms(seed, position, n)
    some = np.array(sorted({0, n // 3, n - 1}))
    assert np.array_equal(sampling.uniforms_of(seed, position, some), every[some])
    for i in some:                                          # the docstring, in integers
        start = sampling.splitmix64(seed % 2**64, position)
        assert every[i] == ((sampling.splitmix64(start, int(i)) >> 12) + 0.5) / 2**52
    assert 0 < every.min() and every.max() < 1


def test_known_choices_stay_as_they_are():
    """Any change here changes every sampled text: it breaks the promise that a seed names a text."""
    logits = np.linspace(-3, 3, 1000, dtype=np.float32)
    plain, usual = Sampler(temperature=1.0, seed=7, **PLAIN), Sampler(temperature=0.8, seed=7)
    assert [plain.sample(logits, p) for p in range(8)] == [960, 917, 994, 939, 988, 870, 842, 939]
    assert [usual.sample(logits, p) for p in range(8)] == [983, 987, 994, 997, 988, 962, 989, 985]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("n", [5, 400])                     # few, and enough that bounds matter
def test_choices_over_many_positions_follow_the_softmax(temperature, n):
    logits = np.random.default_rng(n).normal(0, 2, n).astype(np.float32)
    sampler = Sampler(temperature=temperature, seed=3, **PLAIN)
    draws = 20_000
    counts = np.bincount([sampler.sample(logits, p) for p in range(draws)], minlength=n)
    expected = draws * probabilities(logits / temperature)
    rare = expected < 10
    observed, expected = (np.append(v[~rare], v[rare].sum()) for v in (counts, expected))
    chi2 = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = len(observed) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5        # four standard deviations


def test_neighbouring_positions_seeds_and_ids_are_independent():
    a = np.array([numpy_sampling.uniforms(1, p, 64) for p in range(512)])
    b = np.array([numpy_sampling.uniforms(2, p, 64) for p in range(512)])
    for x, y in ((a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a, b)):
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 4 / x.size ** 0.5


@given(logits_of(), seeds, positions, st.floats(0.05, 5))
def test_the_shortcut_finds_the_true_argmax(logits, seed, position, temperature):
    x = numpy_sampling.uniforms(seed, position, len(logits))
    score = (logits - logits.max()).astype(np.float64) / temperature - np.log(-np.log1p(-x))
    assert numpy_sampling.choose(logits, temperature, seed, position) == score.argmax()


@given(logits_of(high=5000), seeds, positions, st.floats(0, 5), st.integers(0, 700), st.floats(0, 1), st.floats(0, 1), st.data())
@settings(max_examples=400)
def test_the_library_chooses_what_numpy_does(logits, seed, position, temperature, k, p, m, data):
    off = data.draw(st.sets(st.sampled_from(sorted(PLAIN))))
    filters = {"top_k": k, "top_p": p, "min_p": m} | {name: PLAIN[name] for name in off}
    sampler = Sampler(temperature=temperature, seed=seed, **filters)
    assert sampler.sample(logits, position) == numpy_sampling.sample(sampler, logits, position)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("filters", [{}, PLAIN, {**PLAIN, "top_p": 0.9}, {**PLAIN, "min_p": 0.02}, {"top_k": 3000}])
def test_so_it_does_over_a_large_vocabulary(spread, filters):
    rng = np.random.default_rng(5)
    for position in range(20):
        logits = rng.normal(0, spread, 100_000).astype(np.float32)
        sampler = Sampler(temperature=0.8, seed=9, **filters)
        assert sampler.sample(logits, position) == numpy_sampling.sample(sampler, logits, position)


# ---- filters -----------------------------------------------------------------------------------------------


@given(logits_of(), st.integers(1, 700))
def test_top_k_keeps_the_k_largest(logits, k):
    ids = numpy_sampling.top_k(logits, k)
    order = np.argsort(-logits, kind="stable")[:k]
    assert np.array_equal(ids, np.sort(order))


@given(logits_of(), st.floats(0.01, 0.999))
def test_top_p_is_the_smallest_set_that_reaches_p(logits, p):
    ids = numpy_sampling.top_p(logits, p)
    probs = probabilities(logits)
    assert len(ids) >= 1 and np.all(np.diff(ids) > 0)
    assert probs[ids].sum() >= p - 1e-5
    least = ids[np.argmin(logits[ids])]
    assert len(ids) == 1 or probs[ids].sum() - probs[least] < p + 1e-5
    dropped = np.setdiff1d(np.arange(len(logits)), ids)
    assert len(dropped) == 0 or logits[dropped].max() <= logits[ids].min()


def test_top_p_on_a_wide_flat_distribution_equals_a_plain_sort():
    logits = np.random.default_rng(0).normal(0, 1, 50_000).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    n = np.searchsorted(np.cumsum(probabilities(logits)[order]), 0.9) + 1
    ids = numpy_sampling.top_p(logits, 0.9)
    assert abs(len(ids) - n) <= 1 and np.array_equal(ids, np.sort(order[:len(ids)]))


@given(logits_of(), st.floats(0.001, 1))
def test_min_p_keeps_what_is_likely_enough(logits, p):
    probs = probabilities(logits)
    kept = np.zeros(len(logits), bool)
    kept[numpy_sampling.min_p(logits, p)] = True
    clear = np.abs(probs / probs.max() / p - 1) > 1e-4
    assert np.array_equal(kept[clear], (probs >= p * probs.max())[clear])
    assert kept[logits.argmax()]


@given(logits_of(), seeds, positions, st.integers(1, 50), st.floats(0.1, 0.99), st.floats(0.01, 0.5))
def test_a_choice_that_survives_the_filters_is_the_choice_without_them(logits, seed, position, k, p, m):
    kept = numpy_sampling.top_k(logits, k)
    kept = kept[numpy_sampling.top_p(logits[kept], p)]
    kept = kept[numpy_sampling.min_p(logits[kept], m)]
    free = Sampler(temperature=1.0, seed=seed, **PLAIN).sample(logits, position)
    filtered = Sampler(temperature=1.0, seed=seed, top_k=k, top_p=p, min_p=m).sample(logits, position)
    assert filtered == free if free in kept else filtered in kept


# ---- settings ----------------------------------------------------------------------------------------------


@given(logits_of(), seeds, positions)
def test_greedy_top_k_1_and_a_tiny_temperature_agree(logits, seed, position):
    best = int(logits.argmax())
    assert Sampler().sample(logits, position) == best
    assert Sampler(temperature=2.0, top_k=1, seed=seed).sample(logits, position) == best
    cold = Sampler(temperature=1e-6, seed=seed, **PLAIN).sample(logits, position)
    assert logits[cold] == logits[best]


@given(logits_of(low=5), seeds, positions, st.floats(0, 2))
def test_a_bias_of_minus_infinity_bans(logits, seed, position, temperature):
    sampler = Sampler(temperature=temperature, seed=seed, **PLAIN)
    first = sampler.sample(logits, position)
    again = Sampler(temperature=temperature, seed=seed, logit_bias={first: -inf}, **PLAIN)
    assert again.sample(logits, position) != first


@given(logits_of(low=3), st.lists(st.integers(0, 2), max_size=20), st.floats(1, 2), st.floats(0, 2),
       st.floats(0, 2))
def test_penalties_follow_llama_cpp(logits, history, repeat, presence, frequency):
    logits = np.maximum(logits, -50)
    result = sampling.penalize(logits, history, repeat, presence, frequency)
    for token in range(len(logits)):
        count, expected = history.count(token), float(logits[token])
        if count:
            expected = expected / repeat if expected > 0 else expected * repeat
            expected -= count * frequency + presence
        assert result[token] == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_penalties_look_at_the_last_tokens_only():
    logits = np.array([1, 0.9, 0], np.float32)
    history = [0] + [2] * 64
    assert Sampler(repeat_penalty=2.0).sample(logits, 65, history) == 0
    assert Sampler(repeat_penalty=2.0, repeat_last_n=-1).sample(logits, 65, history) == 1
    assert Sampler(repeat_penalty=2.0, repeat_last_n=0).sample(logits, 65, [0]) == 0


@given(logits_of(), seeds, positions)
def test_sampling_leaves_its_input_alone(logits, seed, position):
    before = logits.copy()
    logits.flags.writeable = False
    Sampler(temperature=1.0, seed=seed, repeat_penalty=1.3, logit_bias={0: 1.0}).sample(logits, position, [0])
    assert np.array_equal(before, logits)


@given(logits_of(), st.data())
def test_logprob_is_that_of_the_plain_softmax(logits, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    p = probabilities(logits)[token]
    assert sampling.logprob(logits, token) == pytest.approx(log(p) if p else -inf, abs=1e-4)
    assert sum(exp(sampling.logprob(logits, i)) for i in range(len(logits))) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("bad", [[nan, 1, 2], [1, inf], [-inf, -inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_without_a_finite_largest_are_refused(bad, temperature):
    with pytest.raises(BmcError, match="position 5"):
        Sampler(temperature=temperature).sample(np.array(bad, np.float32), 5)


@pytest.mark.parametrize("settings", [
    {"temperature": -1}, {"temperature": nan}, {"temperature": inf}, {"top_k": -2}, {"top_k": 1.5},
    {"top_p": 1.1}, {"min_p": -0.1}, {"repeat_penalty": 0}, {"repeat_last_n": -2}, {"seed": 0.5},
    {"logit_bias": {0: inf}}, {"logit_bias": {0: nan}}, {"temperature": "warm"}])
def test_settings_out_of_range_are_refused_by_name(settings):
    name = next(iter(settings))
    with pytest.raises(ArgumentError, match=name):
        Sampler(**settings)


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(ArgumentError, match="token 9"):
        Sampler(logit_bias={9: 1.0}).sample(np.zeros(4, np.float32), 0)
