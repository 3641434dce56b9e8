"""GBNF: what it says, what is wrong with it, and that a text is accepted exactly where some
way to read it exists."""

import itertools
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grammar import demo

from pybmc.errors import SchemaError, UnsupportedSchemaError
from pybmc.grammar import Grammar, lexemes
from pybmc.grammar.gbnf import Chars, Either, Name, Repeat, Sequence, parse
from pybmc.grammar.lexemes import lark_of

pytest.importorskip("llguidance", reason="grammars need llguidance")

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}     # white space
"""


def accepts(grammar, text):
    """Whether a text is one of the grammar's, read byte by byte where the vocabulary has the bytes."""
    state, tokenizer = grammar.start(), demo().tokenizer
    for token in tokenizer.encode(text, bos=False):
        if not state.mask(())[token // 32] >> np.uint32(token % 32) & np.uint32(1):
            return False
        state.accept(token)
    return state.accepts


def ends(rules, text):
    """Where the rules may end in a text, by where they begin:
    what changes nothing any more is all there is."""
    known = {(name, at): frozenset() for name in rules for at in range(len(text) + 1)}

    def of(node, at):
        if isinstance(node, Name):
            return known[node.name, at]
        if isinstance(node, Chars):
            inside = at < len(text) and any(first <= ord(text[at]) <= last for first, last in node.ranges)
            return {at + 1} if inside else set()
        if isinstance(node, Either):
            return set().union(*(of(part, at) for part in node.parts))
        if isinstance(node, Sequence):
            found = {at}
            for part in node.parts:
                found = set().union(*(of(part, end) for end in found))
            return found
        found, last = (set() if node.least else {at}), {at}
        for n in range(1, (node.most if node.most is not None else node.least + len(text) + 1) + 1):
            last = set().union(*(of(node.part, end) for end in last))
            found |= last if n >= node.least else set()
        return found

    while True:
        new = {(name, at): frozenset(of(rules[name], at)) for name, at in known}
        if new == known:
            return known
        known = new


@pytest.mark.parametrize("grammar, good, bad", [
    (JSON, ['{"a": [1, -2.5e3, "x\\u00e9\\n"], "b": {}}', "{}", '{\n "ü": true }'],
     ['{"a"}', '{"a": 01x}', "[1]", '{"a":1} x']),
    ('root ::= [a-z ]+ " end"', ["ab end", "x end end"], ["ab", " end x"]),
    ('root ::= word " " word\nword ::= [a-z ]+', ["a b", "a  b c"], ["ab", " "]),
    ('root ::= ("ab" | "abc") "cd"', ["abcd", "abccd"], ["abd"]),
    ('root ::= "(" inner ")"\ninner ::= root | [^)]* "!"', ["((a!))", "(!)", "(!!!)"], ["()", "((a!)a)"]),
    ('root ::= e\ne ::= e "+" t | t\nt ::= [0-9]+ | "(" e ")" | [0-9]+ "0"', ["1+20+(3)", "100"],
     ["1+", "+1"]),
    ('root ::= a\n# a comment\na ::= "x" |\n  "y" (\n "1"\n | "2" )', ["x", "y1", "y2"], ["y"]),
    ('root ::= "a"{2,3} "b"{2} "c"{1,} "d"{,1}', ["aabbc", "aaabbccd"], ["abbc", "aabbcdd"]),
    ('root ::= "\\x41\\u00e9\\U0001F600\\"\\\\" [\\]\\-\\[^]', ['Aé😀"\\]', 'Aé😀"\\^'], ['Aé😀"\\a']),
    ('root ::= [^a-c\\n] [-a] [a-]', ["x--", "é-a"], ["a--", "\n--", "xb-"]),
    ("root ::= . .", ["ab", "a\n", "é😀"], ["a", "abc"]),
    ('root ::= Rule-A ruleA rule_a start\nRule-A ::= "1"\nruleA ::= "2"\nrule_a ::= "3"\nstart ::= "4"',
     ["1234"], ["1"]),
    ('root ::= "" | "a"', ["", "a"], ["b"]), ('root ::= ("x" root)?', ["", "xxx"], ["y"]),
    ('root ::= "/" [/"] "*"', ['//*', '/"*'], ["/"]),
], ids=lambda value: repr(value)[:30])
def test_texts_of_grammars(grammar, good, bad):
    compiled = Grammar.gbnf(grammar, demo())
    assert [accepts(compiled, text) for text in good] == [True] * len(good)
    assert [accepts(compiled, text) for text in bad] == [False] * len(bad)


def drawn(rng):
    """Rules of few letters, many of which may be read in several ways."""
    names = ["root", "a", "b", "c"][:rng.randint(1, 4)]

    def node(depth):
        kind = rng.randrange(9 if depth else 4)
        if kind < 2:
            return '"' + "".join(rng.choice("xyz") for _ in range(rng.randint(1, 3))) + '"'
        if kind == 2:
            return rng.choice(("[xy]", "[^x]", "[x-z]", "."))
        if kind == 3:
            return rng.choice(names)
        if kind < 6:
            return "(" + " ".join(node(depth - 1) for _ in range(rng.randint(1, 3))) + ")"
        if kind < 8:
            return "(" + " | ".join(node(depth - 1) for _ in range(rng.randint(2, 3))) + ")"
        return node(depth - 1) + rng.choice(("*", "+", "?", "{2}", "{1,2}"))

    return "\n".join(f"{name} ::= {node(3)}" for name in names)


@settings(max_examples=int(os.environ.get("PYBMC_GRAMMARS", "40")))
@given(st.integers(0, 10 ** 9))
def test_texts_are_accepted_where_some_way_to_read_them_exists(seed):
    """All texts of up to three letters, and longer ones, against a slow reading of the same rules."""
    rng = random.Random(seed)
    source = drawn(rng)
    rules = parse(source)
    texts = ["".join(letters) for n in range(4) for letters in itertools.product("xyz", repeat=n)]
    texts += ["".join(rng.choice("xyzw") for _ in range(rng.randint(4, 7))) for _ in range(12)]
    expected = [len(text) in ends(rules, text)["root", 0] for text in texts]
    try:
        grammar = Grammar.gbnf(source, demo())
        found = [accepts(grammar, text) for text in texts]
    except UnsupportedSchemaError as error:     # rules that contain themselves in endless ways pass a limit
        assert "Too many items" in str(error) or not any(expected), (source, error)
        return
    assert found == expected, (source,
                               [text for text, one, other in zip(texts, found, expected) if one != other][:5],
                               lark_of(source))


@pytest.mark.parametrize("grammar, message", [
    ("", "expected a text"), ("root", "line 1: expected a name and ::="), ("x ::= [a]", "no rule root"),
    ("root ::= x", "no rule x"), ('root ::= "a', 'expected ", found the end'),
    ("root ::= [a", "expected ], found the end"), ("root ::= (a", r"expected \), found the end"),
    ('root ::= "\\q"', "expected an escape"), ('root ::= "\\ud800"', "escape of a character"),
    ("root ::= [z-a]", "a range in order"), ('root ::= "a"{3,2}', "repetition of up to"),
    ('root ::= "a"{}', "expected {m}"), ('root ::= "a"{999999}', "repetition of up to"),
    ('root ::= "a"\nroot ::= "b"', "root is there twice"), ('root ::= "a" )', "end of the line"),
    ('\n\nroot = "a"', "line 3"), ("root ::= " + "(" * 100 + '"a"' + ")" * 100, "levels of parentheses"),
    ('root ::= "a"' + "?" * 100, "repetitions of a repetition"),
    ('root ::= <token>', "end of the line, found <token>"), ("root ::= *", "end of the line")])
def test_bad_grammars_say_where(grammar, message):
    with pytest.raises(SchemaError if grammar else ValueError, match=message):
        Grammar.gbnf(grammar, demo())


def test_large_grammars_are_refused():
    double = "\n".join(f'r{i} ::= r{i + 1} r{i + 1}' for i in range(30))
    with pytest.raises(SchemaError):
        Grammar.gbnf('root ::= ("(" root ")")? r0\n' + double + '\nr30 ::= "x" | "y"', demo())
    chain = "\n".join(f'r{i} ::= r{i + 1} "x"' for i in range(990))
    with pytest.raises(SchemaError, match="nested too deeply|too large"):
        Grammar.gbnf('root ::= ("(" root ")")? r0\n' + chain + '\nr990 ::= "y"', demo())


def test_what_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(lexemes, "SECONDS", -1.0)
    with pytest.raises(UnsupportedSchemaError, match="seconds"):
        Grammar.gbnf('root ::= "(" root ")" | "too long"', demo())


def test_what_is_regular_stays_whole():
    """A lexeme for a character would be slow: only what may be read in several ways is cut."""
    assert lark_of('root ::= [a-z ]+ " end"').count("\nL") == 1
    assert lark_of(JSON).count("\nL") < 25
    assert isinstance(parse("root ::= [a]*")["root"], Repeat)
