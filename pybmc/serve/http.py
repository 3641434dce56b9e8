"""From ASGI to fields, and from answers back:
bodies with limits, answers whole or as streams, clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from dataclasses import replace

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..errors import BmcError, printable
from .answers import Update
from .errors import Refused, busy, error_body, refusal
from .fields import Fields, parse
from .service import Service
from .sessions import Lease
from .tasks import Task
from .worker import Gone, Run

log = logging.getLogger(__name__)

BODY_SECONDS = 30.0
HEADER = 1000                           # characters of a header
SILENCE = 10.0                          # seconds until a stream tells that it is alive


def dump(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class Json(Response):
    media_type = "application/json"

    def render(self, content) -> bytes:
        return dump(content)


class Sse:
    """Server-sent events, as OpenAI's clients read them."""

    media_type = "text/event-stream"
    done = b"data: [DONE]\n\n"

    def __init__(self, answer=None):
        self.answer = answer

    @staticmethod
    def encode(chunk: dict) -> bytes:
        return b"data: " + dump(chunk) + b"\n\n"

    def alive(self) -> bytes:
        """What is sent after a silence."""
        return b": ping\n\n"

    def failed(self, path: str, refused: Refused) -> bytes:
        """The last event of an answer that failed."""
        return self.encode(error_body(path, refused))


class Bare(Sse):
    """Server-sent events without a mark at the end, as llama-server's own clients read them."""

    done = b""


class Named(Bare):
    """Server-sent events whose names are their types. Clients of these do not count comments, so the answer
    makes an event that tells that it is alive, and one that tells that it failed."""

    @staticmethod
    def encode(chunk: dict) -> bytes:
        return b"event: " + chunk["type"].encode() + b"\n" + Sse.encode(chunk)

    def alive(self) -> bytes:
        return self.encode(self.answer.alive())

    def failed(self, path: str, refused: Refused) -> bytes:
        return self.encode(self.answer.failed(refused))


class Lines(Bare):
    """A JSON object a line, as Ollama's clients read them."""

    media_type = "application/x-ndjson"

    @staticmethod
    def encode(chunk: dict) -> bytes:
        return dump(chunk) + b"\n"

    def alive(self) -> bytes:
        return b""


# ---- requests ----------------------------------------------------------------------------------------------


def service_of(request: HttpRequest) -> Service:
    return request.scope["pybmc.service"]


def writer_of(request: HttpRequest) -> Service:
    """The service, where its model writes text."""
    service = service_of(request)
    if not service.writes:
        raise Refused(400, "unsupported_model",
                      f"{service.name} is an encoder: it writes no text; /v1/embeddings gives its vectors")
    return service


def client_of(request: HttpRequest) -> Hashable:
    """Whose request it is: of an API key, else of an address."""
    return request.scope.get("pybmc.client")


async def fields_of(request: HttpRequest) -> Fields:
    """The object in the body, whatever its type is said to be."""
    return parse(await body_of(request))


async def body_of(request: HttpRequest) -> bytes:
    most = request.scope["pybmc.policy"].max_body
    try:
        return await asyncio.wait_for(_read(request, most), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, "body_too_slow", f"the body did not arrive within {BODY_SECONDS:g} seconds",
                      headers={"Connection": "close"}) from None


async def _read(request: HttpRequest, most: int) -> bytes:
    told = request.headers.get("content-length", "")
    announced, read, parts, more = int(told) if told.isdecimal() else 0, 0, [], True
    while more and max(announced, read) <= most:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        read, more = read + len(parts[-1]), message.get("more_body", False)
    if max(announced, read) > most:
        found = max(announced, read)
        raise Refused(413, "body_too_large", f"the body has {found} bytes or more; expected at most {most}",
                      headers={"Connection": "close"})
    request.scope["pybmc.read"] = read
    return b"".join(parts)


# ---- answers -----------------------------------------------------------------------------------------------


async def answered(request: HttpRequest, make: Callable, wire: type[Sse], stream: bool = False,
                   fields: Fields | None = None) -> Response:
    """The answer to a request for text. make: gives its task and its answer, of service, fields and client.
    stream: whether it is a stream where the request does not say. fields: the request's, if they are read."""
    service = writer_of(request)
    fields = await fields_of(request) if fields is None else fields
    streams = fields.flag("stream", stream)
    task, answer = await in_pool(request, make, service, fields, client_of(request))
    return await respond(request, task, answer, wire(answer) if streams else None)


async def respond(request: HttpRequest, task: Task, answer, wire: Sse | None = None) -> Response:
    """Let the engine write, and answer: whole, or as a stream on a wire.
    A client that leaves ends it, at once."""
    service = service_of(request)
    lease = await _lease_while_here(request, service, task)
    try:
        run = service.submit(task.requests, task.slot)
    except BaseException:
        if lease:
            lease.close()
        raise
    going = Going(request, service, run, task, answer, lease)
    try:
        first = await run.next(service.settings.queue_seconds)
        if first is None:
            why = f"the request waited for {service.settings.queue_seconds:g} seconds"
            raise busy("queue_timeout", why, 5)
        if wire:
            return Stream(wire, going.parts(first, wire), going.close, going.headers)
        going.take(first)
        while going.left:
            going.take(await run.next())
        await going.save()
    except Gone:
        service.metrics.cancelled.inc()
        going.close()
        raise
    except BaseException:
        going.close()
        raise
    going.close()
    return Json(answer.whole(), headers=going.headers)


