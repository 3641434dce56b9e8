"""Tools that a model may call: what a request offers, and how models write calls, a row a format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .. import checks
from ..errors import ArgumentError
from .calls import CALL, FUNCTION, bare, harmony, mistral, tagged

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
MOST = 512                              # tools of a request
OPENED = {"additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf",
          "oneOf"}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. given: as it was offered; parameters: the JSON schema of its
    arguments; place: the field that the schema comes from."""

    name: str
    parameters: Mapping
    given: Mapping
    strict: bool = False
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Tools:
    """What a request offers. choice: "auto", "required", or the name of the one to call.
    parallel: several calls in an answer."""

    tools: tuple[Tool, ...]
    choice: str = "auto"
    parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that the choice leaves."""
        if self.choice in ("auto", "required"):
            return self.tools
        return tuple(tool for tool in self.tools if tool.name == self.choice)

    @property
    def forced(self) -> bool:
        return self.choice != "auto"


def tools_of(tools: Sequence | None, choice: object = None, parallel: bool = True,
             functions: Sequence | None = None, function_call: object = None) -> Tools | None:
    """The tools of a chat in OpenAI's words, also in the older ones; None where no tool may be called."""
    if tools and functions:
        raise ArgumentError("tools and functions: expected one of them, found both")
    where = "functions" if functions else "tools"
    older = choice is None and function_call is not None
    given = functions or tools or []
    if not isinstance(given, (list, tuple)) or len(given) > MOST:
        checks.refuse(where, f"a list of at most {MOST} tools", given)
    if functions:
        given = [{"type": "function", "function": function} for function in given]
    found = tuple(tool_of(tool, f"{where}[{i}]") for i, tool in enumerate(given))
    wanted, named = (function_call, "function_call") if older else (choice, "tool_choice")
    return offered(found, wanted, parallel and not functions, where, named)


def offered(found: tuple[Tool, ...], choice: object, parallel: bool, where: str = "tools",
            choice_name: str = "tool_choice") -> Tools | None:
    """Some tools and the choice among them; None where none may be called."""
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ArgumentError(f"{where}: {twice} is there twice; expected each name once")
    asked = choice_of(choice, names, choice_name)
    return Tools(found, asked, parallel) if found and asked != "none" else None


def tool_of(given: object, where: str) -> Tool:
    function = None
    if isinstance(given, Mapping) and given.get("type", "function") == "function":
        function = given.get("function")
    if not isinstance(function, Mapping):
        checks.refuse(where, "an object with the type function and a function", given)
    return function_tool(function, f"{where}.function")


def function_tool(function: Mapping, where: str, schema: str = "parameters") -> Tool:
    """The tool that a function is. schema: the name of the field with the schema of its arguments."""
    name, parameters = function.get("name"), function.get(schema)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        checks.refuse(f"{where}.name", "1 to 128 letters, digits and signs of _.:/-", name)
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        checks.refuse(f"{where}.{schema}", "a JSON schema of an object", parameters)
    if not isinstance(parameters.get("properties") or {}, Mapping):
        checks.refuse(f"{where}.{schema}.properties", "an object", parameters["properties"])
    required = parameters.get("required") or []
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        checks.refuse(f"{where}.{schema}.required", "a list of names", required)
    if not isinstance(function.get("description") or "", str):
        checks.refuse(f"{where}.description", "a text", function["description"])
    shown = {"name": name, "description": function.get("description") or "", "parameters": parameters}
    offer = {"type": "function", "function": shown}
    return Tool(name, closed(parameters), offer, function.get("strict") is True, f"{where}.{schema}")


def closed(parameters: Mapping) -> Mapping:
    """A schema of arguments in which an object has only the properties that it names,
    unless it says otherwise."""
    opened = parameters.keys() & OPENED
    opened |= {key for key in parameters.get("required") or ()
               if key not in (parameters.get("properties") or ())}
    if opened or "properties" not in parameters and parameters.keys() - {"type", "title", "description"}:
        return {"type": "object", **parameters}
    return {"type": "object", "properties": {}, **parameters, "additionalProperties": False}


