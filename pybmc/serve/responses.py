"""OpenAI's Responses API: its items become messages of a chat, and an answer's blocks become items.
Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..chat.calls import new_id
from ..chat.tools import MOST, Tool, Tools, function_tool, offered
from ..engine.text import Token
from ..grammar.asked import format_asked
from .answers import Update, chat_logprob, progress_of, timings_of
from .blocks import Block, BlockAnswer, sealed, unsealed
from .errors import Refused, unsupported, wrong
from .fields import Fields
from .http import Named, answered
from .service import Service
from .tasks import (
    blaming,
    chat_task_of,
    check_model,
    content_of,
    refuse_common,
    template_request,
    turn_from,
    variables_of,
)

REFUSED = ("prompt", "context_management")
ROLES = ("user", "assistant", "system", "developer")
SEALED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"       # of `include`


# ---- a request ---------------------------------------------------------------------------------------------


async def responses(request: Request) -> Response:
    return await answered(request, task_of, Named)


def task_of(service: Service, fields: Fields, client):
    """The task of a request, and its answer."""
    check_model(service, fields)
    refuse_common(fields)
    fields.refuse(REFUSED)
    fields.choice("truncation", ("auto", "disabled"))
    include, n_top = fields.listed("include"), fields.whole("top_logprobs", 0, 0, 20)
    if n_top and LOGPROBS not in include:
        raise wrong("top_logprobs", f"is given without {LOGPROBS}; expected include to have it")
    most = fields.whole("max_output_tokens", service.settings.max_tokens)
    base = replace(template_request(service, fields, client, most), top=n_top)
    messages, tools = messages_of(fields), tools_of(fields)
    with blaming():
        wish = format_asked(fields.object("text").get("format", {"type": "text"}), "text.format")
        offer = offered(*choice_of(fields, tools))
    reasoning = fields.object("reasoning")
    effort, summary = reasoning.text("effort"), reasoning.choice("summary", ("auto", "concise", "detailed"))
    variables = variables_of(service, fields, reasoning_effort=effort or None)
    task = chat_task_of(service, fields, base, turn_from(service, fields, messages, offer, wish, variables))
    sampler, per_token = base.sampler, fields.flag("timings_per_token")
    told = described(fields, tools, offer) | {
        "model": service.name, "temperature": sampler.temperature, "top_p": sampler.top_p}
    answer = ResponseAnswer(task.choices(), told, SEALED in include, summary is not None, per_token)
    if LOGPROBS in include:
        answer.logprob = partial(chat_logprob, service.tokenizer, n_top=n_top)
    return task, answer


def described(fields: Fields, tools: tuple[Tool, ...], offer: Tools | None) -> dict:
    """What a response says of its request."""
    reasoning, text = fields.object("reasoning"), fields.object("text")
    functions = [{"type": "function", **tool.given["function"], "strict": tool.strict} for tool in tools]
    return {"instructions": fields.text("instructions"), "max_output_tokens": fields.get("max_output_tokens"),
            "metadata": fields.object("metadata"), "previous_response_id": None, "background": False,
            "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
            "truncation": fields.get("truncation", "disabled"), "top_logprobs": fields.get("top_logprobs", 0),
            "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
            "text": {"format": text.get("format", {"type": "text"})}, "tools": functions,
            "tool_choice": fields.get("tool_choice", "auto") if offer else "none" if functions else "auto"}


def tools_of(fields: Fields) -> tuple[Tool, ...]:
    """The functions among the tools. Other kinds are left out: clients add theirs unasked."""
    found = []
    for i, given in enumerate(fields.listed("tools", MOST)):
        if not isinstance(given, dict):
            raise wrong(f"tools[{i}]", "is no object; expected a tool")
        if given.get("type") == "function":
            with blaming():
                found.append(function_tool(given, f"tools[{i}]"))
    return tuple(found)


def choice_of(fields: Fields, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], object, bool]:
    """The tools that are left, the choice among them in the words of a chat,
    and whether there may be several calls."""
    choice, parallel = fields.get("tool_choice"), fields.flag("parallel_tool_calls", True)
    if not isinstance(choice, dict):
        return tools, choice, parallel
    given = fields.object("tool_choice")
    if given.choice("type", ("function", "allowed_tools")) == "function":
        return tools, {"function": {"name": given.get("name")}}, parallel
    names = [tool.get("name") for tool in given.listed("tools") if isinstance(tool, dict)]
    mode = given.choice("mode", ("auto", "required"), "auto")
    return tuple(tool for tool in tools if tool.name in names), mode, parallel


# ---- items -> messages


def messages_of(fields: Fields) -> list[dict]:
    given = fields.get("input")
    if not isinstance(given, (str, list)) or not given:
        raise wrong("input", "is missing or empty; expected a text or a list of items")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else fields.listed("input", 4096)
    instructions = fields.text("instructions")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for i, item in enumerate(items):
        place = f"input[{i}]"
        kind = item.get("type") or "message" if isinstance(item, dict) else item
        read = ITEMS.get(kind) if isinstance(kind, str) and isinstance(item, dict) else None
        if read is None:
            raise unsupported(place, f"is of type {kind!r:.40}; expected {', '.join(ITEMS)}")
        read(Fields(item, f"{place}."), place, messages)
    if not messages:
        raise wrong("input", "has no message; expected one at least")
    return [{"content": None if "tool_calls" in message else ""} | message for message in messages]


def of_assistant(messages: list[dict], *others: str) -> dict:
    """The assistant's message that an item belongs to:
    the last one, unless it has one of the others already."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in others):
        messages.append({"role": "assistant"})
    return messages[-1]


