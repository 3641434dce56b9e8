"""Put a pybmc server under stress: clients that leave at random points, then hostile ones;
does it stay as it was, and serve others?

\b
    python -m tools.serve_stress model.gguf
    python -m tools.serve_stress http://127.0.0.1:8080 --pid 1234
    python -m tools.serve_stress model.gguf --leave 1000 --hostile 100 --seconds 20 --seed 1

First --leave clients send a request and leave: in its headers, in its body, while it waits, is read or is
written, as a stream or not, by closing, resetting or half closing the connection. Then --hostile clients at a
time send, for --seconds, bodies that are slow, huge, deep or no UTF-8, half requests, wrong hosts, broken
chunks, pipelined garbage and more, while an honest client asks the same question again and again.

After each part nothing may wait or run, no rows may be held but those that are kept for other requests, and
the process may have no more files than before, and hardly more memory: --grown-mb, and after hostile clients
what their bodies may take at a time, 8 MB each. No answer may be a 500, and the honest client must have got
the same text each time. The exit status is 1 where one of these fails. Of a URL, the process is looked at
where --pid names it (Linux).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import click

from pybmc.cli.terminal import note

PATHS = {                               # of requests that write, and how each is asked for a length
    "/v1/chat/completions": lambda text, n: {"messages": [{"role": "user", "content": text}],
                                             "max_tokens": n},
    "/v1/completions": lambda text, n: {"prompt": text, "max_tokens": n},
    "/completion": lambda text, n: {"prompt": text, "n_predict": n},
}
WORDS = "the mill house river cat mouse winter night story grain wheel road friend door stone".split()
HONEST = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
ENOUGH = 16 << 20                       # bytes of a body that is too large
PATIENCE = 3.0                          # seconds that a hostile client waits for an answer
EXPECTED = {100, 200, 204, 400, 403, 404, 405, 408, 411, 413, 414, 422, 429, 431, 501, 503}
MEMORY = "32M"                          # of the server that is started here
MAX_BODY = 8 << 20                      # bytes that a hostile client's body may have


class State(NamedTuple):
    """Of a server's process: files, threads and resident bytes."""

    files: int
    threads: int
    resident: int


@dataclass
class Server:
    """Where it is, and its process where that can be looked at."""

    host: str
    port: int
    pid: int | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(asyncio.open_connection(self.host, self.port, limit=1 << 20), 30)

    async def ask(self, method: str, path: str, body: object = None,
                  seconds: float = 120) -> tuple[int, bytes]:
        """Status and body of an answer."""
        reader, writer = await self.connect()
        try:
            writer.write(request(path, body, method, "Connection: close\r\n"))
            data = await asyncio.wait_for(reader.read(-1), seconds)
        finally:
            writer.close()
        head, _, rest = data.partition(b"\r\n\r\n")
        return status_of(head), rest

    async def gauges(self) -> dict[str, float]:
        status, text = await self.ask("GET", "/metrics")
        if status != 200:
            raise click.ClickException(f"/metrics: expected status 200, found {status}")
        return {name: float(value)
                for name, value in re.findall(r"^(pybmc_\w+) (\S+)$", text.decode(), re.MULTILINE)}

    async def settled(self, seconds: float = 60) -> dict[str, float]:
        """The gauges, once nothing waits or runs, or when the time is over."""
        ends = time.monotonic() + seconds
        while True:
            gauges = await self.gauges()
            if not (gauges["pybmc_waiting"] or gauges["pybmc_running"]) or time.monotonic() > ends:
                return gauges
            await asyncio.sleep(0.05)

    def state(self) -> State | None:
        folder = Path(f"/proc/{self.pid}")
        if self.pid is None or not folder.is_dir():
            return None
        told = dict(re.findall(r"^(\w+):\s+(\d+)", (folder / "status").read_text(), re.MULTILINE))
        return State(len(list((folder / "fd").iterdir())), int(told["Threads"]), 1024 * int(told["VmRSS"]))


def request(path: str, body: object = None, method: str = "POST", more: str = "",
            host: str = "localhost") -> bytes:
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return (f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n"
            f"{more}\r\n".encode() + data)


def status_of(data: bytes) -> int:
    """0 where there is no answer."""
    found = re.match(rb"HTTP/1\.[01] (\d{3})", data)
    return int(found[1]) if found else 0


def reset(writer: asyncio.StreamWriter) -> None:
    """Close, so that the other end gets an error."""
    with suppress(OSError):             # it is closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                                   struct.pack("ii", 1, 0))
    writer.transport.abort()


