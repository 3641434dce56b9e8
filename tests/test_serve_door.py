"""Who may use the server: hosts, origins, keys, bodies, connections; while it loads;
and the page's headers."""

import base64
import hashlib
import json
import os
import shutil
import socket
import threading
from types import SimpleNamespace

import pytest
import tiny
from serving import Gate, Served, httpx, read_to, served, until

import pybmc
from pybmc.serve import app, http, run
from pybmc.serve.door import Policy, host_allowed, origin_allowed
from pybmc.serve.service import Service, Settings


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=500), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model):
    with served(model, Policy(hosts=["llm.example.org"], origins=["https://chat.example.org"],
                              max_body=5000)) as server:
        yield server


@pytest.fixture(scope="module")
def locked(model):
    with served(model, Policy(keys=["first-key", "second-key"])) as server:
        yield server


def error_of(response):
    return response.status_code, response.json()["error"]["type"], response.json()["error"]["code"]


@pytest.mark.parametrize("host, allowed", [
    ("localhost", True), ("localhost:8080", True), ("LOCALHOST", True), ("a.localhost:1", True),
    ("box.local", True), ("127.0.0.1:99", True), ("192.168.7.5", True), ("[::1]:8080", True),
    ("llm.example.org", True), ("llm.example.org:443", True), ("localhost.", True), ("example.org", False),
    ("llm.example.org.evil.com", False), ("evil-llm.example.org", False), ("localhost.evil.com", False),
    ("127.0.0.1.evil.com", False), ("xlocalhost", False), ("notlocal", False), ("[::1", False),
    ("1.2.3.4.5", False), ("0x7f.1", False),
])
def test_hosts(server, host, allowed):
    assert host_allowed(host, ["llm.example.org"]) == allowed
    if allowed:
        assert server.client.get("/health", headers={"host": host}).status_code == 200
    elif "[" not in host:
        assert (error_of(server.client.get("/health", headers={"host": host}))
                == (403, "permission_error", "host_not_allowed"))


def test_a_missing_host_is_400(server):
    for line in (b"GET /health HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1\r\nHost:\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(line)
            assert b" 400 " in connection.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize("origin, allowed", [
    ("http://localhost:3000", True), ("https://127.0.0.1", True), ("http://[::1]:5", True),
    ("http://a.localhost", True), ("http://192.168.7.5:8080", True), ("app://obsidian.md", True),
    ("tauri://localhost", True), ("vscode-webview://abc", True), ("https://chat.example.org", True),
    ("null", False), ("https://evil.com", False), ("http://localhost.evil.com", False),
    ("https://chat.example.org.evil.com", False), ("http://192.168.7.5:8081", False),
    ("http://192.168.7.6:8080", False), ("", False), ("file://", False), ("http://[", False),
    ("https://chat.example.org:444", False), ("javascript://localhost", False),
])
def test_origins(server, origin, allowed):
    assert origin_allowed(origin, "192.168.7.5:8080", ["https://chat.example.org"]) == allowed
    response = server.client.get("/health", headers={"host": "192.168.7.5:8080", "origin": origin})
    if allowed:
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == origin
        assert response.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in response.headers
    else:
        assert error_of(response) == (403, "permission_error", "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers


def test_requests_of_other_sites_are_refused_before_their_body_is_read(server):
    for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "https://evil.com"}):
        with server.connect() as connection:
            told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            connection.sendall("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                               f"{told}Content-Length: 100\r\n\r\n".encode())
            assert b"403" in connection.recv(4000).split(b"\r\n")[0]
    assert server.client.get("/health", headers={"sec-fetch-site": "same-origin"}).status_code == 200


def test_preflights_are_answered_for_trusted_origins(locked):
    asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, x-stainless-os",
             "access-control-request-private-network": "true"}
    response = locked.client.options("/v1/chat/completions", headers=asked)
    assert response.status_code == 204
    assert response.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert response.headers["access-control-allow-private-network"] == "true"
    refused = locked.client.options("/v1/chat/completions", headers=asked | {"origin": "https://evil.com"})
    assert refused.status_code == 403


@pytest.mark.parametrize("headers, allowed", [
    ({}, False), ({"authorization": "Bearer first-key"}, True),
    ({"authorization": "bearer second-key"}, True), ({"x-api-key": "first-key"}, True),
    ({"authorization": "Bearer first-ke"}, False), ({"authorization": "Basic first-key"}, False),
    ({"authorization": "Bearer"}, False), ({"x-api-key": ""}, False), ({"x-api-key": "é".encode()}, False),
])
def test_keys(locked, headers, allowed):
    for path in ("/v1/models", "/slots", "/metrics", "/api/tags", "/nowhere"):
        response = locked.client.get(path, headers=headers)
        if allowed:
            assert response.status_code != 401
        else:
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert (path.startswith("/api")
                    or error_of(response) == (401, "authentication_error", "invalid_api_key"))
    assert locked.client.get("/health").status_code == 200 == locked.client.get("/").status_code


