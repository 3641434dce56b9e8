"""The controller in simulation: near the best fixed length, never far below plain decoding; and what it keeps."""

import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import fixed, run

from pybmc import cache
from pybmc.controller import ALLOWED, BANK, GRANT, TRIED, Account, Chances, Controller, CostCurve, FixedLength, Source


def cheap(n):                           # a few tokens more are nearly free
    return 1 + 0.02 * (n - 1) if n <= 6 else 1.1 + 0.1 * (n - 6)


def steep(n):                           # checking costs, as in runtimes that decode weights again for each token
    return 1 + 0.35 * (n - 1)


def steps(n):
    return 1.0 if n <= 1 else 1.3 if n <= 8 else 1.9


@pytest.mark.parametrize("cost, d, share, honest", [
    (cheap, 0.02, 0.97, False), (cheap, 0.05, 0.6, False), (cheap, 0.05, 0.85, True), (cheap, 0.3, 0.85, False),
    (cheap, 0.1, 0.3, True), (steep, 0.1, 0.6, False), (steep, 0.3, 0.85, True), (steep, 0.1, 0.3, False),
    (steps, 0.1, 0.6, True), (steps, 0.02, 0.85, False), (steps, 0.3, 0.0, False)])
def test_within_five_percent_of_the_best_fixed_length(cost, d, share, honest):
    def mean(rate):
        return sum(rate(seed) for seed in range(2)) / 2

    best = max(mean(lambda seed: fixed(cost, share, d, k, seed=seed, n=2000, honest=honest))
               for k in (0, 1, 2, 3, 4, 6, 8, 12, 16))
    found = mean(lambda seed: run(cost, share, d, seed=seed, n=2000, honest=honest)[0])
    assert found > 0.95 * best


@pytest.mark.parametrize("cost", [cheap, steep, steps])
@pytest.mark.parametrize("d", [0.05, 0.3])
def test_the_worst_draft_costs_less_than_three_percent(cost, d):
    for seed in range(4):
        plain = fixed(cost, 0.0, d, 0, n=256, seed=seed)
        rate, stats = run(cost, 0.0, d, n=256, seed=seed)
        assert rate > 0.97 * plain
        assert stats.plain_tok_s == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("believed, cost, known_share, least", [
    (cheap, cheap, 0.97, 0.97), (steps, steps, 0.97, 0.97), (cheap, steep, 0.97, 0.95), (steps, steep, 0.8, 0.95)])
def test_the_purse_bounds_what_false_beliefs_cost(believed, cost, known_share, least):
    """A draft that was right until now; and costs of another day, whose first surprise comes on top."""
    for seed in range(3):
        controller = Controller(CostCurve({n: believed(n) for n in (1, 2, 4, 8, 16)}))
        record = Source("draft", [known_share] * 16, known_share).record()
        record["accepted"] = record["by_mark"] = [[40 * known_share, 40]] * 16
        record["seconds"] = [[1, 0.1], [8, 0.8]]
        rate, _ = run(cost, 0.0, 0.1, n=256, seed=seed, controller=controller, record=record)
        assert rate > least * fixed(cost, 0.0, 0.1, 0, n=256, seed=seed)


def test_costs_of_a_bad_minute_are_put_right():
    controller = Controller(CostCurve({1: 1.0, 2: 2.4, 4: 4.0, 8: 6.0, 16: 12.0}))
    rate, _ = run(cheap, 0.85, 0.1, n=2000, controller=controller)
    assert rate > 0.8 * run(cheap, 0.85, 0.1, n=2000)[0]


def test_a_width_that_is_measured_does_not_stand_as_high_as_one_below_it_that_is_not():
    curve = CostCurve({1: 1.0, 2: 2.0, 3: 2.0, 4: 2.0})
    curve.observe(2, 2.0)
    for _ in range(40):
        curve.observe(4, 1.2)
    assert curve.at(4) == pytest.approx(1.2, rel=0.05) and 1 <= curve.ratio(2) <= curve.ratio(3) <= curve.ratio(4)


def test_a_trial_has_as_many_rounds_as_the_purse_can_lose():
    controller = Controller(CostCurve({1: 1.0, 2: 1.5}))
    for purse, rounds in ((0.0, 1), (0.5, 1), (1.3, 2), (BANK, TRIED)):
        controller.account.purse = purse
        assert controller.trials(1, 0.1) == rounds          # each may lose 0.6


