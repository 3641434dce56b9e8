"""Drafts of another vocabulary, through text."""

from functools import cache

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import pybmc
from pybmc import generate
from pybmc.spec.bridge import TextDrafter, complete, continuation, cut_anew
from pybmc.spec.pair import TEXT
from pybmc.spec.speculation import Speculation, plain


@cache
def tokenizer_of(name):
    return pybmc.Tokenizer(tiny.model(name))


@given(st.text(max_size=6), st.integers(0, 24), st.binary(max_size=2))
def test_what_is_complete_can_be_decoded(text, n, noise):
    """No character is cut in two, and three bytes at most are held back."""
    part = text.encode()[:n]
    whole = complete(part)
    assert 0 <= len(part) - whole <= 3
    assert part[:whole].decode() == part.decode("utf-8", "ignore")
    assert complete(noise + part) <= len(noise + part)


@settings(max_examples=60)
@given(st.text(st.sampled_from("the mill old. \u00e9\u20ac\n"), min_size=1, max_size=60),
       st.lists(st.integers(0, 60), max_size=9))
def test_a_text_is_spelled_whatever_pieces_it_comes_in(text, cuts):
    cuts = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    for name in ("llama", "phi3"):
        tokenizer, ids = tokenizer_of(name), []
        for a, b in zip(cuts, cuts[1:]):
            start, cut = cut_anew(tokenizer, ids, text[a:b].encode())
            ids[start:] = cut
        assert tokenizer.decode(ids) == text
        more = continuation(tokenizer, ids, b" old mill")
        assert b"".join(map(tokenizer.piece, more)).strip() == b"old mill"


def test_control_tokens_are_not_crossed():
    tokenizer = tokenizer_of("llama")
    ids = [*tokenizer.encode("the mill", bos=False), tokenizer.eos_id]
    assert cut_anew(tokenizer, ids, b"old") == (len(ids), tokenizer.encode("old", bos=False))


@pytest.mark.parametrize("sizes", [(401, 900), (900, 401)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_may_have_another_vocabulary(sizes, temperature):
    paths = {401: tiny.model("llama"), 900: tiny.model("phi3", vocab_size=900)}
    with pybmc.Model(paths[sizes[0]], threads=1) as model, pybmc.Model(paths[sizes[1]], threads=1) as draft:
        chosen = {"temperature": temperature, "stop_tokens": (), "max_tokens": 40, "seed": 3}
        made = Speculation(model, draft, "draft", fixed=4)
        assert made.link == TEXT
        stream = generate(model, "the mill", draft=made, **chosen)
        found = [t._replace(from_draft=False, by=None) for t in stream]
        assert found == list(generate(model, "the mill", spec="off", **chosen))
        assert stream.stats.draft_n > 0


def test_guesses_through_text_come_true(monkeypatch):
    """The bundled pair with text between its tokens: nearly as many as without."""
    prompt, shares = [{"role": "user", "content": "Tell me of a king and a golden bird."}], []
    with pybmc.Model(pybmc.demo_model(), threads=1) as model, \
            pybmc.Model(pybmc.demo_model(draft=True), threads=1) as draft:
        for link in (None, TEXT):
            monkeypatch.setattr("pybmc.spec.speculation.connect", lambda *_, link=link: link)
            stream = generate(model, prompt, 120, draft=Speculation(model, draft, "draft", fixed=4),
                              stop_tokens=())
            list(stream)
            shares.append(stream.stats.accepted_share)
    assert shares[1] > shares[0] - 0.15 > 0.2


def test_a_drafter_keeps_what_it_read():
    """Another text with the same beginning: what is new is evaluated, and guesses are a fresh drafter's."""
    with pybmc.Model(tiny.model("llama"), threads=1) as model, \
            pybmc.Model(tiny.model("phi3"), threads=1) as draft:
        one, other = (TextDrafter(model.tokenizer, draft.tokenizer, draft.session(), plain) for _ in range(2))
        text = model.tokenizer.encode("the old mill by the stream " * 4)
        one.propose(text, 3)
        for longer in ([*text, *model.tokenizer.encode(" was still", bos=False)], text[:-9]):
            assert one.propose(longer, 5) == other.propose(longer, 5)
            assert one.session.tokens == other.session.tokens
            assert all(0 <= sure <= 1 for sure in one.propose(longer, 5)[1])
        one.close()
        other.close()


def test_a_text_that_the_draft_cannot_hold_gets_no_guesses():
    with pybmc.Model(tiny.model("llama"), threads=1) as model, \
            pybmc.Model(tiny.model("phi3"), threads=1) as draft:
        drafter = TextDrafter(model.tokenizer, draft.tokenizer, draft.session(12), plain)
        text = model.tokenizer.encode("the old mill by the stream " * 4)
        assert drafter.propose(text, 3) == ([], [])
        assert drafter.propose(text[:3], 3)[0]