def test_clients_are_keys_or_addresses(locked, server):
    seen = []
    for at, headers in ((locked, {"x-api-key": "second-key"}), (server, {})):
        submit = at.service.submit

        def note(requests, *more, submit=submit):
            seen.append(requests[0].client)
            return submit(requests, *more)

        at.service.submit = note
        at.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
        at.service.submit = submit
    assert seen == [1, "127.0.0.1"]


# ---- bodies and connections


def test_bodies_that_are_too_large_are_413(server):
    large = json.dumps({"prompt": "a" * 6000}).encode()
    assert (error_of(server.client.post("/v1/completions", content=large))
            == (413, "invalid_request_error", "body_too_large"))
    chunks = iter([large[:3000], large[3000:]])
    assert error_of(server.client.post("/v1/completions", content=chunks))[0] == 413
    with server.connect() as connection:            # what is announced is enough
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                           b"Content-Length: 99999999999\r\n\r\n")
        assert b"413" in connection.recv(4000).split(b"\r\n")[0]
    assert server.client.get("/health").status_code == 200


def test_bodies_that_are_too_slow_are_408(server, monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.1)
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                           b"Content-Length: 100\r\n\r\n{")
        told = read_to(connection, b"}}")
        assert b"408" in told.split(b"\r\n")[0] and b"body_too_slow" in told and b"timeout_error" in told


def test_headers_that_are_too_slow_close_the_connection(server, monkeypatch):
    monkeypatch.setattr(run, "BODY_SECONDS", 0.1)
    for begun in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"):
        with server.connect() as connection:
            connection.sendall(begun)
            assert connection.recv(100) == b""
    with server.connect() as connection:            # the second request of a connection
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in read_to(connection, b'{"status":"ok"}')
        connection.sendall(b"GET /heal")
        assert connection.recv(100) == b""


def raw(server, data, shut=False):
    """Status and body of the last answer to some bytes, of which there is nothing more."""
    with server.connect() as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        head, _, body = read_to(connection, b"\0").rpartition(b"\r\n\r\n")
    return int(head.rpartition(b"HTTP/1.1 ")[2][:3]), body


def asked(method, path, *headers, body=b"", version="1.1", host="localhost"):
    lines = [f"{method} {path} HTTP/{version}", *([f"Host: {host}"] if host else []),
             "Connection: close", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}"] if body
                       else lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("data, words", [
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000, "more than 32768 bytes"),
    (b"\x16\x03\x01\x02\r\n\r\n", "no HTTP/1.1"), (b"GET /health\r\n\r\n", "no HTTP/1.1"),
    (asked("POST", "/tokenize", "Content-Length: -5"), "no HTTP/1.1"),
    (asked("GET", "/health", "Host: other"), "no HTTP/1.1"),
    (asked("POST", "/tokenize", "Transfer-Encoding: chunked") + b"zz\r\n", "no HTTP/1.1"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2.0 is not served here"),
])
def test_what_is_no_http_is_an_error_as_others(server, data, words):
    status, body = raw(server, data)
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (400, "invalid_http") and words in error["message"]


BODY = b'{"content": "Once upon"}'


@pytest.mark.parametrize("data", [
    asked("POST", "/tokenize", body=BODY, version="1.0"),
    asked("POST", "/tokenize", body=BODY, version="1.0", host=""),
    asked("POST", "http://localhost/tokenize", body=BODY),
    asked("POST", "/tokenize", body=b"\xef\xbb\xbf" + BODY),
    asked("POST", "/tokenize", "Transfer-Encoding: chunked") + b"3\r\n" + BODY[:3] + b"\r\n15\r\n" + BODY[3:]
    + b"\r\n0\r\n\r\n",
    asked("POST", "/tokenize", "Content-Encoding: identity", body=BODY),
], ids=["1.0", "without host", "a whole URL", "a byte order mark", "chunks", "identity"])
def test_forms_of_requests(server, data):
    status, body = raw(server, data)
    assert status == 200
    assert json.loads(body) == {"tokens": server.service.tokenizer.encode("Once upon", bos=False)}


def test_origins_count_without_a_host(server):
    assert raw(server, asked("POST", "/tokenize", "Origin: https://evil.com", body=BODY, version="1.0",
                             host=""))[0] == 403


