"""Anthropic's Messages API: its blocks become messages of a chat, and an answer's blocks become its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..chat.calls import new_id
from ..chat.tools import MOST, Tool, Tools, function_tool, offered
from ..grammar.asked import Asked
from .blocks import Block, BlockAnswer, sealed, unsealed
from .errors import Refused, anthropic_error, unsupported, wrong
from .fields import Fields
from .http import Json, Named, answered, fields_of, in_pool, writer_of
from .service import Service
from .tasks import (
    blaming,
    chat_task_of,
    check_model,
    count_of,
    refuse_common,
    template_request,
    turn_from,
    variables_of,
)

REFUSED = ("container", "mcp_servers")
CHANGING = "x-anthropic-"               # a system block that begins so differs from request to request
SPACE = "\n\n"                          # between blocks of text
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
DELTAS = {"thought": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
          "call": ("input_json_delta", "partial_json")}


# ---- a request ---------------------------------------------------------------------------------------------


async def messages(request: Request) -> Response:
    return await answered(request, task_of, Named)


async def count_tokens(request: Request) -> Response:
    service, fields = writer_of(request), await fields_of(request)

    def count() -> int:
        return count_of(service, fields, *asked(service, fields))

    return Json({"input_tokens": await in_pool(request, count)})


def task_of(service: Service, fields: Fields, client):
    """The task of a request, and its answer."""
    most = fields.whole("max_tokens")
    if most is None:
        raise fields.missing("max_tokens", "a whole number, 0 or more")
    given, tools, variables = asked(service, fields)
    base = template_request(service, fields, client, most, "stop_sequences")
    turn = turn_from(service, fields, given, tools, wish_of(fields), variables)
    task = chat_task_of(service, fields, base, turn)
    hidden = fields.object("thinking").choice("display", ("summarized", "omitted")) == "omitted"
    return task, MessageAnswer(task.choices(), service.name, hidden)


def asked(service: Service, fields: Fields) -> tuple[list[dict], Tools | None, dict]:
    """Messages, tools, and what the chat template is told of thinking:
    without a word about it, that there be none."""
    check_model(service, fields)
    refuse_common(fields)
    fields.refuse(REFUSED)
    told = fields.keys() & {"thinking", "think", "enable_thinking"}
    quiet = {} if told else {"thinking": {"type": "disabled"}}
    effort = fields.object("output_config").text("effort")
    variables = variables_of(service, fields, reasoning_effort=effort or None, **quiet)
    return messages_of(fields), tools_of(fields), variables


def wish_of(fields: Fields) -> Asked | None:
    """The schema of an answer that is no call."""
    place = fields.object("output_config") if "output_config" in fields else fields
    name = "format" if "output_config" in fields else "output_format"
    if name not in place:
        return None
    given = place.object(name)
    given.choice("type", ("json_schema",))
    if not isinstance(given.get("schema"), dict):
        raise wrong(f"{given.where}schema", "is missing or no object; expected a JSON schema")
    return Asked(f"{place.where}{name}", "schema", given["schema"])


def tools_of(fields: Fields) -> Tools | None:
    given = fields.listed("tools", MOST)
    with blaming():
        tools = tuple(tool_of(tool, f"tools[{i}]") for i, tool in enumerate(given))
        return offered(tools, *choice_of(fields))


def tool_of(given: object, place: str) -> Tool:
    if not isinstance(given, dict):
        raise wrong(place, "is no object; expected a tool with name and input_schema")
    if (given.get("type") or "custom") != "custom":
        raise unsupported(place, f"is of type {given['type']!r:.40}; expected a tool with input_schema")
    if given.get("input_schema") is None:
        raise Fields(given, f"{place}.").missing("input_schema", "a JSON schema of an object")
    return function_tool(given, place, "input_schema")


def choice_of(fields: Fields) -> tuple[object, bool]:
    """tool_choice in the words of a chat, and whether there may be several calls."""
    choice = fields.object("tool_choice")
    kind = choice.choice("type", (*CHOICES, "tool"), "auto")
    wanted = {"function": {"name": choice.get("name")}} if kind == "tool" else CHOICES[kind]
    return wanted, not choice.flag("disable_parallel_tool_use")


# ---- blocks -> messages


def messages_of(fields: Fields) -> list[dict]:
    given = fields.listed("messages", 4096)
    if not given:
        raise wrong("messages", "is empty; expected at least one message")
    texts = [block["text"] for block in blocks_of(fields, "system", ("text",))]
    system = [text for text in texts if not text.startswith(CHANGING)]
    found = [{"role": "system", "content": SPACE.join(system)}] if any(system) else []
    names: dict[str, str] = {}                  # of the functions called, by the ids of the calls
    for i, one in enumerate(given):
        place = f"messages[{i}]"
        if not isinstance(one, dict):
            raise wrong(place, "is no object; expected one with role and content")
        message = Fields(one, f"{place}.")
        role = message.choice("role", ("user", "assistant", "system"))
        if role is None:
            raise message.missing("role", "user or assistant")
        if "content" not in message:
            raise message.missing("content", "a text or a list of blocks")
        found += [of_assistant(message, names)] if role == "assistant" else of_user(message, role, names)
    return found


def blocks_of(fields: Fields, name: str, kinds: Sequence[str]) -> Iterator[Fields]:
    """The blocks of a field; a text is one."""
    given = fields.get(name, [])
    if not isinstance(given, (str, list)):
        fields.bad(name, "a text or a list of blocks")
    for i, block in enumerate([{"type": "text", "text": given}] if isinstance(given, str) else given):
        place = f"{fields.where}{name}[{i}]"
        kind = block.get("type") if isinstance(block, dict) else block
        if kind not in kinds or not isinstance(block, dict):
            raise unsupported(place, f"is of type {kind!r:.40}; expected {', '.join(kinds)}")
        if kind == "text" and not isinstance(block.get("text"), str):
            raise wrong(f"{place}.text", "is missing or no text")
        yield Fields(block, f"{place}.")


def of_user(message: Fields, role: str, names: dict[str, str]) -> list[dict]:
    """Texts as one message of the role, results of tools as messages of their own, in their order."""
    found: list[dict] = []
    for block in blocks_of(message, "content", ("text", "tool_result")):
        if block["type"] == "tool_result":
            found.append(result_of(block, names))
        elif found and found[-1]["role"] == role:
            found[-1]["content"] += SPACE + block["text"]
        else:
            found.append({"role": role, "content": block["text"]})
    return found or [{"role": role, "content": ""}]


def result_of(block: Fields, names: dict[str, str]) -> dict:
    id = block.needed("tool_use_id")
    text = SPACE.join(part["text"] for part in blocks_of(block, "content", ("text",)))
    failed = "Error: " if block.flag("is_error") else ""
    name = {"name": names[id]} if id in names else {}
    return {"role": "tool", "tool_call_id": id, "content": failed + text} | name


def of_assistant(message: Fields, names: dict[str, str]) -> dict:
    texts, thoughts, calls = [], [], []
    for block in blocks_of(message, "content", ("text", "thinking", "redacted_thinking", "tool_use")):
        match block["type"]:
            case "text":
                texts.append(block["text"])
            case "thinking":
                thoughts.append(block.text("thinking", "") or unsealed(block.text("signature", "")))
            case "tool_use":
                id, name = block.needed("id"), block.needed("name")
                names[id] = name
                function = {"name": name, "arguments": dict(block.object("input"))}
                calls.append({"id": id, "type": "function", "function": function})
    thought = SPACE.join(filter(None, thoughts))
    return {"role": "assistant", "content": "".join(texts) or (None if calls else "")} \
        | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})


# ---- the answer --------------------------------------------------------------------------------------------


class MessageAnswer(BlockAnswer):
    """hidden: the text of thoughts is left out; the client has it in their signatures."""

    def __init__(self, choices, model: str, hidden: bool = False):
        super().__init__(choices)
        self._model, self._hidden, self._id, self._started = model, hidden, new_id("msg_"), False

    def take(self, update) -> list[dict]:
        """The first update has the counts of the prompt, with which a stream begins."""
        chunks, started = super().take(update), self._started
        self._started = True
        usage = self._usage() | {"output_tokens": 0, "output_tokens_details": {"thinking_tokens": 0}}
        first = {"type": "message_start", "message": self._message([], None) | {"usage": usage}}
        return chunks if started else [first, *chunks]

    def alive(self) -> dict:
        return {"type": "ping"}

    def failed(self, refused: Refused) -> dict:
        return anthropic_error(refused)

    def begun(self, block: Block, text: str) -> list[dict]:
        return [{"type": "content_block_start", "index": block.index,
                 "content_block": self._block(block, {})}]

    def grown(self, block: Block, text: str) -> list[dict]:
        if self._hidden and block.kind == "thought":
            return []
        kind, name = DELTAS[block.kind]
        return [self._delta(block, {"type": kind, name: text})]

    def ended(self, block: Block, text: str) -> list[dict]:
        signed = self._delta(block, {"type": "signature_delta", "signature": self._signature(block)})
        return [signed] * (block.kind == "thought") + [{"type": "content_block_stop", "index": block.index}]

    def last(self) -> list[dict]:
        delta = {"stop_reason": self._reason(), "stop_sequence": self.choice.stop_string}
        return [{"type": "message_delta", "delta": delta, "usage": self._usage()}, {"type": "message_stop"}]

    def whole(self) -> dict:
        """A call that was cut is left out: its input would not be an object."""
        inputs = [call.object() for call in self.choice.calls]
        content = []
        for block in self.blocks.found:
            its = inputs.pop(0) if block.kind == "call" else {}
            content += [self._block(block, its, block.text)] * (its is not None)
        return self._message(content, self._reason()) | {"stop_sequence": self.choice.stop_string}

    # ---- its parts

    def _message(self, content: list[dict], reason: str | None) -> dict:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model,
                "content": content, "stop_reason": reason, "stop_sequence": None, "usage": self._usage()}

    def _block(self, block: Block, given: dict | None, text: str = "") -> dict:
        match block.kind:
            case "call":
                id, name = block.call
                return {"type": "tool_use", "id": id, "name": name, "input": given}
            case "thought":
                signature = self._signature(block) if text else ""
                return {"type": "thinking", "thinking": "" if self._hidden else text, "signature": signature}
        return {"type": "text", "text": text}

    def _delta(self, block: Block, delta: dict) -> dict:
        return {"type": "content_block_delta", "index": block.index, "delta": delta}

    def _signature(self, block: Block) -> str:
        """Clients leave out thoughts without one."""
        return sealed(block.text if self._hidden else "")

    def _reason(self) -> str:
        reason = REASONS[self.choice.finish_reason or "stop"]
        return "stop_sequence" if reason == "end_turn" and self.choice.stop_string else reason

    def _usage(self) -> dict:
        stats = self.choice.stats
        return {"input_tokens": stats.prompt_tokens - stats.reused_tokens, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": stats.reused_tokens, "output_tokens": stats.predicted_tokens,
                "output_tokens_details": {"thinking_tokens": self.choice.reasoning_tokens}}


ROUTES = [Route(prefix + path, answer, methods=["POST"]) for prefix in ("/v1", "")
          for path, answer in (("/messages", messages), ("/messages/count_tokens", count_tokens))]
