"""The simulated stories from which the bundled model learns cause and effect:
sound sentences, about what they say they are about."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tomllib")

from tools.train_demo import simulate, text

seeds = st.integers(0, 2**32)


def tales(n):
    """n tales of each plot."""
    return [simulate.tell(random.Random(seed), plot) for plot in simulate.PLOTS.values() for seed in range(n)]


@given(seeds)
def test_a_tale_is_sound_english(seed):
    for paragraph in simulate.tale(random.Random(seed)).paragraphs:
        assert not re.search(r"[\[\]|{}<>]|  | [,.;:?!]|,,|\.\.", paragraph), "markup or spaces left"
        assert paragraph.count('"') % 2 == 0
        assert re.match(r'["A-Z]', paragraph) and re.search(r'[.!?]"?$', paragraph)
        assert not re.search(r'[.!?] [a-z]|[.]" [a-z]|[!?]" (?!cried|said|asked|thought)[a-z]|[!?]" '
                             r'(Cried|Said|Asked|Thought)', paragraph), "a capital"
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n (?!hour)[^aeiou]", paragraph)


@given(seeds)
def test_a_tale_names_what_may_be_asked_for(seed):
    tale = simulate.tale(random.Random(seed))
    assert len(tale.about) >= 2 and len({noun.kind for noun in tale.about}) == len(tale.about)
    for noun in tale.about:
        assert noun.kind in " ".join(tale.paragraphs)


@given(seeds)
def test_a_seed_makes_its_tale(seed):
    assert simulate.tale(random.Random(seed)) == simulate.tale(random.Random(seed))


def test_nobody_changes_between_he_and_she():
    told = {" ".join(tale.paragraphs): tale for tale in tales(60)}
    men = [t for t, tale in told.items() if all(noun.he == "he" for noun in tale.about)
           and not re.search("daughter|old woman", t)]
    assert len(men) > 200
    assert not any(re.search(r"\b([Ss]he|herself)\b", t) for t in men)


@pytest.mark.parametrize("name", simulate.PLOTS)
def test_every_choice_of_a_plot_can_be_told(name):
    """All facts, parts and members of the cast that a plot's text asks for are there."""
    plot, seen = simulate.PLOTS[name], set()
    for seed in range(400):
        rng = random.Random(seed)
        seen.add(tuple(sorted(simulate.choose_facts(rng, plot).items())))
        simulate.tell(rng, plot)
    for choices in plot.get("facts", {}).values():
        assert all(any(choice.items() <= dict(facts).items() for facts in seen) for choice in choices)


def test_tales_differ():
    told = ["\n\n".join(simulate.tale(random.Random(seed)).paragraphs) for seed in range(2000)]
    assert len(set(told)) == len(told)
    sentences = [s for t in told for s in re.split(r"(?<=[.!?]) ", t)]
    assert len(set(sentences)) > 0.5 * len(sentences)


def test_a_helper_has_the_skill_that_is_needed():
    plot = simulate.PLOTS["repaid"]
    for seed in range(200):
        facts = simulate.choose_facts(random.Random(seed), plot)
        assert facts["need"] in [c["need"] for c in plot["facts"]["way_out"] if c["skill"] == facts["skill"]]
        assert facts["trouble"] in [c["trouble"] for c in plot["facts"]["misfortune"]
                                    if c.get("skill", facts["skill"]) == facts["skill"]]


def documents(n=600):
    return list(text.simulated(random.Random(1), n))


def test_requests_ask_for_what_is_told():
    asked = [(turn[0], " ".join(passage for _, passage in d.turns)) for d in documents()
             for turn in d.turns[:1]]
    nouns = {word for kind in ("person", "animal", "thing") for word in simulate.KINDS[kind]}
    named = [(re.findall("[a-z-]+", request.lower()), told) for request, told in asked
             if request not in text.OPEN_REQUESTS]
    assert all(word in told for words, told in named for word in words if word in nouns) and len(named) > 500


def test_some_tales_go_on_when_asked():
    turns = [d.turns for d in documents()]
    more = [t for t in turns if len(t) == 2]
    assert 0.02 < len(more) / len(turns) < 0.1
    assert all(t[1][0] in text.GO_ON for t in more)


def test_a_share_of_the_documents_is_simulated():
    books = text.invented_books(1)
    plain, mixed = (text.chat_documents(books, 3, 1.0, 400, share) for share in (0.0, 0.5))
    assert len(mixed) == pytest.approx(2 * len(plain), rel=0.02)
