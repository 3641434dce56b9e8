"""Arguments of every kind: what is meant works, everything else is an ArgumentError that names
the argument."""

from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest
import tiny

import pybmc
from pybmc import ArgumentError, checks
from pybmc.engine.perplexity import perplexity
from pybmc.engine.sampler import Sampler


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


# ---- the checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [5, 5.0, np.int64(5), np.uint8(5), np.float32(5), np.array(5), Fraction(5)],
                         ids=repr)
def test_whole_numbers_of_every_kind(value):
    found = checks.whole("n", value)
    assert found == 5 and type(found) is int


@pytest.mark.parametrize("value", [5.5, True, np.True_, "5", b"5", None, nan, inf, -inf, [5], -1, 10, 1e300,
                                   10**400, 5j], ids=repr)
def test_what_is_no_whole_number_in_range(value):
    with pytest.raises(ArgumentError, match="n: expected a whole number from 0 to 9, found "):
        checks.whole("n", value, 0, 9)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), Fraction(1)], ids=repr)
def test_numbers_of_every_kind(value):
    found = checks.number("x", value, 0, 1)
    assert found == 1 and type(found) is float


@pytest.mark.parametrize("value", [True, "1", None, nan, inf, -inf, 1.5, -0.5, [1.0], 10**400, 1j], ids=repr)
def test_what_is_no_number_in_range(value):
    with pytest.raises(ArgumentError, match="x: expected a number from 0 to 1, found "):
        checks.number("x", value, 0, 1)


def test_a_number_with_thousands_of_digits_is_refused_in_words():
    with pytest.raises(ArgumentError, match="n: expected a whole number.* too many digits"):
        checks.whole("n", 10 ** 5000)


def test_infinity_is_a_number_where_that_is_allowed():
    assert checks.number("x", -inf, infinite=True) == -inf
    with pytest.raises(ArgumentError, match="x: expected a number, found nan"):
        checks.number("x", nan, infinite=True)


def test_strings_one_several_or_none():
    assert checks.strings("s", None) == [] and checks.strings("s", "a") == ["a"]
    assert checks.strings("s", (s for s in "ab")) == ["a", "b"]
    for wrong in (b"a", 5, [b"a"], [None], "", [""], {"a": 1}):
        with pytest.raises(ArgumentError, match="s: expected a string"):
            checks.strings("s", wrong)


def test_ids_of_every_kind():
    for value in ([1, 2], (1, 2), np.array([1, 2]), iter([1, 2]), [np.int64(1), 2], range(1, 3)):
        found = checks.ids("t", value, 3)
        assert found == [1, 2] and set(map(type, found)) == {int}
    for wrong in ("12", b"12", 5, None, {1: 2}, [1.0], ["1"], [True], [3], [-1], [None], np.array([1.5]),
                  np.array([[1]])):
        with pytest.raises(ArgumentError, match="t: expected"):
            checks.ids("t", wrong, 3)


def test_an_unknown_setting_names_the_nearest_one(model):
    with pytest.raises(ArgumentError, match="temprature: there is no such setting; did you mean temperature"):
        pybmc.generate(model, "x", temprature=1.0)
    with pytest.raises(ArgumentError, match="did you mean max_tokens"):
        pybmc.generate_batch(model, ["x"], max_token=1)
    with pytest.raises(ArgumentError, match="frobnicate: .* there are temperature, "):
        pybmc.generate(model, "x", frobnicate=1)


