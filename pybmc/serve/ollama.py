"""Ollama's routes, under /api."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from math import inf

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..chat.events import CallBegin, Content, End, Thought
from ..engine.text import Token
from ..grammar.asked import OLLAMA
from .answers import Choice, OneAnswer, Update, chat_logprob
from .embed import normalized, vectors
from .errors import Refused, no_model, wrong
from .fields import Fields
from .http import Json, Lines, answered, fields_of, service_of, writer_of
from .pull import pull
from .service import Service
from .tasks import (
    chat_task_of,
    gap_prompt,
    refuse_common,
    template_request,
    text_prompts,
    text_task_of,
    turn_of,
)

VERSION = "0.12.0"                      # the level of Ollama's API: editors parse it
FILE_TYPES = {                          # of GGUF's general.file_type
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    25: "IQ4_NL", 30: "IQ4_XS", 32: "BF16",
}


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def tagged(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def named(service: Service, fields: Fields) -> str:
    """The model that is asked for, as the client calls it."""
    name = fields.text("model") or fields.text("name")
    if not name:
        raise wrong("model", "is missing")
    if tagged(name) not in map(tagged, service.names):
        raise no_model(name, map(tagged, service.names))
    return name


class Answer(OneAnswer):
    """Lines of one answer. message: what a line says of a text, a thought, and calls of tools."""

    def __init__(self, service: Service, name: str, choices: list[Choice],
                 message: Callable[[str, str, list[dict]], dict], n_top: int | None):
        super().__init__(choices)
        self.service, self.name, self._message, self.n_top = service, name, message, n_top
        self.started = time.perf_counter()
        self._calls = 0                         # that have gone out

    def take(self, update: Update) -> list[dict]:
        lines = []
        for event in self.choice.take(update):
            match event:
                case Content(text):
                    lines.append(self._message(text, "", []))
                case Thought(text):
                    lines.append(self._message("", text, []))
                case CallBegin() | End():
                    ended = self._ended(all=isinstance(event, End))
                    lines += [self._message("", "", ended)] * bool(ended)
        return [self._line(message) | self._logprobs(self.choice.news()) for message in lines]

    def _ended(self, all: bool) -> list[dict]:
        """Calls that are complete and have not gone out: a call is told as a whole."""
        begin, end = self._calls, max(0, len(self.choice.calls) - (not all))
        self._calls = end
        return self._told_calls(begin, end)

    def _told_calls(self, begin: int, end: int) -> list[dict]:
        found = []
        for index, call in enumerate(self.choice.calls[begin:end], begin):
            arguments = call.object()
            if arguments is not None:           # else the answer was cut within it
                found.append({"id": call.id,
                              "function": {"index": index, "name": call.name, "arguments": arguments}})
        return found

    def last(self) -> list[dict]:
        return [self._last_line(self._message("", "", []), self.choice.news())]

    def whole(self) -> dict:
        calls = self._told_calls(0, len(self.choice.calls))
        message = self._message(self.choice.content, self.choice.reasoning, calls)
        return self._last_line(message, self.choice.shown)

    def _last_line(self, message: dict, tokens: list[Token]) -> dict:
        return self._line(message, True) | self._logprobs(tokens) | self._end()

    def _line(self, message: dict, done: bool = False) -> dict:
        return {"model": self.name, "created_at": timestamp(time.time()), **message, "done": done}

    def _logprobs(self, tokens: list[Token]) -> dict:
        if self.n_top is None or not tokens:
            return {}
        return {"logprobs": [chat_logprob(self.service.tokenizer, token, self.n_top) for token in tokens]}

    def _end(self) -> dict:
        stats = self.choice.stats
        reason = {"tool_calls": "stop"}.get(self.choice.finish_reason or "", self.choice.finish_reason)
        return {"done_reason": reason} | durations(
            time.perf_counter() - self.started, self.service.load_seconds, stats.prompt_tokens,
            stats.prompt_s, stats.predicted_tokens, stats.predicted_s)


def durations(total: float, load: float, read: int, reading: float, written: int, writing: float) -> dict:
    def nanoseconds(seconds: float) -> int:
        return max(1, int(1e9 * seconds))

    return {"total_duration": nanoseconds(total), "load_duration": nanoseconds(load),
            "prompt_eval_count": read, "prompt_eval_duration": nanoseconds(reading),
            "eval_count": written, "eval_duration": nanoseconds(writing)}


def loaded(service: Service, name: str, message: dict) -> Json:
    """The answer to a request that only loads a model."""
    return Json({"model": name, "created_at": timestamp(time.time()), **message,
                 "done": True, "done_reason": "load"})


def base_request(service: Service, fields: Fields, client):
    options = fields.object("options")
    most = options.whole("num_predict", -1, -2)
    n_top = fields.whole("top_logprobs", 0, 0, 20) if fields.flag("logprobs") else None
    base = template_request(service, options, client, service.settings.max_tokens if most < 0 else most)
    return replace(base, top=n_top or 0), n_top


async def chat(request: Request) -> Response:
    service, fields = writer_of(request), await fields_of(request)
    name = named(service, fields)
    if not fields.listed("messages"):
        return loaded(service, name, {"message": {"role": "assistant", "content": ""}})
    return await answered(request, partial(chat_task, name=name), Lines, True, fields)


def chat_task(service: Service, fields: Fields, client, name: str):
    refuse_common(fields)
    base, n_top = base_request(service, fields, client)
    task = chat_task_of(service, fields, base, turn_of(service, fields, OLLAMA))

    def message(text: str, thought: str, calls: list[dict]) -> dict:
        more = ({"thinking": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
        return {"message": {"role": "assistant", "content": text} | more}

    return task, Answer(service, name, task.choices(), message, n_top)


async def generate(request: Request) -> Response:
    service, fields = writer_of(request), await fields_of(request)
    name = named(service, fields)
    if not fields.text("prompt") and not fields.get("context"):
        return loaded(service, name, {"response": ""})
    return await answered(request, partial(generate_task, name=name), Lines, True, fields)


class GenerateAnswer(Answer):
    """Its end also has the ids so far, for the next request's context."""

    prompt: list[int] = []

    def _end(self) -> dict:
        return super()._end() | {"context": [*self.prompt, *(token.id for token in self.choice.shown)]}