def read_message(item: Fields, place: str, messages: list[dict]) -> None:
    role = item.choice("role", ROLES)
    if role is None:
        raise item.missing("role", "one of " + ", ".join(ROLES))
    content = content_of(item, place)
    if role == "assistant":
        of_assistant(messages, "content", "tool_calls")["content"] = content
    else:
        messages.append({"role": {"developer": "system"}.get(role, role), "content": content})


def read_reasoning(item: Fields, place: str, messages: list[dict]) -> None:
    """Its text, or what was sealed of it, or else its summary."""
    def joined(name: str) -> str:
        parts = item.listed(name)
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            item.bad(name, "a list of objects with a text")
        return "\n\n".join(part["text"] for part in parts)

    thought = joined("content") or unsealed(item.text("encrypted_content", "")) or joined("summary")
    if thought:
        message = of_assistant(messages, "content", "tool_calls")
        message["reasoning_content"] = "\n\n".join(filter(None, (message.get("reasoning_content"), thought)))


def read_call(item: Fields, place: str, messages: list[dict]) -> None:
    function = {"name": item.needed("name"), "arguments": item.text("arguments", "")}
    call = {"id": item.needed("call_id"), "type": "function", "function": function}
    of_assistant(messages).setdefault("tool_calls", []).append(call)


def read_output(item: Fields, place: str, messages: list[dict]) -> None:
    content = content_of(item, place, "output") or ""
    messages.append({"role": "tool", "tool_call_id": item.needed("call_id"), "content": content})


ITEMS: dict[str, Callable[[Fields, str, list[dict]], None]] = {
    "message": read_message, "function_call": read_call, "function_call_output": read_output,
    "reasoning": read_reasoning}


# ---- the answer --------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How a kind of block is told: the prefix of its id, the name of its events, the field with its text, its
    one part, and the name of this part's events and index."""

    prefix: str
    event: str
    field: str = "text"
    part: Callable[[str], dict] | None = None
    part_event: str = "response.content_part"
    index_name: str = "content_index"


KINDS = {
    "thought": Kind("rs_", "response.reasoning_text",
                    part=lambda text: {"type": "reasoning_text", "text": text}),
    "text": Kind("msg_", "response.output_text",
                 part=lambda text: {"type": "output_text", "text": text, "annotations": []}),
    "call": Kind("fc_", "response.function_call_arguments", "arguments"),
}
SUMMARY = Kind("rs_", "response.reasoning_summary_text",
               part=lambda text: {"type": "summary_text", "text": text},
               part_event="response.reasoning_summary_part", index_name="summary_index")