# ---- where they are used -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"stop": None}, {"seed": None}, {"temperature": None}, {"logit_bias": None}, {"top_p": None},
    {"stop_tokens": None}, {"seed": np.int64(5), "temperature": 0.8}, {"seed": 2**70, "temperature": 0.8},
    {"temperature": np.float32(0.5)}, {"top_k": np.int32(3), "temperature": 1},
    {"top_k": -1, "temperature": 1}, {"max_tokens": 3.0}, {"max_tokens": np.int64(3)},
    {"logit_bias": {"5": -100}}, {"logit_bias": {np.int64(5): np.float64(-100)}}, {"logit_bias": {5: -inf}},
    {"stop_tokens": 5}, {"stop_tokens": np.int64(5)}, {"stop_tokens": np.array([5, 6])}, {"stop": ("x", "y")},
    {"spec": "ngram", "draft_max": np.int64(3), "draft_min": 1.0},
], ids=repr)
def test_settings_as_others_hand_them_over(model, settings):
    for start in (lambda: pybmc.generate(model, "Once", **{"max_tokens": 3} | settings),
                  lambda: pybmc.generate_batch(model, ["Once", "Twice"], **{"max_tokens": 3} | settings)):
        assert 1 <= len(list(start())) <= 6
    sampler = Sampler(**{k: v for k, v in settings.items() if k in Sampler.__dataclass_fields__})
    for name in ("temperature", "top_p", "min_p"):
        assert type(getattr(sampler, name)) is float
    assert type(sampler.seed) is type(sampler.top_k) is int and sampler.top_k >= 0


def test_generators_as_stop_settings_are_read_once(model):
    free = "".join(t.text for t in pybmc.generate(model, "Once", 12, stop_tokens=()))
    stop = free[4:6]
    found = {0: "", 1: ""}
    for number, token in pybmc.generate_batch(model, ["Once", "Once"], 12, stop=(s for s in [stop]),
                                              stop_tokens=iter(())):
        found[number] += token.text
    assert found == {0: free[:free.index(stop)], 1: free[:free.index(stop)]}


@pytest.mark.parametrize("name, value", [
    ("max_tokens", "5"), ("max_tokens", True), ("max_tokens", 1.5), ("max_tokens", -1), ("max_tokens", nan),
    ("temperature", "hot"), ("temperature", True), ("top_k", -2), ("top_k", 1.5),
    ("seed", "x"), ("seed", True), ("top_p", nan), ("logit_bias", [5]), ("logit_bias", {"x": 1}),
    ("logit_bias", {-1: 1}), ("logit_bias", {5: "1"}), ("logit_bias", {5: nan}), ("logit_bias", {401: 1}),
    ("logit_bias", {"5": 1, 5: 2}), ("logit_bias", {True: 1}), ("stop", b"x"), ("stop", 5), ("stop", [None]),
    ("stop_tokens", "5"), ("stop_tokens", [401]), ("stop_tokens", [-1]), ("stop_tokens", True),
    ("stop_tokens", 5.5),
    ("draft", 5), ("draft", b"x"), ("draft", ""), ("spec", None), ("spec", "all"), ("draft_max", -1),
    ("draft_max", 1.5), ("draft_min", 99), ("draft_max", "x"),
], ids=repr)
def test_settings_that_are_none(model, name, value):
    for start in (lambda: pybmc.generate(model, "Once", **{name: value}),
                  lambda: pybmc.generate_batch(model, ["Once"], **{name: value})):
        with pytest.raises(ArgumentError, match="path" if value == "" else name):
            start()


@pytest.mark.parametrize("prompt",
                         [b"hi", bytearray(b"hi"), 5, None, {"role": "user", "content": "hi"}, ["a"],
                          [1, "a"], [True], [1.0], [401], [-1], [[1, 2]], np.array([0.5]), ...], ids=repr)
def test_prompts_that_are_none(model, prompt):
    with pytest.raises(ArgumentError, match="prompt"):
        pybmc.generate(model, prompt)
    with pytest.raises(ArgumentError, match="prompt"):
        pybmc.generate_batch(model, ["x", prompt])


def test_prompts_of_ids_of_every_kind(model):
    want = [t.id for t in pybmc.generate(model, [5, 6, 7], 4)]
    for prompt in ((5, 6, 7), np.array([5, 6, 7]), iter([5, 6, 7]), [np.int64(5), 6, 7]):
        stream = pybmc.generate(model, prompt, 4)
        assert [t.id for t in stream] == want and stream.prompt == [5, 6, 7]