def generate_task(service: Service, fields: Fields, client, name: str):
    refuse_common(fields)
    fields.refuse(("template", "tools"))
    base, n_top = base_request(service, fields, client)
    turn, before = None, context_of(service, fields)
    if fields.text("suffix"):
        ids = gap_prompt(service, fields.text("prompt", ""), fields["suffix"], "suffix")[1]
    elif fields.flag("raw"):
        ids = text_prompts(service, fields)[0][1]
    else:
        turn = turn_of(service, message_of(fields), OLLAMA)
        ids = turn.tokens
    if before:
        ids = [*before, *(ids[1:] if ids[:1] == [service.tokenizer.bos_id] else ids)]
    if turn:
        turn.tokens = ids
        task = chat_task_of(service, fields, base, turn)
    else:
        task = text_task_of(service, fields, base, [(fields.text("prompt", ""), ids)], names=OLLAMA)

    def message(text: str, thought: str, calls: list[dict]) -> dict:
        return {"response": text} | ({"thinking": thought} if thought else {})

    answer = GenerateAnswer(service, name, task.choices(), message, n_top)
    answer.prompt = ids
    return task, answer


def message_of(fields: Fields) -> Fields:
    """The fields of a chat with one message."""
    given = (("system", fields.text("system")), ("user", fields.text("prompt", "")))
    messages = [{"role": role, "content": content} for role, content in given if content]
    return Fields(fields | {"messages": messages})