async def _lease_while_here(request: HttpRequest, service: Service, task: Task) -> Lease | None:
    """The same as _lease(); a client that leaves while another request has the session does not wait."""
    waiting = asyncio.ensure_future(_lease(service, task))
    try:
        return await while_here(request, waiting)
    except BaseException:
        waiting.add_done_callback(_let_go)
        raise


def _let_go(waiting: asyncio.Future) -> None:
    """Close a lease that came too late."""
    if not waiting.cancelled() and not waiting.exception() and waiting.result():
        waiting.result().close()


async def _lease(service: Service, task: Task) -> Lease | None:
    """The saved session that a task goes on with, for it alone, and with its rows in memory."""
    if task.session is None:
        return None
    lease = await service.sessions.lease(task.session)
    try:
        await lease.restore()
    except BaseException:
        lease.close()
        raise
    task.requests = [replace(request, ended=lease.ended) for request in task.requests]
    return lease


class Going:
    """An answer on its way: the run, and who watches whether the client is still there."""

    def __init__(self, request: HttpRequest, service: Service, run: Run, task: Task, answer,
                 lease: Lease | None = None):
        self.request, self.service, self.run, self.task, self.answer = request, service, run, task, answer
        self.left, self.lease = len(task.requests), lease
        self.headers = {"x-pybmc-seed": str(task.seed), "Cache-Control": "no-store"}
        if task.ignored:
            ignored = ", ".join(map(ascii_only, task.ignored))
            self.headers["x-pybmc-schema-ignored"] = printable(ignored, HEADER)
        self._clock = service.metrics.clock(run.started)
        self._watcher = when_gone(request, run.leave)

    def take(self, update) -> list[dict]:
        self._clock.note(update)
        self.left -= update.done
        chunks = self.answer.take(update)
        if not self.left:
            self._note_end()
        return chunks

    def _note_end(self) -> None:
        usage, choices = self.answer.usage(), self.answer.choices
        self.request.scope["pybmc.counts"] = usage["prompt_tokens"], usage["completion_tokens"]
        if self.service.settings.log_texts:
            told = {"id": self.request.scope["pybmc.id"], "path": self.request.url.path,
                    "prompts": [text for text, _ in self.task.prompts],
                    "answers": [choice.told() for choice in choices]}
            try:
                append_private(self.service.settings.log_texts, dump(told) + b"\n")
            except OSError as error:
                log.warning("%s: the texts are not logged: %s", told["id"], error.strerror)

    async def parts(self, update: Update, wire: Sse) -> AsyncIterator[bytes]:
        """What a stream has of the answer, from its first update on."""
        try:
            for chunk in self.answer.begin() + self.take(update):
                yield wire.encode(chunk)
            while self.left:
                new = await self.run.next(SILENCE)
                if new is None:
                    yield wire.alive()
                elif chunks := self.take(new):
                    yield b"".join(map(wire.encode, chunks))
            await self.save()
            for chunk in self.answer.last():
                yield wire.encode(chunk)
        except Gone:
            self.service.metrics.cancelled.inc()
            raise

    async def save(self) -> None:
        """Save the session of an answer that has ended."""
        if self.lease:
            await self.lease.save()

    def close(self) -> None:
        self._watcher.cancel()
        self.run.close()
        if self.lease:
            self.lease.close()


def ascii_only(text: str) -> str:
    return text.encode("ascii", "replace").decode()


def append_private(path: str, data: bytes) -> None:
    """Append to a file that, where it is new, only its owner may read."""
    with open(path, "ab", 0, opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(data)


class Stream(Response):
    """A stream of parts on a wire; what goes wrong later is its last one.
    close: called at the end, whatever that is."""

    def __init__(self, wire: Sse, parts: AsyncIterator[bytes], close: Callable[[], None], headers: dict):
        self.wire, self.parts, self.close = wire, parts, close
        headers = headers | {"X-Accel-Buffering": "no", "Content-Type": wire.media_type}
        self.coded = [(name.lower().encode("latin-1"), value.encode("latin-1"))
                      for name, value in headers.items()]

    async def __call__(self, scope, receive, send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.coded})
            async for part in self.parts:
                await put(part)
            await put(self.wire.done, more=False)
        except Gone:
            pass
        except Refused as refused:
            await put(self.wire.failed(scope["path"], refused), more=False)
        finally:
            self.close()


async def in_pool(request: HttpRequest, function, *args):
    """Work of the pool, whose errors are the request's."""
    try:
        work = service_of(request).in_pool(request.scope["pybmc.read"], function, *args)
        return await while_here(request, work)
    except BmcError as error:
        raise refusal(error) from None


async def while_here(request: HttpRequest, work: Coroutine | asyncio.Future):
    """The result of some work. A client that leaves before ends it: raises Gone."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(departure(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        left.cancel()


def when_gone(request: HttpRequest, leave: Callable[[], None]) -> asyncio.Task:
    """A task that calls leave() when the client closes the connection."""
    async def watch() -> None:
        await departure(request)
        leave()

    return asyncio.create_task(watch())


async def departure(request: HttpRequest) -> None:
    """Wait until the client closes the connection. Only after the body."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
