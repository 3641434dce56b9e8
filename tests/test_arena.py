"""The arena through a session, grown by chunks and in the ways of tools.growth, against a list of tokens."""

import sys
from functools import lru_cache

import numpy as np
import pytest
import tiny
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pybmc
from pybmc._native import lib
from tools import balance, lab
from tools.growth import POLICIES, GrowingSession, Growth, grown, parse
from tools.machine import Machine

CAP = 300
LINUX = sys.platform == "linux"
NAMES = [name for name in POLICIES if name != "remap" or LINUX]
names = pytest.mark.parametrize("name", NAMES)


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


def sizes():
    """Rows added at a time."""
    return st.sampled_from(["auto", 1, 5, 16, 33, 128, 999])


class Arena(RuleBasedStateMachine):
    """A session holds the beginning of text(), or a few other tokens after that;
    `tokens` is what it should hold."""

    @initialize(rows=sizes(), cap=st.sampled_from([CAP, 64, 1]))
    def open(self, rows, cap):
        self.cap, self.tokens = cap, []
        self.session = model().session(context=cap, rows=rows)

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

    @rule(rows=sizes())
    def start_anew(self, rows):
        self.session.close()
        self.session, self.tokens = model().session(context=self.cap, rows=rows), []

    @invariant()
    def holds_what_was_given(self):
        if not hasattr(self, "session"):
            return
        stats = self.session.arena_stats()
        assert self.session.tokens == self.tokens
        assert stats.rows_used == len(self.tokens) <= stats.rows_reserved
        assert stats.bytes_reserved >= stats.rows_reserved * stats.row_bytes
        assert stats.rows_reserved % stats.r == 0

    def teardown(self):
        if hasattr(self, "session"):
            self.session.close()


TestArena = Arena.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.long
@pytest.mark.parametrize("rows", [16, "auto"])
def test_every_allocation_may_fail(rows):
    """The first, the second, .. until none is left: a MemoryError,
    and the session goes on at its old length."""
    fail, failed = 1, True
    while failed:
        failed = one_failure(rows, fail)
        fail += 1
    assert fail > 2


def one_failure(rows, fail):
    failed = 0
    lib.bmc_fail_allocation(fail)
    with model().session(context=CAP, rows=rows) as session:
        for at in range(0, CAP, 60):
            try:
                logits = session.eval(text()[at:at + 60], logits="all")
            except MemoryError as error:
                assert "rows of keys and values" in str(error) and session.position == at
                failed += 1
                logits = session.eval(text()[at:at + 60], logits="all")
            assert (logits == truth()[at:at + 60]).all()
    lib.bmc_fail_allocation(0)
    assert failed <= 1
    return failed


def test_auto_rows_are_4_mb_and_16_to_256_rows():
    with model().session() as session, model().session(rows=40) as other:
        stats = session.arena_stats()
        assert stats.r == min(256, max(16, round((4 << 20) / stats.row_bytes / 16) * 16))
        assert other.arena_stats().r == 48


# ---- the ways to grow that tools.kvbench compares ----------------------------------------------------------


@pytest.mark.parametrize("spelled, growth", [
    ("chunk:128", Growth("chunk", 128)), ("geometric:1.5", Growth("geometric", 0, 1.5)),
    ("copy", Growth("copy")), ("max", Growth("max")), ("max-lazy", Growth("max-lazy")),
    ("reserve:7", Growth("reserve", 7)),
])
def test_a_policy_is_spelled_with_its_number(spelled, growth):
    assert parse(spelled) == growth and str(growth) == spelled and parse(spelled, pad=True).pad


@pytest.mark.parametrize("spelled",
                         ["", "auto", "most", "chunk:", "chunk:0", "chunk:x", "max:5", "geometric:1",
                          "geometric:nan", "geometric:99", "copy:-3", f"copy:{2**31}"])
def test_other_spellings_are_refused(spelled):
    with pytest.raises(pybmc.ArgumentError, match="policy: expected one of copy"):
        parse(spelled)


@pytest.mark.skipif(LINUX, reason="Linux can remap")
def test_a_system_that_cannot_remap_says_so():
    with GrowingSession(model(), Growth("remap"), CAP) as session:
        with pytest.raises(pybmc.ArgumentError, match="cannot remap"):
            session.reserve(1)


@names
@pytest.mark.parametrize("r", [1, 16, 40])
def test_a_session_grows_as_its_policy_says(name, r):
    growth, reserved = Growth(name, r, 1.4), 0
    with GrowingSession(model(), growth, CAP) as session:
        for n in range(1, CAP + 1):
            if n > reserved:
                reserved = grown(growth, n, reserved, CAP)
            logits = session.eval([text()[n - 1]])
            assert session.rows == reserved, n
        assert (logits == truth()[CAP - 1]).all()
        assert (session.bytes_copied > 0) == (name in ("copy", "geometric"))


def test_a_copied_arena_takes_no_rows_but_those_it_has():
    with GrowingSession(model(), Growth("copy", 20), CAP) as session:
        session.eval(text()[:30], logits="none")
        with pytest.raises(pybmc.ContextFullError, match="its cap is 40"):
            session.session.eval(text()[:11])


def test_seconds_are_told_apart():
    with GrowingSession(model(), Growth("copy", 16, touch=True), CAP) as session:
        session.eval(text()[:200], logits="none")
        session.eval([1] * 90, logits="none")
        assert min(session.spent.values()) > 0 and session.bytes_copied > 0
    with GrowingSession(model(), Growth("chunk"), CAP) as session:
        spent = session.evaluate(7)
        assert spent["wall"] > spent["attention"] > 0 and spent["allocate"] > 0
        assert (session.spent["copy"] == session.spent["touch"] == session.bytes_copied
                == session.position == 0)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_attention_on_unused_rows_covers_them_all(n):
    config = model().config
    with GrowingSession(model(), Growth("copy", 600), 600) as session:
        session.eval(text()[:n], logits="none")
        seconds, pairs = lab.attend_unused(session.session, n)
        assert seconds > 0 and pairs == config.n_layers * config.n_heads * n * (600 - -(-n // 16) * 16)


@pytest.mark.parametrize("n", [0, -1, 10**6])
def test_unused_rows_meet_the_tokens_of_a_pass(n):
    with model().session() as session, pytest.raises(pybmc.ArgumentError, match="expected 1 to"):
        lab.attend_unused(session, n)


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