def test_in_company_the_purse_counts_everybodys_time():
    """Two tokens instead of one are nine instead of eight, in a pass a quarter longer."""
    controller = Controller(CostCurve({1: 1.0, 8: 1.0, 9: 1.25, 16: 2.0}))
    controller.ended(1, 2, 0.0, 1.25, others=7)
    assert controller.account.purse == pytest.approx(GRANT + 9 / 8 - 1.25 + ALLOWED * 2 / 8)
    controller.rested(8 / 8, 0.0)
    assert controller.account.purse == pytest.approx(GRANT + 9 / 8 - 1.25 + ALLOWED * 10 / 8)


@given(st.lists(st.tuples(st.integers(1, 17), st.floats(0, 1)), max_size=200))
def test_the_purse_is_all_that_can_be_lost(rounds):
    """Rounds that gain, or lose a part of what the purse holds, up to all of it."""
    account, total, tokens = Account(), 0.0, 0
    for n, share in rounds:
        gained = n - 1.0 if share > 0.7 else -share / 0.7 * max(account.purse, 0.0)
        account.enter(n, gained)
        total, tokens = total + gained, tokens + n
        assert total >= -(GRANT + ALLOWED * tokens) - 1e-9 and account.purse <= BANK


def test_a_draft_that_is_good_at_times_is_used_then():
    rate, stats = run(cheap, lambda position: 0.9 if position // 500 % 2 == 0 else 0.0, 0.1, n=4000)
    best = max(fixed(cheap, lambda position: 0.9 if position // 500 % 2 == 0 else 0.0, 0.1, k, n=4000)
               for k in (0, 1, 2, 4, 6, 8))
    assert rate > 1.03 * best and stats.lengths[0] > 1000


def test_costs_are_learned_where_nothing_is_known():
    rate, _ = run(cheap, 0.85, 0.1, n=2000, known=False)
    assert rate > 0.93 * max(fixed(cheap, 0.85, 0.1, k, n=2000) for k in (3, 4, 5, 6, 8))


@pytest.mark.parametrize("share, d", [(0.85, 0.05), (0.6, 0.05), (0.0, 0.1)])
def test_while_other_programs_run_and_afterwards(share, d):
    """They take the processors for whole slices of time: short work suffers more than long work."""
    def busy(position, seconds):
        return 5 * seconds + 1.0 if 1000 < position < 2000 else seconds

    def rates(**settings):
        marks = {1000: 0.0, 1999: 0.0, 2300: 0.0, 2999: 0.0}
        run(cheap, share, d, n=3000, busy=busy, marks=marks, **settings)
        before, during, soon, late = marks.values()
        return 1000 / before, 999 / (during - before), 301 / (soon - during), 699 / (late - soon)

    found = rates()
    best = [max(of_one) for of_one in zip(*(rates(controller=FixedLength(k)) for k in (0, 1, 2, 3, 4, 6, 8)))]
    assert all(ours > least * theirs for ours, theirs, least in zip(found, best, (0.9, 0.85, 0.75, 0.9)))


def test_bounds_hold():
    for most, least in ((4, 0), (8, 3), (16, 6)):
        _, stats = run(cheap, 0.9, 0.05, n=300, controller=Controller(CostCurve({n: cheap(n) for n in (1, 4, 16)}), most, least))
        assert all(k == 0 or least <= k <= most for k in stats.lengths)


# ---- costs -------------------------------------------------------------------------------------------------


def test_a_curve_follows_the_machine_and_ignores_a_hiccup():
    curve = CostCurve({1: 0.01, 8: 0.012})
    assert curve.ratio(4) == pytest.approx(1 + 0.2 * 3 / 7) and curve.ratio(8) == pytest.approx(1.2)
    for _ in range(20):
        curve.observe(1, 0.01)
    curve.observe(1, 1.0)
    assert curve.at(1) < 0.015
    for _ in range(50):
        curve.observe(1, 0.01)
        curve.observe(8, 0.012)
    assert curve.at(1) == pytest.approx(0.01, rel=0.05) and curve.at(8) == pytest.approx(0.012, rel=0.05)
    for _ in range(60):
        curve.observe(8, 0.024)                     # everything became twice as slow: so did a single token
    assert 0.015 < curve.at(1) < 0.021 and curve.at(8) == pytest.approx(0.024, rel=0.05)
    for _ in range(40):
        curve.observe(1, 0.02)
        curve.observe(8, 0.024)
    assert curve.at(1) == pytest.approx(0.02, rel=0.05) and curve.at(8) == pytest.approx(0.024, rel=0.07)


def test_a_busy_minute_is_forgotten():
    """While other programs run, passes of any width wait for the processors; what was believed then does not outlive it."""
    curve = CostCurve({n: cheap(n) for n in (1, 2, 4, 8, 16)})
    for _ in range(20):
        for n in (15, 15, 15, 1):
            curve.observe(n, 4.0)
    assert curve.ratio(15) < 1.3
    curve = CostCurve(curve.seconds())              # another run
    for _ in range(8):
        curve.observe(15, cheap(15))
    assert curve.at(1) < 2.2                        # nobody looked; it cannot be dearer than the wide one
    for _ in range(5):
        curve.observe(1, 1.0)
    assert curve.at(1) == pytest.approx(1.0, rel=0.1) and curve.at(15) == pytest.approx(cheap(15), rel=0.15)
    assert curve.ratio(4) < curve.ratio(8) < curve.ratio(15)


@given(st.dictionaries(st.integers(2, 16), st.floats(0.5, 20), max_size=5), st.lists(st.integers(1, 40), max_size=30))
def test_a_curve_never_falls(shape, observed):
    curve = CostCurve({1: 1.0} | shape)
    for n in observed:
        curve.observe(n, 1 + n % 7)
    ratios = [curve.ratio(n) for n in range(1, 60)]
    assert ratios[0] == 1 and all(a <= b for a, b in zip(ratios, ratios[1:]))


@given(st.dictionaries(st.integers(2, 16), st.floats(0.5, 20), max_size=5),
       st.lists(st.tuples(st.integers(1, 600), st.floats(1e-4, 1e3), st.integers(1, 3)), max_size=40))
def test_what_is_hoped_is_between_what_is_known_and_what_is_expected(shape, observed):
    curve = CostCurve({1: 1.0} | shape)
    for n, seconds, count in observed:
        curve.observe(n, seconds, count)
    assert all(0 < curve.hope(n) <= curve.at(n) * (1 + 1e-9) for n in range(1, 40))


def test_a_width_that_looked_dear_once_is_hoped_to_be_cheaper_until_it_is_seen():
    curve = CostCurve({1: 1.0, 4: 1.2, 6: 2.0})
    for _ in range(50):
        curve.observe(1, 1.0)
        curve.observe(4, 1.2)
    assert 1.2 < curve.hope(6) < 0.98 * curve.at(6) and curve.hope(4) == curve.at(4)
    for _ in range(12):
        curve.observe(6, 1.4)
    assert curve.hope(6) == pytest.approx(curve.at(6), rel=0.01) and curve.at(6) == pytest.approx(1.4, rel=0.1)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.integers(1, 50))
def test_a_class_that_was_not_seen_follows_the_others(own, other, n):
    better, worse = Chances([own, other]), Chances([own, other])
    for _ in range(n):
        better.add(1, True)
        worse.add(1, False)
    assert 0 < worse.at(0) < own < better.at(0) < 1
    assert better.each() == [better.at(0), better.at(1)]


def test_classes_that_are_as_expected_say_nothing_of_others():
    chances = Chances([0.3, 0.5, 0.0])
    for i in range(100):
        chances.add(1, i % 2 == 0)
    assert chances.at(0) == pytest.approx(0.3, abs=0.01) and chances.at(2) == 0


@pytest.mark.parametrize("first", [4, 5, 6, 7, 9])
def test_widths_that_seem_dear_and_are_not_are_found_out(first):
    def straight(n):
        return 1 + 0.04 * (n - 1)

    believed = CostCurve({n: straight(n) * (1 if n < first else 1.6) for n in range(1, 18)})
    found, _ = run(straight, 0.95, 0.05, n=1000, controller=Controller(believed))
    assert found > 0.9 * run(straight, 0.95, 0.05, n=1000)[0]


def test_unsure_tokens_are_cut_off():
    source = Source("draft", [0.05, 0.95])
    controller = Controller(CostCurve({n: cheap(n) for n in (1, 2, 4, 6, 8, 12, 16)}))
    for n in (1, 2, 3, 4) * 10:
        controller.observe(n, cheap(n))
    assert controller.cut(source, [1, 1, 1], 0.0)[0] == 3
    assert controller.cut(source, [1, 0, 0], 0.0)[0] == 2
    assert Controller(CostCurve({n: steep(n) for n in (1, 2, 4)})).cut(source, [1, 0, 1], 0.0)[0] == 1
    for _ in range(60):
        source.learn(0, 0, [1], [False])
    assert Controller(CostCurve({n: steep(n) for n in (1, 2, 4)})).cut(source, [1, 1, 1], 0.0)[0] == 0


# ---- the cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"x")
    return SimpleNamespace(path=str(tmp_path / "m.gguf"), threads=2)


def test_costs_are_kept_for_the_same_file_threads_and_kind(model):
    key = cache.identity(model, "best")
    assert cache.load(key) is None
    cache.save(key, {1: 0.01, 4: 0.0123456})
    assert cache.load(key) == {1: 0.01, 4: 0.01235}
    assert cache.load(cache.identity(model, "all")) is None
    model.threads = 3
    assert cache.load(cache.identity(model, "best")) is None
    os.utime(model.path, (1, 1))
    model.threads = 2
    assert cache.load(cache.identity(model, "best")) is None
    assert cache.identity(SimpleNamespace(path="/nowhere", threads=1), "best") is None
    assert cache.load(None) is None and cache.save(None, {1: 1.0}) is None


def test_a_record_is_kept_for_a_pair(model, tmp_path):
    (tmp_path / "d.gguf").write_bytes(b"y")
    draft = SimpleNamespace(path=str(tmp_path / "d.gguf"), threads=2)
    source, again = Source("draft", [0.5] * 16), Source("draft", [0.5] * 16)
    for _ in range(30):
        source.learn(4, 4, [9, 9, 3, 3], [True, True, False])
        source.seconds.add(4, 0.04)
    source.seconds.follow(0.1)                              # a plain token's seconds
    key = cache.pair(model, draft, "best")
    assert key != cache.pair(model, draft, "all") and cache.pair(model, SimpleNamespace(path="/no", threads=1), "best") is None
    assert cache.load_record(key) is None
    cache.save_record(key, source.record())
    again.recall(cache.load_record(key))
    again.seconds.follow(0.2)                               # everything is half as fast today
    assert again.seconds.at(4) == pytest.approx(0.08, rel=0.01)
    assert again.by_mark.at(9) > 0.75 and again.by_mark.at(3) < 0.25
    assert all(abs(a - b) < 0.2 for a, b in zip(source.accepted.each(), again.accepted.each()))
    for _ in range(12):
        again.learn(4, 4, [9, 9, 3, 3], [False])
    assert again.by_mark.at(9) < 0.45                       # it does not weigh much
    for broken in ({"by_mark": [[1]]}, {"other": []}, {"seconds": [[1, -1]]}, {"accepted": 3}, [], None):
        cache.write(key, record=broken)
        assert cache.load_record(key) is None


def test_a_hiccup_is_not_what_drafts_cost():
    for costs in ([2.0, 0.01], [0.01, 2.0], [0.01] * 5 + [2.0] + [0.01] * 5):
        source = Source("draft", [0.5])
        for seconds in costs:
            source.seconds.add(3, seconds)
        assert 0.005 < source.seconds.at(3) < 0.021


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": 1}', "\xff", "[" * 100000,
                                  '{"seconds": {"1": 1}}', "SECONDS:{}", 'SECONDS:{"2": 1.0}', 'SECONDS:{"1": -1}',
                                  'SECONDS:{"1": NaN}', 'SECONDS:{"1": 1, "99999": 2}', 'SECONDS:{"x": 1}', "SECONDS:[]"])
def test_a_broken_file_is_no_file(model, text):
    key = cache.identity(model, "best")
    cache.save(key, {1: 1.0})
    if text.startswith("SECONDS:"):
        text = json.dumps({"key": key, "seconds": 0})[:-2] + text[8:] + "}"
    cache._path(key).write_text(text, encoding="latin-1")
    assert cache.load(key) is None


def test_a_folder_that_cannot_be_written_is_no_failure(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache.save(cache.identity(model, "best"), {1: 1.0})
    assert cache.load(cache.identity(model, "best")) is None