class ResponseAnswer(BlockAnswer):
    """told: what the response says of its request. seal: thoughts come sealed too. summary: they are told as
    their summary, for clients that ask for one. per_token: deltas and the end come with timings."""

    logprob: Callable[[Token], dict] | None = None          # how a token of a text is told

    def __init__(self, choices, told: dict, seal: bool = False, summary: bool = False,
                 per_token: bool = False):
        super().__init__(choices)
        self._told, self._seal, self._summary, self._per_token = told, seal, summary, per_token
        self._kinds = KINDS | ({"thought": SUMMARY} if summary else {})
        self._id, self._created, self._n = new_id("resp_"), int(time.time()), 0
        self._ids: list[str] = []               # of the items

    def begin(self) -> list[dict]:
        return [self._event("response.created", response=self._response("in_progress")), self.alive()]

    def alive(self) -> dict:
        return self._event("response.in_progress", response=self._response("in_progress"))

    def failed(self, refused: Refused) -> dict:
        for block in self.blocks.found[-1:]:
            block.cut = True
        error = {"code": refused.code, "message": refused.message}
        return self._event("response.failed",
                           response=self._response("failed", self._items()) | {"error": error})

    def begun(self, block: Block, text: str) -> list[dict]:
        kind = self._kinds[block.kind]
        self._ids.append(new_id(kind.prefix))
        told = [self._event("response.output_item.added", output_index=block.index,
                            item=self._item(block, "in_progress"))]
        if kind.part:
            told.append(self._at(block, kind.part_event + ".added", part=self._part(block, False)))
        return told

    def grown(self, block: Block, text: str) -> list[dict]:
        kind = self._kinds[block.kind]
        return [self._at(block, kind.event + ".delta", delta=text, **self._logprobs(block, block.new),
                         **self._timings())]

    def ended(self, block: Block, text: str) -> list[dict]:
        kind = self._kinds[block.kind]
        told = [self._at(block, kind.event + ".done", **{kind.field: block.text},
                         **self._logprobs(block, block.tokens))]
        if kind.part:
            told.append(self._at(block, kind.part_event + ".done", part=self._part(block)))
        return [*told, self._event("response.output_item.done", output_index=block.index,
                                   item=self._item(block))]

    def last(self) -> list[dict]:
        whole = self.whole()
        return [self._event(f"response.{whole['status']}", response=whole, **self._timings())]

    def whole(self) -> dict:
        cut = self.choice.finish_reason == "length"
        found = self._response("incomplete" if cut else "completed", self._items())
        return found | {"incomplete_details": {"reason": "max_output_tokens"} if cut else None,
                        "usage": self._usage(), "completed_at": None if cut else int(time.time())}

    def take(self, update: Update) -> list[dict]:
        events = self.choice.take(update)
        progress = progress_of(self.choice, update, self._per_token)
        return [self.alive() | told for told in progress] + self.tell(events)

    # ---- its parts

    def _timings(self) -> dict:
        return {"timings": timings_of(self.choice.stats)} if self._per_token else {}

    def _logprobs(self, block: Block, tokens: list[Token]) -> dict:
        """Of some tokens of a text, where they were asked for."""
        if block.kind != "text":
            return {}
        return {"logprobs": [self.logprob(token) for token in tokens] if self.logprob else []}

    def _part(self, block: Block, whole: bool = True) -> dict:
        part = self._kinds[block.kind].part
        assert part is not None
        return part(block.text if whole else "") | self._logprobs(block, block.tokens if whole else [])

    def _event(self, type: str, **fields) -> dict:
        self._n += 1
        return {"type": type, "sequence_number": self._n - 1, **fields}

    def _at(self, block: Block, type: str, **fields) -> dict:
        kind = self._kinds[block.kind]
        index = {kind.index_name: 0} if kind.part else {}
        return self._event(type, item_id=self._ids[block.index], output_index=block.index, **index, **fields)

    def _response(self, status: str, output: list[dict] | None = None) -> dict:
        return {"id": self._id, "object": "response", "created_at": self._created, "status": status,
                "error": None, "incomplete_details": None, "usage": None, **self._told,
                "output": output or []}

    def _items(self) -> list[dict]:
        return [self._item(block) for block in self.blocks.found]

    def _item(self, block: Block, status: str | None = None) -> dict:
        found = {"id": self._ids[block.index],
                 "status": status or ("incomplete" if block.cut else "completed")}
        if block.kind == "call":
            id, name = block.call
            return found | {"type": "function_call", "call_id": id, "name": name, "arguments": block.text}
        content = [self._part(block)] if self._kinds[block.kind].part and status is None else []
        if block.kind == "text":
            return found | {"type": "message", "role": "assistant", "content": content}
        seal = {"encrypted_content": sealed(block.text)} if self._seal and status is None else {}
        told = {"summary": content} if self._summary else {"summary": [], "content": content}
        return found | {"type": "reasoning"} | told | seal

    def _usage(self) -> dict:
        usage = self.usage()
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens_details": usage["completion_tokens_details"]}


ROUTES = [Route(prefix + "/responses", responses, methods=["POST"]) for prefix in ("/v1", "")]