# ---- clients that leave ------------------------------------------------------------------------------------


async def leave(server: Server, rng: random.Random) -> str:
    """Send a request and leave at some point; which one."""
    path = rng.choice(list(PATHS))
    text = " ".join(rng.choice(WORDS) for _ in range(rng.choice([3, 40, 200])))
    data = request(path, PATHS[path](text, rng.choice([0, 1, 20, 200])) | {"stream": rng.random() < 0.5})
    point = rng.choice(["headers", "body", "sent", "later", "begun", "far"])
    head = data.index(b"\r\n\r\n")
    cut = {"headers": rng.randrange(head), "body": rng.randrange(head + 4, len(data))}.get(point, len(data))
    reader, writer = await server.connect()
    try:
        writer.write(data[:cut])
        await writer.drain()
        if point == "later":
            await asyncio.sleep(rng.expovariate(20))
        if point in ("begun", "far"):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(1 if point == "begun" else rng.randrange(1, 4000)), 10)
        if rng.random() < 0.3:
            writer.write_eof()
            await asyncio.sleep(rng.random() * 0.02)
    except ConnectionError:
        pass
    finally:
        reset(writer) if rng.random() < 0.5 else writer.close()
    return point


async def leave_all(server: Server, n: int, at_once: int, rng: random.Random) -> Counter[str]:
    gate, points = asyncio.Semaphore(at_once), Counter[str]()

    async def one(seed: float) -> None:
        async with gate:
            points[await leave(server, random.Random(seed))] += 1

    await asyncio.gather(*(one(rng.random()) for _ in range(n)))
    return points


# ---- hostile clients ---------------------------------------------------------------------------------------

Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter, random.Random], Awaitable[None]]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


def sends(name: str, *pieces: bytes) -> None:
    """An attack that sends one of some pieces."""
    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
        writer.write(rng.choice(pieces))
        await writer.drain()

    ATTACKS[name] = send


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
sends("no utf-8", request("/v1/completions", b'{"prompt": "\xff\xfe\x80"}'),
      request("/api/chat", b"\xff" * 1000))
sends("deep json",
      *(request("/v1/completions", piece * 100_000) for piece in (b"[", b'{"a":', b'{"prompt":[[')))
sends("odd json", *(request("/v1/chat/completions", body) for body in (
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1e999}', b'{"seed": ' + b"9"
    * 100_000 + b"}", b"NaN", b"", b"null", b'{"messages": ' + b'[{"role": "user"},' * 5000 + b"null]}",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    json.dumps({"messages": [{"role": "user", "content": "a"}], "stop": ["a" * 10**6]}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "a"}],
                "logit_bias": {str(i): 1 for i in range(10**4)}}).encode())))
sends("long prompt", request("/v1/completions", {"prompt": "a " * 10**6, "max_tokens": 1}),
      request("/tokenize", {"content": "ab" * 10**6}))
sends("wrong host", *(request("/v1/completions", {"prompt": "a"}, host=host)
                      for host in ("evil.com", "", "a\tb", "localhost.evil.com")),
      b"GET /health HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n\r\n")
sends("half request", b"GET /heal", b"POST /v1/completions HTTP/1.1\r\nHost: loc",
      POST + b"Content-Length: 100\r\n\r\n{\"prompt\"", b"\r\n", b"")
sends("huge length", POST + b"Content-Length: 999999999999\r\n\r\n{", POST + b"Content-Length: -5\r\n\r\n{}",
      POST + b"Content-Length: x\r\n\r\n")
