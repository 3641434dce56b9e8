"""A server on a loopback port, in a thread of the test's process."""

import asyncio
import contextlib
import functools
import json
import socket
import threading
import time

import pytest

httpx = pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("uvicorn", reason="needs pybmc[serve]")

from pybmc.serve import run  # noqa: E402
from pybmc.serve.door import Policy  # noqa: E402
from pybmc.serve.service import Service, Settings  # noqa: E402


class Served:
    """url, a client for it, and the service behind."""

    def __init__(self, load, policy=None, grace=0.2, page=True):
        self.place = run.Place(port=0)
        self.place.bind()
        self.url = self.place.url
        self.service = self._error = self.gate = None
        self._started, self._ready = threading.Event(), threading.Event()
        coroutine = run.serve(self.place, policy or Policy(), load, self._note, grace, page,
                              self._note_server)
        self._thread = threading.Thread(target=self._run, args=(coroutine,))
        self._thread.start()
        self._started.wait(10)
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def _run(self, coroutine):
        try:
            asyncio.run(coroutine)
        except Exception as error:
            self._error = error

    def _note(self, service):
        self.service = service
        self._ready.set()

    def _note_server(self, server):
        self.server, self.loop = server, asyncio.get_running_loop()
        self._started.set()

    @property
    def engine(self):
        return self.service.worker.engine

    def ready(self):
        assert self._ready.wait(30)
        return self

    def stop(self):
        self.loop.call_soon_threadsafe(self.server.stop)

    def close(self):
        self.client.close()
        if self.gate:
            self.gate.open()
        with contextlib.suppress(RuntimeError):
            self.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def post(self, path, body=None, **more):
        return self.client.post(path, json=body, **more)

    def connect(self):
        """A plain socket."""
        return socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=10)

    def begin(self, path, body):
        """Send a request by a plain socket, and read nothing."""
        data, connection = json.dumps(body).encode(), self.connect()
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
                           b"\r\n" % (path.encode(), len(data)) + data)
        return connection


@contextlib.contextmanager
def served(model, policy=None, draft=None, grace=0.2, page=True, **settings):
    server = Served(lambda: Service(model, draft, Settings(**settings)), policy, grace, page)
    try:
        yield server.ready()
    finally:
        server.close()


@contextlib.contextmanager
def served_by_name(load, *policy):
    """What gives the server of a name's model; started when it is first asked for.
    load: makes a model of a name."""
    with contextlib.ExitStack() as stack:
        @functools.cache
        def get(name):
            model = stack.enter_context(load(name))
            return stack.enter_context(served(model, *policy, names=["tiny"]))

        yield get


def events(response):
    """The data of a stream of events, [DONE] left out."""
    found = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(data) for data in found if data != "[DONE]"]


def read_to(connection, end):
    """What a plain socket gives, up to some bytes or its end."""
    data, part = b"", b"x"
    while part and not data.endswith(end):
        part = connection.recv(10_000)
        data += part
    return data


def until(condition, seconds=20):
    """Wait for what another thread will do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


class Gate:
    """Lets an engine make the first `steps` steps, then others one by one. open() lets all pass."""

    def __init__(self, server, steps=0):
        self.steps, self._step, self._free = 0, server.engine.step, threading.Semaphore(steps)
        self._open = False
        server.engine.step, server.gate = self.step, self

    def step(self):
        if not self._open:
            self._free.acquire()
        self.steps += 1
        return self._step()

    def allow(self, n=1):
        """Let n steps pass."""
        self._free.release(n)

    def let(self, n=1):
        """Let n steps pass, and wait until the last of them begins."""
        wanted = self.steps + n
        self.allow(n)
        until(lambda: self.steps >= wanted)

    def open(self):
        self._open = True
        self._free.release(100)
