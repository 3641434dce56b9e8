"""A server's life: a socket, a model that loads while the socket answers already, signals, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import make_app
from .door import Door, Policy
from .http import BODY_SECONDS
from .service import Service

CONNECTIONS, KEEP_ALIVE, HEADER_BYTES = 256, 15, 32 << 10


@dataclass
class Place:
    """Where a server listens: a host and a port (0: a free one), or the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8080
    unix: str | None = None
    listener: socket.socket | None = field(default=None, repr=False)

    def bind(self) -> socket.socket:
        """Raises an OSError that names the place."""
        try:
            self.listener = self._bound()
        except OSError as error:
            place = str(self.unix or f"{self.host}:{self.port}")
            raise OSError(error.errno, error.strerror or str(error), place) from None
        return self.listener

    def _bound(self) -> socket.socket:
        if self.unix:
            return self._bound_path(self.unix)
        family, kind, proto, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        with _closing_on_error(found):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(CONNECTIONS)
        return found

    def _bound_path(self, path: str) -> socket.socket:
        """The path of a server that has gone is taken over; one of a server that answers is not."""
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _closing_on_error(found):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as other:
                other.connect(path)
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(os.lstat(path).st_mode):
                    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
                os.unlink(path)
            found.bind(path)
            os.chmod(path, 0o600)
        return found

    @property
    def url(self) -> str:
        if self.unix:
            return f"unix:{self.unix}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.listener.getsockname()[1] if self.listener else self.port}"


@contextlib.contextmanager
def _closing_on_error(found: socket.socket):
    try:
        yield
    except BaseException:
        found.close()
        raise


class Protocol(H11Protocol):
    """Closes connections whose headers take too long."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._stop()

    def connection_lost(self, exc) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(BODY_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """uvicorn's, which sleeps while nothing happens, and ends in two steps: answers get `grace` seconds, then an error."""

    def __init__(self, config: uvicorn.Config, door: Door, grace: float):
        super().__init__(config)
        self.door, self.grace, self.exit = door, grace, asyncio.Event()

    async def main_loop(self) -> None:
        await self.exit.wait()

    @contextlib.contextmanager
    def capture_signals(self):
        """The first signal ends the server in peace, the second one at once."""
        loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for sign in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sign, self.stop)
        try:
            yield
        finally:
            for sign in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(sign)

    def stop(self) -> None:
        """End the server; called again, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.exit.set()
        service = self.door.service
        if service is None:
            return
        service.closing = True
        if self.force_exit:
            service.stop()
        else:
            asyncio.get_running_loop().call_later(self.grace, service.stop)


async def serve(place: Place, policy: Policy, load: Callable[[], Service], ready: Callable[[Service], None],
                grace: float = 5.0, page: bool = True, started: Callable[[Server], None] = lambda server: None) -> None:
    """Serve until a signal comes. The socket, bound already, answers while load() runs in a thread; what load() raises
    ends the server and is raised. ready is called when the model can be used, started when there is a server."""
    door = make_app(policy, page=page)
    config = uvicorn.Config(
        door, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, date_header=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=KEEP_ALIVE,
        h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=int(grace) + 3)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    server = Server(config, door, grace)
    started(server)
    loading = asyncio.ensure_future(_in_thread(load))

    def loaded(task: asyncio.Future) -> None:
        if task.cancelled() or task.exception():
            server.stop()
        elif server.should_exit:
            task.result().close()
        else:
            door.service = task.result()
            ready(door.service)

    loading.add_done_callback(loaded)
    try:
        await server.serve(sockets=[place.listener or place.bind()])
    finally:
        if door.service is not None:
            door.service.close()
    if loading.done() and not loading.cancelled():
        loading.result()


async def _in_thread(function: Callable):
    """The result of a function in a thread that an early end does not wait for."""
    loop = asyncio.get_running_loop()
    result = loop.create_future()

    def settle(set_it, value) -> None:
        if not result.done():
            set_it(value)

    def work() -> None:
        try:
            value, set_it = function(), result.set_result
        except BaseException as error:
            value, set_it = error, result.set_exception
        with contextlib.suppress(RuntimeError):     # the loop is closed
            loop.call_soon_threadsafe(settle, set_it, value)

    threading.Thread(target=work, daemon=True, name="pybmc-load").start()
    return await result