sends("bad chunks", *(POST + b"Transfer-Encoding: chunked\r\n\r\n" + piece for piece in (
    b"zz\r\n{}\r\n", b"-1\r\n", b"ffffffffffffffffffff\r\n{}", b"2\r\n{}x0\r\n\r\n", b"5\r\n{}\r\n")),
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n")
sends("garbage", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
      b"\0" * 5000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"a" * 70_000,
      b"GET /" + b"%00" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
sends("headers", b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
      b"GET /health HTTP/1.1\r\n" + b"X" * 60_000, request("/health", method="GET", more="X\0: y\r\n"),
      request("/v1/completions", {"prompt": "a"}, more="Expect: 100-continue\r\n"),
      request("/health", method="GET", more="Connection: Upgrade\r\nUpgrade: websocket\r\n"))
sends("pipelined", request("/health", method="GET") * 200, request("/health", method="GET")
      + b"garbage\r\n\r\n" * 100, (request("/v1/completions", HONEST | {"stream": True}) + b"\0") * 5)
sends("odd routes", *(request(path, {}, method) for method, path in (
    ("BREW", "/"), ("DELETE", "/v1/models/x"), ("PUT", "/api/blobs/sha256:0"), ("GET", "/../../etc/passwd"),
    ("OPTIONS", "*"), ("GET", "http://evil.com/"), ("POST", "/api/pull"), ("TRACE", "/health"),
    ("POST", "/api/show"), ("POST", "/detokenize"))))


@attack
async def slow_body(reader, writer, rng):
    writer.write(POST + b"Content-Length: 1000\r\n\r\n")
    for _ in range(rng.randrange(40)):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


@attack
async def slow_headers(reader, writer, rng):
    for letter in POST[:rng.randrange(40)]:
        writer.write(bytes([letter]))
        await writer.drain()
        await asyncio.sleep(0.05)


@attack
async def huge_body(reader, writer, rng):
    writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(ENOUGH >> 16):
        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await writer.drain()


@attack
async def half_closed(reader, writer, rng):
    writer.write(request("/v1/completions", HONEST | {"stream": rng.random() < 0.5}))
    writer.write_eof()


@attack
async def never_reads(reader, writer, rng):
    writer.transport.pause_reading()
    writer.write(request("/v1/completions", {"prompt": "a", "max_tokens": 300, "stream": True}))
    await asyncio.sleep(rng.random())


@dataclass
class Attacks:
    """Statuses of the answers by attack; 0: none."""

    statuses: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in ATTACKS})

    async def one(self, server: Server, rng: random.Random, name: str) -> None:
        reader, writer = await server.connect()
        data = b""
        try:
            with suppress(ConnectionError, asyncio.TimeoutError):
                await asyncio.wait_for(ATTACKS[name](reader, writer, rng), PATIENCE)
            with suppress(ConnectionError, asyncio.TimeoutError, RuntimeError):
                data = await asyncio.wait_for(reader.read(4096), rng.random() * PATIENCE)
        finally:
            reset(writer) if rng.random() < 0.5 else writer.close()
        self.statuses[name][status_of(data)] += 1

    async def run(self, server: Server, seconds: float, rng: random.Random) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            await self.one(server, rng, rng.choice(list(ATTACKS)))

    @property
    def total(self) -> Counter[int]:
        return sum(self.statuses.values(), Counter())

    def odd(self) -> list[str]:
        return [f"{name}: {n} answers of status {status}" for name, statuses in self.statuses.items()
                for status, n in statuses.items() if status and status not in EXPECTED]


async def ask_honestly(server: Server) -> str:
    """The answer, after another try where too many wait."""
    status, body = 429, b""
    while status == 429:
        status, body = await server.ask("POST", "/v1/completions", HONEST)
        await asyncio.sleep(0.2 * (status == 429))
    return json.loads(body)["choices"][0]["text"] if status == 200 else f"(status {status})"


async def honest(server: Server, hostile: asyncio.Future, times: list[float]) -> list[str]:
    """Answers to the same question, until the hostile clients have gone."""
    answers = []
    while not hostile.done():
        started = time.monotonic()
        answers.append(await ask_honestly(server))
        times.append(time.monotonic() - started)
        await asyncio.sleep(0.02)
    return answers


# ---- what must hold ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """What a process may have more afterwards."""

    bytes: int
    files: int = 2                      # the connection that asks, and one that closes
    threads: int = 3                    # of pools, which begin when they are needed


def grown(before: State | None, after: State | None, bounds: Bounds) -> list[str]:
    if before is None or after is None:
        return []
    most = State(before.files + bounds.files, before.threads + bounds.threads, before.resident + bounds.bytes)
    return [f"{name}: expected at most {allowed}, found {found}"
            for name, allowed, found in zip(State._fields, most, after) if found > allowed]


async def checked(server: Server, before: State | None, bounds: Bounds) -> tuple[list[str], State | None]:
    """What is wrong once all clients have gone; and the state then."""
    gauges = await server.settled()
    wrong = [f"{name}: expected 0, found {gauges[name]:g}" for name in ("pybmc_waiting", "pybmc_running")
             if gauges[name]]
    if gauges["pybmc_rows"] != gauges["pybmc_kept_rows"]:
        wrong.append(f"rows: expected those that are kept, {gauges['pybmc_kept_rows']:g}, found "
                     f"{gauges['pybmc_rows']:g}")
    ends = time.monotonic() + 20        # connections that are closed take a moment
    while (more := grown(before, server.state(), bounds)) and time.monotonic() < ends:
        await asyncio.sleep(0.1)
    return wrong + more, server.state()


