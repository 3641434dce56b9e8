"""Grammars compiled for a vocabulary: their states, guesses that are taken back,
and texts that follow them."""

import gc
import json
import lzma
import os
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import engines
import numpy as np
import pytest
import test_draft_head
from hypothesis import given, settings
from hypothesis import strategies as st
from places import VOCABULARIES

import pybmc
from pybmc import ArgumentError, Engine, Request
from pybmc.chat.reasoning import Marks
from pybmc.engine import Schema
from pybmc.engine.sampler import Sampler
from pybmc.errors import SchemaError, UnsupportedSchemaError
from pybmc.grammar import Grammar, compiler, vocabulary
from pybmc.grammar.vocabulary import Vocabulary, continued
from pybmc.spec.speculation import Speculation
from pybmc.tokenizers import Tokenizer
from tools.schemas import draw, fits

LLMatcher = pytest.importorskip("llguidance", reason="schemas need llguidance").LLMatcher

PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8},
                                           "age": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["name", "age"], "additionalProperties": False}


@lru_cache(maxsize=None)
def demo():
    return pybmc.Model(pybmc.demo_model(), threads=1)


@pytest.fixture(scope="module")
def model():
    return demo()


def allowed(mask):
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def ids(model, text):
    return model.tokenizer.encode(text, bos=False)


def write_with_stats(model, schema, n=80, sampler=None, **engine):
    with Engine(model, **engine) as made:
        prompt = model.tokenizer.encode("Once upon a time")
        sequence = made.add(Request(prompt, n, sampler or Sampler(), schema=schema,
                                    stop_ids=model.tokenizer.stop_ids))
        tokens = [token for _, token in engines.events(made)]
        if sequence.error:
            raise sequence.error
        return tokens, sequence.stats


def write(*args, **more):
    return write_with_stats(*args, **more)[0]


def unforced(schema):
    schema.forced = lambda: []
    return schema


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


def test_states_of_a_grammar_do_not_disturb_one_another(model):
    """In threads: the server makes states beside the engine's thread, which uses others."""
    grammar, text = Grammar.json(PERSON, model), ids(model, '{"name":"Ann","age":7}')

    def masks():
        state, found = grammar.start(), []
        for token in text:
            found.append(state.mask(()).copy())
            state.accept(token)
        return np.array(found)

    expected = masks()
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(found, expected) for found in pool.map(lambda _: masks(), range(40)))


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


# with which no text is written
@pytest.mark.parametrize("name", sorted(VOCABULARIES.keys() - {"wordpiece", "unigram"}))
def test_forced_tokens_are_those_of_the_tokenizer(name, tmp_path):
    """The text that has to follow is cut as it would be in a longer text;
    what more text could change is left out."""
    (tmp_path / "vocabulary.gguf").write_bytes(lzma.decompress(VOCABULARIES[name].read_bytes()))
    tokenizer = Tokenizer(tmp_path / "vocabulary.gguf")
    grammar = Grammar(Vocabulary(tokenizer, tokenizer.vocab_size, name),
                      LLMatcher.grammar_from_regex('\\{"name of  the\\n größe":"[a-z]+"'))
    text = '{"name of  the\n größe":"'
    for more in ("abc", "the", "z"):
        state = grammar.start()
        whole = continued(tokenizer, text + more)
        found = state.forced()
        assert found == whole[:len(found)]
        spelled = b"".join(map(tokenizer.piece, found))
        assert text.encode().startswith(spelled) and len(spelled) > 0.5 * len(text)


def test_a_tokenizer_that_changes_the_text_forces_nothing(model, monkeypatch):
    monkeypatch.setattr(vocabulary, "continued",
                        lambda tokenizer, text: tokenizer.encode(text.upper(), bos=False))
    state = Grammar(Vocabulary(model.tokenizer, model.config.vocab_size, "altered"),
                    LLMatcher.grammar_from_regex("abc def")).start()
    assert state.forced() == [] and allowed(state.mask(()))


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
    longer = next(piece for piece in map(model.tokenizer.piece, range(300, 4096))
                  if re.fullmatch(rb" [a-z]{4,}", piece))
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

FORMS = [
    PERSON, {"enum": ["a long string that is forced once it has begun", "another"]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 5},
    {"type": "object",
     "properties": {"first name": {"type": "string", "maxLength": 12},
                    "kind": {"enum": ["miller", "king"]},
                    "rooms": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 30},
                              "minItems": 2, "maxItems": 3}},
     "required": ["first name", "kind", "rooms"], "additionalProperties": False}]
