"""Attention to the first and the last rows only, and a target that drafts for itself with it."""

import numpy as np
import pytest
import tiny

import pybmc
from pybmc import ArgumentError, generate
from pybmc.spec import speculation

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
def test_the_text_is_plain_decodings(arch, temperature, monkeypatch):
    monkeypatch.setattr(speculation, "SELF_WINDOW", LAST)
    with pybmc.Model(tiny.model(arch, n_ctx=2048), threads=2) as model:
        prompt = random_text(model, 500)
        chosen = {"temperature": temperature, "stop_tokens": (), "seed": 5, "max_tokens": 60, "top_k": 0}
        with model.session() as session:
            stream = generate(model, prompt, session=session,
                              draft=speculation.Speculation(model, None, "self", fixed=4), **chosen)
            found = [t._replace(from_draft=False, by=None) for t in stream]
            assert found == list(generate(model, prompt, spec="off", **chosen))
            assert 10 < stream.stats.draft_n_accepted
            assert arch == "gemma3" or stream.stats.draft_n_accepted < stream.stats.draft_n
            assert session.tokens == [*prompt, *(t.id for t in found[:-1])]
            row = session.eval([1], "last")
            text = session.tokens
        assert (row == after(model, text)).all()            # rows of drafts are gone