def test_a_body_that_is_compressed_is_415(server):
    response = server.client.post("/tokenize", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert error_of(response) == (415, "invalid_request_error", "unsupported_encoding")
    assert "'gzip'; expected none" in response.text


def test_a_client_that_waits_to_send_its_body_is_asked_for_it(server):
    for length, answer in ((len(BODY), b"100 Continue"), (99999999999, b"413")):
        with server.connect() as connection:
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                               b"Content-Length: %d\r\n\r\n" % length)
            assert answer in connection.recv(4000).split(b"\r\n")[0]
            if length == len(BODY):
                connection.sendall(BODY)
                assert b"200" in connection.recv(4000).split(b"\r\n")[0]


CHAT = json.dumps({"messages": [{"role": "user", "content": "Once"}], "max_tokens": 3, "seed": 1}).encode()


def test_a_client_that_closes_its_side_is_answered(server):
    """Whole and as a stream, also the second of two requests."""
    one = asked("POST", "/v1/chat/completions", body=CHAT).replace(b"Connection: close\r\n", b"")
    stream = asked("POST", "/v1/chat/completions", body=CHAT[:-1] + b', "stream": true}')
    right = json.loads(raw(server, one, shut=True)[1])["choices"][0]["message"]
    assert right == server.client.post("/v1/chat/completions", content=CHAT).json()["choices"][0]["message"]
    assert json.loads(raw(server, one + one, shut=True)[1])["choices"][0]["message"] == right
    with server.connect() as connection:
        connection.sendall(stream)
        connection.shutdown(socket.SHUT_WR)
        assert b"data: [DONE]" in read_to(connection, b"\0")


@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_closes_its_side_and_then_leaves_costs_nothing(model, monkeypatch, waits):
    """At once, or while it waits for its answer."""
    monkeypatch.setattr(run, "LOOKS", (0.005, 0.02))
    with served(model) as server:
        gate = Gate(server, 1)
        connection = server.begin("/v1/chat/completions", json.loads(CHAT) | {"max_tokens": 1000})
        until(lambda: server.engine.running)
        if waits:
            connection.shutdown(socket.SHUT_WR)
            assert b"100 Continue" in connection.recv(100)
            assert server.service.worker.runs
        connection.close()
        until(lambda: not server.service.worker.runs)
        gate.open()
        until(lambda: not server.engine.running)


def test_a_client_that_does_not_read_is_given_up(server, monkeypatch):
    monkeypatch.setattr(run, "STALLED", 0.05)
    data = asked("POST", "/tokenize",
                 body=json.dumps({"content": "a " * 20_000, "with_pieces": True}).encode())
    monkeypatch.setattr(server.server.config.app, "policy", Policy(max_body=1 << 20))
    connections = server.server.server_state.connections
    with socket.socket() as connection:
        before = set(connections)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        until(lambda: connections - before)
        accepted, = connections - before
        accepted.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.sendall(data)
        until(lambda: accepted not in connections)


def test_a_client_that_reads_slowly_is_not_given_up():
    """Only one of which all waits that waited before."""
    for waiting, ended in ((100, True), (99, False)):
        aborted, later = [], []
        loop = SimpleNamespace(call_later=lambda *args, later=later: later.append(args))
        transport = SimpleNamespace(get_write_buffer_size=lambda waiting=waiting: waiting,
                                    abort=lambda aborted=aborted: aborted.append(True))
        protocol = SimpleNamespace(_give_up=None, loop=loop, transport=transport)
        run.Protocol._give_up(protocol, 100)
        assert (bool(aborted), later) == (ended, [] if ended else [(run.STALLED, None, 99)])


def test_connections_beyond_the_most_are_503(server, monkeypatch):
    monkeypatch.setattr(run, "CONNECTIONS", 0)
    response = server.client.get("/health")
    assert error_of(response) == (503, "unavailable_error", "too_many_connections")
    assert response.headers["retry-after"] == "1"
    monkeypatch.undo()
    assert server.client.get("/health").status_code == 200


def test_a_file_that_is_written_to_is_not_gone_on_with(tmp_path):
    """One that takes its name, as a new download does, is no harm."""
    path = tmp_path / "m.gguf"
    shutil.copy(tiny.model("llama"), path)
    with pybmc.Model(path, threads=1) as model, served(model) as server:
        assert server.client.post("/v1/chat/completions", content=CHAT).status_code == 200
        shutil.copy(path, tmp_path / "new.gguf")
        os.replace(tmp_path / "new.gguf", path)
        assert server.client.post("/v1/chat/completions", content=CHAT).status_code == 200
        path.unlink()
        assert server.client.post("/v1/chat/completions", content=CHAT).status_code == 200
    shutil.copy(tiny.model("llama"), path)
    with pybmc.Model(path, threads=1) as model, served(model) as server:
        os.utime(path, (1, 1))
        for route, body in (("/v1/chat/completions", json.loads(CHAT)),
                            ("/v1/embeddings", {"input": "Once"})):
            response = server.post(route, body)
            assert error_of(response) == (503, "unavailable_error", "model_changed")
            assert str(tmp_path) not in response.text


