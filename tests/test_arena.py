"""The arena through a session: every policy against a list of tokens, allocations that fail, what is counted."""

import sys
from functools import lru_cache

import numpy as np
import pytest
import tiny
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pybmc
from pybmc import balance
from pybmc._native import lib
from pybmc.growth import POLICIES, Growth, parse
from pybmc.machine import Machine

CAP = 300
LINUX = sys.platform == "linux"
NAMES = [name for name in POLICIES if name != "remap" or LINUX]
numbers = pytest.mark.parametrize("name", NAMES)


@lru_cache(maxsize=None)
def model():
    return pybmc.Model(tiny.model("llama", n_ctx=512), threads=2)


@lru_cache(maxsize=None)
def text():
    return np.random.default_rng(3).integers(0, 401, CAP).astype(np.int32).tolist()


@lru_cache(maxsize=None)
def truth():
    with model().session() as session:
        return session.eval(text(), logits="all")


def growths():
    return st.builds(Growth, st.sampled_from(NAMES), st.sampled_from([0, 1, 5, 16, 33, 128, 999]),
                     st.sampled_from([0, 1.1, 2.5]), huge=st.booleans(), touch=st.booleans(), pad=st.booleans())


class Arena(RuleBasedStateMachine):
    """A session holds the beginning of text(), or a few other tokens after that; `tokens` is what it should hold."""

    @initialize(growth=growths(), cap=st.sampled_from([CAP, 64, 1]))
    def open(self, growth, cap):
        self.cap, self.tokens, self.bytes = cap, [], 0
        self.session = model().session(context=cap, rows=growth)

    @property
    def good(self):
        return self.tokens == text()[:len(self.tokens)]

    @precondition(lambda self: self.good)
    @rule(n=st.one_of(st.integers(1, 40), st.integers(100, 200)), fail=st.sampled_from([0, 0, 0, 1, 2]))
    def append(self, n, fail):
        at = len(self.tokens)
        words = text()[at:at + n]
        lib.bmc_fail_allocation(fail)
        try:
            if at + n > self.cap:
                for want in ("all", "last", "argmax", "best", "none"):
                    with pytest.raises(pybmc.ContextFullError):
                        self.session.eval([0] * n, logits=want)
                return
            rows = self.session.eval(words, logits="all")
        except MemoryError as error:
            assert fail and "rows of keys and values" in str(error)
            return
        finally:
            lib.bmc_fail_allocation(0)
        assert (rows.view(np.int32) == truth()[at:at + n].view(np.int32)).all()
        self.tokens += words

    @rule(n=st.integers(1, 30))
    def append_other_words(self, n):
        if len(self.tokens) + n <= self.cap:
            self.session.eval([7] * n, logits="none")
            self.tokens += [7] * n

    @rule(share=st.floats(0, 1))
    def rewind(self, share):
        n = int(share * len(self.tokens))
        while self.tokens[:n] != text()[:n]:
            n -= 1
        self.session.rewind(n)
        del self.tokens[n:]

    @rule(n=st.integers(0, 400))
    def reserve(self, n):
        if len(self.tokens) + n > self.cap:
            with pytest.raises(pybmc.ContextFullError):
                self.session.reserve(n)
        else:
            self.session.reserve(n)
            assert self.session.rows >= len(self.tokens) + n

    @rule(growth=growths())
    def start_anew(self, growth):
        self.session.close()
        self.session, self.tokens, self.bytes = model().session(context=self.cap, rows=growth), [], 0

    @invariant()
    def holds_what_was_given(self):
        if not hasattr(self, "session"):
            return
        stats = self.session.arena_stats()
        assert self.session.tokens == self.tokens and stats.rows_used == len(self.tokens) <= stats.rows_reserved
        assert stats.bytes_reserved >= stats.rows_reserved // 16 * 16 * stats.row_bytes
        assert stats.bytes_allocated >= max(self.bytes, stats.bytes_reserved)
        assert min(stats.allocate_s, stats.copy_s, stats.touch_s) >= -1e-9 and stats.why
        self.bytes = stats.bytes_allocated

    def teardown(self):
        if hasattr(self, "session"):
            self.session.close()


TestArena = Arena.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.long
@numbers
@pytest.mark.parametrize("touch", [False, True])
def test_every_allocation_may_fail(name, touch):
    """The first, the second, .. until none is left: a MemoryError, and the session goes on at its old length."""
    fail, failed = 1, True
    while failed:
        failed = one_failure(Growth(name, 16, touch=touch), fail)
        fail += 1
    assert fail > 2


def one_failure(growth, fail):
    failed = 0
    lib.bmc_fail_allocation(fail)
    try:
        session = model().session(context=CAP, rows=growth)
    except MemoryError:
        failed, session = 1, model().session(context=CAP, rows=growth)
    with session:
        for at in range(0, CAP, 60):
            try:
                rows = session.eval(text()[at:at + 60], logits="all")
            except MemoryError as error:
                assert "rows of keys and values" in str(error) and session.position == at
                failed += 1
                rows = session.eval(text()[at:at + 60], logits="all")
            assert (rows == truth()[at:at + 60]).all()
    lib.bmc_fail_allocation(0)
    assert failed <= 1
    return failed


