"""Thoughts before an answer: where they begin and end, however the text was cut,
and what is printed of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybmc.chat.reasoning import Reasoning
from pybmc.cli.terminal import Voice
from pybmc.engine import Token


def split(chunks, inside=False):
    """(thoughts, answer, everything)"""
    reasoning = Reasoning(inside)
    pieces = [piece for chunk in chunks for piece in reasoning.push(chunk)] + reasoning.flush()
    sides = ["".join(text for text, thought in pieces if thought is side) for side in (True, False)]
    return *sides, "".join(text for text, _ in pieces)


@pytest.mark.parametrize("text, inside, thoughts, answer", [
    ("Hello", False, "", "Hello"),
    ("<think>hm</think>Hello", False, "<think>hm</think>", "Hello"),
    ("\n<think>\nhm\n</think>\n\nHello\n", False, "\n<think>\nhm\n</think>\n\n", "Hello\n"),
    ("hm\n</think>\n\nHello", True, "hm\n</think>\n\n", "Hello"),
    ("<think>a</thin </think>b<think>c</think>", False, "<think>a</thin </think>", "b<think>c</think>"),
    ("Write <think> first", False, "", "Write <think> first"),
    ("<think>without end </th", False, "<think>without end </th", ""),
    ("  <thin", False, "", "  <thin"),
    ("<thinker>", False, "", "<thinker>"),
    ("<think></think>", False, "<think></think>", ""),
    ("", False, "", ""),
])
def test_where_thoughts_end(text, inside, thoughts, answer):
    assert split([text], inside) == split(list(text), inside) == (thoughts, answer, text)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "think>", "</", " ", "\n", "a"]),
                max_size=8).map("".join),
       st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_the_split_does_not_depend_on_how_the_text_was_cut(text, cuts, inside):
    cuts = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    chunks = [text[a:b] for a, b in zip(cuts, cuts[1:])]
    assert split(chunks, inside) == split([text], inside) and split([text], inside)[2] == text


def spoken(capsys, pieces, *settings):
    voice = Voice(*settings)
    for piece in pieces:
        voice.say(Token(1, piece, -1.0))
    voice.end()
    return capsys.readouterr()


def test_thoughts_are_shown_or_hidden(capsys, monkeypatch):
    answer = ["<thi", "nk>hm</th", "ink>\n\nHel", "lo"]
    assert spoken(capsys, answer, "show") == ("".join(answer), "")
    assert spoken(capsys, answer, "hide") == ("Hello", "")
    assert spoken(capsys, ["hm</think>", "Hello"], "hide", Reasoning(True)) == ("Hello", "")
    assert spoken(capsys, answer[:2], "hide") == ("", "(the answer ended within its thoughts, which are "
                                                      "hidden)\n")
    monkeypatch.setattr("pybmc.cli.terminal.is_terminal", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _ = spoken(capsys, ["<think>hm</think>", "Hello"], "show")
    assert out == "\x1b[2m<think>\x1b[0m\x1b[2mhm</think>\x1b[0mHello"
