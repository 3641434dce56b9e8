"""Attention to the first and the last rows only, and a target that drafts for itself with it."""

import numpy as np
import pytest
import tiny

import pybmc
from pybmc import ArgumentError
from pybmc.controller import FixedLength
from pybmc.decode import generate
from pybmc.drafters import SelfDrafter
from pybmc.prove import Recorder, digests, replay
from pybmc.sampling import Sampler
from pybmc.speculate import Speculation

FIRST, LAST = 256, 64                   # rows that are always seen; and here at the end


@pytest.fixture(scope="module")
def shallow():
    """One layer: a row holds its own token and nothing of the others'."""
    with pybmc.Model(tiny.model("llama", n_layers=1, n_ctx=2048), threads=2) as model:
        yield model


def random_text(model, n, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n).tolist()


def after(model, text, last=0):
    with model.session() as session:
        session.eval(text[:-1], "none")
        return session.eval(text[-1:], "last", last)


def test_rows_between_are_not_seen(shallow):
    text, other = random_text(shallow, 700), random_text(shallow, 700, 1)
    changed = text[:FIRST] + other[FIRST:-300] + text[-300:]
    assert (after(shallow, text, LAST) == after(shallow, changed, LAST)).all()
    assert (after(shallow, text, LAST) != after(shallow, text)).any()
    for place in (100, -LAST + 1):              # and those at both ends are
        changed = list(text)
        changed[place] = (changed[place] + 1) % shallow.config.vocab_size
        assert (after(shallow, text, LAST) != after(shallow, changed, LAST)).any()


def test_many_last_rows_are_all_rows():
    with pybmc.Model(tiny.model("llama", n_ctx=2048), threads=2) as model:
        text = random_text(model, 600)
        assert (after(model, text, 600) == after(model, text)).all()
        assert (after(model, text, 600 - FIRST) == after(model, text)).all()
        with pytest.raises(ArgumentError, match="last"):
            after(model, text, -1)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_plain_decodings(arch, temperature):
    with pybmc.Model(tiny.model(arch, n_ctx=2048), threads=2) as model:
        prompt, chosen = random_text(model, 500), {"temperature": temperature, "stop_tokens": (), "seed": 5, "max_tokens": 30}
        plain = list(generate(model, prompt, **chosen))
        made = Speculation(model, None, "self", controller=FixedLength(4))
        made.drafter = SelfDrafter(model, LAST, shortest=0)
        with model.session() as session:
            recorded = Recorder(session)
            stream = generate(model, prompt, session=recorded, draft=made, **chosen)
            assert plain == [t._replace(from_draft=False) for t in stream]
            assert stream.stats.draft_n_accepted > 10
            text = [*prompt, *(t.id for t in plain)]
            rows, difference = replay(model, text, recorded.passes, digests(model, text, len(prompt)))
            assert rows > 20 and difference is None


def test_it_is_asked_where_rows_outweigh_weights():
    with pybmc.Model(tiny.model("llama", n_ctx=2048), threads=1) as model, model.session() as session:
        drafter = SelfDrafter(model, LAST)
        drafter.session = session
        row = session.arena_stats().row_bytes
        plain, draft = model.packed_bytes + drafter.shortest * row, model.packed_bytes + (FIRST + LAST) * row
        assert draft / plain == pytest.approx(0.7, abs=0.01)
        stream = generate(model, random_text(model, 40), 20, spec="self", stop_tokens=())
        list(stream)
        assert stream.stats.draft_n == 0


def test_a_session_elsewhere_is_left_alone():
    with pybmc.Model(tiny.model("llama"), threads=1) as model, model.session() as session:
        drafter = SelfDrafter(model, LAST, shortest=0)
        drafter.session = session
        assert drafter.propose([1, 2, 3], 4, 0.0, Sampler()).ids == [] and session.position == 0