def choice_of(choice: object, names: Sequence[str], where: str) -> str:
    """"none", "auto", "required", or a tool's name. Among none, nothing can be required."""
    named = choice
    if isinstance(choice, Mapping):
        inner = choice.get("function") if choice.get("type") == "function" or "function" in choice else choice
        named = inner.get("name") if isinstance(inner, Mapping) else None
        if named not in names:
            known = ", ".join(names) or "the tools, of which there are none"
            raise ArgumentError(f"{where}: expected one of {known}, found {checks.shown(named)}")
    elif choice is None:
        named = "auto"
    elif choice == "any":
        named = "required"
    if not isinstance(named, str) \
            or not isinstance(choice, Mapping) and named not in ("none", "auto", "required"):
        checks.refuse(where, "none, auto, required, or an object with the name of a function", choice)
    if named == "required" and not names:
        raise ArgumentError(f"{where}: required, but there are no tools to call")
    return named


# ---- how models write calls --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A way of writing calls. signs: texts of a chat template that tell it, one of each group;
    others: texts that tell another.

    parse: the parser of calls.py. kind: how its grammar is made (toolgrammar.py). mark: the text with which
    each call begins; "" where a grammar of the whole answer tells. shown: names of control tokens that only
    calls need. parallel: an answer may have several calls. prompts: the template shows tools by itself.
    history: earlier messages as the template takes them.
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    parse: Callable
    kind: str
    mark: str = ""
    others: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    parallel: bool = True
    prompts: bool = True
    history: Callable[[list[dict]], list[dict]] = list

    def tells(self, template: str) -> bool:
        found = all(any(sign in template for sign in group) for group in self.signs)
        return found and not any(sign in template for sign in self.others)


def with_calls(messages: Sequence[Mapping]) -> list[dict]:
    """Messages as templates know them: arguments of calls as objects, and no older names of the same."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ArgumentError(f"message {i}: expected a mapping with a role, got {message!r:.100}")
    return [_with_calls(dict(message), f"messages[{i}]") for i, message in enumerate(messages)]


def _with_calls(message: dict, where: str) -> dict:
    _check_id(message.get("tool_call_id"), f"{where}.tool_call_id")
    given = message.pop("tool_calls", None) or []
    old = message.pop("function_call", None)
    given = [{"type": "function", "function": old}] if old and not given else given
    if not isinstance(given, (list, tuple)):
        checks.refuse(f"{where}.tool_calls", "a list of calls", given)
    calls = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(given)]
    if message.get("role") == "function":
        message["role"] = "tool"
    thought = message.get("reasoning_content") or message.get("thinking")
    if thought:
        message |= {"reasoning_content": thought, "thinking": thought}
    return message | ({"tool_calls": calls} if calls else {})


def _call(call: object, where: str) -> dict:
    """An earlier call of a tool; arguments that are a JSON object become one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) \
            or not isinstance(function.get("name"), str):
        checks.refuse(where, "a call of a function with a name", call)
    _check_id(call.get("id"), f"{where}.id")
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) and arguments else arguments
    except (ValueError, RecursionError):
        parsed = arguments
    return {**call, "type": "function",
            "function": {**function, "arguments": {} if parsed in (None, "") else parsed}}


def _check_id(id: object, where: str) -> None:
    if not isinstance(id, (str, int, type(None))):
        checks.refuse(where, "a text", id)


def one_by_one(messages: list[dict]) -> list[dict]:
    """Each message with one call at most, and its result behind it, for templates that take no more."""
    found: list[dict] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            found.append(message)
            continue
        results = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for i, call in enumerate(calls):
            first = message if i == 0 else {"role": message["role"], "content": ""}
            found.append(first | {"tool_calls": [call]})
            its = next((r for r in results if r.get("tool_call_id") == call.get("id")),
                       results[0] if results else None)
            if its is not None:
                results.remove(its)
                found.append(its)
        found += results
    return found


