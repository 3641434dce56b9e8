"""Many prompts together: each one's text is what it is alone."""

import random
from itertools import groupby

import pytest
import tiny

import pybmc
from pybmc import ArgumentError, ContextFullError
from pybmc.decode import generate


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def draft():
    with pybmc.Model(tiny.model("llama", seed=1, n_layers=1), threads=1) as draft:
        yield draft


def together(model, prompts, *args, **settings):
    found = [[] for _ in prompts]
    batch = pybmc.generate_batch(model, prompts, *args, **settings)
    for i, token in batch:
        found[i].append(token)
    return found, batch


def plain(tokens):
    return [(t.id, t.text, t.logprob, t.finish_reason) for t in tokens]


@pytest.mark.parametrize("drafting", [{}, {"spec": "ngram"}, {"draft": "other"}, {"draft": "itself", "spec": "draft"}])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("parallel", [1, 3, 8])
def test_each_result_is_its_solo_run(model, draft, drafting, temperature, parallel):
    rng = random.Random(parallel)
    prompts = [tiny.TEXT[at:at + rng.choice([1, 20, 150, 700])] for at in rng.sample(range(400), 7)]
    drafting = drafting | ({"draft": {"other": draft, "itself": model}[drafting["draft"]]} if "draft" in drafting else {})
    settings = {"temperature": temperature, "seed": 4, "repeat_penalty": 1.1, "stop": ["th"]}
    found, batch = together(model, prompts, 40, parallel=parallel, context=500, **drafting, **settings)
    for prompt, tokens in zip(prompts, found):
        with model.session(500) as session:
            assert plain(tokens) == plain(generate(model, prompt, 40, session=session, **settings))
    assert [batch.stats[i].predicted_tokens for i in range(7)] == [len(tokens) for tokens in found]


def test_tokens_come_as_they_are_written(model):
    order = [i for i, _ in pybmc.generate_batch(model, ["a mouse", "a mill", "a river"], 5, parallel=2, stop_tokens=())]
    assert order[:4] == [0, 1, 0, 1] and order.count(2) == 5


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_with_a_draft_nobody_goes_ahead_alone(model, temperature):
    """Rounds left to the library are passes of one sequence, while the others wait."""
    prompts, settings = ["a mouse", "a mill"], {"temperature": temperature, "seed": 4, "stop_tokens": ()}
    order = [i for i, _ in pybmc.generate_batch(model, prompts, 60, draft=model, **settings)]
    assert max(len(list(run)) for _, run in groupby(order[:60])) <= 17
    found, _ = together(model, prompts, 60, draft=model, **settings)
    for prompt, tokens in zip(prompts, found):
        assert plain(tokens) == plain(generate(model, prompt, 60, **settings))


def test_wishes_and_prompts_are_checked(model):
    assert list(pybmc.generate_batch(model, [])) == [] and list(pybmc.generate_batch(model, ["x"], 0)) == []
    for wrong in ({"parallel": 0}, {"max_tokens": -1}, {"heat": 3}, {"spec": "x"}, {"stop": [""]}):
        with pytest.raises(ArgumentError):
            pybmc.generate_batch(model, ["x"], **wrong)
    with pytest.raises(ArgumentError, match="empty"):
        pybmc.generate_batch(model, ["x", []])
    with pytest.raises(ContextFullError, match="room for 4"):
        pybmc.generate_batch(model, ["x", "much too long a prompt"], context=4)


def test_leaving_early_closes_everything(model, draft):
    batch = pybmc.generate_batch(model, ["one", "two", "three"], 50, draft=draft, stop_tokens=())
    for _ in range(10):
        next(batch)
    before = len(model._sessions)
    batch.close()
    assert before >= 3 and not any(s._handle for s in model._sessions) and not any(s._handle for s in draft._sessions)


def test_drafts_get_shorter_when_others_fill_the_pass():
    from simulation import cheap_controller

    controller, source = cheap_controller()
    plans = [controller.plan(source, 16, others) for others in (0, 3, 7, 15)]
    lengths = [0 if plan.trial else plan.k for plan in plans]
    assert lengths[0] >= 3 and lengths == sorted(lengths, reverse=True) and lengths[-1] == 0