def context_of(service: Service, fields: Fields) -> list[int]:
    context = fields.listed("context")
    return text_prompts(service, Fields({"context": context}), "context")[0][1] if context else []


# ---- embeddings --------------------------------------------------------------------------------------------


async def embed(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    name, started = named(service, fields), time.perf_counter()
    texts = [fields["input"]] if isinstance(fields.get("input"), str) else fields.listed("input")
    if not all(isinstance(text, str) for text in texts):
        raise wrong("input", "has something else than texts; expected a text or a list of texts")
    found, n = await vectors(request, texts, fields.flag("truncate")) if texts else (np.zeros((0, 1)), 0)
    rows = normalized(found, fields.whole("dimensions", None, 1)).tolist()
    seconds = time.perf_counter() - started
    return Json({"model": name, "embeddings": rows}
                | durations(seconds, service.load_seconds, n, seconds, 0, 0))


async def embedding(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    named(service, fields)
    text = fields.text("prompt", "")
    rows = normalized((await vectors(request, [text]))[0]).tolist() if text else [[]]
    return Json({"embedding": rows[0]})


# ---- the model ---------------------------------------------------------------------------------------------


def details(service: Service) -> dict:
    family, n = service.model.config.arch, service.n_params
    found = {"format": "gguf", "family": family, "families": [family],
             "parameter_size": f"{n / 1e9:.1f}B" if n >= 5e8 else f"{n / 1e6:.2f}M"}
    number = service.model.metadata.get("general.file_type")
    kind = FILE_TYPES.get(number) if isinstance(number, int) else None
    return found | ({"quantization_level": kind} if kind else {})


def listed(service: Service, name: str) -> dict:
    return {"name": tagged(name), "model": tagged(name), "modified_at": timestamp(service.created),
            "size": service.model._file.size, "digest": service.model.fingerprint,
            "details": details(service), "capabilities": service.capabilities}


async def tags(request: Request) -> Response:
    service = service_of(request)
    return Json({"models": [listed(service, name) for name in service.names]})


async def running(request: Request) -> Response:
    service = service_of(request)
    return Json({"models": [listed(service, name) | {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0,
                                                     "context_length": service.context}
                            for name in service.names]})


async def show(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    named(service, fields)
    verbose = fields.flag("verbose")
    info = {key: plain(value) for key, value in service.model.metadata.items()
            if key != "tokenizer.chat_template" and (verbose or not isinstance(value, (list, np.ndarray)))}
    return Json({"details": details(service), "model_info": info, "template": service.template.source,
                 "capabilities": service.capabilities, "modified_at": timestamp(service.created)})


def plain(value):
    """A value of a file's metadata as JSON has it."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not -inf < value < inf else value


async def version(request: Request) -> Response:
    return Json({"version": VERSION, "pybmc": __version__})


COMMANDS = {"delete": "pybmc rm NAME", "create": "pybmc serve FILE",
            "copy": "pybmc serve FILE --alias NAME", "push": "", "blobs": ""}


async def disabled(request: Request) -> Response:
    name = request.url.path.split("/")[2]
    how = f"; on the command line {COMMANDS[name]} does it" if COMMANDS[name] else ""
    raise Refused(403, "disabled", f"/api/{name} is disabled: this server serves one model{how}")


ROUTES = [
    Route("/api/chat", chat, methods=["POST"]), Route("/api/generate", generate, methods=["POST"]),
    Route("/api/embed", embed, methods=["POST"]), Route("/api/embeddings", embedding, methods=["POST"]),
    Route("/api/show", show, methods=["POST"]), Route("/api/tags", tags), Route("/api/ps", running),
    Route("/api/version", version), Route("/api/pull", pull, methods=["POST"]),
    *(Route(f"/api/{name}", disabled, methods=["POST", "DELETE"]) for name in COMMANDS if name != "blobs"),
    Route("/api/blobs/{digest}", disabled, methods=["GET", "POST"]),
]
