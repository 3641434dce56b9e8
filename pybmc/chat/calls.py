"""Parsers of answers with calls of tools, one for each way in which models write them;
see tools.py for who writes which.

What looks like a call and is none, such as JSON without the name of a tool, is content.
"""

from __future__ import annotations

import json
import re
import secrets
import string as letters
from collections.abc import Callable, Mapping

from .events import CallArguments, CallBegin, Content, Event, Thought
from .feed import WHITE, Feed, Steps, space, until, value, word

CALL, FUNCTION, PARAMETER = "<tool_call>", "<function=", "<parameter="
FENCES = {"```json": "```", "```": "```", "<tools>": "</tools>"}    # what may stand around an object
BRACES = ("{", "{{")                    # the latter stand in a template of Qwen's, and then in answers
HARMONY_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
LITERALS = {"True": "true", "False": "false", "None": "null"}       # as some models write them
_ALPHABET = letters.ascii_letters + letters.digits


def new_id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))


class Calls:
    """Numbers the calls of an answer. tools: the parameters of each tool by its name. new_id: makes an id for
    a call. loose: an answer may begin with a call without its mark. first: a call is the first thing of an
    answer, or there is none."""

    def __init__(self, tools: Mapping[str, Mapping], new_id: Callable[[], str], loose: bool = True,
                 first: bool = False):
        self.tools, self.loose, self.first, self._new_id, self._n = tools, loose, first, new_id, 0

    def begin(self, name: str) -> CallBegin:
        self._n += 1
        return CallBegin(self._n - 1, self._new_id(), name)

    def piece(self, text: str) -> CallArguments:
        return CallArguments(self._n - 1, text)


# ---- in tags -----------------------------------------------------------------------------------------------


def tagged(feed: Feed, calls: Calls) -> Steps:
    """Hermes and Qwen: a JSON object in <tool_call>, or tags in tags.
    Some forget the tag at the beginning of an answer."""
    if calls.loose:
        yield from headed(feed, calls)
    if calls.first and not (yield from begins(feed, CALL)):
        return
    while True:
        before, mark = yield from until(feed, (CALL,), Content, trim=True)
        if not mark:
            return
        feed.begin()
        first = yield from after_space(feed, "{", FUNCTION)
        one = {"{": call_object, FUNCTION: call_tags}.get(first)
        if not one or not (yield from one(feed, calls)):
            yield Content(white_end(before) + mark + "".join(feed.taken))
            continue
        yield from after_space(feed, "</tool_call>")
        yield from space(feed)


def headed(feed: Feed, calls: Calls) -> Steps:
    """Objects that name a tool at the beginning of a text, as they are, in a fence of Markdown or in <tools>.
    Takes nothing else. Returns whether there are any."""
    found = False
    while True:
        feed.begin()
        if found:
            yield from after_space(feed, ";", ",")
        mark = yield from after_space(feed, *BRACES, *FENCES)
        brace = (yield from after_space(feed, *BRACES)) if mark in FENCES else mark
        if not brace or not (yield from call_object(feed, calls, bare=True)):
            feed.text = "".join(feed.taken) + feed.text
            if found:
                yield from space(feed)
            return found
        found = True
        if brace == "{{":
            yield from after_space(feed, "}")
        if mark in FENCES:
            yield from after_space(feed, FENCES[mark])


def begins(feed: Feed, mark: str) -> Steps:
    """Whether a text begins with a mark, behind white space. Takes nothing."""
    feed.begin()
    found = yield from after_space(feed, mark)
    feed.text = "".join(feed.taken) + feed.text
    return bool(found)


def white_end(text: str) -> str:
    """The white space at the end of a text."""
    return text[len(text.rstrip(WHITE)):]


def after_space(feed: Feed, *words: str) -> Steps:
    """The word behind white space, "" for another one."""
    yield from space(feed)
    return (yield from word(feed, *words))


def call_object(feed: Feed, calls: Calls, bare: bool = False) -> Steps:
    """{"name": .., "arguments": {..}}, from behind its brace. bare: it is a call only where it is written
    just so. Returns whether it was one."""
    name, begun, held = "", False, ""
    while (char := (yield from after_space(feed, ",", "}"))) != "}":
        if char == ",":
            continue
        written = (yield from value(feed)) if feed.text[:1] == '"' else ""
        key = string(written)
        if key is None or bare and not name and written != '"name"' \
                or (yield from after_space(feed, ":")) != ":":
            return begun
        yield from space(feed)
        if key == "name" and not name:
            written = yield from value(feed)
            name = string(written) or ""
            if name not in calls.tools or bare and written != f'"{name}"':
                return False
        elif key in ("arguments", "parameters") and name and not begun:
            begun = True
            yield calls.begin(name)
            yield from arguments(feed, calls)
        elif key in ("arguments", "parameters") and not begun:
            held = yield from arguments(feed, None)
        else:
            yield from value(feed)
    if not begun and name and (held or not bare):
        yield calls.begin(name)
        yield calls.piece(held or "{}")
        return True
    return begun


def arguments(feed: Feed, calls: Calls | None) -> Steps:
    """The arguments, an object or a text that holds one; with calls their pieces are yielded."""
    if feed.text[:1] == '"':
        found = string((yield from value(feed))) or ""
        if calls:
            yield from pieces(calls, found)
        return found
    return (yield from value(feed, calls.piece if calls else None))


def pieces(calls: Calls, text: str) -> Steps:
    if text:
        yield calls.piece(text)


