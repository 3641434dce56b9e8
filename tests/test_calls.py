"""Parsers of calls: what they find in whole texts, and the same in texts that come in pieces."""

import json
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybmc.chat.calls import Calls, bare, harmony, mistral, tagged
from pybmc.chat.events import CallArguments, CallBegin, Content, Thought
from pybmc.chat.feed import Parser

TOOLS = {"get": {"properties": {"city": {"type": "string"}, "n": {"type": "integer"},
                                "kind": {"type": ["string", "null"]}}}, "add": {}}
GET = '{"name": "get", "arguments": {"city": "Paris }]", "n": 2}}'
ARGUMENTS = {"city": "Paris }]", "n": 2}
TAGS = "<function=get>\n<parameter=city>\nParis }]\n</parameter>\n<parameter=n>\n2\n</parameter>\n</function>"


def read(parse, pieces):
    """The events of a text, neighbours of one kind joined;
    what is cut within a piece of arguments as well."""
    numbers = count()
    calls = Calls(TOOLS, lambda: f"id{next(numbers)}")
    parser = Parser(lambda feed: parse(feed, calls))
    found = []
    for event in [e for piece in pieces for e in parser.push(piece)] + parser.flush():
        before = found[-1] if found else None
        if (type(before) is type(event) and not isinstance(event, CallBegin)
                and getattr(before, "index", 0) == getattr(event, "index", 0)):
            found[-1] = type(event)(**(vars(before) | {"text": before.text + event.text}))
        else:
            found.append(event)
    return found


def shown(events):
    """Texts, and calls as (name, arguments)."""
    found = []
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == sum(isinstance(one, tuple) for one in found)
            assert event.id == f"id{event.index}"
            found.append((event.name, ""))
        elif isinstance(event, CallArguments):
            name, text = found.pop()
            found.append((name, text + event.text))
        else:
            found.append(event.text if isinstance(event, Content) else Thought(event.text))
    return [(one[0], json.loads(one[1])) if isinstance(one, tuple) else one for one in found]


