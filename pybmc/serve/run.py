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

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import make_app
from .door import Door, Policy
from .errors import Refused, openai_error
from .http import BODY_SECONDS, dump
from .service import Service
from .worker import fulfil

CONNECTIONS, KEEP_ALIVE, HEADER_BYTES = 256, 15, 32 << 10
STALLED = 60.0                          # seconds in which a client reads nothing, until it is given up
LOOKS = 0.005, 2.5                      # seconds between looks at a connection that may be closed: from, to


@dataclass
class Place:
    """Where a server listens: hosts, with commas between them, and a port (0: a free one),
    or the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8080
    unix: str | None = None
    listeners: list[socket.socket] = field(default_factory=list, repr=False)

    @property
    def hosts(self) -> list[str]:
        return [host.strip() for host in self.host.split(",")]

    def bind(self) -> list[socket.socket]:
        """Raises an OSError that names the place."""
        port = self.port
        for where in [self.unix] if self.unix else self.hosts:
            try:
                self.listeners.append(self._bound_path(self.unix) if self.unix else self._bound(where, port))
            except OSError as error:
                place = self.unix or f"{where}:{port}"
                for listener in self.listeners:
                    listener.close()
                raise OSError(error.errno, error.strerror or str(error), place) from None
            if not self.unix:
                port = self.listeners[0].getsockname()[1]       # all have the one that was free for the first
        return self.listeners

    def _bound(self, host: str, port: int) -> socket.socket:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        with _closing_on_error(found):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:           # several hosts: each has an address of its own
                found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, len(self.hosts) > 1)
            found.bind(address)
            found.listen(CONNECTIONS)
        return found

    def _bound_path(self, path: str) -> socket.socket:
        """The path of a server that has gone is taken over; one of a server that answers is not."""
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _closing_on_error(found):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                with socket.socket(socket.AF_UNIX) as other:
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
        host = f"[{self.hosts[0]}]" if ":" in self.hosts[0] else self.hosts[0]
        return f"http://{host}:{self.listeners[0].getsockname()[1] if self.listeners else self.port}"


@contextlib.contextmanager
def _closing_on_error(found: socket.socket):
    try:
        yield
    except BaseException:
        found.close()
        raise


class Protocol(H11Protocol):
    """Closes connections whose headers take too long, and those whose clients do not read. Answers clients
    that close their side of the connection behind a request, and writes errors as the routes do."""

    _timer: asyncio.TimerHandle | None = None           # until headers have to be there
    _look: asyncio.TimerHandle | None = None            # at a client that has closed its side
    _stall: asyncio.TimerHandle | None = None           # of one that does not read

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self.limit_concurrency, self._app, self.app = None, self.app, self._admit

    async def _admit(self, scope, receive, send) -> None:
        if max(len(self.connections), len(self.tasks)) > CONNECTIONS:
            scope = scope | {"pybmc.crowded": True}
        await self._app(scope, receive, send)

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
        for timer in filter(None, (self._look, self._stall)):
            timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        refused = Refused(400, "invalid_http",
                          f"the request is no HTTP/1.1, or its headers have more than {HEADER_BYTES} bytes")
        body = dump(openai_error(refused))
        headers = [("content-length", str(len(body))), ("content-type", "application/json"),
                   ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers, reason="Bad Request"),
                      h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    # ---- clients that close their side

    def eof_received(self) -> bool:         # type: ignore[override]  # asyncio looks at what it gives
        """Whether the connection stays open. One that is closed answers whatever is sent with a reset; a
        client that only says that nothing follows skips an interim answer, and waits for its own."""
        waits = self.cycle is not None and not self.cycle.more_body and not self.cycle.response_started
        if waits and self.scope["http_version"] == "1.1":
            self._probe()
        return self._look is not None

    def _probe(self) -> None:
        if not self.cycle.response_started:
            interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(interim))
        self._look_at(LOOKS[0])

    def _look_at(self, seconds: float) -> None:
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        elif seconds < LOOKS[1]:
            self._look = self.loop.call_later(seconds, self._look_at, 2 * seconds)
        else:
            self._look = self.loop.call_later(seconds, self._probe)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._look is not None and self.cycle.response_complete and not self.transport.is_closing():
            self.transport.close()

    # ---- clients that do not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALLED, self._give_up, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def _give_up(self, waited: int) -> None:
        """End a connection of which as many bytes wait as before."""
        waiting = self.transport.get_write_buffer_size()
        if waiting >= waited:
            self.transport.abort()
        else:
            self._stall = self.loop.call_later(STALLED, self._give_up, waiting)

    # ---- clients that are slow to ask

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(BODY_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """uvicorn's, which sleeps while nothing happens, and ends in two steps:
    answers get `grace` seconds, then an error."""

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
        signs = [sign for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                 if signal.getsignal(sign) != signal.SIG_IGN]
        for sign in signs:                      # nohup ignores SIGHUP, which a closed terminal sends
            loop.add_signal_handler(sign, self.stop)
        try:
            yield
        finally:
            for sign in signs:
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
                grace: float = 5.0, page: bool = True,
                started: Callable[[Server], None] = lambda server: None) -> None:
    """Serve until a signal comes. The socket, bound already, answers while load() runs in a thread;
    what load() raises ends the server and is raised. ready is called when the model can be used,
    started when there is a server."""
    door = make_app(policy, page=page)
    config = uvicorn.Config(
        door, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, date_header=False, timeout_keep_alive=KEEP_ALIVE,
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
        await server.serve(sockets=place.listeners or place.bind())
    finally:
        if door.service is not None:
            door.service.close()
    if loading.done() and not loading.cancelled():
        loading.result()


async def _in_thread(function: Callable):
    """The result of a function in a thread that an early end does not wait for."""
    result = asyncio.get_running_loop().create_future()
    threading.Thread(target=fulfil, args=(result, function), daemon=True, name="pybmc-load").start()
    return await result