@pytest.mark.parametrize("prompts", ["one text", b"x", 5, None, {"a": "b"}, [1, 2]], ids=repr)
def test_a_batch_wants_a_list_of_prompts(model, prompts):
    with pytest.raises(ArgumentError, match="prompt"):
        pybmc.generate_batch(model, prompts)


@pytest.mark.parametrize("settings", [{"parallel": 1.5}, {"parallel": True}, {"context": 0}, {"context": -1},
                                      {"context": "8"}])
def test_a_batchs_own_settings(model, settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        pybmc.generate_batch(model, ["x"], **settings)


def test_the_first_argument_is_a_model(model):
    for wrong in (model.path, None, 5):
        with pytest.raises(ArgumentError, match="model: expected a Model"):
            pybmc.generate(wrong, "x")


def test_a_session_is_one_of_the_same_model(model):
    with pybmc.Model(tiny.model("llama", seed=1), threads=1) as other, other.session() as session:
        for wrong in (session, other, "x", model):
            with pytest.raises(ArgumentError, match="session: expected a session of the same model"):
                pybmc.generate(model, "x", session=wrong)
        made = pybmc.Speculation(other, spec="ngram")
        with pytest.raises(ArgumentError, match="draft: expected a Speculation of the same model"):
            pybmc.generate(model, "x", draft=made)


@pytest.mark.parametrize("call", [
    lambda s: s.sync(["x"]), lambda s: s.sync([0.5]), lambda s: s.sync([[1]]),
    lambda s: s.eval([1], last=True), lambda s: s.eval([1], last="x"),
    lambda s: s.eval([1], "best", sampler={"temperature": 1}), lambda s: s.eval([1], logits=[]),
    lambda s: s.rewind("0"), lambda s: s.rewind(None), lambda s: s.rewind(False),
    lambda s: s.reserve(True), lambda s: s.reserve(1.5), lambda s: pybmc.eval_batch([5]),
    lambda s: pybmc.eval_batch([(s, [1])]), lambda s: pybmc.eval_batch([("s", [1], "last")]),
    lambda s: s.model.session(context=True), lambda s: s.model.session(rows=True),
    lambda s: s.model.session(kv_type=None), lambda s: s.model.session(context=nan),
    lambda s: pybmc.Model(s.model.path, threads=True), lambda s: pybmc.Model(None), lambda s: pybmc.Model(5),
    lambda s: pybmc.Model(""), lambda s: pybmc.Tokenizer(None), lambda s: s.model.tokenizer.piece("5"),
    lambda s: s.model.tokenizer.piece([5]), lambda s: s.model.tokenizer.piece(1.5),
    lambda s: s.model.tokenizer.decode(5), lambda s: s.model.tokenizer.decode("5"),
    lambda s: s.model.tokenizer.decode(b"5"), lambda s: s.model.tokenizer.decode([401]),
    lambda s: s.model.tokenizer.encode(b"x"), lambda s: s.model.tokenizer.encode(None),
    lambda s: s.model.tokenizer.is_control(None), lambda s: perplexity(s.model, "x", 3),
    lambda s: perplexity(s.model, "x", "8"),
    lambda s: perplexity(s.model, b"x", 8),
])
def test_arguments_of_the_wrong_kind(model, call):
    with model.session() as session:
        session.eval([1, 2, 3])
        with pytest.raises(ArgumentError, match="expected|out of range"):
            call(session)
        assert session.position == 3


def test_whole_floats_are_counts(model):
    with model.session(context=16.0, rows=np.int64(8)) as session:
        session.eval([1, 2, 3])
        session.rewind(2.0)
        session.reserve(np.uint8(4))
        assert session.position == 2 and session.context == 16
