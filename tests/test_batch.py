"""Many prompts together: each one's text is what it is alone."""

import random

import pytest
import tiny

import pybmc
from pybmc import ArgumentError, ClosedError, ContextFullError, generate


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


@pytest.mark.parametrize("drafting", [{}, {"spec": "ngram"}, {"draft": "other"},
                                      {"draft": "itself", "spec": "draft"}])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("parallel", [1, 3, 8])
def test_each_result_is_its_solo_run(model, draft, drafting, temperature, parallel):
    rng = random.Random(parallel)
    prompts = [tiny.TEXT[at:at + rng.choice([1, 20, 150, 700])] for at in rng.sample(range(400), 7)]
    drafting = drafting | ({"draft": {"other": draft, "itself": model}[drafting["draft"]]}
                           if "draft" in drafting else {})
    settings = {"temperature": temperature, "seed": 4, "repeat_penalty": 1.1, "stop": ["th"]}
    found, batch = together(model, prompts, 40, parallel=parallel, context=500, **drafting, **settings)
    for prompt, tokens in zip(prompts, found):
        with model.session(500) as session:
            assert plain(tokens) == plain(generate(model, prompt, 40, session=session, **settings))
    assert [batch.stats[i].predicted_tokens for i in range(7)] == [len(tokens) for tokens in found]


def test_tokens_come_as_they_are_written(model, monkeypatch):
    monkeypatch.setattr("pybmc.engine.engine.CALL_SECONDS", 0.0)
    order = [i for i, _ in pybmc.generate_batch(model, ["a mouse", "a mill", "a river"], 5, parallel=2,
                                                spec="off", stop_tokens=())]
    assert set(order[:4]) == {0, 1} and order[-1] == 2 and [order.count(i) for i in range(3)] == [5, 5, 5]


def test_one_that_fails_is_raised(model):
    batch = pybmc.generate_batch(model, ["one", "two"], 400, stop_tokens=())
    next(batch)
    batch._sequences[1].session.close()
    with pytest.raises(ClosedError, match="session is closed"):
        list(batch)


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
    assert before >= 3 and not any(s._handle for s in model._sessions)
    assert not any(s._handle for s in draft._sessions)