CASES = [
    (tagged, "Hello\n", ["Hello\n"]),
    (tagged, f"<tool_call>\n{GET}\n</tool_call>", [("get", ARGUMENTS)]),
    (tagged, f"So:\n\n<tool_call>\n{GET}\n</tool_call>\n<tool_call>{GET}</tool_call>\n",
     ["So:", ("get", ARGUMENTS), ("get", ARGUMENTS)]),
    (tagged, f"<tool_call>{GET}</tool_call>\nDone.", [("get", ARGUMENTS), "Done."]),
    (tagged, '<tool_call>{"arguments": {"n": 1}, "id": [1, {"a": "}"}], "name": "add"}</tool_call>',
     [("add", {"n": 1})]),
    (tagged, '<tool_call>{"name": "add"}</tool_call>', [("add", {})]),
    (tagged, r'<tool_call>{"name": "add", "arguments": "{\"n\": \"\\\"\"}"}</tool_call>',
     [("add", {"n": '"'})]),
    (tagged, '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
     ['<tool_call>{"name": "other", "arguments": {}}</tool_call>']),
    (tagged, "a <tool_call> b", ["a <tool_call> b"]),
    (tagged, '<tool_call>\n{"na', ['<tool_call>\n{"na']),
    (tagged, f"<tool_call>\n{TAGS}\n</tool_call>", [("get", ARGUMENTS)]),
    (tagged, f"I do.\n<tool_call>\n{TAGS}\n</tool_call>\n<tool_call>\n<function=add>\n</function>\n"
             "</tool_call>", ["I do.", ("get", ARGUMENTS), ("add", {})]),
    (tagged, "<tool_call><function=get><parameter=city>\n"
             "\na \"\\ é\n\n</parameter><parameter=n>True</parameter></function></tool_call>",
     [("get", {"city": "\na \"\\ é\n", "n": True})]),
    (tagged, "<tool_call><function=get><parameter=kind>\nnull\n</parameter>\n<parameter=x>\nplain\n"
             "</parameter></function></tool_call>", [("get", {"kind": None, "x": "plain"})]),
    (tagged, f"```json\n{GET}\n```\n", [("get", ARGUMENTS)]),
    (tagged, f" <tools>{GET}</tools> and", [("get", ARGUMENTS), "and"]),
    (tagged, f"```json\n{GET}\n```\n<tool_call>{GET}</tool_call>", [("get", ARGUMENTS), ("get", ARGUMENTS)]),
    (tagged, '```json\n{"name": "other"}\n```', ['```json\n{"name": "other"}\n```']),
    (tagged, "```\ncode\n```", ["```\ncode\n```"]),
    (tagged, '{"arguments": {}, "name": "add"}', ['{"arguments": {}, "name": "add"}']),
    (tagged, r'{"n\u0061me": "add", "arguments": {}}', [r'{"n\u0061me": "add", "arguments": {}}']),
    (tagged, '{{"name": "add", "arguments": {}}}', [("add", {})]),
    (bare, '{"name": "add", "age": 3}', ['{"name": "add", "age": 3}']),
    (tagged, "<tool_call>\n<function=other>\n</function>", ["<tool_call>\n<function=other>\n</function>"]),
    (bare, '{"name": "get", "parameters": {"n": 2}}', [("get", {"n": 2})]),
    (bare, ' {"name": "add", "parameters": {}}; {"name": "get", "parameters": {"n": 2}}\n',
     [("add", {}), ("get", {"n": 2})]),
    (bare, '<|python_tag|>{"name": "add", "parameters": {}}', [("add", {})]),
    (bare, 'Wait.\n<|python_tag|>{"name": "add", "parameters": {}}', ["Wait.", ("add", {})]),
    (bare, '{"name": "Bob", "age": 3}', ['{"name": "Bob", "age": 3}']),
    (bare, '  {"a": 1}, and more', ['  {"a": 1}, and more']),
    (bare, " hello {x}\n", [" hello {x}\n"]),
    (bare, "<|python_tag|>print(1)", ["print(1)"]),
    (mistral, f"[TOOL_CALLS] [{GET}, {GET}]", [("get", ARGUMENTS), ("get", ARGUMENTS)]),
    (mistral, f'Sure.[TOOL_CALLS]get[ARGS]{json.dumps(ARGUMENTS)}[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS]{{}}',
     ["Sure.", ("get", ARGUMENTS), ("add", {})]),
    (mistral, 'x[TOOL_CALLS]get{"n": 2}', ["x", ("get", {"n": 2})]),
    (mistral, "[TOOL_CALLS]nothing", ["[TOOL_CALLS]nothing"]),
    (mistral, "just text [TOOL", ["just text [TOOL"]),
    (harmony, "<|channel|>analysis<|message|>Hm so<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
     [Thought("Hm so"), "Yes."]),
    (harmony, "<|channel|>analysis<|message|>a<|end|>"
              "<|start|>assistant<|channel|>commentary to=functions.get <|constrain|>json"
              f"<|message|>{json.dumps(ARGUMENTS)}<|call|>", [Thought("a"), ("get", ARGUMENTS)]),
    (harmony, ' to=functions.add<|channel|>commentary json<|message|>{"n": 1}', [("add", {"n": 1})]),
    (harmony, "<|channel|>commentary<|message|>First.<|end|>"
              "<|start|>assistant<|channel|>final<|message|>Then.",
     ["First.\n\nThen."]),
    (harmony, "<|channel|>commentary to=functions.other<|message|>{}", ["{}"]),
    (harmony, "plain text", ["plain text"]),
    (harmony, "<|channel|>final<|message|>in channel<|channel|>analysis<|message|>x",
     ["in channel", Thought("x")]),
]


@pytest.mark.parametrize("parse, text, expected", CASES, ids=range(len(CASES)))
def test_what_is_found(parse, text, expected):
    assert shown(read(parse, [text])) == expected


@pytest.mark.parametrize("parse, text, expected", CASES, ids=range(len(CASES)))
def test_events_do_not_depend_on_where_a_text_is_cut(parse, text, expected):
    whole = read(parse, [text])
    assert read(parse, list(text)) == whole
    for at in range(len(text)):
        assert read(parse, [text[:at], text[at:]]) == whole


PARTS = ["<tool_call>", "</tool_call>", "<function=get>", "<function=", "</function>", "<parameter=city>",
         "</parameter>", "get", "add", '{"name": "get", "arguments": ', '{"name": "add", "parameters": {}}',
         "{", "}", "[", "]", ",", ":", '"', "\\", "\n", " ", "1", "x", "[TOOL_CALLS]",
         "[ARGS]", "<|python_tag|>", "<|channel|>", "analysis", " to=functions.get", "<|message|>", "<|end|>",
         "<|start|>"]


@given(st.sampled_from([tagged, bare, mistral, harmony]),
       st.lists(st.sampled_from(PARTS), max_size=14).map("".join), st.lists(st.integers(0, 99), max_size=6))
def test_any_text_is_read_the_same_in_pieces(parse, text, cuts):
    cuts = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    whole = read(parse, [text])
    assert read(parse, [text[a:b] for a, b in zip(cuts, cuts[1:])]) == read(parse, list(text)) == whole