def test_forwarded_headers_are_not_believed(locked):
    seen = []
    submit = locked.service.submit
    policy, locked.server.config.app.policy = locked.server.config.app.policy, Policy()
    locked.service.submit = lambda requests, *more: seen.append(requests[0].client) or submit(requests, *more)
    locked.post("/v1/completions", {"prompt": "a", "max_tokens": 1},
                headers={"x-forwarded-for": "1.2.3.4", "forwarded": "for=1.2.3.4"})
    locked.server.config.app.policy, locked.service.submit = policy, submit
    assert seen == ["127.0.0.1"]


def test_log_lines_are_escaped(server, caplog):
    caplog.set_level("INFO")
    server.client.get("/a%0Ab%1b[31m")
    until(lambda: r"GET /a\nb\x1b[31m 404" in caplog.text)          # it is written behind the answer
    assert "\x1b" not in caplog.text


def test_what_flags_disable_is_501(model, tmp_path):
    with served(model, Policy(slots=False, metrics=False), sessions=str(tmp_path)) as server:
        for path in ("/slots", "/metrics"):
            assert error_of(server.client.get(path)) == (501, "not_supported_error", "disabled")
        # concerns the list alone, as in llama-server
        assert server.post("/slots/0?action=erase").json() == {"id_slot": 0, "n_erased": 0}


# ---- loading


def test_while_the_model_loads_every_route_says_so(model):
    go = threading.Event()

    def load():
        go.wait(20)
        return Service(model, settings=Settings())

    server = Served(load)
    try:
        for method, path in (("GET", "/health"), ("GET", "/"), ("POST", "/v1/chat/completions"),
                             ("GET", "/nowhere")):
            response = server.client.request(method, path)
            assert error_of(response) == (503, "unavailable_error", "loading_model")
            assert response.headers["retry-after"] == "1"
        assert server.client.get("/api/tags").json() == {"error": "the model is being loaded"}
        assert server.client.get("/health", headers={"host": "evil.com"}).status_code == 403
        go.set()
        server.ready()
        assert server.client.get("/health").status_code == 200
    finally:
        go.set()
        server.close()


def test_a_model_that_does_not_load_ends_the_server():
    def load():
        raise pybmc.FormatError("no model at all")

    server = Served(load)
    server._thread.join(20)
    server.close()
    assert isinstance(server._error, pybmc.FormatError)


def test_a_port_that_is_taken_is_told(server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(OSError) as told:
        run.Place(port=port).bind()
    assert told.value.filename == f"127.0.0.1:{port}"


def test_a_unix_socket(model, tmp_path):
    place = run.Place(unix=str(tmp_path / "socket"))
    place.bind()[0].close()                         # of a server that has gone
    with served(model) as server:
        assert server.url.startswith("http://127.0.0.1:")
    again = run.Place(unix=str(tmp_path / "socket"))
    listening, = again.bind()
    listening.listen()
    assert again.url == f"unix:{tmp_path / 'socket'}"
    assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="in use"):
        run.Place(unix=str(tmp_path / "socket")).bind()
    listening.close()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="exists"):
        run.Place(unix=str(tmp_path / "file")).bind()
    assert (tmp_path / "file").read_text() == "mine"


# ---- the page


PAGE = "<!doctype html><style>p { color: red }</style><p>Hello</p><script>1 + 1</script>"


def test_the_page_has_hashes_of_what_is_in_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "PAGE", tmp_path / "page.html")
    (tmp_path / "page.html").write_text(PAGE)
    with served(model, Policy(keys=["k"])) as server:
        response = server.client.get("/", headers={"accept": "text/html,*/*"})
        assert response.text == PAGE and response.headers["content-type"].startswith("text/html")
        policy = response.headers["content-security-policy"]
        for part in ("1 + 1", "p { color: red }"):
            assert f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" in policy
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "connect-src 'self'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert server.client.get("/").text == "pybmc is running"
        for path in ("/page.html", "/../page.html", "/serve/page.html", "/%2e%2e/page.html"):
            assert server.client.get(path, headers={"x-api-key": "k"}).status_code == 404
    with served(model, page=False) as server:
        assert server.client.get("/", headers={"accept": "text/html"}).text == "pybmc is running"


def test_other_servers_can_run_the_application(model):
    """Whoever hosts the ASGI application: it opens the model, and closes it at the end of the lifespan."""
    import asyncio

    made = app.app(tiny.model("llama", n_ctx=500), threads=1, names=["mine"])

    async def use():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(made),
                                     base_url="http://localhost") as client:
            return await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})

    response = asyncio.run(use())
    assert response.status_code == 200 and response.json()["model"] == "mine"
    made.service.close()
    made.service.close()
    assert not made.service.worker._thread.is_alive()