def string(text: str) -> str | None:
    """The text that a JSON string means; None for another value, or a part of one."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def call_tags(feed: Feed, calls: Calls) -> Steps:
    """NAME><parameter=..>..</parameter>..</function>, as Qwen's coders write.
    Returns whether it was a call."""
    name, _ = yield from until(feed, (">",))
    if name not in calls.tools:
        return False
    yield calls.begin(name)
    before, mark = "{", PARAMETER
    while (mark := (yield from after_space(feed, PARAMETER, "</function>"))) == PARAMETER:
        key, end = yield from until(feed, (">",))
        if end:
            yield from word(feed, "\n")
            yield calls.piece(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            yield from parameter(feed, calls, is_raw(property_of(calls.tools[name], key)))
            before = ", "
    if mark or not feed.ended:
        yield calls.piece("{}" if before == "{" else "}")
    return True


def parameter(feed: Feed, calls: Calls, raw: bool) -> Steps:
    """A value in tags, as JSON. raw: all of it is the text of a string."""
    ends = ("\n</parameter>", "</parameter>")
    if raw:
        yield calls.piece('"')
        _, end = yield from until(feed, ends,
                                  lambda text: calls.piece(json.dumps(text, ensure_ascii=False)[1:-1]))
        yield from pieces(calls, '"' * bool(end))
        return
    text, end = yield from until(feed, ends)
    if end:
        yield calls.piece(as_json(text.strip()))


def as_json(text: str) -> str:
    text = LITERALS.get(text, text)
    try:
        json.loads(text)
        return text
    except ValueError:
        return json.dumps(text, ensure_ascii=False)


def property_of(parameters: Mapping, name: str) -> Mapping:
    """The schema of a parameter; {} where there is none."""
    properties = parameters.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def is_raw(schema: Mapping) -> bool:
    """Whether a value is a string that is written in tags as it is:
    any one, or one of some without ends of lines."""
    known = {"type", "title", "description", "default", "examples", "enum", "const"}
    if schema.get("type") != "string" or schema.keys() - known:
        return False
    return schema.keys().isdisjoint({"enum", "const"}) or bool(named(schema))


def named(schema: Mapping) -> list[str]:
    """The strings that a schema names one by one; none where it names others too."""
    if "enum" in schema and "const" in schema:
        return []
    found = schema.get("enum", [schema.get("const")])
    fits = isinstance(found, list) \
        and all(isinstance(text, str) and text and not set(text) & set("\n<") for text in found)
    return found if fits else []


# ---- without tags ------------------------------------------------------------------------------------------


def bare(feed: Feed, calls: Calls) -> Steps:
    """Llama 3 and plain JSON: the answer is an object, or <|python_tag|> stands before it."""
    if not (yield from headed(feed, calls)) and not calls.first:
        _, mark = yield from until(feed, ("<|python_tag|>",), Content, trim=True)
        if mark:
            yield from headed(feed, calls)


def mistral(feed: Feed, calls: Calls) -> Steps:
    """[TOOL_CALLS][{..}, ..] or [TOOL_CALLS]name[ARGS]{..}[TOOL_CALLS].."""
    if calls.first and not (yield from begins(feed, "[TOOL_CALLS]")):
        return
    while True:
        before, mark = yield from until(feed, ("[TOOL_CALLS]",), Content, trim=True)
        if not mark:
            return
        feed.begin()
        listed = yield from after_space(feed, "[")
        if not (yield from (call_list if listed else named_call)(feed, calls)):
            yield Content(white_end(before) + mark + "".join(feed.taken))
            continue
        yield from space(feed)


def call_list(feed: Feed, calls: Calls) -> Steps:
    found = False
    while (mark := (yield from after_space(feed, "{", ",", "]"))) in ("{", ","):
        if mark == "{":
            if not (yield from call_object(feed, calls)):
                return found
            found = True
    return found


def named_call(feed: Feed, calls: Calls) -> Steps:
    name, mark = yield from until(feed, ("[CALL_ID]", "[ARGS]", "{"))
    if mark == "[CALL_ID]":
        _, mark = yield from until(feed, ("[ARGS]", "{"))
    if not mark or name.strip() not in calls.tools:
        return False
    if mark == "{":
        feed.text = mark + feed.text
    yield calls.begin(name.strip())
    yield from space(feed)
    yield from value(feed, calls.piece)
    return True


# ---- in channels -------------------------------------------------------------------------------------------


def harmony(feed: Feed, calls: Calls) -> Steps:
    """gpt-oss: messages in channels, <|channel|>NAME<|message|>..<|end|>; those to a function are calls."""
    told: set[type] = set()
    while True:
        feed.begin()
        first = yield from after_space(feed, "<|start|>", "<|channel|>", "<|message|>", "to=")
        if not first:
            yield from kept(feed)
            return
        header, mark = first, first
        if first != "<|message|>":
            rest, mark = yield from until(feed, ("<|message|>",))
            header += rest
        if mark:
            yield from message(feed, calls, header, told)


def kept(feed: Feed) -> Steps:
    text = "".join(feed.taken)
    if text and feed.text:
        yield Content(text)


def message(feed: Feed, calls: Calls, header: str, told: set[type]) -> Steps:
    channel = re.search(r"<\|channel\|>\s*(\w+)", header)
    to = re.search(r"to=(?:functions\.)?([^\s<]+)", header)
    make: Callable[[str], Event] = Thought if channel and channel[1] == "analysis" and not to else Content
    if to and to[1] in calls.tools:
        make = calls.piece
        yield calls.begin(to[1])
        yield from space(feed)
    elif make in told:
        yield make("\n\n")
    if isinstance(make, type):
        told.add(make)
    _, mark = yield from until(feed, HARMONY_ENDS, make, trim=make == calls.piece)
    if mark in ("<|start|>", "<|channel|>"):
        feed.text = mark + feed.text