def short_ids(messages: list[dict]) -> list[dict]:
    """Ids of calls as Mistral's templates want them: nine letters and digits."""
    def short(id: object) -> str:
        text = str(id)
        fits = re.fullmatch(r"[A-Za-z0-9]{9}", text)
        return text if fits else hashlib.sha256(text.encode()).hexdigest()[:9]

    def changed(message: dict) -> dict:
        calls = [call | {"id": short(call.get("id"))} for call in message.get("tool_calls") or ()]
        id = {"tool_call_id": short(message["tool_call_id"])} if "tool_call_id" in message else {}
        return message | ({"tool_calls": calls} if calls else {}) | id

    return [changed(message) for message in messages]


def as_texts(messages: list[dict]) -> list[dict]:
    """Calls and results as plain messages, for templates that know of none."""
    found: list[dict] = []
    names: dict[object, str] = {}       # of functions, by ids of calls
    for message in messages:
        calls = message.get("tool_calls") or []
        names |= {call.get("id"): call["function"]["name"] for call in calls}
        if calls:
            lines = [json.dumps({name: call["function"][name] for name in ("name", "arguments")},
                                ensure_ascii=False)
                     for call in calls]
            rest = {name: value for name, value in message.items() if name not in ("tool_calls", "content")}
            texts = [text_of(message.get("content")), *lines]
            found.append(rest | {"content": "\n".join(filter(None, texts))})
        elif message["role"] in ("tool", "function"):
            name = message.get("name") or message.get("tool_name") \
                or names.get(message.get("tool_call_id"), "the tool")
            found.append({"role": "user", "content": f"Result of {name}:\n{text_of(message.get('content'))}"})
        else:
            found.append(message)
    return found


def text_of(content: object) -> str:
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    return "".join(str(part.get("text", "")) for part in parts)


FORMATS = (
    Format("harmony", (("<|channel|>",), ("<|message|>",)), harmony, "harmony", parallel=False,
           history=one_by_one),
    Format("qwen-coder", ((CALL,), (FUNCTION,), ("<parameter=",)), tagged, "tags", CALL,
           shown=(CALL, "</tool_call>")),
    Format("hermes", ((CALL,), ("arguments",)), tagged, "object", others=("<arg_key>",),
           shown=(CALL, "</tool_call>")),
    Format("mistral", (("[TOOL_CALLS]",), ("[ARGS]",)), mistral, "named", "[TOOL_CALLS]", history=short_ids,
           shown=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
    Format("mistral-list", (("[TOOL_CALLS]",),), mistral, "list", "[TOOL_CALLS]", shown=("[TOOL_CALLS]",),
           history=short_ids),
    Format("llama3", (("<|python_tag|>", '"parameters"'), ('"parameters": ', '\\"parameters\\": ')), bare,
           "llama", shown=("<|python_tag|>",), parallel=False, history=one_by_one),
)
PLAIN = Format("plain", (), bare, "bare", prompts=False, history=as_texts)


def format_of(template) -> Format:
    """The format of a ChatTemplate's model."""
    reads = template.reads("tools")
    rows = FORMATS if reads or template.channels else ()
    return next((row for row in rows if row.tells(template.source)), PLAIN)


PROMPT = """\
You may call functions. These are their names, what they do, and the JSON schemas of their arguments, \
one a line:
{tools}
To call one, answer with nothing but a JSON object: {{"name": "its name", "arguments": {{..}}}}"""


def written(row: Format, messages: Sequence[Mapping], tools: Tools | None) -> tuple[list[dict], dict]:
    """Messages and further variables as the chat template takes them."""
    found = row.history(with_calls(messages))
    if tools is None:
        return found, {}
    if row.prompts:
        return found, {"tools": [tool.given for tool in tools.tools]}
    return with_prompt(found, tools.tools), {}


def with_prompt(messages: list[dict], tools: Iterable[Tool]) -> list[dict]:
    """Messages that begin with what tools there are, for templates that do not show them."""
    lines = "\n".join(json.dumps(tool.given["function"], ensure_ascii=False) for tool in tools)
    text = PROMPT.format(tools=lines)
    if messages and messages[0]["role"] == "system":
        texts = [text_of(messages[0].get("content")), text]
        return [messages[0] | {"content": "\n\n".join(filter(None, texts))}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