# ---- the spelling of policies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, growth", [
    ("auto", Growth()), (1, Growth("copy", 1)), ("64", Growth("copy", 64)), (np.int64(3), Growth("copy", 3)),
    ("chunk:128", Growth("chunk", 128)), ("geometric:1.5", Growth("geometric", 0, 1.5)), ("copy", Growth("copy")),
    ("max", Growth("max")), ("max-lazy", Growth("max-lazy")), ("reserve:7", Growth("reserve", 7)),
    (Growth("remap", 9, pad=True), Growth("remap", 9, pad=True)),
])
def test_rows_name_a_policy(rows, growth):
    assert parse(rows) == growth and parse(str(growth)).policy == growth.policy


@pytest.mark.parametrize("rows", [
    0, -1, "0", "most", "chunk:", "chunk:0", "chunk:x", "max:5", "geometric:1", "geometric:nan", "geometric:99", 1.5,
    None, "auto:3", 2**31, "copy:-3", Growth("none"), Growth("copy", -1), Growth("geometric", 0, 0.5),
])
def test_rows_that_name_none(rows):
    with pytest.raises(pybmc.ArgumentError, match="rows: expected auto"):
        parse(rows)


@pytest.mark.skipif(LINUX, reason="Linux can remap")
def test_a_system_that_cannot_remap_says_so():
    with pytest.raises(pybmc.ArgumentError, match="cannot remap"):
        model().session(rows="remap")


# ---- what is counted, and what the model says of it --------------------------------------------------------------


@pytest.mark.long
@numbers
def test_the_model_grows_as_the_arena_does(name):
    """balance.grown() is arena.c in three lines: the same rows reserved, the same bytes copied."""
    for r in (1, 16, 40):
        growth = Growth(name, r, 1.4)
        with model().session(context=CAP, rows=growth) as session:
            reserved = 0
            for n in range(1, CAP + 1):
                if n > reserved:
                    reserved = balance.grown(growth, n, reserved, CAP)
                session.eval([1], logits="none")
                assert session.rows == reserved, (name, r, n)


def test_seconds_are_told_apart():
    with model().session(rows=Growth("copy", 16, touch=True)) as session:
        session.eval(text(), logits="none")
        session.eval([1] * 100, logits="none")
        stats = session.arena_stats()
        assert stats.copy_s > 0 and stats.touch_s > 0 and stats.allocate_s > 0 and stats.attention_s > 0
    with model().session(rows="chunk") as session:
        session.eval(text(), logits="none")
        stats = session.arena_stats()
        assert stats.copy_s == stats.touch_s == 0 < stats.allocate_s and stats.bytes_copied == 0


def test_unused_rows_take_time_where_that_is_asked_for():
    big = pybmc.Model(tiny.model("llama", n_ctx=8192), threads=1)

    def attention_s(pad):
        with big.session(rows=Growth("chunk", 8192, pad=pad)) as session:
            session.eval([1] * 8, logits="none")
            for _ in range(20):
                session.eval([1])
            return session.arena_stats().attention_s

    assert attention_s(True) > 5 * attention_s(False)
    big.close()


def test_auto_rows_are_a_few_huge_pages():
    machine = Machine()
    assert balance.chunk_rows(machine, 32 << 10) == 128 and balance.chunk_rows(machine, 512 << 10) == 16
    assert balance.chunk_rows(machine, 256) == 256
    for s in (1, 100, 33333, 1 << 20, 1 << 30):
        assert balance.chunk_rows(machine, s) % 16 == 0
    with model().session() as session:
        stats = session.arena_stats()
        assert stats.r == balance.chunk_rows(machine, stats.row_bytes) and stats.growth == "chunk" and stats.why


def test_best_r_balances_copies_and_unused_rows():
    """At r* both cost the same, each r around it costs more, and speculation moves it by the root of tau."""
    machine, s, u, n = Machine(map_s=0.0), 1e6, 1e-4, 4096
    r = balance.best_r(machine, s, u, n)
    copying = s * n * (machine.copy + machine.touch_huge + machine.unmap_huge) / r
    assert copying == pytest.approx(u * r / 2, rel=0.2)
    costs = {r: balance.predict(Growth("copy", r, pad=True), machine, s, (0, u), n - 512, 1024, 2 * n).total
             for r in (16, r // 3, r, 3 * r, 1024)}
    assert min(costs, key=costs.get) == r
    assert balance.best_r(machine, s, u, n, tau=4) == pytest.approx(2 * r, abs=16)
    assert balance.best_r(machine, 100, u, n, width=20) == 32