SAMPLERS = [Sampler(), Sampler(temperature=1.2, seed=3, repeat_penalty=1.1)]


def requests(model, n=80):
    """Schemas from the first token, and behind a word that the model writes soon."""
    ends = model.tokenizer.stop_ids
    for form in FORMS:
        grammar = Grammar.json(form, model)
        for sampler in SAMPLERS:
            for start in (grammar.start, lambda grammar=grammar: grammar.after(" the", gap="\n")):
                yield lambda start=start, sampler=sampler: Request(
                    model.tokenizer.encode("Once upon a time"), n, sampler, schema=start(), stop_ids=ends)


def one_by_one(model, request):
    """Its tokens where nothing is forced or guessed."""
    unforced(request.schema)
    return engines.write(model, request)[0]


@pytest.fixture(scope="module")
def expected(model):
    return [one_by_one(model, make()) for make in requests(model)]


def test_texts_are_json_of_their_schema(model, expected):
    for i, (make, tokens) in enumerate(zip(requests(model), expected)):
        text = text_of(tokens)
        text = text.partition(" the")[2].lstrip("\n") if i % 2 else text
        assert tokens[-1].finish_reason == "stop" and fits(json.loads(text), FORMS[i // 4]), text


@pytest.mark.parametrize("spec, fixed",
                         [("off", 0), ("ngram", 0), ("ngram", 4), ("self", 3), ("draft", 0), ("draft", 5)])
def test_guesses_and_forced_tokens_change_nothing(model, expected, spec, fixed):
    with pybmc.Model(pybmc.demo_model(draft=True), threads=1) as draft:
        made = Speculation(model, draft if spec == "draft" else None, spec, fixed=fixed)
        for make, tokens in zip(requests(model), expected):
            assert engines.write(model, make(), made)[0] == tokens


def test_a_draft_head_changes_nothing():
    model = test_draft_head.load()
    for grammar in (Grammar.json({"enum": ["abcab", "abcbc", "bc"]}, model),
                    Grammar.regex("(ab|c){3,9}d", model)):
        make = lambda: Request([1, 2, 3], 30, SAMPLERS[1], schema=grammar.start(),
                               stop_ids=model.tokenizer.stop_ids)
        for fixed in (0, 3):
            assert (engines.write(model, make(), Speculation(model, spec="mtp", fixed=fixed))[0]
                    == one_by_one(model, make()))


@pytest.mark.parametrize("room", [None, 130])
def test_company_and_short_memory_change_nothing(model, expected, room, monkeypatch):
    monkeypatch.setattr("pybmc.engine.sequence.ANSWER", 1)    # all are admitted, and some are put aside later
    with model.session(rows=16) as session:
        session.reserve(room or 1)
        memory = session.arena_stats().bytes_reserved if room else None
    with Engine(model, spec="ngram", parallel=5, memory=memory) as engine:
        found = {engine.add(make()): [] for make in requests(model)}
        for sequence, token in engines.events(engine):
            found[sequence].append(token._replace(from_draft=False, by=None))
        assert not any(sequence.error for sequence in found) and list(found.values()) == expected
        assert bool(engine.put_aside) == bool(room)


@pytest.mark.parametrize("draft", [False, True])
def test_a_grammar_begins_behind_a_thought(model, monkeypatch, draft):
    """The mark is one that this model writes."""
    monkeypatch.setattr("pybmc.chat.schema.THINK", Marks("<think>", ","))
    with pybmc.Model(pybmc.demo_model(draft=True), threads=1) as small:
        for seed in range(3):
            text = text_of(pybmc.generate(model, "Once <think>", 200, grammar='root ::= "yes" | "no"',
                                          temperature=0.8, seed=seed, draft=small if draft else None))
            thought, mark, answer = text.partition(",")
            assert thought and mark and answer.lstrip("\n") in ("yes", "no")


def test_schema_and_grammar_of_generate(model):
    texts = [text_of([t for _, t in pybmc.generate_batch(model, ["a", [5, 6]], 20,
                                                         grammar=Grammar.regex("x{3}", model))])]
    assert texts == ["xxxxxx"]
    assert text_of(pybmc.generate(model, "a", 20, schema='{"const": 5}', stop_tokens=())) == "5"
    for wrong in ({"schema": {}, "grammar": "x"}, {"schema": 5}, {"grammar": 5}, {"schema": False}):
        with pytest.raises(ArgumentError):
            pybmc.generate(model, "a", **wrong)
    with pybmc.Model(pybmc.demo_model(draft=True), threads=1) as other, \
            pytest.raises(ArgumentError, match="same model"):
        pybmc.generate(other, "a", grammar=Grammar.regex("x", model))


def test_forced_tokens_share_passes(model):
    grammar = Grammar.json(FORMS[3], model)
    always = Speculation(model, spec="ngram", fixed=16)   # all guesses are checked, whatever passes cost here
    tokens, stats = write_with_stats(model, grammar.start(), speculation=always)
    slow, plain = write_with_stats(model, unforced(grammar.start()), spec="off")
    assert [t.id for t in tokens] == [t.id for t in slow] and stats.rounds < 0.7 * plain.rounds
    assert {t.by for t in tokens} >= {None, "schema"} and {t.by for t in slow} == {None}
    assert sum(t.by == "schema" for t in tokens) > 10


@settings(max_examples=int(os.environ.get("PYBMC_SCHEMAS", "40")))
@given(st.randoms(use_true_random=False))
def test_random_schemas_are_followed(rng):
    """PYBMC_SCHEMAS: how many; 1200 at night."""
    schema = draw(rng)
    model = demo()
    grammar = Grammar.json(schema, model, strict=True)
    assert grammar.ignored == ()
    tokens = write(model, grammar.start(), 300, sampler=Sampler(temperature=1.0, seed=rng.randrange(1000)),
                   spec="ngram")
    text, replay = text_of(tokens), grammar.start()
    for token in tokens:
        assert token.id in allowed(replay.mask(()))
        replay.accept(token.id)
    assert tokens[-1].finish_reason == "length" or fits(json.loads(text), schema), (schema, text)
    outside = re.sub(r'"(\\.|[^"\\])*"', "", text)
    assert not re.search(r"\s", outside) or tokens[-1].finish_reason == "length", text       # compact


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, error, message", [
    (lambda m: Grammar.json("{", m), SchemaError, "schema: expected JSON"),
    (lambda m: Grammar.json([1], m), SchemaError, r"schema: expected an object, found \[1\]"),
    (lambda m: Grammar.json({"type": "wurst"}, m), UnsupportedSchemaError, "Invalid type: wurst"),
    (lambda m: Grammar.json({"$ref": "http://x.test/y"}, m), UnsupportedSchemaError, "x.test"),
    (lambda m: Grammar.json({"uniqueItems": True}, m, strict=True), UnsupportedSchemaError, "uniqueItems"),
    (lambda m: Grammar.json({"const": "x" * 300_000}, m), SchemaError, "at most 262144 bytes, found 300"),
    (lambda m: Grammar.gbnf("root ::= (", m), SchemaError, r"grammar, line 1: expected \)"),
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


@pytest.mark.parametrize("schema", [
    {"type": "integer", "minimum": -2 ** 63, "maximum": -2 ** 63},
    {"allOf": [{"type": "integer", "minimum": -1e30}, {"maximum": -1e300}]},
    {"type": "integer", "minimum": -10 ** 400, "exclusiveMaximum": -10 ** 400},
    {"items": [{"type": "integer", "multipleOf": 2 ** 31}]},
    {"type": "number", "multipleOf": 9999.99}])
def test_numbers_that_llguidance_does_not_survive_are_refused(model, schema):
    """A recursion without end, or memory without end."""
    # More digits than Python reads as a whole number.
    text = json.dumps(schema).replace("1e+300", "1" + "0" * 5000)
    lark = f'%llguidance {{}}\nstart: x\n// "\nx: /[/]/ %json {text} /a/'
    for make in (lambda: Grammar.json(schema, model), lambda: Grammar.lark(lark, model)):
        with pytest.raises(UnsupportedSchemaError, match="expected (maximum|exclusiveMaximum|multipleOf) "):
            make()


@pytest.mark.parametrize("schema, text", [
    ({"type": "integer", "minimum": -2 ** 63, "maximum": 2 ** 63 - 1}, "-7"),
    ({"anyOf": [{"type": "number", "exclusiveMinimum": -1.7e308, "exclusiveMaximum": 1.7e308}]}, "-7.5"),
    ({"const": {"maximum": 10 ** 19}}, '{"maximum":10000000000000000000}'),
    ({"type": "number", "multipleOf": 0.01}, "0.25"),
    ({"type": "integer", "multipleOf": 3_600_000}, "7200000"),
    ({"const": {"maximum": True}}, '{"maximum":true}')])
def test_large_numbers_of_usual_schemas_are_fine(model, schema, text):
    state = Grammar.json(schema, model).start()
    for id in ids(model, text):
        assert id in allowed(state.mask([]))
        state.accept(id)
    assert state.accepts


@pytest.mark.parametrize("schema", [{"multipleOf": 10 ** 5000 + 1}, {"maximum": -10 ** 5000}])
def test_numbers_that_python_does_not_write_are_refused(model, schema):
    with pytest.raises(UnsupportedSchemaError, match="too many digits"):
        Grammar.json(schema, model)


def chain(n, rule, last):
    return "\n".join(rule.format(i, i + 1) for i in range(n)) + "\n" + last.format(n)


def references(n):
    return {"$ref": "#/$defs/d0",
            "$defs": {f"d{n}": {"type": "null"}} | {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}}


def test_deep_references_do_not_end_the_process(model):
    """As many as a schema or a grammar may have: recursion as deep as that overflows usual stacks."""
    schema = references(6000)
    assert len(json.dumps(schema)) > 0.8 * 256 * 1024
    assert Grammar.json(schema, model).start().forced()
    for rules in (chain(900, 'a{}: a{} "x"', 'a{}: "y"'), chain(900, 'A{}: A{} "x"', 'A{}: "y"')):
        assert Grammar.lark(f"%llguidance {{}}\nstart: {rules[0]}0\n{rules}", model).start().forced()
    with pytest.raises(SchemaError, match="at most 1000 rules, found 1102"):
        Grammar.lark("%llguidance {}\nstart: a0\n" + chain(1100, 'a{}: a{} "x"', 'a{}: "y"'), model)


@pytest.mark.parametrize("schema, loose", [
    ('{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], '
     '"additionalProperties": false}', False),
    ('{"x-guidance": {"whitespace_flexible": true}, "type": "object", "properties": {"a": {"enum": [1]}}, '
     '"required": ["a"]}', True),
])
def test_json_in_lark_is_compact_unless_it_says_otherwise(model, schema, loose):
    """Also behind texts, expressions and comments that look like one."""
    lark = f'%llguidance {{}}\nstart: "%json {{" x // %json {{\nx: /[%]json [{{]/ y\ny: %json {schema}\n'
    before, encode = "%json {%json {", model.tokenizer.encode
    for text, allowed in ((before + '{"a":1}', True), (before + '{"a": 1}', loose),
                          (before + '{ "a":1}', loose)):
        ids = encode(text, bos=False)
        assert (Grammar.lark(lark, model)._matcher.deep_copy().try_consume_tokens(ids) == len(ids)) == allowed
    with pytest.raises(SchemaError):
        Grammar.lark('%llguidance {}\nstart: %json {"type": ', model)


def test_what_compiles_too_long_is_given_up(model, monkeypatch):
    monkeypatch.setattr(compiler, "SECONDS", 0.01)
    done, release = threading.Event(), threading.Event()
    with pytest.raises(UnsupportedSchemaError, match="more than 0.01 seconds"):
        compiler.in_time(lambda: release.wait(20) and done.set())
    release.set()
    assert done.wait(20)
    monkeypatch.setattr(compiler, "SECONDS", 20.0)
    assert compiler.in_time(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        compiler.in_time(lambda: 1 / 0)

    def panic():
        raise BaseException("a panic")

    with pytest.raises(UnsupportedSchemaError, match="llguidance failed: a panic"):
        compiler.in_time(panic)


@pytest.mark.parametrize("make", [
    lambda m: Grammar.regex("a[^\\s\\S]", m), lambda m: Grammar.json({"$ref": "#"}, m),
    lambda m: Grammar.json({"type": "object",
                            "properties": {f"p{i}": {"type": "string"} for i in range(900)}}, m)])
def test_what_fails_at_the_first_tokens_is_refused_at_once(model, make):
    with pytest.raises(UnsupportedSchemaError):
        make(model)


def test_a_closed_model_leaves_nothing_behind():
    with pybmc.Model(pybmc.demo_model(), threads=1) as model:
        state = Grammar.json(PERSON, model).after("!")
        state.mask(())
        known = weakref.ref(vocabulary.vocabulary_of(model))
        # compiled once
        assert Grammar.json(PERSON, model)._matcher is Grammar.json(dict(PERSON), model)._matcher
    del model, state
    gc.collect()
    assert known() is None


def test_ignored_keywords_are_listed(model):
    assert any("uniqueItems" in word
               for word in Grammar.json({"type": "array", "uniqueItems": True}, model).ignored)
