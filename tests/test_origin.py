"""Text that knows its origin: whatever is done to it, no character of a message counts as
the template's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybmc.chat.origin import Traced, conversions, own, own_of

OWN, FOREIGN = "<|>ab %s", "xyßİﬁŉ\u0345\n{}"           # no letter of one becomes a letter of the other
OWN_AFTER = set(OWN + OWN.upper())


def shown(text):
    """The characters, those that are not the template's own in brackets."""
    return "".join(c if mine else f"[{c}]" for c, mine in zip(str.__str__(text), own_of(text)))


MIX = own("<a>") + "xy" + own(" b")


@pytest.mark.parametrize("made, expected", [
    (MIX, "<a>[x][y] b"),
    ("x" + own("a"), "[x]a"),
    (own("a") + "x", "a[x]"),
    (2 * (own("a") + "x"), "a[x]a[x]"),
    (own("a") * -1, ""),
    (MIX[1:5], "a>[x][y]"),
    (MIX[::-1], "b [y][x]>a<"),
    (MIX[3], "[x]"),
    (own("").join(["x", own("a"), "y"]), "[x]a[y]"),
    (own("-").join(MIX), "<-a->-[x]-[y]- -b"),
    (own("|").join(MIX.split("a")), "<|>[x][y] b"),
    (own("|").join((own(" a  ") + "x y").split()), "a|[x]|[y]"),
    (own("|").join((own(" a  ") + "x y").rsplit(None, 1)), " a  [x]|[y]"),
    (own("|").join((own("a,b") + ",x").rsplit(",", 1)), "a,b|[x]"),
    (own("|").join((own("a\r\n") + "x\ny").splitlines()), "a|[x]|[y]"),
    (own("").join(MIX.partition("xy")), "<a>[x][y] b"),
    (own("").join(MIX.rpartition("none")), "<a>[x][y] b"),
    ((own(" <") + "x ").strip(), "<[x]"),
    ((own("ab") + "x").removeprefix("a"), "b[x]"),
    ((own("ab") + "x").removesuffix("x"), "ab"),
    (MIX.replace("xy", own("|")), "<a>| b"),
    (MIX.replace("a", "z"), "<[z]>[x][y] b"),
    (MIX.replace("", "z"), "[z][<][z][a][z][>][z][x][z][y][z][ ][z][b][z]"),
    (MIX.upper(), "<A>[X][Y] B"),
    ((own("a") + "ß" + own("b")).upper(), "A[S][S]B"),
    ((own("A") + "İ" + own("B")).lower(), "a[i][\u0307]b"),
    ((own("a") + "ßﬁ").swapcase(), "A[S][S][F][I]"),
    ((own("a ") + "ß").title(), "[A][ ][S][s]"),
    (own("<%s|%s>") % (own("a"), "x"), "<a|[x]>"),
    (own("<%(k)s> 100%%") % {"k": "x"}, "<[x]> 100%"),
    (own("%s") % MIX, "<a>[x][y] b"),
    (own("a%3d%s") % (7, None), "a[ ][ ][7][N][o][n][e]"),
    (own("a%*d") % (3, 7), "[a][ ][ ][7]"),
    (own("a").center(3), "[ ][a][ ]"),
    (str(own("a")), "a"),
    (Traced("a"), "[a]"),
])
def test_what_is_followed(made, expected):
    assert shown(made) == expected


def pieces(draw):
    return draw(st.one_of(st.text(OWN, max_size=6).map(own), st.text(FOREIGN, max_size=6)))


CHANGES = [
    lambda s, t: s + t, lambda s, t: t + s, lambda s, t: s * 2, lambda s, t: s[1:], lambda s, t: s[::-2],
    lambda s, t: s.strip(), lambda s, t: s.lstrip("<x"), lambda s, t: s.rstrip("a\n"), lambda s, t: s.upper(),
    lambda s, t: s.lower(), lambda s, t: s.title(), lambda s, t: s.capitalize(), lambda s, t: s.swapcase(),
    lambda s, t: s.casefold(), lambda s, t: s.replace(t[:1], t), lambda s, t: s.replace("a", t, 1),
    lambda s, t: t.join(s), lambda s, t: t.join(s.split()), lambda s, t: t.join(s.split(t[:1] or "a", 2)),
    lambda s, t: t.join(s.rsplit(None, 1)), lambda s, t: t.join(s.splitlines()),
    lambda s, t: t.join(s.splitlines(True)), lambda s, t: t.join(s.partition(t[-1:] or "x")),
    lambda s, t: t.join(s.rpartition("x")),
    lambda s, t: s.removeprefix(t[:2]), lambda s, t: s.removesuffix(t[:2]), lambda s, t: s.zfill(9),
    lambda s, t: (s.replace("%", "") + own("%s") if isinstance(s, Traced) else s.replace("%", "") + "%s")
    % (t,),
]


def plain_of(text):
    return str.__str__(text)


@given(st.data(), st.lists(st.sampled_from(CHANGES), max_size=6))
def test_no_sequence_of_operations_makes_foreign_text_own(data, changes):
    text = pieces(data.draw)
    expected = plain_of(text)
    for change in changes:
        other = pieces(data.draw)
        text = change(text, other)
        expected = change(expected, plain_of(other))
        assert plain_of(text) == expected and len(own_of(text)) == len(expected)
        assert {c for c, mine in zip(expected, own_of(text)) if mine} <= OWN_AFTER
        text, expected = text[:200], expected[:200]


def test_an_operation_that_is_not_known_is_followed_by_plain_text():
    text = own("<a>")
    for made in (text.center(9), text.expandtabs(), text.zfill(9), f"{text:4}", "".join([text, text]),
                 repr(text)):
        assert not any(own_of(made))


@pytest.mark.parametrize("format, widths", [
    ("**%s** 12345", [""]), ("%5d %-.3f %% %(a(b)c)12345s", ["5", "3", "", "12345"]), ("%*d", ["*"]),
    ("%.*f", ["*"]), ("%(((x)))99999d", ["99999"]), ("100%", [""]), ("%(open", [""]),
])
def test_conversions_of_a_format(format, widths):
    assert [one.width for one in conversions(format)] == widths
