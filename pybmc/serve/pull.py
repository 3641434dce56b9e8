"""POST /api/pull: bring a model of the hub to this machine, for clients of Ollama.
One at a time, where --allow-pull is given."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response

from ..errors import BmcError
from ..hub import names, transfer
from .errors import Refused, busy, shutting_down, unsupported, wrong
from .fields import Fields
from .http import Json, Lines, Stream, fields_of, service_of, when_gone
from .service import Service
from .worker import Gone

log = logging.getLogger(__name__)

EVERY = 0.2                             # seconds between two lines of progress
SUCCESS = {"status": "success"}         # the last line


class Pull:
    """A model on its way, in a thread that hands lines to the event loop.
    leave() ends it at the next bytes that come."""

    def __init__(self, service: Service, name: str):
        self.service, self.name = service, name
        self._left, self._told = False, 0.0
        self._loop, self._lines = asyncio.get_running_loop(), asyncio.Queue[dict | BaseException]()
        service.pulling = self
        threading.Thread(target=self._work, name="pybmc-pull", daemon=True).start()

    async def lines(self) -> AsyncIterator[dict]:
        """A line a step, as Ollama writes them. Raises Gone, or the Refused that ended it."""
        yield {"status": "pulling manifest"}
        while (line := await self._lines.get()) != SUCCESS:
            if isinstance(line, BaseException):
                raise line
            yield line
        yield SUCCESS

    def leave(self) -> None:
        """The client has gone, or has its answer."""
        self.fail(Gone())

    def fail(self, error: BaseException) -> None:
        self._left = True
        self._lines.put_nowait(error)

    # ---- the thread

    def _work(self) -> None:
        try:
            transfer.pull(self.name, progress=self._note)
            end: dict | BaseException = SUCCESS
        except BmcError as error:
            end = Refused(404, "model_not_found", str(error), "model")
        except OSError as error:
            end = Refused(500, "internal", f"{self.name}: {error.strerror or type(error).__name__}")
        except Exception as error:
            log.error("the pull of %s failed", self.name, exc_info=error)
            end = Refused(500, "internal", "internal error")
        with suppress(RuntimeError):            # the loop is closed
            self._loop.call_soon_threadsafe(self._end, end)

    def _end(self, end: dict | BaseException) -> None:
        self.service.pulling = None
        self._lines.put_nowait(end)

    def _note(self, part: transfer.Remote, done: int) -> None:
        if self._left:
            raise transfer.HubError("nobody waits for it any more")
        if done < part.bytes and time.monotonic() - self._told < EVERY:
            return
        self._told = time.monotonic()
        digest = f"sha256:{part.sum}" if part.sum else part.file
        status = f"pulling {(part.sum or part.file)[:12]}"
        self._tell({"status": status, "digest": digest, "total": part.bytes, "completed": done})
        if done >= part.bytes and part.sum:
            self._tell({"status": "verifying sha256 digest"})

    def _tell(self, line: dict) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._lines.put_nowait, line)


async def pull(request: Request) -> Response:
    if not request.scope["pybmc.policy"].pull:
        raise Refused(403, "disabled", "/api/pull is disabled: --allow-pull allows it; "
                                       "on the command line pybmc pull NAME does it")
    service, fields = service_of(request), await fields_of(request)
    name, stream = hub_name(fields), fields.flag("stream", True)
    if service.closing:
        raise shutting_down()
    if service.pulling:
        why = f"{service.pulling.name} is being pulled; expected one model at a time"
        raise busy("queue_full", why, 5, 429)
    pulled = Pull(service, name)
    watcher = when_gone(request, pulled.leave)

    def close() -> None:
        watcher.cancel()
        pulled.leave()

    if stream:
        parts = (Lines.encode(line) async for line in pulled.lines())
        return Stream(Lines(), parts, close, {"Cache-Control": "no-store"})
    try:
        return Json([line async for line in pulled.lines()][-1])
    finally:
        close()


def hub_name(fields: Fields) -> str:
    """The model that is asked for; Ollama's clients may add a tag that the hub does not have."""
    if fields.flag("insecure"):
        raise unsupported("insecure")
    given = fields.text("model") or fields.text("name") or ""
    name = given.removesuffix(":latest")
    if names.parse(name) is None:
        raise wrong("model", f"is {given!r:.80}; "
                             "expected the name of a model on the hub, as in user/repo:Q4_K_M")
    return name