async def stress(server: Server, n_leave: int, n_hostile: int, seconds: float, seed: int, bounds: Bounds,
                 tell=note) -> list[str]:
    """Both parts; what is wrong."""
    rng = random.Random(seed)
    warm = Attacks()                    # what grows once: pools, caches, kept rows
    await leave_all(server, min(n_leave, 200), 16, rng)
    await asyncio.gather(*(warm.one(server, random.Random(rng.random()), name) for name in ATTACKS
                           for _ in range(2)))
    truth = await ask_honestly(server)
    await server.settled()
    before = server.state()
    points = await leave_all(server, n_leave, 16, rng)
    wrong, after = await checked(server, before, bounds)
    tell(f"{sum(points.values())} clients left ({counted(points)}); {shown(before)} before, "
         f"{shown(after)} after")
    attacks, times = Attacks(), list[float]()
    hostile = asyncio.gather(*(attacks.run(server, seconds, random.Random(rng.random()))
                               for _ in range(n_hostile)))
    answers = await honest(server, hostile, times)
    await hostile
    more, last = await checked(server, after, replace(bounds, bytes=bounds.bytes + n_hostile * MAX_BODY))
    tell(f"{attacks.total.total()} attacks (statuses {counted(attacks.total)}); {shown(last)} after")
    tell(f"{len(answers)} honest answers meanwhile, in {statistics.median(times):.2f} s at the median, "
         f"{max(times):.2f} s at most")
    others = [answer for answer in [*answers, await ask_honestly(server)] if answer != truth]
    return wrong + more + attacks.odd() + [f"an honest answer: expected {truth!r:.60}, found {other!r:.60}"
                                           for other in others[:3]]


def counted(counts: Counter) -> str:
    return ", ".join(f"{name}: {n}" for name, n in sorted(counts.items()))


def shown(state: State | None) -> str:
    return (f"{state.files} files, {state.threads} threads, {state.resident / 1e6:.0f} MB" if state
            else "the process not looked at")


@contextmanager
def started(model: str, threads: int):
    """A server of a model, in a process of its own."""
    command = [sys.executable, "-m", "pybmc", "serve", model, "--json", "--port", "0", "--memory", MEMORY,
               "-t", str(threads)]
    log = tempfile.TemporaryFile("w+", errors="replace")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        if not line:
            raise click.ClickException(f"{' '.join(command[2:])} ended with status {process.wait()}")
        yield at(json.loads(line)["url"], process.pid)
        if process.poll() is not None:
            raise click.ClickException(f"the server ended with status {process.returncode}")
        log.seek(0)
        if told := re.search(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*|.*internal error.*", log.read(),
                             re.MULTILINE):
            raise click.ClickException(f"the server's log: {told[0]:.200}")
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def at(url: str, pid: int | None) -> Server:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise click.UsageError(f"expected http://HOST:PORT, found {url!r:.80}")
    return Server(parts.hostname, parts.port or 80, pid)


@click.command(help=__doc__)
@click.argument("target", metavar="MODEL|URL")
@click.option("--pid", type=int, help="The process of the server at the URL.")
@click.option("--leave", "n_leave", type=click.IntRange(0), default=1000, show_default=True, metavar="N",
              help="Clients that leave.")
@click.option("--hostile", "n_hostile", type=click.IntRange(1), default=100, show_default=True, metavar="N",
              help="Hostile clients at a time.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=20, show_default=True,
              help="How long they go on.")
@click.option("--grown-mb", type=click.IntRange(0), default=32, show_default=True,
              help="What the process may grow by in each part.")
@click.option("-t", "--threads", type=click.IntRange(1), default=2, show_default=True, metavar="N",
              help="Of the server started here.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(target, pid, n_leave, n_hostile, seconds, grown_mb, threads, seed):
    bounds = Bounds(grown_mb << 20)
    try:
        if "://" in target:
            wrong = asyncio.run(stress(at(target, pid), n_leave, n_hostile, seconds, seed, bounds))
        else:
            with started(target, threads) as server:
                wrong = asyncio.run(stress(server, n_leave, n_hostile, seconds, seed, bounds))
    except (OSError, asyncio.TimeoutError) as error:
        raise click.ClickException(f"{target}: {error or 'no answer'}") from None
    if wrong:
        raise click.ClickException("; ".join(wrong))
    click.echo("the server stayed as it was, and served the honest client")


if __name__ == "__main__":
    main()
