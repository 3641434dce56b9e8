"""Grammars compiled for a vocabulary: their states, guesses that are taken back, and texts that follow them."""

import json
import re

import numpy as np
import pytest

import pybmc
from pybmc import ArgumentError, Engine, Request
from pybmc.engine import Schema
from pybmc.errors import SchemaError, UnsupportedSchemaError
from pybmc.grammar import Grammar

pytest.importorskip("llguidance", reason="schemas need llguidance")

PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["name", "age"], "additionalProperties": False}


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(pybmc.demo_model(), threads=1) as model:
        yield model


def allowed(mask):
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def ids(model, text):
    return model.tokenizer.encode(text, bos=False)


def write(model, schema, n=60, prompt="Once upon a time", **engine):
    with Engine(model, **engine) as made:
        sequence = made.add(Request(model.tokenizer.encode(prompt), n, schema=schema, stop_ids=model.tokenizer.stop_ids))
        tokens = []
        while not sequence.done:
            tokens += [token for _, token in made.step()]
        if sequence.error:
            raise sequence.error
        return tokens


def text_of(tokens):
    return "".join(token.text for token in tokens)


# ---- states ------------------------------------------------------------------------------------------------


def test_a_state_follows_the_protocol(model):
    grammar = Grammar.json(PERSON, model)
    assert isinstance(grammar.start(), Schema) and isinstance(grammar.after("</think>"), Schema)


def test_guesses_are_taken_back(model):
    """Masks behind guesses equal those of a state that accepted the same tokens."""
    grammar = Grammar.json(PERSON, model)
    text = ids(model, '{"name":"Ann","age":7}')
    state = grammar.start()
    for i, token in enumerate(text):
        for guesses in (text[i:i + 3], text[i:i + 2], [text[i]], []):
            fresh = grammar.start()
            for earlier in [*text[:i], *guesses]:
                fresh.accept(earlier)
            assert allowed(state.mask(guesses)) == allowed(fresh.mask(()))
        state.accept(token)
    assert state.accepts and allowed(state.mask(())) == set(model.tokenizer.stop_ids)


def test_another_guess_takes_the_first_back(model):
    state = Grammar.regex("(abc|xyz)!", model).start()
    a, x = ids(model, "a")[0], ids(model, "x")[0]
    behind_a, behind_x = allowed(state.mask([a])), allowed(state.mask([x]))
    assert ids(model, "b")[0] in behind_a and ids(model, "y")[0] in behind_x and behind_a.isdisjoint(behind_x)
    state.mask([a])
    state.accept(x)
    assert allowed(state.mask(())) == behind_x


def test_ends_are_allowed_exactly_where_the_grammar_accepts(model):
    state, ends = Grammar.regex("ab*", model).start(), model.tokenizer.stop_ids
    assert not ends & allowed(state.mask(()))
    state.accept(ids(model, "a")[0])
    assert ends <= allowed(state.mask(()))
    state.accept(min(ends))
    assert allowed(state.mask(())) == ends


# ---- a grammar behind a mark -------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_mark_is_found_however_it_is_cut(model, cut):
    """Also where it ends in the middle of a bundle of guesses."""
    text = "so </think"
    tokens = ids(model, text[:cut]) + ids(model, text[cut:]) + ids(model, ">")
    state = Grammar.json(PERSON, model).after("</think>")
    brace = set(allowed(Grammar.json(PERSON, model).start().mask(())))
    assert allowed(state.mask(tokens)) == brace
    for token in tokens:
        state.accept(token)
    assert allowed(state.mask(())) == brace
    more = ids(model, '{"name')
    assert allowed(state.mask(more[:1])) != brace
    for token in more:
        state.accept(token)
    assert state.forced()


def test_no_token_passes_the_mark(model):
    """Tokens that end the mark and go on with other text would escape the grammar."""
    longer = next(piece for piece in map(model.tokenizer.piece, range(300, 4096)) if re.fullmatch(rb" [a-z]{4,}", piece))
    mark = longer[1:3]
    state = Grammar.json(PERSON, model).after(mark)
    mask = allowed(state.mask(()))
    for id in range(model.tokenizer.vocab_size):
        piece = model.tokenizer.piece(id)
        assert (id in mask) == (mark not in piece or piece.endswith(mark) and piece.count(mark) == 1)


def test_white_space_may_follow_a_mark(model):
    newline, brace = ids(model, "\n")[-1], ids(model, "{")[0]
    state = Grammar.json(PERSON, model).after("!", gap="\n\n")
    state.accept(ids(model, "!")[0])
    for _ in range(2):
        assert {newline, brace} <= allowed(state.mask(()))
        state.accept(newline)
    assert newline not in allowed(state.mask(())) and newline not in allowed(state.mask([brace]))


def test_a_text_that_does_not_open_begins_with_the_grammar(model):
    grammar = Grammar.json(PERSON, model)
    opening, brace = ids(model, "<")[0], ids(model, "{")[0]
    state = grammar.after("</think>", opens="<think>", ends=False)
    assert allowed(state.mask(())) >= {opening, brace}
    assert allowed(state.mask([brace])) == allowed(grammar.start().mask([brace]))
    for token in ids(model, "<think>hm"):
        assert token in allowed(mask) if (mask := state.mask(())) is not None else True
        state.accept(token)
    assert not model.tokenizer.stop_ids & allowed(state.mask(()))


# ---- texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["off", "ngram"])
def test_texts_are_json_of_their_schema(model, spec):
    found = json.loads(text_of(write(model, Grammar.json(PERSON, model).start(), spec=spec)))
    assert set(found) == {"name", "age"} and len(found["name"]) <= 8 and 0 <= found["age"] <= 99


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, error, message", [
    (lambda m: Grammar.json("{", m), SchemaError, "schema: expected JSON"),
    (lambda m: Grammar.json([1], m), SchemaError, r"schema: expected an object, found \[1\]"),
    (lambda m: Grammar.json({"type": "wurst"}, m), UnsupportedSchemaError, "Invalid type: wurst"),
    (lambda m: Grammar.json({"$ref": "http://x.test/y"}, m), UnsupportedSchemaError, "x.test"),
    (lambda m: Grammar.json({"uniqueItems": True}, m, strict=True), UnsupportedSchemaError, "uniqueItems"),
    (lambda m: Grammar.json({"const": "x" * 300_000}, m), SchemaError, "at most 262144 bytes, found 300"),
    (lambda m: Grammar.gbnf("root ::= (", m), SchemaError, "grammar: "),
    (lambda m: Grammar.gbnf("", m), ArgumentError, "grammar: expected a text"),
    (lambda m: Grammar.lark("start: nothing", m), UnsupportedSchemaError, "nothing"),
    (lambda m: Grammar.regex("(", m), UnsupportedSchemaError, "regex")])
def test_bad_schemas_are_refused_with_a_reason(model, make, error, message):
    with pytest.raises(error, match=message) as caught:
        make(model)
    assert "\n" not in str(caught.value)


def test_deep_schemas_are_refused(model):
    deep: dict = {}
    for _ in range(70):
        deep = {"items": deep}
    with pytest.raises(SchemaError, match="at most 64 levels"):
        Grammar.json(deep, model)


def test_ignored_keywords_are_listed(model):
    assert any("uniqueItems" in word for word in Grammar.json({"type": "array", "uniqueItems": True}, model).ignored)
