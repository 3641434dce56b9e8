"""Grammars of calls: what an answer follows so that a call's arguments fit the schema of its tool.
Lark, as llguidance reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from ..grammar.grammar import narrowed
from ..tokenizers import Tokenizer
from .calls import HARMONY_ENDS, is_raw, named
from .tools import Format, Tool, Tools

# A model writes arguments as chat templates show them to it: with a space behind commas and colons.
JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
COMPACT = {"whitespace_flexible": False}
SIMPLE = {"type", "properties", "required", "additionalProperties", "title", "description", "$defs",
          "definitions", "$schema"}
ANY = "(?s:.*)"
WHITE_SPACE = r"[ \t\r\n]"
SPACE = WHITE_SPACE + "{0,20}"           # in more of it models lose themselves


class Rules:
    """Rules of a grammar, one a line. final: the rule of an answer that is no call, where it has to follow
    a schema. apart: calls are written in the same pieces as such an answer, so that both are possible as
    long as they begin alike."""

    def __init__(self, tokenizer: Tokenizer, tools: Tools, final: Mapping | None = None):
        self.tokenizer, self.tools = tokenizer, tools
        self.lines: list[str] = []
        self.apart = False
        self.final = "" if final is None or tools.forced else self.json(final, form=COMPACT)

    @property
    def whole(self) -> bool:
        """Whether the grammar is that of the whole answer."""
        return self.tools.forced or bool(self.final)

    def add(self, name: str, body: str) -> str:
        self.lines.append(f"{name}: {body}")
        return name

    def new(self, body: str, kind: str = "r") -> str:
        return self.add(f"{kind}{len(self.lines)}", body)

    def mark(self, text: str) -> str:
        """A token that is no text, or the text itself where the vocabulary has no such token."""
        id = self.tokenizer.vocab.ids.get(text)
        return quoted(text) if id is None or id not in self.tokenizer.vocab.silent else f"<[{id}]>"

    def json(self, schema: Mapping, strict: bool = False, form: Mapping = JSON) -> str:
        options = {**(COMPACT if self.apart else form), "lenient": not strict}
        return self.new("%json " + json.dumps({**narrowed(schema), "x-guidance": options}))

    def arguments(self, tool: Tool) -> str:
        return self.json(tool.parameters, tool.strict)

    def any_of(self, bodies) -> str:
        return self.new(" | ".join(bodies))

    def objects(self, key: str) -> str:
        """{"name": .., key: {..}} of each tool."""
        return self.any_of(f'{self.head(tool.name, key)} {self.arguments(tool)} "}}"'
                           for tool in self.tools.callable)

    def head(self, name: str, key: str) -> str:
        """The beginning of an object, in one piece; beside an answer that is JSON as well,
        in the pieces of that."""
        if not self.apart:
            return quoted(object_head(name, key))
        return " ".join(map(quoted, ("{", '"name"', ":", f'"{name}"', ",", f'"{key}"', ":")))


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def pattern(text: str) -> str:
    """A text as a regular expression in Lark."""
    return re.escape(text).replace("/", r"\/")


def object_head(name: str, key: str) -> str:
    return f'{{"name": "{name}", "{key}": '


def grammar_text(row: Format, tools: Tools, tokenizer: Tokenizer, final: Mapping | None = None) -> str:
    """The grammar of an answer; where a call may but need not come, that of what follows the format's mark,
    if it has one. final: the schema of an answer without a call."""
    rules = Rules(tokenizer, tools, final)
    start = KINDS[row.kind](rules, row.parallel and tools.parallel)
    return "\n".join(["start: " + start, *rules.lines, ""])


def marked(rules: Rules, mark: str, body: str, between: str = "", several: bool = False) -> str:
    """Calls that each begin with a mark, without that of the first one where the answer is free up to it."""
    more = f"({between} {rules.mark(mark)} {body})*" if several else ""
    if not rules.whole:
        return f"{body} {more}"
    return f"{rules.mark(mark)} {body} {more}" + f" | {rules.final}" * bool(rules.final)


def object_rules(rules: Rules, several: bool) -> str:
    mark = rules.mark("<tool_call>")
    body = rules.new(f'"\\n" {rules.objects("arguments")} "\\n" {rules.mark("</tool_call>")}')
    if rules.whole:
        return marked(rules, "<tool_call>", body, '"\\n"', several)
    more = f'("\\n" {mark} {body})*' if several else ""
    return headed(rules, "arguments", several, "<tool_call>", f"{body} {more}")


def tags_rules(rules: Rules, several: bool) -> str:
    inner = rules.any_of(_tags(rules, tool) for tool in rules.tools.callable)
    return marked(rules, "<tool_call>", rules.new(f'"\\n" {inner} "\\n" {rules.mark("</tool_call>")}'),
                  '"\\n"', several)


def _tags(rules: Rules, tool: Tool) -> str:
    """<function=..> with a tag for each parameter, in the schema's order;
    JSON where a schema does not name them."""
    schema, properties = tool.parameters, tool.parameters.get("properties", {})
    simple = schema.keys() <= SIMPLE and not isinstance(schema.get("additionalProperties"), Mapping)
    fits = isinstance(properties, Mapping) and all(
        isinstance(value, Mapping) and key and not set(key) & set("<>\n")
        for key, value in properties.items())
    required = schema.get("required", [])
    if not simple or not fits or not properties.keys() >= set(required):
        return f'{quoted(object_head(tool.name, "arguments"))} {rules.arguments(tool)} "}}"'
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts = []
    for key, given in properties.items():
        value = _value(rules, given if is_raw(given) else {**shared, **given}, tool.strict)
        part = f'{quoted(f"<parameter={key}>" + chr(10))} {value} "\\n"'
        parts.append(part if key in required else f"({part})?")
    return " ".join([quoted(f"<function={tool.name}>\n"), *parts, '"</function>"'])


def _value(rules: Rules, schema: Mapping, strict: bool) -> str:
    if not is_raw(schema):
        return rules.json(schema, strict) + ' "\\n</parameter>"'
    known = named(schema)
    if known:
        return rules.any_of(quoted(text) for text in known) + ' "\\n</parameter>"'
    name = f"raw{len(rules.lines)}"
    rules.add(name + "[lazy]", rf"/{ANY}<\/parameter>/")
    return name


def named_rules(rules: Rules, several: bool) -> str:
    args = rules.mark("[ARGS]")
    rules.add("ID", "/[A-Za-z0-9]{9}/")
    id = f"({rules.mark('[CALL_ID]')} ID)? " * ("[CALL_ID]" in rules.tokenizer.vocab.ids)
    body = rules.any_of(f"{quoted(tool.name)} {id}{args} {rules.arguments(tool)}"
                        for tool in rules.tools.callable)
    return marked(rules, "[TOOL_CALLS]", body, several=several)


def list_rules(rules: Rules, several: bool) -> str:
    one = rules.objects("arguments")
    more = f'(", " {one})*' if several else ""
    return marked(rules, "[TOOL_CALLS]", rules.new(f'"[" {one} {more} "]"'))


def bare_rules(key: str) -> Callable[[Rules, bool], str]:
    """An object is the whole answer; text that does not begin like one is free."""
    def made(rules: Rules, several: bool) -> str:
        if rules.whole:
            rules.apart = bool(rules.final)
            one = rules.objects(key)
            return one + f' ("\\n" {one})*' * several + f" | {rules.final}" * bool(rules.final)
        one = rules.objects(key)
        return headed(rules, key, several, "<|python_tag|>", one + f' ("\\n" {one})*' * several)
    return made


def headed(rules: Rules, key: str, several: bool, mark: str, behind: str) -> str:
    """An answer that is free text, or an object at its beginning, as models write it on their own, or text
    that ends with calls behind a mark."""
    heads = []
    for tool in rules.tools.callable:
        head = rules.new("/" + head_pattern(f'{pattern(tool.name)}"@,@"{key}"@:@', SPACE) + "/", "HEAD")
        heads.append(f"{head} {rules.arguments(tool)} TAIL")
    names = "|".join(pattern(tool.name) for tool in rules.tools.tools)
    headless = "~/" + head_pattern(f'({names})"', WHITE_SPACE + "*") + ANY + "/"
    rules.add("TAIL", "/" + r"@\}\}?@(<\/tools>|```)?".replace("@", SPACE) + "/")
    rules.add("OTHER", f"/{ANY}/ & {headless} & {without(mark)}")
    one = rules.any_of(heads)
    rules.add("calls", f"{one} ({one})*" if several else one)
    token = rules.mark(mark)
    if token.startswith("<["):
        return rules.new(f"OTHER | calls | OTHER? {token} {behind}")
    rules.add("free[lazy]", f"/{ANY}{pattern(mark)}/ & {headless}")
    return rules.new(f"OTHER | calls | free {behind}")


def head_pattern(behind: str, space: str) -> str:
    """How an object that names a tool begins, up to the name and what stands behind; @ is white space."""
    return (r'@(<tools>@|```(json)?@)?\{\{?@"name"@:@"' + behind).replace("@", space)


def without(*marks: str) -> str:
    """Any text without some marks, which readers would take for tokens."""
    return f"~/{ANY}({'|'.join(map(pattern, marks))}){ANY}/"


def harmony_rules(rules: Rules, _: bool) -> str:
    """Thoughts and preambles in their channels, then the final message or a call."""
    channel, message, end, start, constrain = (
        rules.mark(f"<|{name}|>") for name in ("channel", "message", "end", "start", "constrain"))
    rules.add("TEXT", f"/{ANY}/ & {without(*HARMONY_ENDS, '<|message|>')}")
    calls = []
    for tool in rules.tools.callable:
        to = f" to=functions.{tool.name}"
        header = f'({channel} {quoted("commentary" + to)} | {quoted(to)} {channel} "commentary")'
        calls.append(f'{header} (" " {constrain} "json" | " json")? {message} {rules.arguments(tool)}')
    call = rules.any_of(calls)
    free = f'({channel} ("analysis" | "commentary") {message} TEXT {end} {start} "assistant")*'
    final = "" if rules.tools.forced else f' | {channel} "final" {message} {rules.final or "TEXT"}'
    return f"{free} ({call}{final})"


KINDS: dict[str, Callable[[Rules, bool], str]] = {
    "object": object_rules, "tags": tags_rules, "named": named_rules, "list": list_rules,
    "llama": bare_rules("parameters"), "bare": bare_rules("arguments"), "harmony": harmony_rules,
}
